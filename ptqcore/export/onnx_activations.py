"""Marks on activations become QuantizeLinear and DequantizeLinear, in the patterns that engines know.

The patterns, each tried in ONNX Runtime and OpenVINO: codes are unsigned and have one scale a tensor;
every tensor goes to one quantizer that all its readers share; ReLU and clipping functions before it
are left to it; functions that only move values have the same quantizer behind them as before them.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir
import torch

from ptqcore import grid
from ptqcore.export.onnx_edit import OnnxEditor, array, attribute, moves, only_reader, source
from ptqcore.export.onnx_timesteps import TimedGrid, TimedTensors
from ptqcore.export.onnx_trace import Activation
from ptqcore.placement import Edge
from ptqcore.quantizers import FakeQuant

_LARGEST = 255
_CLIPPING = ("Clip", "Relu")


@dataclass(frozen=True)
class Grid:
    """The unsigned 8-bit grid of a tensor in the file."""

    label: str
    scale: np.float32
    zero_point: int

    def parameters(self, editor: OnnxEditor) -> list[ir.Value]:
        """The two constants of its quantizers."""
        return [
            editor.constant(f"{self.label}.scale", np.asarray(self.scale, np.float32)),
            editor.constant(f"{self.label}.zero_point", np.asarray(self.zero_point, np.uint8)),
        ]


class Activations:
    """The quantized tensors of a graph; `grids`, `codes`: the output of a DequantizeLinear → its grid, and
    what it reads; `timed`: tensors with a range for each timestep, None if there are none."""

    def __init__(
        self, editor: OnnxEditor, marks: Mapping[str, Activation], timed: TimedTensors | None
    ) -> None:
        self.editor, self.timed = editor, timed
        self.grids: dict[ir.Value, Grid] = {}
        self.codes: dict[ir.Value, ir.Value] = {}
        for node in editor.nodes("Mark"):
            one = marks.get(attribute(node, "key", ""))
            if one is not None:
                self._place(node, one)
        editor.tidy()
        for node in editor.nodes():
            if node.inputs and node.inputs[0] in self.grids:
                self._spread(node)

    def _place(self, mark: ir.Node, one: Activation) -> None:
        """A quantizer instead of a mark and the clipping functions before it."""
        quantizer, value = one.quantizer, mark.inputs[0]
        assert value is not None
        if quantizer.spec.timesteps is not None:
            assert self.timed is not None
            made = TimedGrid.of(label(one.edge), quantizer)
            self.editor.redirect(mark.outputs[0], self.timed.quantized(value, made))
            return
        assert quantizer.scale is not None
        value, bounds = _before_clipping(value)
        low, high = (_code(quantizer, bound) for bound in bounds)
        zero_point = _zero_point(quantizer)
        # The lowest code becomes 0, so that the integer type itself does the clipping.
        shift = min(low, zero_point)
        scale = np.float32(quantizer.scale.item())
        held = Grid(label(one.edge), scale, zero_point - shift)
        self.editor.redirect(mark.outputs[0], self._quantized(value, held, (low - shift, high - shift)))

    def _quantized(
        self, value: ir.Value, made: Grid, codes: tuple[int, int] = (0, _LARGEST), place: str = ""
    ) -> ir.Value:
        """A value rounded to a grid and back; `codes`: those that may come up."""
        editor, name = self.editor, f"{made.label}{place}"
        parameters = made.parameters(editor)
        rounded = editor.add("QuantizeLinear", [value, *parameters], f"{name}.quantize")
        if codes != (0, _LARGEST):
            rounded = self._clipped(rounded, codes, f"{name}.clip")
        return self._dequantized(rounded, made, f"{name}.dequantize", value)

    def _clipped(self, codes: ir.Value, bounds: tuple[int, int], name: str) -> ir.Value:
        low, high = (self.editor.constant(f"code_{bound}", np.asarray(bound, np.uint8)) for bound in bounds)
        return self.editor.add("Clip", [codes, low, high], name)

    def _dequantized(self, codes: ir.Value, made: Grid, name: str, like: ir.Value) -> ir.Value:
        result = self.editor.add("DequantizeLinear", [codes, *made.parameters(self.editor)], name)
        result.shape, result.type = like.shape, like.type
        self.grids[result], self.codes[result] = made, codes
        return result

    def _spread(self, node: ir.Node) -> None:
        """The grid of what a node reads also for what it makes, if it only moves or clips values."""
        value = node.inputs[0]
        assert value is not None
        made = self.grids[value]
        if node.op_type == "Relu":
            self._clip_codes(node, value, made)
        elif node.op_type == "AveragePool":
            self._pad_first(node, value, made)
        elif moves(node):
            for output in node.outputs:
                readers = {user.op_type for user, _ in output.uses()}
                if (
                    node.op_type == "Pad"
                    and readers == {"Conv"}
                    and attribute(node, "mode", "") == "constant"
                ):
                    continue  # engines take the padding into the convolution
                if readers != {"QuantizeLinear"}:
                    self._repeat(node, output, made)

    def _repeat(self, node: ir.Node, output: ir.Value, made: Grid) -> None:
        place = f".{node.name}" if len(node.outputs) == 1 else f".{node.name}.{output.index()}"
        again = self._quantized(output, made, place=place)
        (quantize,) = (user for user, _ in output.uses() if user.name == f"{made.label}{place}.quantize")
        self.editor.redirect(output, again, keep=quantize)

    def _clip_codes(self, node: ir.Node, value: ir.Value, made: Grid) -> None:
        """A ReLU of a quantized tensor, done to its codes."""
        name = f"{made.label}.{node.name}"
        codes = self._clipped(self.codes[value], (made.zero_point, _LARGEST), f"{name}.clip")
        self.editor.redirect(node.outputs[0], self._dequantized(codes, made, f"{name}.dequantize", value))

    def _pad_first(self, node: ir.Node, value: ir.Value, made: Grid) -> None:
        """An average over padding as two nodes: OpenVINO takes the code 0 for the padded zeros."""
        pads = attribute(node, "pads", [])
        counts = attribute(node, "count_include_pad", 0) and not attribute(node, "ceil_mode", 0)
        if not any(pads) or not counts or not made.zero_point:
            return
        half = len(pads) // 2
        amounts = [0, 0, *pads[:half], 0, 0, *pads[half:]]
        constant = self.editor.constant(
            "pads_" + "_".join(map(str, amounts)), np.asarray(amounts, np.int64)
        )
        padded = self.editor.add("Pad", [value, constant], f"{node.name}.pad", mode="constant")
        padded.type = value.type
        node.replace_input_with(0, self._quantized(padded, made, place=f".{node.name}.pad"))
        for name in ("pads", "count_include_pad"):
            del node.attributes[name]


def label(edge: Edge) -> str:
    """The name of an edge's tensor in the file."""
    return str(edge).replace("<", ".input").replace(">", ".output").replace(":", "/").lstrip("/")


