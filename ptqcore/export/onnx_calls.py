"""The calls of quantized layers in a traced graph, and other nodes put in their place."""

from dataclasses import dataclass

import onnx_ir as ir

from ptqcore.errors import ExportError
from ptqcore.export.onnx_activations import Activations, Grid
from ptqcore.export.onnx_edit import OnnxEditor, attribute, only_reader, source
from ptqcore.export.onnx_operands import Operand, TimedOperand, operand
from ptqcore.export.onnx_trace import Marked, Parameter
from ptqcore.modules import QuantModule


@dataclass(frozen=True)
class LayerCall:
    """One call of a quantized layer in the graph.

    name: the layer's path, with `#1`, `#2`, … for further calls. path: the layer's path. product: the
    node that multiplies. weight, bias: the marks on its weight and its bias. grid: of its input, if that
    has one. operand: the input as codes, if it is on that grid or on one of its timestep.
    """

    name: str
    path: str
    layer: QuantModule
    product: ir.Node
    weight: ir.Node
    bias: ir.Node | None
    grid: Grid | None
    operand: Operand | TimedOperand | None

    @property
    def input(self) -> ir.Value:
        """What the layer multiplies its weight by."""
        value = self.product.inputs[0]
        assert value is not None
        return value

    def replace(self, editor: OnnxEditor, result: ir.Value, bias: ir.Value | None) -> None:
        """Let `result` stand for the product of a linear layer, and `bias` for its bias."""
        product = self.product
        if self.bias is not None and bias is not None:
            if product.op_type == "MatMul":
                editor.redirect(self.bias.outputs[0], bias)
            else:
                result.shape, result.type = product.outputs[0].shape, product.outputs[0].type
                result = editor.add("Add", [result, bias], f"{self.name}.add")
        product.name = f"{self.name}.replaced"
        editor.redirect(product.outputs[0], result)


def find_calls(editor: OnnxEditor, marked: Marked, activations: Activations) -> list[LayerCall]:
    """All calls, in order.

    Args:
        editor: of the graph with its marks.
        marked: what the marks stand for.
        activations: the quantized tensors of the graph.

    Raises:
        ExportError: if a layer became something else than a product.
    """
    found = {attribute(node, "key", ""): node for node in editor.nodes("Mark")}
    biases = {one.site: found.get(key) for key, one in marked.biases.items()}
    return [
        _call(editor, found[key], one, biases.get(one.site), activations)
        for key, one in marked.weights.items()
        if key in found
    ]


def _call(
    editor: OnnxEditor, mark: ir.Node, one: Parameter, bias: ir.Node | None, activations: Activations
) -> LayerCall:
    product = only_reader(mark.outputs[0])
    if product is not None and product.op_type == "Transpose":
        product = only_reader(product.outputs[0])
    if product is None or product.op_type not in ("Conv", "ConvTranspose", "Gemm", "MatMul"):
        raise ExportError(f"export to ONNX: layer {one.site.owner} is written in a form that is not known")
    value, grids = product.inputs[0], activations.grids
    assert value is not None
    read = operand(editor, activations, value)
    padding = source(value, "Pad")
    if value not in grids and padding is not None:
        value = padding.inputs[0]
    grid = None if value is None else grids.get(value)
    path = one.site.owner
    name = path + (f"#{one.site.call}" if one.site.call else "")
    product.name = name
    return LayerCall(name, path, one.layer, product, mark, bias, grid, read)
