"""Why a product of the file did not run in integer arithmetic, as far as the graph around it tells.

The reasons are facts that were tried on small graphs, one at a time; what was not tried is `unknown`.
"""

import re
from collections.abc import Callable, Set
from importlib.util import find_spec
from pathlib import Path

import numpy as np

from ptqcore.engines.execution import Execution
from ptqcore.engines.graph import WEIGHTED, Graph, Node
from ptqcore.errors import ExportError

Check = Callable[[Graph, Node], str | None]

_UNKNOWN = "unknown"
_NAMELESS = "unknown, for the node has no name"
_FLOAT_INPUT = "its input is not quantized"
# Kinds of nodes that an engine moves a DequantizeLinear across, or a QuantizeLinear back across.
_ONNXRUNTIME_FORWARD = {"MaxPool", "Reshape", "Transpose", "Slice", "Squeeze", "Unsqueeze", "Expand"}
_ONNXRUNTIME_BACKWARD = {"MaxPool", "Reshape", "Transpose", "Slice"}
_OPENVINO_FORWARD = {
    *_ONNXRUNTIME_FORWARD,
    *("AveragePool", "DepthToSpace", "Flatten", "Gather", "Pad", "Resize", "Split"),
}
_FOLDED = {"Add", "BatchNormalization", "Mul"}
_TOLERANCE = 1e-6


def fallback_reasons(model: Path, execution: Execution) -> dict[str, str | None]:
    """Why each Conv, ConvTranspose, Gemm and MatMul of the file did not run in integer; None where it did.

    Nodes without a name go by that of their output; ONNX Runtime leaves no trace of those that it fuses.
    `execution` must have been profiled.

    Raises:
        ExportError: if it was not profiled, or the file cannot be read.
    """
    if not execution.nodes:
        raise ExportError(f"{execution.engine} was not profiled: execute {model.name} with profile=True")
    if find_spec("onnx") is None:
        raise ExportError("onnx is not installed: pip install 'ptqcore[onnx]'")
    try:
        graph = Graph.read(model)
    except Exception as error:  # protobuf raises classes of its own
        raise ExportError(f"cannot read {model.name}: {error}") from error
    products = [node for node in graph.nodes if node.op_type in WEIGHTED]
    integer = _ran_in_integer(graph, products, execution)
    checks = _CHECKS[execution.engine]
    return {
        _key(node): None if _key(node) in integer else _reason(graph, node, checks) for node in products
    }


def _key(node: Node) -> str:
    return node.name or node.output[0]


def _reason(graph: Graph, node: Node, checks: tuple[Check, ...]) -> str:
    unknown = _UNKNOWN if node.name else _NAMELESS
    return next((reason for check in checks if (reason := check(graph, node))), unknown)


def _ran_in_integer(graph: Graph, products: list[Node], execution: Execution) -> set[str]:
    """Keys of the products that an integer node was made of."""
    names = {alias for node in graph.nodes for alias in (*node.output, node.name) if alias}
    ran: dict[str, bool] = {}
    for executed in execution.nodes:
        for source in executed.sources:
            name = _in_file(source, names)
            ran[name] = ran.get(name, False) or executed.integer
    return {_key(node) for node in products if any(ran.get(name) for name in _traces(graph, node, ran))}


def _traces(graph: Graph, node: Node, ran: dict[str, bool]) -> list[str]:
    """The names that a node may have left; where there is none, those of what was folded into it."""
    own = [node.name, *node.output]
    reader = graph.only_reader(node.output[0])
    if any(name in ran for name in own) or reader is None or reader.op_type not in _FOLDED:
        return own
    return [reader.name, *reader.output]


def _in_file(executed: str, names: set[str]) -> str:
    """The name of the file that an engine's name begins with: `_token_1`, `/WithoutBiases` are appended."""
    ends = [len(executed), *(match.start() for match in re.finditer("[_/]", executed))]
    return next((executed[:end] for end in sorted(ends, reverse=True) if executed[:end] in names), executed)


def _onnxruntime_convtranspose(graph: Graph, node: Node) -> str | None:
    return "ONNX Runtime has no integer ConvTranspose" if node.op_type == "ConvTranspose" else None


def _onnxruntime_operands(graph: Graph, node: Node) -> str | None:
    through = _ONNXRUNTIME_FORWARD | ({"Pad"} if node.op_type == "Conv" else set())
    return _first(graph, node, through) or _second(graph, node, _ONNXRUNTIME_FORWARD)


def _openvino_operands(graph: Graph, node: Node) -> str | None:
    return _first(graph, node, _OPENVINO_FORWARD) or _second(graph, node, _OPENVINO_FORWARD)


def _first(graph: Graph, node: Node, through: Set[str]) -> str | None:
    """Whether the first operand comes from a quantizer of 8 bits."""
    source = graph.dequantizer(node.input[0], through)
    if source is not None:
        return _wrong_type("its input is quantized to", graph.code_type(source))
    before = graph.made_by(node.input[0], through)
    return f"the output of the {before.op_type} before it is not quantized" if before else _FLOAT_INPUT


