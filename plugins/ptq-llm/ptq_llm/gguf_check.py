"""What a GGUF file says that it holds, checked before a library reads it.

The format: "GGUF", the version, the numbers of tensors and of keys; then keys with values, tensors with
their sides, type and place; then, aligned, the data. All numbers are little-endian.
"""

import math
import mmap
import struct
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import gguf

_SCALARS = dict(zip((0, 1, 2, 3, 4, 5, 6, 7, 10, 11, 12), "BbHhIifBQqd", strict=True))
_STRING, _ARRAY = 8, 9
_VERSIONS = (2, 3)
_MOST_SIDES = 4
_DEEPEST = 4
_ALIGNMENT = "general.alignment"


@dataclass(frozen=True)
class Contents:
    """numbers: single whole and floating-point values by key. tensors: their names and sides. size: bytes
    of the file."""

    numbers: dict[str, float]
    tensors: dict[str, tuple[int, ...]]
    size: int


def check_gguf(path: Path) -> Contents:
    """What a file holds.

    Raises:
        OSError: if it cannot be read.
        ValueError: if it is no GGUF file, or claims more than it holds.
    """
    with path.open("rb") as file:
        try:
            data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        except ValueError:
            raise ValueError("it is empty") from None
        with data:
            return _Reader(data).contents()


class _Reader:
    def __init__(self, data: mmap.mmap) -> None:
        self._data, self._at, self._size = data, 0, len(data)

    def contents(self) -> Contents:
        magic, version, tensors, keys = self._next("<4sIQQ")
        if magic != b"GGUF" or version not in _VERSIONS:
            raise ValueError("it does not begin as GGUF files of version 2 or 3 do")
        numbers: dict[str, float] = {}
        known = set()
        for _ in range(keys):
            key = self._text()
            if key in known:
                raise ValueError(f"it has the key {key!r} twice")
            known.add(key)
            value = self._value(self._next("<I")[0])
            if value is not None:
                numbers[key] = value
        infos = [self._tensor() for _ in range(tensors)]
        self._check_places(infos, int(numbers.get(_ALIGNMENT, 32)))
        return Contents(numbers, {name: sides for name, sides, _, _ in infos}, self._size)

    def _next(self, layout: str) -> tuple:
        end = self._at + struct.calcsize(layout)
        if end > self._size:
            raise ValueError("it ends in the middle of its header")
        found = struct.unpack_from(layout, self._data, self._at)
        self._at = end
        return found

    def _skip(self, count: int) -> None:
        if count > self._size - self._at:
            raise ValueError(f"something in its header has {count} bytes, more than are left")
        self._at += count

    def _text(self) -> str:
        (length,) = self._next("<Q")
        start = self._at
        self._skip(length)
        return self._data[start : self._at].decode("utf-8")

    def _value(self, kind: int, depth: int = 0) -> float | None:
        """The value if it is a number; others are passed over."""
        if kind in _SCALARS:
            number: float = self._next("<" + _SCALARS[kind])[0]
            return number
        if kind == _STRING:
            self._skip(self._next("<Q")[0])
        elif kind == _ARRAY and depth < _DEEPEST:
            inner, length = self._next("<IQ")
            if inner in _SCALARS:
                self._skip(length * struct.calcsize("<" + _SCALARS[inner]))
            else:
                for _ in range(length):
                    self._value(inner, depth + 1)
        else:
            raise ValueError(f"it has a value of the type {kind}, which is not known or nested too deeply")
        return None

    def _tensor(self) -> tuple[str, tuple[int, ...], int, int]:
        """Name, sides, bytes and place of a tensor."""
        name = self._text()
        (count,) = self._next("<I")
        if not 1 <= count <= _MOST_SIDES:
            raise ValueError(f"tensor {name!r} has {count} sides")
        sides = self._next(f"<{count}Q")
        kind, place = self._next("<IQ")
        try:
            block, size = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType(kind)]
        except (ValueError, KeyError):
            raise ValueError(f"tensor {name!r} has the type {kind}, which is not known") from None
        if sides[0] % block or not all(sides):
            raise ValueError(f"tensor {name!r} of sides {list(sides)} does not fill blocks of {block}")
        return name, sides, math.prod(sides) // block * size, place

    def _check_places(self, infos: list[tuple[str, tuple[int, ...], int, int]], alignment: int) -> None:
        if alignment < 1 or alignment & (alignment - 1):
            raise ValueError(f"its {_ALIGNMENT} is {alignment}, which is no power of two")
        start = -(-self._at // alignment) * alignment
        if len({name for name, _, _, _ in infos}) < len(infos):
            raise ValueError("it has two tensors of one name")
        for name, sides, size, place in infos:
            if start + place + size > self._size:
                raise ValueError(
                    f"tensor {name!r} of sides {list(sides)} has {size} bytes from {place} on, which lie "
                    "outside of the file"
                )
        for before, after in pairwise(sorted(infos, key=lambda info: info[3])):
            if before[3] + before[2] > after[3]:
                raise ValueError(f"tensors {before[0]!r} and {after[0]!r} share bytes")
