"""What can go wrong through no fault of the code: each error is one sentence for the user."""

from collections.abc import Iterable
from difflib import get_close_matches
from typing import ClassVar

_MOST_SHOWN = 30


class PtqError(Exception):
    """Base of every error that the command line prints as one sentence, with its exit code."""

    exit_code: ClassVar[int] = 2

    def __str__(self) -> str:
        """On one line, whatever names from a file are in it."""
        return " ".join(super().__str__().splitlines())


class RecipeError(PtqError):
    """A recipe, or a `--set` on the command line, cannot be understood or carried out."""


class PluginError(PtqError):
    """A plugin is missing, broken, or breaks its contract with the core."""


class ModelError(PtqError):
    """A model cannot be read, traced or quantized."""


class DataError(PtqError):
    """Calibration or evaluation data cannot be used."""


class ArtifactError(PtqError):
    """An output folder cannot be written, or a saved artifact cannot be read."""


class ExportError(PtqError):
    """A result cannot be expressed in the asked-for format, or did not read back as written."""


class BugError(PtqError):
    """Code of a plugin failed, or did to a model what it must not: its author has to mend that."""

    exit_code = 1


class OutOfMemoryError(PtqError):
    """A run needs more memory than there is."""


class DistributedError(PtqError):
    """The processes of one run have lost each other, or have come to different results."""


class SweepError(PtqError):
    """The processes that runs of a sweep need cannot be had, or some of the runs did not succeed."""


def nearest(name: str, known: Iterable[str]) -> str:
    """`; did you mean 'x'?`, or what is known, where that is short."""
    names = sorted(known)
    close = get_close_matches(name, names, n=1, cutoff=0.6)
    if close:
        return f"; did you mean {close[0]!r}?"
    return f"; known: {', '.join(names)}" if 0 < len(names) <= _MOST_SHOWN else ""
