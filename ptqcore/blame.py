"""Whose code failed: what a plugin raises becomes one sentence that names it."""

from collections.abc import Iterator
from contextlib import contextmanager

from ptqcore.errors import BugError, OutOfMemoryError, PtqError

_NO_MEMORY = ("can't allocate memory", "out of memory")  # as the allocators of torch say it


@contextmanager
def blaming(who: str, doing: str) -> Iterator[None]:
    """Turn whatever code of a plugin raises, other than a `PtqError`, into a `BugError`.

    Args:
        who: whose code it is, for example `step 'round' of plugin 'core'`.
        doing: what it was to do, as in `… failed in block 'head'`.

    Raises:
        BugError: with what was raised, as its cause.
        OutOfMemoryError: if that was for want of memory.
    """
    try:
        with enough_memory(f"{who} {doing}"):
            yield
    except PtqError:
        raise
    except (Exception, SystemExit) as error:
        said = f"{type(error).__name__}: {error}".rstrip(": ")
        raise BugError(f"{who} failed {doing}: {said}") from error


@contextmanager
def enough_memory(doing: str) -> Iterator[None]:
    """Turn what is raised where memory is used up into one sentence.

    Args:
        doing: what was being done, as in `memory is used up: … could not go on`.

    Raises:
        OutOfMemoryError: naming it, and what helps.
    """
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if not isinstance(error, MemoryError) and not any(text in str(error) for text in _NO_MEMORY):
            raise
        raise OutOfMemoryError(
            f"memory is used up: {doing} could not go on; use fewer or shorter calibration samples or a "
            "smaller recipe key memory_gib, or give the run more memory, then run again with --resume"
        ) from error
