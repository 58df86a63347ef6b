"""What a quantized layer reads, as codes: on one grid, or on that of the timestep."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from ptqcore.export.onnx_activations import Activations, Grid
from ptqcore.export.onnx_edit import OnnxEditor, array, source
from ptqcore.export.onnx_timesteps import TimedGrid, TimedTensors, whole


@dataclass(frozen=True)
class Factor:
    """One of two activations that are multiplied: codes as whole numbers, and of their grid the scale and
    the zero point, which is None where it is 0."""

    values: ir.Value
    scale: ir.Value
    zero_point: ir.Value | None


@dataclass(frozen=True)
class Operand:
    """A tensor on one grid; `rounded`: its codes."""

    editor: OnnxEditor
    grid: Grid
    rounded: ir.Value

    def codes(self, pads: Sequence[int], name: str) -> ir.Value:
        """The codes, padded with that of zero; `pads`: as those of the operator Pad."""
        if not any(pads):
            return self.rounded
        zero = self.editor.constant(
            f"code_{self.grid.zero_point}", np.asarray(self.grid.zero_point, np.uint8)
        )
        return self.editor.add("Pad", [self.rounded, _pads(self.editor, pads), zero], f"{name}.pad")

    def values(self, codes: ir.Value, name: str) -> ir.Value:
        """What is multiplied by the weight."""
        return self.editor.add("DequantizeLinear", [codes, *self.grid.parameters(self.editor)], name)

    def factor(self, name: str, middle: int) -> Factor:
        """As one of two activations that are multiplied; codes count from `middle`, 0 or 128."""
        codes = self.rounded if not middle else self._signed(middle, name)
        zero_point = np.asarray(self.grid.zero_point - middle, np.float32)
        constant = self.editor.constant
        return Factor(
            whole(self.editor, codes, name, signed=bool(middle)),
            constant(f"{name}.scale", np.asarray(self.grid.scale, np.float32)),
            constant(f"{name}.zero_point", zero_point) if zero_point.any() else None,
        )

    def _signed(self, middle: int, name: str) -> ir.Value:
        """The codes as signed ones: what was rounded, rounded again."""
        editor, value = self.editor, self.rounded
        clip = source(value, "Clip")
        quantize = source(value if clip is None else clip.inputs[0], "QuantizeLinear")
        assert quantize is not None
        zero_point = np.asarray(self.grid.zero_point - middle, np.int8)
        parameters = [quantize.inputs[1], editor.constant(f"{name}.code_of_zero", zero_point)]
        codes = editor.add("QuantizeLinear", [quantize.inputs[0], *parameters], f"{name}.quantize")
        if clip is not None:
            low, high = (int(array(bound).item()) - middle for bound in clip.inputs[1:])  # type: ignore[union-attr]
            bounds = [
                editor.constant(f"code_{code}_signed", np.asarray(code, np.int8)) for code in (low, high)
            ]
            codes = editor.add("Clip", [codes, *bounds], f"{name}.clip")
        return codes

    def corrected(self, product: ir.Value, sums: np.ndarray, name: str) -> ir.Value:
        """The product with the layer's weight, whose rows have these sums [out]."""
        return product


@dataclass(frozen=True)
class TimedOperand:
    """A tensor on the grid of its timestep: scale and zero point stay outside of the product."""

    tensors: TimedTensors
    grid: TimedGrid
    value: ir.Value

    def codes(self, pads: Sequence[int], name: str) -> ir.Value:
        """The codes, padded with that of zero; `pads`: as those of the operator Pad."""
        steps = self.tensors.steps(self.value)
        if any(pads):
            editor, before = self.tensors.editor, steps
            steps = editor.add("Pad", [before, _pads(editor, pads)], f"{name}.pad")
            steps.shape, steps.type = before.shape, before.type  # that of the rows is what matters
        return self.tensors.codes(steps, self.grid)

    def values(self, codes: ir.Value, name: str) -> ir.Value:
        """What is multiplied by the weight."""
        return whole(self.tensors.editor, codes, name)

    def factor(self, name: str, middle: int) -> Factor:
        """As one of two activations that are multiplied; codes count from `middle`, 0 or 128."""
        tensors, steps = self.tensors, self.tensors.steps(self.value)
        codes = tensors.codes(steps, self.grid, middle)
        values = whole(tensors.editor, codes, name, signed=bool(middle))
        offset = bool((self.grid.zero_point - middle).any())
        zero_point = tensors.zero_point(self.grid, steps, middle) if offset else None
        return Factor(values, tensors.scale(self.grid, steps), zero_point)

    def corrected(self, product: ir.Value, sums: np.ndarray, name: str) -> ir.Value:
        """The product with the layer's weight, whose rows have these sums [out]."""
        add, tensors, shape, kind = self.tensors.editor.add, self.tensors, product.shape, product.type
        held = tensors.editor.constant(f"{name}.sums", sums.astype(np.float32))
        zero = add("Mul", [tensors.zero_point(self.grid, product), held], f"{name}.of_zero")
        result = add("Sub", [product, zero], f"{name}.minus_zero")
        result = add("Mul", [result, tensors.scale(self.grid, product)], f"{name}.times_scale")
        result.shape, result.type = shape, kind
        return result


def operand(
    editor: OnnxEditor, activations: Activations, value: ir.Value | None
) -> Operand | TimedOperand | None:
    """That of a tensor which lies on a grid."""
    if value in activations.grids:
        return Operand(editor, activations.grids[value], activations.codes[value])
    timed = activations.timed
    grid = None if timed is None else timed.grid(value)
    if timed is None or value is None or grid is None:
        return None
    return TimedOperand(timed, grid, value)


def _pads(editor: OnnxEditor, pads: Sequence[int]) -> ir.Value:
    return editor.constant("pads_" + "_".join(map(str, pads)), np.asarray(pads, np.int64))
