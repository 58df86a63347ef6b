"""Quantized layers in the file: codes of weights and biases behind DequantizeLinear.

A layer whose input is quantized keeps its weight as signed 8-bit codes, one scale a channel, whatever
its bits, and its bias as 32-bit codes in units of input scale times weight scale: what engines compute
with. A linear layer with a float input keeps a weight [in, out] of 4 or 8 bits, in groups if it has
them: what engines unpack in their kernels for compressed weights.
"""

import math
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from ptqcore.errors import ExportError
from ptqcore.export.onnx_activations import Grid
from ptqcore.export.onnx_edit import Editor, attribute, only_reader, source
from ptqcore.export.onnx_trace import Parameter
from ptqcore.modules import QuantConvTranspose2d, QuantModule

_LARGEST_BIAS = 2**31 - 1


@dataclass
class _Call:
    """One call of a layer in the graph: its product node and the grid of its input, if it has one."""

    name: str
    layer: QuantModule
    weight: ir.Node
    product: ir.Node
    grid: Grid | None
    bias: ir.Node | None = None


def place_layers(
    editor: Editor,
    weights: Mapping[str, Parameter],
    biases: Mapping[str, Parameter],
    grids: Mapping[ir.Value, Grid],
) -> None:
    """Replace the marks of all weights and biases."""
    calls: dict[tuple[str, str], list[_Call]] = defaultdict(list)
    by_site = {}
    for node in editor.nodes("Mark"):
        key = attribute(node, "key", "")
        if key in weights:
            call = _call(node, weights[key], grids)
            by_site[weights[key].site] = call
            calls[weights[key].site.owner, call.product.op_type].append(call)
        elif key in biases:
            by_site[biases[key].site].bias = node
    for (path, kind), of_layer in calls.items():
        layer = of_layer[0].layer
        stored = _Stored(editor, path, layer, kind == "Conv" and isinstance(layer, QuantConvTranspose2d))
        for call in of_layer:
            stored.place(call)
    editor.tidy()


def _call(mark: ir.Node, one: Parameter, grids: Mapping[ir.Value, Grid]) -> _Call:
    product = only_reader(mark.outputs[0])
    if product is not None and product.op_type == "Transpose":
        product = only_reader(product.outputs[0])
    if product is None or product.op_type not in ("Conv", "ConvTranspose", "Gemm", "MatMul"):
        raise ExportError(f"export onnx-qdq: layer {one.site.owner} is written in a form that is not known")
    value = product.inputs[0]
    padding = source(value, "Pad")
    if value not in grids and padding is not None:
        value = padding.inputs[0]
    name = one.site.owner + (f"#{one.site.call}" if one.site.call else "")
    product.name = name
    return _Call(name, one.layer, mark, product, None if value is None else grids.get(value))


