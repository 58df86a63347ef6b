"""What a traced graph needs before and after its grids are placed: names, and forms that engines know."""

import ast
import re
from collections.abc import Mapping
from typing import TypeGuard

import numpy as np
import onnx_ir as ir
from onnx_ir.passes import common

from ptqcore.export.feeding import LARGEST
from ptqcore.export.onnx_edit import OnnxEditor, array, attribute, only_reader, source
from ptqcore.export.onnx_trace import Dimensions
from ptqcore.version import __version__

_IR_VERSION = 10
_SCOPES = "pkg.torch.onnx.name_scopes"
_ROOT = "model"
# Through these ONNX Runtime looks for quantizers around a layer with a float weight.
_LOOKED_THROUGH = ("Clip", "Dropout", "Identity", "MaxPool", "Pad", "Relu", "Reshape", "Slice", "Transpose")
_PRODUCTS = ("Conv", "ConvTranspose", "Gemm", "MatMul")
_BEYOND = np.float32(3e38)


def name_nodes(editor: OnnxEditor) -> None:
    """Call every node by the path of its module and its kind, and constants as the model does."""
    used: dict[str, int] = {}
    for node in editor.nodes():
        scopes = ast.literal_eval(node.metadata_props.get(_SCOPES, "['', '']"))
        path = _below_root(scopes[-2]) if len(scopes) > 1 else ""
        name = f"{path}/{node.op_type}".lstrip("/")
        count = used[name] = used.get(name, -1) + 1
        node.name = f"{name}_{count}" if count else name
    for name, value in list(editor.graph.initializers.items()):
        value.name = _below_root(name)


def _below_root(path: str) -> str:
    return path.removeprefix(_ROOT).removeprefix(".") if path.startswith((_ROOT + ".", _ROOT)) else path


def pool_globally(editor: OnnxEditor) -> None:
    """Means over height and width as GlobalAveragePool, which engines compute in integers."""
    for node in editor.nodes("ReduceMean"):
        value, output = node.inputs[0], node.outputs[0]
        axes = array(node.inputs[1]) if len(node.inputs) > 1 else None
        if value is None or value.shape is None or len(value.shape) != 4 or axes is None:
            continue
        if sorted(int(axis) % 4 for axis in axes) != [2, 3]:
            continue
        pooled = editor.add("GlobalAveragePool", [value], f"{node.name}.pool")
        pooled.shape, pooled.type = ir.Shape([*list(value.shape)[:2], 1, 1]), value.type
        if attribute(node, "keepdims", 1):
            editor.redirect(output, pooled)
        else:
            _squeeze(editor, node, output, pooled)
    editor.tidy()


def _squeeze(editor: OnnxEditor, node: ir.Node, output: ir.Value, pooled: ir.Value) -> None:
    """The dimensions of size 1 dropped, behind the mark of the mean if it has one."""
    axes = editor.constant("height_and_width", np.asarray([2, 3], np.int64))
    mark = only_reader(output)
    if mark is not None and mark.op_type == "Mark":
        mark.replace_input_with(0, pooled)
        output, pooled_shape = mark.outputs[0], pooled.shape
        squeezed = editor.add("Squeeze", [output, axes], f"{node.name}.squeeze")
        squeezed.shape, squeezed.type = output.shape, output.type
        editor.redirect(output, squeezed, keep=squeezed.producer())
        output.shape = pooled_shape
    else:
        editor.redirect(output, editor.add("Squeeze", [pooled, axes], f"{node.name}.squeeze"))


def unfold_upsampling(editor: OnnxEditor) -> None:
    """Transposed convolutions whose kernel is their stride as a convolution and DepthToSpace.

    No two taps of such a kernel meet, so each is an output channel of a 1x1 convolution, which engines
    compute in integers. The quantizer behind stands on both sides of what only moves values.
    """
    for node in editor.nodes("ConvTranspose"):
        after = only_reader(node.outputs[0])
        if after is None or after.op_type != "QuantizeLinear" or not _tiles(node):
            continue
        name, parameters = node.name, list(after.inputs[1:])
        group, (size, _) = attribute(node, "group", 1), attribute(node, "kernel_shape", [])
        value = editor.add("Conv", list(node.inputs), f"{name}.conv", kernel_shape=[1, 1], group=group)
        value = editor.add("QuantizeLinear", [value, *parameters], f"{name}.quantize")
        value = editor.add("DequantizeLinear", [value, *parameters], f"{name}.dequantize")
        value = editor.add("DepthToSpace", [value], f"{name}.shuffle", blocksize=size, mode="CRD")
        editor.redirect(node.outputs[0], value)
    editor.tidy()