def _second(graph: Graph, node: Node, through: Set[str]) -> str | None:
    """Whether the second operand comes from a quantizer of 8 bits with one scale per tensor or channel."""
    source = graph.dequantizer(node.input[1], through)
    if source is None:
        constant = graph.made_by(node.input[1], through) is None
        return "its weight is not quantized" if constant else "its second input is not quantized"
    if any(attribute.name == "block_size" and attribute.i for attribute in source.attribute):
        return "its weight is quantized in blocks"
    return _wrong_type("its weight is stored as", graph.code_type(source))


def _wrong_type(what: str, kind: str) -> str | None:
    return None if kind in ("INT8", "UINT8") else f"{what} {kind}"


def _onnxruntime_output(graph: Graph, node: Node) -> str | None:
    """Whether the node's output reaches one quantizer, across nothing that must be computed in float."""
    reader = _next(graph, node)
    if node.op_type == "MatMul":
        return _onnxruntime_matmul_bias(graph, reader)
    if reader is None:
        return _no_quantizer_after(graph, node)
    if reader.op_type == "QuantizeLinear":
        return _wrong_type("its output is quantized to", graph.code_type(reader))
    return _activation(graph, node, reader)


def _activation(graph: Graph, node: Node, reader: Node) -> str | None:
    after = _next(graph, reader)
    quantized = after is not None and after.op_type == "QuantizeLinear"
    if reader.op_type in ("Relu", "Clip") and quantized:
        outside = not _within(graph, reader, after)
        return f"the quantizer after its {reader.op_type} reaches beyond it" if outside else None
    if node.op_type == "Conv":
        return f"there is no quantizer between it and the {reader.op_type} after it"
    return _no_quantizer_after(graph, node)


def _next(graph: Graph, node: Node) -> Node | None:
    """The one node that reads the output, looking on across nodes that only move values."""
    reader = graph.only_reader(node.output[0])
    while reader is not None and reader.op_type in _ONNXRUNTIME_BACKWARD:
        reader = graph.only_reader(reader.output[0])
    return reader


def _no_quantizer_after(graph: Graph, node: Node) -> str | None:
    if node.op_type == "Gemm":
        float_bias = len(node.input) > 2 and graph.dequantizer(node.input[2]) is None
        return "its output is not quantized and its bias is float" if float_bias else None
    readers = {reader.op_type for reader in graph.consumers.get(node.output[0], [])}
    if "QuantizeLinear" in readers:
        return "its output is also used unquantized"
    return "its output is not quantized"


def _onnxruntime_matmul_bias(graph: Graph, reader: Node | None) -> str | None:
    """With fixed shapes, a MatMul and its bias become a Gemm, which then falls under the rule for Gemm."""
    if reader is None or reader.op_type != "Add" or graph.constants.keys().isdisjoint(reader.input):
        return None
    after = _next(graph, reader)
    quantized = after is not None and after.op_type == "QuantizeLinear"
    return None if quantized else "the Add after it has a float bias and its output is not quantized"


def _within(graph: Graph, clip: Node, quantizer: Node) -> bool:
    """Whether a quantizer expresses nothing that the Relu or Clip before it cuts off, if that is known."""
    expressed = graph.range(quantizer)
    if expressed is None:
        return True
    low, high = (0.0, np.inf) if clip.op_type == "Relu" else _bounds(graph, clip)
    margin = _TOLERANCE * (expressed[1] - expressed[0])
    return expressed[0] >= low - margin and expressed[1] <= high + margin


def _bounds(graph: Graph, clip: Node) -> tuple[float, float]:
    bounds = [-np.inf, np.inf]
    for index, name in enumerate(list(clip.input)[1:3]):
        if name in graph.constants:
            bounds[index] = graph.value(name).item()
    return bounds[0], bounds[1]


def _openvino_weight(graph: Graph, node: Node) -> str | None:
    source = graph.dequantizer(node.input[1], _OPENVINO_FORWARD)
    if source is None or source.input[0] not in graph.constants:
        return None
    zero_point = graph.zero_point(source)
    return "its weight has a zero point" if zero_point is not None and zero_point.any() else None


def _openvino_convtranspose(graph: Graph, node: Node) -> str | None:
    source = graph.dequantizer(node.input[0], _OPENVINO_FORWARD)
    if node.op_type != "ConvTranspose" or source is None:
        return None
    zero_point = graph.zero_point(source)
    return "the zero point of its input is not 0" if zero_point is not None and zero_point.any() else None


def _openvino_two_activations(graph: Graph, node: Node) -> str | None:
    first, second = (graph.dequantizer(name, _OPENVINO_FORWARD) for name in node.input[:2])
    if node.op_type != "MatMul" or first is None or second is None or second.input[0] in graph.constants:
        return None
    zero_points = [graph.zero_point(source) for source in (first, second)]
    nonzero = any(zero_point is not None and zero_point.any() for zero_point in zero_points)
    return "a product of two activations needs zero points of 0" if nonzero else None


_CHECKS: dict[str, tuple[Check, ...]] = {
    "onnxruntime": (_onnxruntime_convtranspose, _onnxruntime_operands, _onnxruntime_output),
    "openvino": (
        _openvino_operands,
        _openvino_weight,
        _openvino_convtranspose,
        _openvino_two_activations,
    ),
}
