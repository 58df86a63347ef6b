"""Products of two activations, as in attention, by their codes alone.

OpenVINO computes these in integers without zero points only, and if the second operand has signed codes:
Σ s (q − z) · t (p − y) = s t · (Σ q p − y Σ q − z Σ (p − y)), with scales s, t and zero points z, y.
"""

from typing import Any

import numpy as np
import onnx_ir as ir

from ptqcore.export.onnx_activations import Activations
from ptqcore.export.onnx_edit import OnnxEditor
from ptqcore.export.onnx_operands import Factor, operand
from ptqcore.export.onnx_patterns import apart

_MIDDLE = 128


def multiply_codes(editor: OnnxEditor, activations: Activations) -> None:
    """Compute every MatMul so whose operands both lie on grids."""
    for node in editor.nodes("MatMul"):
        left, right = (operand(editor, activations, value) for value in node.inputs)
        if left is not None and right is not None:
            name, product = str(node.name), node.outputs[0]
            node.name = f"{name}.replaced"
            first = left.factor(f"{name}.first", 0)
            second = right.factor(f"{name}.second", _MIDDLE)
            result = _product(editor, name, first, second)
            result.shape, result.type = product.shape, product.type
            editor.redirect(product, result)


def _product(editor: OnnxEditor, name: str, first: Factor, second: Factor) -> ir.Value:
    def add(op: str, inputs: list[ir.Value | None], what: str, **attributes: Any) -> ir.Value:
        return editor.add(op, inputs, f"{name}.{what}", **attributes)

    # OpenVINO sums integers up wrongly where a batch has more than eight rows: these are sums of floats.
    result, centred = editor.add("MatMul", [first.values, second.values], name), second.values
    if second.zero_point is not None:
        last = editor.constant("last_dimension", np.asarray([-1], np.int64))
        floats = apart(editor, first.values, f"{name}.first_apart")
        sums = add("ReduceSum", [floats, last], "sums_of_first", keepdims=1)
        sums = add("Mul", [sums, second.zero_point], "zero_of_second")
        result = add("Sub", [result, sums], "minus_zero_of_second")
        centred = add("Sub", [centred, second.zero_point], "centred")
    if first.zero_point is not None:
        last_but_one = editor.constant("last_but_one_dimension", np.asarray([-2], np.int64))
        floats = apart(editor, centred, f"{name}.second_apart")
        sums = add("ReduceSum", [floats, last_but_one], "sums_of_second", keepdims=1)
        sums = add("Mul", [sums, first.zero_point], "zero_of_first")
        result = add("Sub", [result, sums], "minus_zero_of_first")
    return add("Mul", [result, add("Mul", [first.scale, second.scale], "scale")], "times_scale")