def _tiles(node: ir.Node) -> bool:
    """Whether the outputs of a transposed convolution with a marked weight never overlap."""
    kernel = list(attribute(node, "kernel_shape", []))
    square = len(kernel) == 2 and kernel[0] == kernel[1] > 1
    plain = not any([*attribute(node, "pads", []), *attribute(node, "output_padding", [])])
    undilated = all(size == 1 for size in attribute(node, "dilations", []))
    marked = source(node.inputs[1], "Mark") is not None
    return marked and square and plain and undilated and list(attribute(node, "strides", [])) == kernel


def keep_roundings_before_sums(editor: OnnxEditor) -> None:
    """Keep OpenVINO from adding to the output of a layer before that is rounded.

    It takes sums into the layer, and leaves out the rounding in between; a Min that changes nothing keeps
    them apart, and no engine is slower for it.
    """
    for node in editor.nodes("Add"):
        for index, value in enumerate(node.inputs):
            rounded = source(value, "DequantizeLinear")
            quantize = None if rounded is None else source(rounded.inputs[0], "QuantizeLinear")
            if quantize is not None and source(quantize.inputs[0], *_PRODUCTS) is not None:
                assert value is not None
                node.replace_input_with(index, apart(editor, value, f"{node.name}.rounded.{index}"))
    editor.tidy()


def apart(editor: OnnxEditor, value: ir.Value, name: str) -> ir.Value:
    """A value behind a function that changes nothing, so that engines do not join what is on both sides."""
    beyond = editor.constant("beyond_any_value", np.asarray(_BEYOND))
    return editor.add("Min", [value, beyond], name)


def protect_float_layers(editor: OnnxEditor) -> None:
    """Keep ONNX Runtime from quantizing the float weight of a layer between two quantizers on its own.

    It looks for the quantizer behind the layer; a Min that changes nothing hides it.
    """
    for node in editor.nodes("Conv", "ConvTranspose", "Gemm"):
        if source(node.inputs[1], "DequantizeLinear", "Reshape") is None and _between(node):
            output = node.outputs[0]
            same = apart(editor, output, f"{node.name}.float")
            editor.redirect(output, same, keep=same.producer())
    editor.tidy()


def _between(node: ir.Node) -> bool:
    value = node.inputs[0]
    while (before := source(value, *_LOOKED_THROUGH)) is not None:
        value = before.inputs[0]
    return is_rounded(node) and source(value, "DequantizeLinear") is not None


def is_rounded(node: ir.Node) -> bool:
    """Whether what a node makes goes into a quantizer, as far as ONNX Runtime looks for one."""
    after = only_reader(node.outputs[0])
    while after is not None and after.op_type in _LOOKED_THROUGH:
        after = only_reader(after.outputs[0])
    return after is not None and after.op_type == "QuantizeLinear"


def finish(editor: OnnxEditor, dimensions: Dimensions, largest: Mapping[str, int]) -> None:
    """Drop everything that is not the network: traces of its source, unused names and domains.

    Open dimensions of inputs, and what outputs have of them, get their names; how large they may be is
    written beside.
    """
    model, graph = editor.model, editor.graph
    common.ClearMetadataAndDocStringPass()(model)
    graph.metadata_props.clear()
    for node in graph:
        for output in node.outputs:
            if not output.is_graph_output():
                place = f".{output.index()}" if len(node.outputs) > 1 else ""
                output.name = f"{node.name}.out{place}"
                output.shape = None  # engines infer it
    _name_dimensions(graph, dimensions)
    common.RemoveUnusedOpsetsPass()(model)
    graph.opset_imports.setdefault("", 21)
    graph.name = "network"
    model.ir_version = _IR_VERSION
    model.producer_name, model.producer_version = "ptqcore", __version__
    model.metadata_props.clear()
    model.metadata_props["ptqcore"] = __version__
    model.metadata_props.update({f"{LARGEST}{name}": str(size) for name, size in largest.items()})


def _name_dimensions(graph: ir.Graph, dimensions: Dimensions) -> None:
    """Call open dimensions by their names: the tracer numbers its symbols."""
    names = {}
    for value in graph.inputs:
        for place, name in dimensions.get(value.name or "", {}).items():
            size = None if value.shape is None else value.shape[place]
            if _is_open(size):
                names[size.value] = name
    for value in (*graph.inputs, *graph.outputs):
        if value.shape is not None:
            value.shape = ir.Shape(
                [_renamed(str(size.value), names) if _is_open(size) else size for size in value.shape]
            )


def _renamed(size: str, names: Mapping[str | None, str]) -> str:
    """A symbol, or an expression of symbols, with their names."""
    return re.sub(r"\w+", lambda symbol: names.get(symbol[0], symbol[0]), size)


def _is_open(size: object) -> TypeGuard[ir.SymbolicDim]:
    return isinstance(size, ir.SymbolicDim) and size.value is not None
