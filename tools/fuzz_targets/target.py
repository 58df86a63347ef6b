"""What a target of the fuzzer is."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any


def _nothing(folder: Path) -> None:
    """A target without checksums has nothing to mend."""


@dataclass(frozen=True)
class Target:
    """A reader.

    name: on the command line.
    seed: writes a valid input into an empty folder.
    read: reads the input in a folder; it may raise nothing but PtqError.
    mend: makes a changed input consistent again where a checksum would give the change away.
    whole: whether the valid input is read to its end; a part of a large file is refused there.
    """

    name: str
    seed: Callable[[Path], None]
    read: Callable[[Path], Any]
    mend: Callable[[Path], None] = _nothing
    whole: bool = True
