"""States of what takes minutes to learn, written now and then, so that a killed run loses seconds of it."""

import json
import time
from collections.abc import Iterator
from itertools import count
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor

from ptqcore import distributed, files
from ptqcore.fingerprint import digest_of
from ptqcore.reading import plain_size
from ptqcore.tensor_header import read_tensor_header

SECONDS = 15.0  # between two writes
_START = "midway-"


class Midway:
    """Where the state of one problem lies, in one file with its digest."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._last = time.monotonic()

    def due(self) -> bool:
        """Whether the state is to be written again."""
        return time.monotonic() - self._last >= SECONDS

    def write(self, tensors: dict[str, Tensor], values: dict[str, Any]) -> None:
        """Write a state, in the place of an earlier one; of several processes the first alone does.

        Args:
            tensors: by name.
            values: whatever JSON can hold.

        Raises:
            ArtifactError: if it cannot be written.
        """
        if distributed.is_first():
            text = json.dumps(values)
            files.write_tensors(self._path, tensors, {"values": text, "digest": _digest(tensors, text)})
        self._last = time.monotonic()

    def read(self) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
        """The state that an earlier process has written; None if there is none, or it is damaged."""
        try:
            if not plain_size(self._path):
                return None
            read_tensor_header(self._path)
            with safe_open(self._path, "pt") as file:
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - no dict
                metadata = file.metadata()
            text = metadata["values"]
            if _digest(tensors, text) != metadata["digest"]:
                return None
            return tensors, json.loads(text)
        except (OSError, ValueError, KeyError, TypeError, SafetensorError):
            return None


def midways(folder: Path, block: int | None) -> Iterator[Midway]:
    """The places of the problems of a block, in the order in which they are solved; None: of those that
    are solved before the first block."""
    for number in count():
        yield Midway(folder / f"{_prefix(block)}{number:04d}.safetensors")


def forget(folder: Path, block: int) -> None:
    """Remove the states of a block that is finished."""
    for file in folder.glob(f"{_prefix(block)}*"):
        file.unlink()


def forget_all(folder: Path) -> None:
    """Remove all states."""
    for file in folder.glob(f"{_START}*"):
        file.unlink()


def _digest(tensors: dict[str, Tensor], text: str) -> str:
    return digest_of([dict(sorted(tensors.items())), text])


def _prefix(block: int | None) -> str:
    return f"{_START}before-" if block is None else f"{_START}{block:04d}-"
