"""What a safetensors file says that it holds, checked before a tensor of it is made.

The format: 8 bytes with the length of a JSON header (little-endian), the header, the data. The header maps
names to `dtype`, `shape` and `data_offsets`, counted from the end of the header.
"""

import math
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

from ptqcore.reading import parse_json, plain_size

_MOST_HEADER = 100 * 2**20  # that of the reference implementation
_MOST_EMPTY = 2**20  # the longest side of a tensor without elements
_BITS = {
    "F4": 4,
    **dict.fromkeys(("BOOL", "U8", "I8", "F8_E4M3", "F8_E4M3FNUZ", "F8_E5M2", "F8_E5M2FNUZ", "F8_E8M0"), 8),
    **dict.fromkeys(("U16", "I16", "F16", "BF16"), 16),
    **dict.fromkeys(("U32", "I32", "F32"), 32),
    **dict.fromkeys(("U64", "I64", "F64", "C64"), 64),
}


@dataclass(frozen=True)
class StoredTensor:
    """A tensor in a file: its type as the header spells it, its shape, and where in the file it lies."""

    dtype: str
    shape: tuple[int, ...]
    start: int
    end: int

    @property
    def elements(self) -> int:
        """How many numbers it has."""
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        """How many bytes it has."""
        return self.end - self.start


def read_tensor_header(path: Path) -> dict[str, StoredTensor]:
    """The tensors of a safetensors file, by name; no memory is taken for what is only claimed.

    Raises:
        OSError: if it cannot be read.
        ValueError: if the header is none, or claims what the file cannot hold.
    """
    size = plain_size(path)
    with path.open("rb") as file:
        first = file.read(8)
        length = int.from_bytes(first, "little")
        if len(first) < 8 or length > min(size - 8, _MOST_HEADER):
            raise ValueError(f"its header has {length} bytes, in a file of {size}")
        header = parse_json(file.read(length).decode("utf-8"))
    if not isinstance(header, dict):
        raise ValueError("its header is no JSON object")
    header.pop("__metadata__", None)
    found = {name: _tensor(name, entry, 8 + length, size) for name, entry in header.items()}
    _check_apart(found)
    return found


def _tensor(name: str, entry: Any, base: int, size: int) -> StoredTensor:
    shape, offsets = _whole(entry, "shape"), _whole(entry, "data_offsets")
    dtype = entry.get("dtype") if isinstance(entry, dict) else None
    if shape is None or offsets is None or len(offsets) != 2 or not isinstance(dtype, str):
        raise ValueError(f"tensor {name!r} needs a dtype, a shape and two data_offsets of whole numbers")
    if dtype not in _BITS:
        raise ValueError(f"tensor {name!r} has the type {dtype!r}, which is none of {', '.join(_BITS)}")
    found = StoredTensor(dtype, shape, base + offsets[0], base + offsets[1])
    if not found.start <= found.end <= size:
        raise ValueError(f"tensor {name!r} lies at {list(offsets)}, outside of the file")
    needed = -(-found.elements * _BITS[dtype] // 8)
    if needed != found.nbytes:
        raise ValueError(
            f"tensor {name!r} of shape {list(shape)} needs {needed} bytes, but has {found.nbytes}"
        )
    if not found.elements and max(shape) > _MOST_EMPTY:
        raise ValueError(f"tensor {name!r} has the shape {list(shape)}, and no elements")
    return found


def _whole(entry: Any, key: str) -> tuple[int, ...] | None:
    """The list of whole numbers, none negative, under a key; None if it is anything else."""
    value = entry.get(key) if isinstance(entry, dict) else None
    if not isinstance(value, list) or not all(type(one) is int and 0 <= one < 2**63 for one in value):
        return None
    return tuple(value)


def _check_apart(tensors: dict[str, StoredTensor]) -> None:
    """Make sure that no two tensors share bytes."""
    order = sorted(tensors, key=lambda name: (tensors[name].start, tensors[name].end))
    for before, after in pairwise(order):
        if tensors[after].start < tensors[before].end:
            raise ValueError(f"tensors {before!r} and {after!r} share bytes")
