"""Read the layers of an exported file back with the `onnx` package alone, and compare them."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import numpy_helper
from torch import nn

from ptqcore.errors import ExportError
from ptqcore.export.feeding import LARGEST
from ptqcore.export.onnx_file import read_onnx_graph
from ptqcore.modules import QuantModule
from ptqcore.reading import one_sentence

_ROUNDING = 1e-6
_PRODUCTS = {"Conv", "ConvTranspose", "Gemm", "MatMul"}


def largest_difference(path: Path, model: nn.Module) -> float:
    """The largest absolute difference between the layers in the file and a model's.

    Biases in whole steps are compared to half a step.

    Raises:
        ExportError: if it cannot be read, or a layer is missing or has another shape.
    """
    layers = {name: layer for name, layer in model.named_modules() if isinstance(layer, QuantModule)}
    with one_sentence(f"{path} cannot be read back", ExportError):
        file = _File(path)
        return max((file.difference(name, layer) for name, layer in layers.items()), default=0.0)


def fixed_dimensions(path: Path, asked: Mapping[str, Mapping[int, str]]) -> list[str]:
    """Sentences on inputs that have no open dimension, or not all that were asked for, and on how large
    these may be."""
    with one_sentence(f"{path} cannot be read back", ExportError):
        model = onnx.load(str(path), load_external_data=False)
    sentences = [
        f"is known to be right for a {entry.key.removeprefix(LARGEST)} of at most {entry.value}"
        for entry in model.metadata_props
        if entry.key.startswith(LARGEST)
    ]
    for value in model.graph.input:
        name, sizes = value.name, value.type.tensor_type.shape.dim
        fixed = {place: size.dim_value for place, size in enumerate(sizes) if size.HasField("dim_value")}
        if sizes and len(fixed) == len(sizes):
            sentences.append(f"takes {name} in this shape only: {list(fixed.values())}")
            continue
        for place, meaning in asked.get(name, {}).items():
            if place in fixed:
                sentences.append(f"takes {name} with a {meaning} of {fixed[place]} only")
    return sentences


@dataclass(frozen=True)
class _Constant:
    """A constant of the file in floating point, and the step of each of its values (0: it has none)."""

    values: np.ndarray
    step: np.ndarray

    def map(self, change: Any) -> "_Constant":
        return _Constant(change(self.values), change(self.step))


class _File:
    def __init__(self, path: Path) -> None:
        self.path, graph = path, read_onnx_graph(path)
        self.nodes = list(graph.node)
        self.constants = {tensor.name: tensor for tensor in graph.initializer}
        self.producers = {name: node for node in self.nodes for name in node.output}
        self._constants: dict[str, bool] = {}

    def difference(self, name: str, layer: QuantModule) -> float:
        """The largest difference to a layer over all its calls."""
        calls = [
            node for node in self.nodes if node.op_type in _PRODUCTS and node.name.partition("#")[0] == name
        ]
        if not calls:
            raise ExportError(f"layer {name} is missing in {self.path.name}")
        return max(self._call_difference(name, node, layer) for node in calls)

    def _call_difference(self, name: str, node: Any, layer: QuantModule) -> float:
        weight, bias = self._constant(node.input[1]), self._bias(node)
        corrected = self._reader(node.output[0], f"{node.name}.minus_zero")
        if corrected is not None:
            self._check_sums(name, corrected, weight)
        if node.op_type == "MatMul" and len(layer.weight_shape) > 2:
            weight = _of_windows(weight, layer)
        elif node.op_type == "MatMul" or (node.op_type == "Gemm" and not _attribute(node, "transB", 0)):
            weight = weight.map(np.transpose)
        if node.op_type == "Conv" and hasattr(layer, "output_padding"):
            weight, bias = _folded(weight, layer), _folded_bias(bias, layer)
        pairs = [(weight, layer.weight)]
        if layer.bias is not None and bias is not None:
            pairs.append((bias, layer.bias))
        elif (layer.bias is None) != (bias is None):
            raise ExportError(f"layer {name} has {'no' if bias is None else 'a'} bias in {self.path.name}")
        largest = 0.0
        for stored, tensor in pairs:
            ours = tensor.detach().cpu().numpy()
            if stored.values.shape != ours.shape:
                raise ExportError(
                    f"layer {name} has the shape {list(stored.values.shape)} in {self.path.name}, not "
                    f"{list(ours.shape)}"
                )
            apart = np.abs(stored.values.astype(np.float32) - ours)
            if stored is bias:
                apart = np.maximum(apart - stored.step / 2, 0)
            largest = max(largest, float(np.nan_to_num(apart, nan=np.inf).max(initial=0)))
        return largest

    def _bias(self, node: Any) -> _Constant | None:
        if node.op_type != "MatMul":
            return self._constant(node.input[2]) if len(node.input) > 2 else None
        product = node.output[0]
        for step in ("minus_zero", "times_scale"):
            reader = self._reader(product, f"{node.name}.{step}")
            product = product if reader is None else reader.output[0]
        for reader in self.nodes:
            if reader.op_type == "Add" and product in reader.input:
                (other,) = (name for name in reader.input if name != product)
                if self._is_constant(other):
                    return self._constant(other)
        return None

    def _reader(self, value: str, name: str) -> Any:
        """The node of that name, if it reads a value."""
        return next((node for node in self.nodes if node.name == name and value in node.input), None)

    def _check_sums(self, name: str, corrected: Any, weight: _Constant) -> None:
        """Compare the sums of a layer's rows, by which its product is corrected, to its weight [in, out].

        Raises:
            ExportError: if they differ by more than rounding.
        """
        subtracted = self.producers[corrected.input[1]]
        (sums,) = (self._array(value) for value in subtracted.input if value in self.constants)
        off = np.abs(sums - weight.values.sum(0))
        if sums.shape != off.shape or bool((off > _ROUNDING * np.abs(weight.values).sum(0)).any()):
            raise ExportError(f"layer {name} is corrected by other sums than those of its weight")

    def _is_constant(self, name: str) -> bool:
        if name not in self._constants:
            maker = self.producers.get(name)
            known = name in self.constants if maker is None else all(map(self._is_constant, maker.input))
            self._constants[name] = known
        return self._constants[name]

    def _array(self, name: str) -> np.ndarray:
        if name not in self.constants:
            raise ExportError(f"tensor {name} is missing in {self.path.name}")
        return numpy_helper.to_array(self.constants[name], base_dir=str(self.path.parent))

    def _constant(self, name: str) -> _Constant:
        """What the nodes that make a constant make of it."""
        node = self.producers.get(name)
        if node is None:
            values = self._array(name)
            return _Constant(values, np.zeros_like(values))
        if node.op_type == "DequantizeLinear":
            return self._dequantized(node)
        before = self._constant(node.input[0])
        if node.op_type == "Reshape":
            return before.map(
                lambda x: np.broadcast_to(x, before.values.shape).reshape(self._array(node.input[1]))
            )
        if node.op_type == "Transpose":
            return before.map(lambda x: x.transpose(_attribute(node, "perm", None)))
        raise ExportError(f"{self.path.name} makes {name} by a {node.op_type}")

    def _dequantized(self, node: Any) -> _Constant:
        codes = self._array(node.input[0]).astype(np.float64)
        step = self._spread(self._array(node.input[1]).astype(np.float64), codes, node)
        if len(node.input) > 2:
            codes = codes - self._spread(self._array(node.input[2]).astype(np.float64), codes, node)
        return _Constant(codes * step, np.abs(np.broadcast_to(step, codes.shape)))

    def _spread(self, parameter: np.ndarray, codes: np.ndarray, node: Any) -> np.ndarray:
        """A scale or zero point per tensor, channel or block, for every code."""
        axis, block = _attribute(node, "axis", 1), _attribute(node, "block_size", 0)
        if parameter.ndim == 0:
            return parameter
        length = codes.shape[axis]
        fits = parameter.size in (1, length)
        if block:
            fits = parameter.shape[axis] == -(-length // block)
        if not fits:
            raise ExportError(
                f"{node.name} has parameters of shape {list(parameter.shape)} for codes of shape "
                f"{list(codes.shape)} in blocks of {block}"
            )
        if block:
            return parameter.repeat(min(block, length), axis).take(range(length), axis)
        shape = [1] * codes.ndim
        shape[axis] = -1
        return parameter.reshape(shape)


def _of_windows(rows: _Constant, layer: QuantModule) -> _Constant:
    """The weight [height · width · in, out] of windows as that of the convolution it stands for."""
    out, inputs, height, width = layer.weight_shape
    return rows.map(
        lambda x: (
            np.broadcast_to(x, rows.values.shape).reshape(height, width, inputs, out).transpose(3, 2, 0, 1)
        )
    )


def _folded(weight: _Constant, layer: QuantModule) -> _Constant:
    """The weight [out · taps, in/groups, 1, 1] as that of the transposed convolution it stands for."""
    rows, inputs, *kernel = layer.weight_shape
    groups: Any = layer.groups
    return weight.map(
        lambda x: (
            np.broadcast_to(x, weight.values.shape)
            .reshape(groups, rows // groups, *kernel, inputs)
            .transpose(0, 4, 1, 2, 3)
            .reshape(groups * inputs, rows // groups, *kernel)
        )
    )


def _folded_bias(bias: _Constant | None, layer: QuantModule) -> _Constant | None:
    """One bias of the taps of every channel, NaN where they differ."""
    if bias is None:
        return None
    taps = bias.map(lambda x: x.reshape(layer.weight_shape[0], -1))
    same = (taps.values == taps.values[:, :1]).all(1)
    return _Constant(np.where(same, taps.values[:, 0], np.nan), taps.step[:, 0])


def _attribute(node: Any, name: str, default: Any) -> Any:
    for attribute in node.attribute:
        if attribute.name == name:
            return onnx.helper.get_attribute_value(attribute)
    return default
