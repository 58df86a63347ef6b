"""Tensors that outlive a loop: in memory up to a budget, in files beyond it."""

import weakref
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Self

from torch import Tensor

from ptqcore.errors import ArtifactError
from ptqcore.on_disk import OnDisk, Place
from ptqcore.tensor_file import tensor_bytes

ACTIVATIONS = "activations-"  # how the names of their folders begin


class Store:
    """Keeps tensors; what exceeds the budget lies in files, which go with the tensors or at the end."""

    def __init__(self, budget: int, folder: Path) -> None:
        """Args:
        budget: bytes kept in memory.
        folder: where files go; they are gone when the store is.
        """
        self._budget = budget
        self._parent = folder
        self._folder: TemporaryDirectory[str] | None = None
        self._used = 0
        self._count = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        """Remove all files."""
        if self._folder is not None:
            self._folder.cleanup()

    @property
    def in_files(self) -> bool:
        """Whether anything had to go into a file."""
        return self._count > 0

    def keep(self, tensor: Tensor) -> Tensor:
        """The tensor itself while the budget lasts, else one whose numbers lie in a file (`OnDisk`).

        Raises:
            ArtifactError: if the disk has no room for it.
        """
        size = tensor.nbytes
        if self._used + size <= self._budget or not size:
            self._used += size
            weakref.finalize(tensor, self._release, size)
            return tensor
        try:
            if self._folder is None:
                self._folder = TemporaryDirectory(prefix=ACTIVATIONS, dir=self._parent)
            path = Path(self._folder.name) / f"{self._count}.bin"
            path.write_bytes(tensor_bytes(tensor))
        except OSError as error:
            raise ArtifactError(
                f"cannot keep activations in {self._parent}: {error.strerror}; free some space there, or "
                "set the recipe key memory_gib to more"
            ) from error
        self._count += 1
        place = Place(path, 0, tensor.dtype, tuple(tensor.shape))
        weakref.finalize(place, path.unlink, missing_ok=True)
        return OnDisk(place)

    def _release(self, size: int) -> None:
        self._used -= size
