"""Tensors that outlive a loop: in memory up to a budget, memory-mapped files beyond it."""

import os
import weakref
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from torch import Tensor

from ptqcore.errors import ArtifactError


class Store:
    """Keeps tensors; what exceeds the budget lies in files that go with the tensors."""

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

    @property
    def in_files(self) -> bool:
        """Whether anything had to go into a file."""
        return self._count > 0

    def keep(self, tensor: Tensor) -> Tensor:
        """The tensor itself while the budget lasts, else a memory-mapped copy.

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
                self._folder = TemporaryDirectory(prefix="activations-", dir=self._parent)
            path = Path(self._folder.name) / f"{self._count}.bin"
            _reserve(path, size)
        except OSError as error:
            raise ArtifactError(
                f"cannot keep activations in {self._parent}: {error.strerror}; free some space there, or "
                "set the recipe key memory_gib to more"
            ) from error
        self._count += 1
        mapped = torch.from_file(str(path), shared=True, size=tensor.numel(), dtype=tensor.dtype)
        path.unlink()  # the mapping stays, and the space is free once the tensor is
        return mapped.view(tensor.shape).copy_(tensor)

    def _release(self, size: int) -> None:
        self._used -= size


def _reserve(path: Path, size: int) -> None:
    """Have the space on disk: to write into a mapping that has none would kill the process."""
    with open(path, "wb") as file:
        if hasattr(os, "posix_fallocate"):
            os.posix_fallocate(file.fileno(), 0, size)


def half_of_memory() -> int:
    """Half of the memory that is free now, in bytes (4 GiB where the system does not say)."""
    try:
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
    except OSError:
        return 4 * 2**30
    free = next((line.split()[1] for line in lines if line.startswith("MemAvailable")), "8388608")
    return int(free) * 1024 // 2
