"""Tensors that stay in their file: read at each use, so that a model may be larger than memory."""

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import numpy
import torch
from torch import Tensor, nn
from torch.nn.functional import linear
from torch.utils._pytree import tree_map_only

from ptqcore.allocator import keep_no_freed_memory
from ptqcore.errors import ArtifactError, ModelError
from ptqcore.tensor_header import StoredTensor, read_tensor_header
from ptqcore.tensor_types import TYPES

SMALL = 2**13  # bytes that are not worth the reading
PIECE = 2**26  # bytes that are read at a time where more is not needed

_SAME = (torch.ops.aten.detach.default, torch.ops.aten.alias.default)
_ROWS = torch.ops.aten.embedding.default


@dataclass(frozen=True)
class Place:
    """Where the numbers of a tensor lie: a file, and where in it."""

    file: Path
    start: int
    dtype: torch.dtype
    shape: tuple[int, ...]

    def read(self) -> Tensor:
        """All of them.

        Raises:
            ArtifactError: if the file cannot be read any more.
        """
        return self._numbers(self.start, self.shape)

    def rows(self, first: int, count: int) -> Tensor:
        """Some of them: rows [count, …] in a row."""
        width = math.prod(self.shape[1:]) * self.dtype.itemsize
        return self._numbers(self.start + first * width, (count, *self.shape[1:]))

    def _numbers(self, start: int, shape: tuple[int, ...]) -> Tensor:
        numbers = torch.empty(shape, dtype=self.dtype)
        flat = numbers.as_strided((numbers.numel(),), (1,)).view(torch.uint8).numpy()
        try:
            with open(self.file, "rb", buffering=0) as file:
                file.seek(start)
                _fill(file.readinto, flat)
        except OSError as error:
            raise ArtifactError(f"{self.file} can no longer be read: {error}") from error
        return numbers


def _fill(read_into: Callable[[Any], int | None], target: numpy.ndarray[Any, Any]) -> None:
    view, done = target.data, 0
    while done < len(view):
        count = read_into(view[done:])
        if not count:
            raise OSError("it has become shorter")
        done += count


