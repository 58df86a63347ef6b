"""Reads compressed-tensors files with numpy alone, from the definition of the format.

It shares no code with the export and none with torch: an error in the packing cannot cancel out.
"""

import math
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ptqcore import ExportError, QuantSpec, StoredTensor, read_tensor_header

Array = NDArray[Any]

# bfloat16 and FP8 have no numpy type: their bits are read, and `_decode` gives them their meaning.
_STORED_AS = {
    "F64": "<f8",
    "F32": "<f4",
    "F16": "<f2",
    "BF16": "<u2",
    "F8_E4M3": "u1",
    "I64": "<i8",
    "I32": "<i4",
    "I16": "<i2",
    "I8": "i1",
    "U8": "u1",
    "BOOL": "?",
}


class TensorFile:
    """A safetensors file, read tensor by tensor."""

    def __init__(self, path: Path) -> None:
        """Read the header.

        Raises:
            ExportError: if the file is missing or not a safetensors file.
        """
        try:
            self._path, self._entries = path, read_tensor_header(path)
        except (OSError, ValueError) as error:
            raise ExportError(f"{path} cannot be read back as a safetensors file: {error}") from error

    @property
    def names(self) -> set[str]:
        """Names of all tensors."""
        return set(self._entries)

    def dtype(self, name: str) -> str:
        """Type of a tensor as the header spells it, for example `BF16`."""
        return self._entry(name).dtype

    def numbers(self, name: str, shape: tuple[int, ...], rows: range | None = None) -> Array:
        """A tensor's numbers, all or some rows: floats as float32 (F64 as float64), integers as they are.

        Raises:
            ExportError: if it is missing or has another shape.
        """
        entry = self._entry(name)
        if entry.shape != shape:
            raise ExportError(f"tensor {name} has shape {list(entry.shape)} in the file, not {list(shape)}")
        kind = np.dtype(_STORED_AS[entry.dtype])
        start, count = entry.start, entry.nbytes // kind.itemsize
        if rows is not None:
            start += rows.start * math.prod(shape[1:]) * kind.itemsize
            shape = (len(rows), *shape[1:])
            count = math.prod(shape)
        stored = np.fromfile(self._path, kind, count, offset=start)
        return _decode(stored.reshape(shape), entry.dtype)

    def _entry(self, name: str) -> StoredTensor:
        if name not in self._entries:
            raise ExportError(f"tensor {name} is missing in the file")
        entry = self._entries[name]
        if entry.dtype not in _STORED_AS:
            raise ExportError(f"tensor {name} has type {entry.dtype}, which cannot be read back")
        return entry


def _decode(stored: Array, dtype: str) -> Array:
    if dtype == "BF16":
        return (stored.astype(np.uint32) << 16).view(np.float32)
    if dtype == "F8_E4M3":
        return e4m3_values()[stored]
    return stored.astype(np.float32) if dtype == "F16" else stored


def e4m3_values() -> Array:
    """The 256 values of FP8 e4m3, float32 [256]: 1 sign, 4 exponent (bias 7) and 3 mantissa bits.

    Exponent 0 is subnormal; there are no infinities; all ones but the sign is NaN.
    """
    code = np.arange(256)
    sign, exponent, mantissa = 1 - 2 * (code >> 7), (code >> 3) & 15, code & 7
    subnormal = mantissa / 8 * 2.0**-6
    normal = (1 + mantissa / 8) * 2.0 ** (exponent - 7)
    values = sign * np.where(exponent == 0, subnormal, normal)
    values[(code & 127) == 127] = np.nan
    return values.astype(np.float32)


def unpack_codes(words: Array, bits: int, n: int) -> Array:
    """Codes uint8 [rows, n] from int32 words [rows, ceil(n·bits/32)].

    A row is one stream of bits, least significant first: code j is bits [j·bits, (j+1)·bits).
    """
    stream = np.ascontiguousarray(words, dtype="<i4").view(np.uint8)
    single = np.unpackbits(stream, axis=1, count=n * bits, bitorder="little")
    return np.packbits(single.reshape(len(words), n, bits), axis=2, bitorder="little")[..., 0]


def whole(config: dict[str, Any], key: str, low: int, high: int) -> int:
    """The whole number under a key of config.json.

    Raises:
        ExportError: if there is none from `low` to `high`.
    """
    value = config.get(key)
    if type(value) is not int or not low <= value <= high:
        raise ExportError(f"config.json has {key} {value!r:.200}: it must be a number from {low} to {high}")
    return value


def round_to(values: Array, dtype: str) -> Array:
    """Float32 values rounded to the nearest (ties to even) of a float type of the header."""
    if dtype == "F16":
        return values.astype(np.float16).astype(np.float32)
    if dtype == "BF16":
        raw = values.astype(np.float32).view(np.uint32)
        return ((raw + 0x7FFF + ((raw >> 16) & 1)) & np.uint32(0xFFFF0000)).view(np.float32)
    return values


