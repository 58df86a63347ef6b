"""Read `MatMulNBits` layers back from an ONNX file, by the operator's definition alone."""

from collections.abc import Mapping
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np

from ptqcore import ExportError, QuantLinear, one_sentence, read_onnx_graph


@dataclass(frozen=True)
class StoredLayer:
    """What a file says about a layer: codes [out, in], scales and zero points [out, groups], bias [out]."""

    codes: np.ndarray
    scale: np.ndarray
    zero_point: np.ndarray
    bias: np.ndarray | None

    @property
    def weight(self) -> np.ndarray:
        """(code − zero point) · scale, float32 [out, in]."""
        rows, groups = self.scale.shape
        numbers = self.codes.reshape(rows, groups, -1) - self.zero_point[..., None]
        return (numbers * self.scale[..., None]).astype(np.float32).reshape(self.codes.shape)


def unpack(packed: np.ndarray, bits: int, count: int) -> np.ndarray:
    """Whole numbers [rows, count] of bytes [rows, n], the first in the lowest bits."""
    shifts = np.arange(0, 8, bits, dtype=np.uint8)
    numbers = (packed[:, :, None] >> shifts) & np.uint8(2**bits - 1)
    return numbers.reshape(len(packed), -1)[:, :count]


def largest_difference(path: Path, layers: Mapping[str, QuantLinear]) -> float:
    """The largest absolute difference between layers in a file and the records they were made of: of
    weights, scales, zero points and biases. Zero only if all of these are the same.

    Raises:
        ExportError: if the file cannot be read, or a layer is missing or has another shape.
    """
    with one_sentence(f"{path} cannot be read back", ExportError):
        file = _File(path)
        return max((file.difference(name, layer) for name, layer in layers.items()), default=0.0)


def _stored_difference(stored: StoredLayer, layer: QuantLinear) -> float:
    record = layer.quantized_weight
    middle = np.full(stored.zero_point.shape, record.spec.middle)
    pairs = [
        (stored.codes, record.codes.numpy()),
        (stored.scale, record.scale.numpy()),
        (stored.zero_point, middle if record.zero_point is None else record.zero_point.numpy()),
        (stored.weight, record.dequantize().numpy()),
    ]
    if stored.bias is not None and layer.bias is not None:
        pairs.append((stored.bias, layer.bias.detach().numpy()))
    return max(_apart(found, ours) for found, ours in pairs)


def _apart(found: np.ndarray, ours: np.ndarray) -> float:
    apart = np.abs(found.astype(np.float64) - ours.astype(np.float64))
    return float(np.nan_to_num(apart, nan=np.inf).max(initial=0))


class _File:
    def __init__(self, path: Path) -> None:
        self.path, self._onnx = path, import_module("onnx")
        graph = read_onnx_graph(path)
        self.constants = {tensor.name: tensor for tensor in graph.initializer}
        self.products = [node for node in graph.node if node.op_type == "MatMulNBits"]
        self.sums = {name: node for node in graph.node if node.op_type == "Add" for name in node.input}

    def difference(self, name: str, layer: QuantLinear) -> float:
        """The largest difference to a layer over all its calls."""
        calls = [node for node in self.products if node.name.partition("#")[0] == name]
        if not calls:
            raise ExportError(f"layer {name} is missing in {self.path.name}")
        return max(_stored_difference(self._layer(node, name, layer), layer) for node in calls)

    def _layer(self, node: Any, name: str, layer: QuantLinear) -> StoredLayer:
        """What a node holds, checked against the shape of the layer it stands for."""
        says = {one.name: self._onnx.helper.get_attribute_value(one) for one in node.attribute}
        rows, columns, bits, block = (says[key] for key in ("N", "K", "bits", "block_size"))
        if (rows, columns) != (layer.out_features, layer.in_features):
            raise ExportError(
                f"layer {name} has the shape {[rows, columns]} in {self.path.name}, not "
                f"{[layer.out_features, layer.in_features]}"
            )
        if bits not in (2, 4, 8) or block < 1:
            raise ExportError(f"layer {name} has {bits} bits in blocks of {block} in {self.path.name}")
        groups = -(-columns // block)
        packed = self._array(node.input[1], (rows, groups, block * bits // 8))
        codes = unpack(packed.reshape(rows, -1), bits, columns)
        scale = self._array(node.input[2], (rows * groups,)).reshape(rows, groups)
        zero_point = np.full((rows, groups), 2 ** (bits - 1))
        if len(node.input) > 3 and node.input[3]:
            width = -(-groups * bits // 8)
            packed = self._array(node.input[3], (rows * width,))
            zero_point = unpack(packed.reshape(rows, width), bits, groups)
        bias = self._bias(node, rows)
        if (bias is None) != (layer.bias is None):
            raise ExportError(f"layer {name} has {'no' if bias is None else 'a'} bias in {self.path.name}")
        return StoredLayer(codes.astype(np.int16), scale, zero_point.astype(np.int16), bias)

    def _bias(self, node: Any, rows: int) -> np.ndarray | None:
        """The constant that is added to a product."""
        reader = self.sums.get(node.output[0])
        others = [] if reader is None else [name for name in reader.input if name in self.constants]
        return self._array(others[0], (rows,)) if others else None

    def _array(self, name: str, shape: tuple[int, ...]) -> np.ndarray:
        if name not in self.constants:
            raise ExportError(f"tensor {name} is missing in {self.path.name}")
        values: np.ndarray = self._onnx.numpy_helper.to_array(self.constants[name], str(self.path.parent))
        if values.shape != shape:
            raise ExportError(
                f"tensor {name} has the shape {list(values.shape)} in {self.path.name}, not {list(shape)}"
            )
        return values