class OnDisk(Tensor):
    """A tensor on the CPU whose numbers lie in a file; every operation reads them anew.

    It has a shape and a type like any other and can be a parameter; whatever is computed from it is a plain
    tensor in memory. It cannot be written into, and has no `numpy()`: `load` and `in_memory` give tensors
    in memory in its place.
    """

    place: Place

    @staticmethod
    def __new__(cls, place: Place, dtype: torch.dtype | None = None) -> Self:
        """Args:
        place: where its numbers lie.
        dtype: what they are turned into when they are read; by default nothing.
        """
        made: Self = Tensor._make_wrapper_subclass(cls, place.shape, dtype=dtype or place.dtype)
        made.place = place
        return made

    def read(self) -> Tensor:
        """The numbers, in memory."""
        return self.place.read().to(self.dtype)

    def pieces(self) -> Iterator[Tensor]:
        """The numbers row by row in tensors of at most 64 MiB, or of one row."""
        rows, *others = self.shape or (1,)
        count = max(1, PIECE // max(1, math.prod(others) * self.dtype.itemsize))
        for first in range(0, rows, count):
            piece = self.place.rows(first, min(count, rows - first)) if self.shape else self.place.read()
            yield piece.to(self.dtype)

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Multiply by large matrices piece by piece."""
        kwargs = kwargs or {}
        if func is linear and not kwargs and isinstance(args[1], OnDisk) and args[1].nbytes > PIECE:
            x, weight, *bias = args
            made = torch.cat([linear(x, piece) for piece in weight.pieces()], -1)
            return made if not bias or bias[0] is None else made + bias[0]
        with torch._C.DisableTorchFunctionSubclass():
            return func(*args, **kwargs)

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if func in _SAME:
            return cls(args[0].place, args[0].dtype)
        if func is _ROWS and isinstance(args[0], OnDisk):
            return args[0]._looked_up(args[1])
        _refuse_writing(func, args, kwargs)
        args, kwargs = tree_map_only(OnDisk, OnDisk.read, (args, kwargs))
        return func(*args, **kwargs)

    def _looked_up(self, numbers: Tensor) -> Tensor:
        """Rows [..., width] of this matrix, by numbers [...]; only they are read."""
        wanted, places = torch.unique(numbers, return_inverse=True)
        rows = [self.place.rows(row, 1) for row in wanted.tolist()]
        found = torch.cat(rows) if rows else self.place.rows(0, 0)
        return found.to(self.dtype)[places]

    def __repr__(self, **_: Any) -> str:  # type: ignore[override]
        return f"OnDisk({list(self.shape)}, {self.dtype}, {self.place.file.name})"

    def __deepcopy__(self, _: Any) -> Self:
        return self  # nobody can write into it


def _refuse_writing(func: Any, args: Any, kwargs: Mapping[str, Any]) -> None:
    for index, argument in enumerate(func._schema.arguments):
        given = args[index] if index < len(args) else kwargs.get(argument.name)
        alias = argument.alias_info
        if alias is not None and alias.is_write and isinstance(given, OnDisk):
            raise ModelError(
                f"{func} would write into a weight that lies on disk ({given.place.file}): a step that "
                "changes weights outside of the block at hand needs the whole model in memory; leave it "
                "out, or have the task load the model whole"
            )


def storage_of(tensor: Tensor) -> Any:
    """Where its numbers begin, in memory or on disk: the same for tensors of one shape that share them."""
    return tensor.place if isinstance(tensor, OnDisk) else tensor.data_ptr()


def tensors_on_disk(file: Path) -> dict[str, Tensor]:
    """The tensors of a safetensors file by name: small ones in memory, the others on disk.

    Raises:
        OSError: if it cannot be read.
        ValueError: if it is damaged, or has a type that torch has not.
    """
    file = file.absolute()
    return {name: _tensor(file, name, stored) for name, stored in read_tensor_header(file).items()}


def pieces(tensor: Tensor) -> Iterator[Tensor]:
    """A tensor in parts along its first dimension, in order: at most 64 MiB of one that lies on disk are in
    memory at a time; any other is one part."""
    return tensor.pieces() if isinstance(tensor, OnDisk) else iter([tensor])


def in_memory(tensor: Tensor) -> Tensor:
    """The tensor itself, or one read from disk."""
    return tensor.read() if isinstance(tensor, OnDisk) else tensor


def as_type(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """A tensor turned into another type; one on disk is turned into it whenever it is read."""
    return OnDisk(tensor.place, dtype) if isinstance(tensor, OnDisk) else tensor.to(dtype)


def _tensor(file: Path, name: str, stored: StoredTensor) -> Tensor:
    if stored.dtype not in TYPES:
        raise ValueError(f"tensor {name!r} has the type {stored.dtype!r}, which none can compute with")
    place = Place(file, stored.start, TYPES[stored.dtype], stored.shape)
    return place.read() if stored.nbytes <= SMALL else OnDisk(place)


def is_on_disk(model: nn.Module) -> bool:
    """Whether some of a model's tensors lie on disk."""
    return any(isinstance(tensor, OnDisk) for tensor in (*model.parameters(), *model.buffers()))


def load(module: nn.Module) -> None:
    """Read all tensors of a module that lie on disk; those that are one tensor stay one."""
    known: dict[int, Tensor] = {}
    for part in module.modules():
        tables: tuple[dict[str, Any], ...] = (part._parameters, part._buffers)
        for table in tables:
            for name, tensor in table.items():
                if isinstance(tensor, OnDisk):
                    if id(tensor) not in known:
                        read, is_parameter = tensor.read(), isinstance(tensor, nn.Parameter)
                        known[id(tensor)] = nn.Parameter(read, False) if is_parameter else read
                    table[name] = known[id(tensor)]


@contextmanager
def without_memory() -> Iterator[None]:
    """Modules made here have their parameters on the meta device: shapes, and no numbers.

    Where this is needed, memory is short: from here on what is freed is given back at once.
    """
    keep_no_freed_memory()
    register = nn.Module.register_parameter

    def without(module: nn.Module, name: str, parameter: nn.Parameter | None) -> None:
        if parameter is not None and not parameter.is_meta:
            parameter = nn.Parameter(parameter.to("meta"), requires_grad=parameter.requires_grad)
        register(module, name, parameter)

    nn.Module.register_parameter = without  # type: ignore[method-assign, assignment]
    try:
        yield
    finally:
        nn.Module.register_parameter = register  # type: ignore[method-assign]
