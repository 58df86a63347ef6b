"""Quantized layers in the file: codes of weights and biases behind DequantizeLinear.

A layer whose input is quantized keeps its weight as signed 8-bit codes, one scale a channel, whatever
its bits, and its bias as 32-bit codes in units of input scale times weight scale: what engines compute
with. A bias that the simulation adds in floating point stays so, behind a MatMul. A linear layer with a
float input keeps a weight [in, out] of 4 or 8 bits, in groups if it has them: what engines unpack in
their kernels for compressed weights.
"""

import math
from collections import defaultdict
from collections.abc import Iterable
from typing import Any

import numpy as np
import onnx_ir as ir

from ptqcore.errors import ExportError
from ptqcore.export.onnx_calls import LayerCall
from ptqcore.export.onnx_edit import OnnxEditor, only_reader
from ptqcore.export.onnx_operands import TimedOperand
from ptqcore.export.onnx_patterns import is_rounded
from ptqcore.export.onnx_window import has_window, window_rows, windows
from ptqcore.modules import QuantConvTranspose2d, QuantModule

_LARGEST_BIAS = 2**31 - 1


def place_layers(editor: OnnxEditor, calls: Iterable[LayerCall]) -> None:
    """Replace the marks of all weights and biases."""
    by_kind: dict[tuple[str, str], list[LayerCall]] = defaultdict(list)
    quantized = set()
    for call in calls:
        by_kind[call.path, call.product.op_type].append(call)
        if call.operand is not None:
            quantized.add(call.path)
    for (path, kind), of_layer in by_kind.items():
        layer = of_layer[0].layer
        unfolded = kind == "Conv" and isinstance(layer, QuantConvTranspose2d)
        stored = _Stored(editor, path, layer, unfolded, path in quantized)
        for call in of_layer:
            stored.place(call)