def _before_clipping(value: ir.Value) -> tuple[ir.Value, tuple[float, float]]:
    """The value before the clipping functions that nothing else reads, and what they leave of it."""
    low, high = -math.inf, math.inf
    while (node := source(value, *_CLIPPING)) is not None and only_reader(value) is not None:
        bounds, before = _bounds(node), node.inputs[0]
        if bounds is None or before is None:
            break
        low, high = (max(low, min(bound, high)) for bound in bounds)
        value = before
    return value, (low, high)


def _bounds(node: ir.Node) -> tuple[float, float] | None:
    """What a Relu or Clip leaves; None if that is not constant."""
    if node.op_type == "Relu":
        return 0.0, math.inf
    bounds = [-math.inf, math.inf]
    for index, value in enumerate(node.inputs[1:3]):
        if value is not None:
            found = array(value)
            if found is None:
                return None
            bounds[index] = found.item()
    return bounds[0], bounds[1]


def _zero_point(quantizer: FakeQuant) -> int:
    zero_point = quantizer.zero_point
    return quantizer.spec.middle if zero_point is None else int(zero_point.item())


def _code(quantizer: FakeQuant, value: float) -> int:
    """The code that the simulation gives to a value."""
    assert quantizer.scale is not None
    codes = grid.quantize(torch.tensor([value]), quantizer.scale, quantizer.zero_point, quantizer.spec)
    return int(codes.item())
