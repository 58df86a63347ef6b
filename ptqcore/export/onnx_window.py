"""Convolutions as products of matrices: each row is what the kernel sees at one place.

ONNX Runtime computes a convolution in integers only if its output is rounded to 8 bits at once
(`ConvInteger` is several times slower than floating point there), a product of matrices always; OpenVINO
computes both.
"""

import numpy as np
import onnx_ir as ir

from ptqcore.export.onnx_edit import OnnxEditor, attribute
from ptqcore.export.onnx_operands import Operand, TimedOperand

_END = np.iinfo(np.int64).max


def has_window(node: ir.Node) -> bool:
    """Whether a Conv can be computed so: of two dimensions, in one group, with padding in numbers."""
    automatic = attribute(node, "auto_pad", "NOTSET") != "NOTSET"
    kernel = attribute(node, "kernel_shape", [])
    return (
        node.op_type == "Conv" and len(kernel) == 2 and attribute(node, "group", 1) == 1 and not automatic
    )


def windows(editor: OnnxEditor, image: Operand | TimedOperand, node: ir.Node, name: str) -> ir.Value:
    """What the kernel of a Conv sees of an image [batch, in, height, width], its padding included: [batch,
    rows, columns, kernel height · kernel width · in]."""
    (height, width), steps = attribute(node, "kernel_shape", []), attribute(node, "strides", [1, 1])
    apart, (top, left, bottom, right) = (
        attribute(node, "dilations", [1, 1]),
        attribute(node, "pads", [0] * 4),
    )
    codes = image.codes([0, 0, top, left, 0, 0, bottom, right], name)
    if height == width == 1 and list(steps) == [1, 1]:
        # OpenVINO computes in floating point where codes alone are transposed, and then multiplied.
        return _channels_last(editor, image.values(codes, f"{name}.input"), name)
    codes = _channels_last(editor, codes, name)
    axes = editor.constant("height_and_width_last", np.asarray([1, 2], np.int64))
    stride = editor.constant("steps_" + "_".join(map(str, steps)), np.asarray(steps, np.int64))
    seen = []
    for row in range(height):
        for column in range(width):
            begin = [row * apart[0], column * apart[1]]
            end = [begin[0] - (height - 1) * apart[0] or _END, begin[1] - (width - 1) * apart[1] or _END]
            bounds = [_numbers(editor, begin), _numbers(editor, end), axes, stride]
            seen.append(editor.add("Slice", [codes, *bounds], f"{name}.tap_{row}_{column}"))
    codes = editor.add("Concat", seen, f"{name}.window", axis=-1) if len(seen) > 1 else seen[0]
    return image.values(codes, f"{name}.input")


def window_rows(weight: np.ndarray) -> np.ndarray:
    """The weight [out, in, height, width] of a Conv as it is multiplied by windows: [height · width · in,
    out]."""
    return weight.transpose(2, 3, 1, 0).reshape(-1, len(weight))


def _channels_last(editor: OnnxEditor, image: ir.Value, name: str) -> ir.Value:
    return editor.add("Transpose", [image], f"{name}.channels_last", perm=[0, 2, 3, 1])


def _numbers(editor: OnnxEditor, numbers: list[int]) -> ir.Value:
    name = "place_" + "_".join("end" if number == _END else str(number) for number in numbers)
    return editor.constant(name, np.asarray(numbers, np.int64))