@dataclass(frozen=True)
class Grid:
    """What config.json says of the grid of a weight or an input, in its words."""

    type: str
    num_bits: int
    symmetric: bool
    strategy: str
    group_size: int | None
    dynamic: bool

    @classmethod
    def read(cls, arguments: dict[str, Any]) -> "Grid":
        """The grid that the arguments of a group describe.

        Raises:
            ExportError: if they lack something, or describe none.
        """
        if not isinstance(arguments, dict) or any(field.name not in arguments for field in fields(cls)):
            raise ExportError(f"config.json describes a grid by {arguments!r:.200}, which is not enough")
        size = arguments["group_size"]
        return cls(
            **{field.name: arguments[field.name] for field in fields(cls)}
            | {
                "num_bits": whole(arguments, "num_bits", 2, 8),
                "group_size": None if size is None else whole(arguments, "group_size", 1, 2**31),
            }
        )

    def describes(self, spec: QuantSpec) -> bool:
        """Whether it is that grid."""
        dtype = {"int": "int", "float": "e4m3"}[self.type]
        stated = (dtype, self.num_bits, self.symmetric, self.strategy, self.group_size, self.dynamic)
        return stated == (
            spec.dtype,
            spec.bits,
            spec.symmetric,
            spec.granularity,
            spec.group_size,
            spec.dynamic,
        )

    def groups(self, columns: int) -> int:
        """Scales in a row of that many columns."""
        return 1 if self.group_size is None else math.ceil(columns / self.group_size)

    @property
    def middle(self) -> int:
        """What an unsigned code is above the signed number, 2^(bits−1)."""
        return int(2 ** (self.num_bits - 1))


@dataclass(frozen=True)
class Layout:
    """How config.json says that a layer is stored."""

    format: str
    weights: Grid
    inputs: Grid | None

    @classmethod
    def find(cls, config: dict[str, Any], name: str) -> "Layout | None":
        """The layout of the linear layer `name` under a `quantization_config`; None if left alone."""
        if name in config["ignore"]:
            return None
        groups = list(config["config_groups"].values())
        for target in (name, "Linear"):
            for group in groups:
                if target in group["targets"]:
                    inputs = group["input_activations"]
                    return cls(
                        format=group.get("format") or config["format"],
                        weights=Grid.read(group["weights"]),
                        inputs=None if inputs is None else Grid.read(inputs),
                    )
        return None

    @property
    def packed(self) -> bool:
        """Whether the codes of the weight are packed into words."""
        return self.format == "pack-quantized"

    def tensors(self) -> set[str]:
        """Names, after the layer's, of the tensors that hold its weight and its input's grid."""
        names = {"weight_scale"} | ({"weight_packed", "weight_shape"} if self.packed else {"weight"})
        if not self.weights.symmetric:
            names.add("weight_zero_point")
        if self.inputs is not None and not self.inputs.dynamic:
            names |= {"input_scale"} if self.inputs.symmetric else {"input_scale", "input_zero_point"}
        return names


def read_weight(file: TensorFile, name: str, layout: Layout, shape: tuple[int, int]) -> Array:
    """Dequantized weight [out, in] of the layer `name`: (number − zero point) · scale.

    The product is rounded to the type of the scale, as every reader of the format does.

    Raises:
        ExportError: if a tensor is missing or has another shape.
    """
    out, columns = shape
    per_tensor, groups = layout.weights.strategy == "tensor", layout.weights.groups(columns)
    layout_shape = (1,) if per_tensor else (out, groups)
    scale_name = f"{name}.weight_scale"
    scale = file.numbers(scale_name, layout_shape)
    numbers = _weight_numbers(file, name, layout, shape).reshape(out, groups, -1)
    if not layout.weights.symmetric:
        numbers = numbers - _zero_points(file, name, layout, layout_shape).reshape(-1, groups)[..., None]
    values = numbers * scale.reshape(-1, groups)[..., None]
    return round_to(values.reshape(shape), file.dtype(scale_name))


def _weight_numbers(file: TensorFile, name: str, layout: Layout, shape: tuple[int, int]) -> Array:
    """Float32 [out, in] before the zero point and the scale."""
    if not layout.packed:
        return file.numbers(f"{name}.weight", shape).astype(np.float32)
    out, columns = shape
    stated = tuple(int(size) for size in file.numbers(f"{name}.weight_shape", (2,)))
    if stated != shape:
        raise ExportError(f"tensor {name}.weight_shape says {list(stated)}, not {list(shape)}")
    bits = layout.weights.num_bits
    words = file.numbers(f"{name}.weight_packed", (out, math.ceil(columns * bits / 32)))
    return unpack_codes(words, bits, columns).astype(np.float32) - layout.weights.middle


def _zero_points(file: TensorFile, name: str, layout: Layout, shape: tuple[int, ...]) -> Array:
    """Float32 in the layout of the scale; those of packed weights are packed along the rows, so that a
    column is one stream of bits, unless there is one for all."""
    key = f"{name}.weight_zero_point"
    if not layout.packed or layout.weights.strategy == "tensor":
        return file.numbers(key, shape).astype(np.float32)
    (out, groups), bits = shape, layout.weights.num_bits
    words = file.numbers(key, (math.ceil(out * bits / 32), groups))
    return unpack_codes(words.T, bits, out).T.astype(np.float32) - layout.weights.middle
