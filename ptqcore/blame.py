"""Whose code failed: what a plugin raises becomes one sentence that names it."""

from collections.abc import Iterator
from contextlib import contextmanager

from ptqcore.errors import BugError, PtqError


@contextmanager
def blaming(who: str, doing: str) -> Iterator[None]:
    """Turn whatever code of a plugin raises, other than a `PtqError`, into a `BugError`.

    Args:
        who: whose code it is, for example `step 'round' of plugin 'core'`.
        doing: what it was to do, as in `… failed in block 'head'`.

    Raises:
        BugError: with what was raised, as its cause.
    """
    try:
        yield
    except PtqError:
        raise
    except (Exception, SystemExit) as error:
        said = f"{type(error).__name__}: {error}".rstrip(": ")
        raise BugError(f"{who} failed {doing}: {said}") from error
