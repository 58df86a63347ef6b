"""Small verbs to change an ONNX graph: constants, nodes, and who reads what."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
from onnx_ir.passes import common

from ptqcore.errors import ExportError

_MOVING = {
    *("DepthToSpace", "Expand", "Flatten", "Gather", "Identity", "MaxPool", "Pad", "Reshape", "Resize"),
    *("Slice", "SpaceToDepth", "Split", "Squeeze", "Tile", "Transpose", "Unsqueeze"),
}


class OnnxEditor:
    """A graph that is being changed. New nodes are appended; `sort` puts them where they belong."""

    def __init__(self, model: ir.Model) -> None:
        self.model, self.graph = model, model.graph
        self._made: dict[str, ir.Value] = {}

    def nodes(self, *kinds: str) -> list[ir.Node]:
        """The nodes of these kinds (all, if none is named), in order, as they are now."""
        return [node for node in self.graph if not kinds or node.op_type in kinds]

    def constant(self, name: str, array: np.ndarray, dtype: ir.DataType | None = None) -> ir.Value:
        """The constant of that name, made at the first call."""
        known = self.graph.initializers.get(name)
        if known is not None:
            return known
        tensor = ir.tensor(np.asarray(array, order="C"), dtype=dtype, name=name)
        value = ir.Value(
            name=name, const_value=tensor, shape=ir.Shape(array.shape), type=ir.TensorType(tensor.dtype)
        )
        self.graph.register_initializer(value)
        return value

    def codes(self, name: str, array: np.ndarray, dtype: ir.DataType) -> ir.Value:
        """A constant of whole numbers in an integer type, however narrow."""
        return self.constant(name, array.astype(dtype.numpy()), dtype)

    def made(self, name: str) -> ir.Value | None:
        """The output of the node of that name, if `add` made one."""
        return self._made.get(name)

    def add(
        self, op: str, inputs: Sequence[ir.Value | None], name: str, domain: str = "", **attributes: Any
    ) -> ir.Value:
        """The output of a new node; `domain`: whose operator it is, if not the standard's."""
        node = ir.node(op, inputs, attributes, domain=domain, name=name)
        self.graph.opset_imports.setdefault(domain, 1)
        self.graph.append(node)
        (output,) = node.outputs
        output.name = f"{name}.out"
        self._made[name] = output
        return output

    def redirect(self, old: ir.Value, new: ir.Value, keep: ir.Node | None = None) -> None:
        """Let whatever reads `old` read `new`; `keep` goes on to read `old`. The shape goes along."""
        for user, index in list(old.uses()):
            if user is not keep:
                user.replace_input_with(index, new)
        for index, output in enumerate(self.graph.outputs):
            if output is old:
                name, old.name = old.name, f"{old.name}.before"
                self.graph.outputs[index], new.name = new, name
        if new.shape is None:
            new.shape, new.type = old.shape, old.type

    def tidy(self) -> None:
        """Drop nodes and constants that nothing reads, and sort the others."""
        common.RemoveUnusedNodesPass()(self.model)
        self.graph.sort()


def array(value: ir.Value | None) -> np.ndarray | None:
    """A constant as an array; None for any other value."""
    if value is None or value.const_value is None:
        return None
    return value.const_value.numpy()


def attribute(node: ir.Node, name: str, default: Any) -> Any:
    """The value of a node's attribute."""
    found = node.attributes.get(name)
    return default if found is None else found.value


def only_reader(value: ir.Value) -> ir.Node | None:
    """The one node that reads a value; None if several do, or if it leaves the graph."""
    readers = [user for user, _ in value.uses()]
    return readers[0] if len(readers) == 1 and not value.is_graph_output() else None


def moves(node: ir.Node) -> bool:
    """Whether a node only moves values: what it makes lies on the grid of what it reads."""
    if node.op_type == "Resize":
        return bool(attribute(node, "mode", "nearest") == "nearest")
    if node.op_type == "Pad":
        filling = array(node.inputs[2]) if len(node.inputs) > 2 else None
        return filling is None or not filling.any()
    return node.op_type in _MOVING


def source(value: ir.Value | None, *kinds: str) -> ir.Node | None:
    """The node that makes a value, if it is of one of these kinds."""
    node = None if value is None else value.producer()
    return node if node is not None and node.op_type in kinds else None


def save(model: ir.Model, path: Path, largest: int, beside: str) -> None:
    """Write a model and check that it is well formed; one that is too large keeps its constants beside it.

    Raises:
        ExportError: if it is not what the standard says.
    """
    size = sum(value.const_value.nbytes for value in model.graph.initializers.values() if value.const_value)
    ir.save(model, path, external_data=beside if size > largest else None)
    try:
        onnx.checker.check_model(str(path), full_check=True)
    except Exception as error:  # its own classes, and those of shape inference
        raise ExportError(f"export to ONNX: the graph is not valid: {error}") from error