class _Stored:
    """The constants of one layer, shared by its calls; `unfolded`: as `unfold_upsampling` left it."""

    def __init__(self, editor: Editor, path: str, layer: QuantModule, unfolded: bool) -> None:
        self.editor, self.path, self.layer = editor, path, layer
        record = self.layer.quantized_weight
        rows = record.shape[0]
        codes = record.codes.cpu().numpy().astype(np.int16).reshape(rows, -1)
        self.spec = record.spec
        self.zero_point: np.ndarray | None = None
        if record.zero_point is not None:
            # Both counted from the middle of the grid.
            self.zero_point = record.zero_point.cpu().numpy().astype(np.int16) - self.spec.middle
        self.codes = codes - self.spec.middle
        scale = record.scale.detach().cpu().numpy().astype(np.float32)
        self.scale = scale if self.spec.granularity == "group" else np.broadcast_to(scale.reshape(-1), rows)
        if self.zero_point is not None and self.spec.granularity != "group":
            self.zero_point = np.broadcast_to(self.zero_point.reshape(-1), rows)

        self.taps = 1
        if unfolded:
            self._unfold()

    def _unfold(self) -> None:
        """Every tap of the kernel as an output channel of its own: [out · taps, in]."""
        rows, inputs, *kernel = self.layer.weight_shape
        self.taps = math.prod(kernel)
        codes = self.codes.reshape(rows, inputs, self.taps).swapaxes(1, 2)
        self.codes, self.scale = codes.reshape(-1, inputs), self.scale.repeat(self.taps)
        if self.zero_point is not None:
            self.zero_point = self.zero_point.repeat(self.taps)

    def place(self, call: _Call) -> None:
        """Put the constants into one call."""
        linear = call.product.op_type in ("Gemm", "MatMul")
        if linear and call.grid is None:
            self._compressed(call)
        elif call.product.op_type == "MatMul":
            self._flattened(call)
        else:
            weight = self._rows("weight", self.codes) if linear else self._convolution()
            call.product.replace_input_with(1, weight)
            if call.bias is not None:
                call.product.replace_input_with(2, self._bias(call))

    def _rows(self, name: str, codes: np.ndarray, axis: int = 0) -> ir.Value:
        """Codes with one scale for each index of `axis`."""
        zeros = np.zeros(len(self.scale), np.int16)  # ONNX Runtime knows Gemm by a zero point that is there
        zero_point = zeros if self.zero_point is None else self.zero_point
        return self._dequantize(name, codes, self.scale, zero_point, {"axis": axis})

    def _dequantize(
        self,
        name: str,
        codes: np.ndarray,
        scale: np.ndarray,
        zero_point: np.ndarray | None,
        attributes: dict[str, int],
        dtype: ir.DataType = ir.DataType.INT8,
    ) -> ir.Value:
        editor, path = self.editor, f"{self.path}.{name}"
        known = editor.made(f"{path}.dequantize")
        if known is not None:
            return known
        inputs = [editor.codes(f"{path}.codes", codes, dtype), editor.constant(f"{path}.scale", scale)]
        if zero_point is not None:
            inputs.append(editor.codes(f"{path}.zero_point", zero_point, dtype))
        return editor.add("DequantizeLinear", inputs, f"{path}.dequantize", **attributes)

    def _convolution(self) -> ir.Value:
        """The weight of a convolution; of a transposed one as [in, out/groups, …]."""
        if self.taps > 1:
            return self._rows("taps", self.codes[:, :, None, None])
        codes = self.codes.reshape(self.layer.weight_shape)
        if not isinstance(self.layer, QuantConvTranspose2d):
            return self._rows("weight", codes)
        groups = self.layer.groups
        if len(codes) == groups and codes.shape[1] == 1:
            return self._rows("weight", codes)
        if groups == 1:
            return self._rows("weight", codes.swapaxes(0, 1), axis=1)
        return self._regrouped(codes, groups)

    def _regrouped(self, codes: np.ndarray, groups: int) -> ir.Value:
        """The weight [out, in/groups, …] of a grouped transposed convolution, turned in the graph."""
        rows, inputs, *kernel = codes.shape
        split = np.asarray([groups, rows // groups, inputs, *kernel], np.int64)
        joined = np.asarray([groups * inputs, rows // groups, *kernel], np.int64)
        editor, path = self.editor, f"{self.path}.weight"
        value = self._rows("weight", codes)
        value = editor.add("Reshape", [value, editor.constant(f"{path}.split", split)], f"{path}.ungroup")
        order = [0, 2, 1, *range(3, codes.ndim + 1)]
        value = editor.add("Transpose", [value], f"{path}.swap", perm=order)
        return editor.add("Reshape", [value, editor.constant(f"{path}.joined", joined)], f"{path}.group")

    def _bias(self, call: _Call) -> ir.Value:
        """The bias of one call: 32-bit codes beside a quantized input, else as it is."""
        bias = self._float_bias()
        if call.grid is None:
            return self.editor.constant(f"{self.path}.bias", bias)
        scale = np.float32(call.grid.scale) * self.scale
        codes = np.round(bias.astype(np.float64) / scale)
        if np.abs(codes).max(initial=0) > _LARGEST_BIAS:
            raise ExportError(
                f"export onnx-qdq: the bias of {self.path} does not fit 32 bits beside the steps of its "
                f"weights and its input, add {self.path} to quant.ignore"
            )
        editor, path = self.editor, f"{call.name}.bias"
        held = editor.codes(f"{path}.codes", codes, ir.DataType.INT32)
        inputs = [held, editor.constant(f"{path}.scale", scale)]
        return editor.add("DequantizeLinear", inputs, f"{path}.dequantize", axis=0)

    def _float_bias(self) -> np.ndarray:
        assert self.layer.bias is not None
        return self.layer.bias.detach().cpu().numpy().astype(np.float32).repeat(self.taps)

    def _compressed(self, call: _Call) -> None:
        """A linear layer with a float input: MatMul with [in, out] codes, and Add."""
        editor, name, product = self.editor, call.name, call.product
        small = self.spec.bits <= 4
        dtype = ir.DataType.INT4 if small else ir.DataType.INT8
        scale, zero_point = self.scale, self.zero_point
        attributes = {"axis": 1}
        if self.spec.granularity == "group":
            attributes = {"axis": 0, "block_size": self.spec.group_size or self.codes.shape[1]}
            scale = scale.T
            zero_point = None if zero_point is None else zero_point.T
        weight = self._dequantize("weight", self.codes.T, scale, zero_point, attributes, dtype)
        if product.op_type == "MatMul":
            product.replace_input_with(1, weight)
            if call.bias is not None:
                self.editor.redirect(call.bias.outputs[0], self._bias(call))
            return
        product.name = f"{name}.gemm"
        result = editor.add("MatMul", [product.inputs[0], weight], name)
        if call.bias is not None:
            result.shape, result.type = product.outputs[0].shape, product.outputs[0].type
            result = editor.add("Add", [result, self._bias(call)], f"{name}.add")
        editor.redirect(product.outputs[0], result)

    def _flattened(self, call: _Call) -> None:
        """A linear layer on more than two dimensions: Gemm between two Reshapes where sizes are known."""
        editor, product, name = self.editor, call.product, call.name
        value, adding = product.inputs[0], None if call.bias is None else only_reader(call.bias.outputs[0])
        assert value is not None
        sizes = (
            [] if value.shape is None else [size if isinstance(size, int) else -1 for size in value.shape]
        )
        if not sizes or sizes.count(-1) > 1:
            weight = self._rows("weight", self.codes.T, axis=1)
            product.replace_input_with(1, weight)
            if call.bias is not None:
                editor.redirect(call.bias.outputs[0], self._bias(call))
            return
        last = product if adding is None else adding
        product.name = f"{name}.matmul"
        if flat := len(sizes) == 2:
            rows = value
        else:
            inside = editor.constant(f"{name}.rows", np.asarray([-1, sizes[-1]], np.int64))
            rows = editor.add("Reshape", [value, inside], f"{name}.flatten")
        inputs = [rows, self._rows("weight", self.codes)]
        inputs += [] if call.bias is None else [self._bias(call)]
        result = editor.add("Gemm", inputs, name, transB=1)
        if not flat:
            outside = editor.constant(f"{name}.sizes", np.asarray([*sizes[:-1], len(self.codes)], np.int64))
            result = editor.add("Reshape", [result, outside], f"{name}.unflatten")
        editor.redirect(last.outputs[0], result)