class _Stored:
    """The constants of one layer, shared by its calls.

    unfolded: whether `unfold_upsampling` changed it. mixed: whether only some calls have a quantized input.
    """

    def __init__(
        self, editor: OnnxEditor, path: str, layer: QuantModule, unfolded: bool, mixed: bool
    ) -> None:
        self.editor, self.path, self.layer, self.mixed = editor, path, layer, mixed
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

    def place(self, call: LayerCall) -> None:
        """Put the constants into one call."""
        linear = call.product.op_type in ("Gemm", "MatMul")
        if self._is_outside(call):
            self._multiplied_outside(call)
        elif linear and call.grid is None:
            self._compressed(call)
        elif linear and call.bias is None:
            self._multiplied(call)
        elif call.product.op_type == "MatMul":
            in_steps = self.layer.input_scale is not None
            self._flattened(call) if in_steps else self._multiplied(call)
        else:
            weight = self._rows("weight", self.codes) if linear else self._convolution()
            call.product.replace_input_with(1, weight)
            if call.bias is not None:
                call.product.replace_input_with(2, self._bias(call))

    def _is_outside(self, call: LayerCall) -> bool:
        """Whether a layer's input is on a grid of its timestep, or its output on none right behind it."""
        timed = isinstance(call.operand, TimedOperand)
        if call.product.op_type in ("Gemm", "MatMul"):
            return timed
        return (
            call.operand is not None
            and has_window(call.product)
            and (timed or not is_rounded(call.product))
        )

    def _multiplied_outside(self, call: LayerCall) -> None:
        """A product of integers of which everything else is done outside, in floating point."""
        editor, name, product, read = self.editor, call.name, call.product, call.operand
        assert read is not None
        is_image = product.op_type == "Conv"
        product.name = f"{name}.replaced"
        if is_image:
            values = windows(editor, read, product, name)
            weight = self._rows("window", window_rows(self.codes.reshape(self.layer.weight_shape)), axis=1)
        else:
            values = read.values(read.codes((), name), f"{name}.input")
            weight = self._rows("transposed", self.codes.T, axis=1)
        result, before = editor.add("MatMul", [values, weight], name), product.outputs[0]
        result.type, result.shape = before.type, before.shape
        result = read.corrected(result, self._sums(), name)
        if not is_image:
            call.replace(editor, result, None if call.bias is None else self._float_bias())
            return
        if call.bias is not None:
            result = editor.add("Add", [result, self._float_bias()], f"{name}.add")
        result = editor.add("Transpose", [result], f"{name}.channels_first", perm=[0, 3, 1, 2])
        editor.redirect(before, result)

    def _sums(self) -> np.ndarray:
        """Of the weights of each row [out]."""
        zero_point = 0 if self.zero_point is None else self.zero_point[:, None]
        return (self.codes.astype(np.float64) - zero_point).sum(1) * self.scale

    def _rows(self, name: str, codes: np.ndarray, axis: int = 0) -> ir.Value:
        """Codes with one scale for each index of `axis`, and a zero point of 0 wherever 8 bits hold that:
        OpenVINO computes with no other."""
        zero_point = np.zeros(len(self.scale), np.int16)  # ONNX Runtime knows Gemm by one that is there
        if self.zero_point is not None:
            counted = codes - np.moveaxis(self.zero_point.reshape(-1, *[1] * (codes.ndim - 1)), 0, axis)
            if np.array_equal(counted, counted.astype(np.int8)):
                codes = counted
            else:
                zero_point = self.zero_point
        return self._dequantize(name, codes, self.scale, zero_point, {"axis": axis})

    def _dequantize(
        self,
        name: str,
        codes: np.ndarray,
        scale: np.ndarray,
        zero_point: np.ndarray | None,
        attributes: dict[str, Any],
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

    def _bias(self, call: LayerCall) -> ir.Value:
        """The bias of one call: 32-bit codes beside a quantized input, else as it is."""
        if call.grid is None:
            return self._float_bias()
        bias = self._bias_values()
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

    def _float_bias(self) -> ir.Value:
        return self.editor.constant(f"{self.path}.bias", self._bias_values())

    def _bias_values(self) -> np.ndarray:
        assert self.layer.bias is not None
        return self.layer.bias.detach().cpu().numpy().astype(np.float32).repeat(self.taps)

    def _compressed(self, call: LayerCall) -> None:
        """A linear layer with a float input: MatMul with [in, out] codes, and Add."""
        editor, name = self.editor, "compressed" if self.mixed else "weight"
        small = self.spec.bits <= 4
        dtype = ir.DataType.INT4 if small else ir.DataType.INT8
        scale, zero_point = self.scale, self.zero_point
        attributes: dict[str, Any] = {"axis": 1}
        if self.spec.granularity == "group":
            attributes = {"axis": 0, "block_size": self.spec.group_size or self.codes.shape[1]}
            scale = scale.T
            zero_point = None if zero_point is None else zero_point.T
        weight = self._dequantize(name, self.codes.T, scale, zero_point, attributes, dtype)
        result = editor.add("MatMul", [call.input, weight], call.name)
        call.replace(editor, result, None if call.bias is None else self._float_bias())

    def _multiplied(self, call: LayerCall) -> None:
        """A linear layer without a bias, or whose bias is in floating point in the simulation too."""
        weight = self._rows("transposed", self.codes.T, axis=1)
        result = self.editor.add("MatMul", [call.input, weight], call.name)
        call.replace(self.editor, result, None if call.bias is None else self._float_bias())

    def _flattened(self, call: LayerCall) -> None:
        """A linear layer on more than two dimensions with a bias in steps: Gemm between two Reshapes.

        Only Gemm takes its bias as whole numbers. (Without a bias, OpenVINO would misread the Reshape
        behind it.)
        """
        editor, product, name, columns = self.editor, call.product, call.name, self.codes.shape[1]
        assert call.bias is not None
        last = only_reader(call.bias.outputs[0])
        assert last is not None
        product.name = f"{name}.matmul"
        inside = editor.constant(f"{name}.rows", np.asarray([-1, columns], np.int64))
        rows = editor.add("Reshape", [call.input, inside], f"{name}.flatten")
        result = editor.add(
            "Gemm", [rows, self._rows("weight", self.codes), self._bias(call)], name, transB=1
        )
        outside = self._sizes(call)
        result = editor.add("Reshape", [result, outside], f"{name}.unflatten")
        editor.redirect(last.outputs[0], result)

    def _sizes(self, call: LayerCall) -> ir.Value:
        """The sizes of a layer's output: a constant where one dimension is open at most."""
        editor, name = self.editor, call.name
        outputs = np.asarray([len(self.codes)], np.int64)
        shape = call.input.shape
        known = [-1] if shape is None else [size if isinstance(size, int) else -1 for size in shape][:-1]
        if shape is not None and known.count(-1) <= 1:
            return editor.constant(f"{name}.sizes", np.asarray([*known, *outputs], np.int64))
        before = editor.add("Shape", [call.input], f"{name}.shape", start=0, end=-1)
        return editor.add(
            "Concat", [before, editor.constant(f"{name}.outputs", outputs)], f"{name}.sizes", axis=0
        )
