"""An ONNX file as a graph that can be asked for the quantizers around a node."""

from collections import defaultdict
from collections.abc import Set
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np

Node = Any  # onnx.NodeProto

WEIGHTED = {"Conv", "ConvTranspose", "Gemm", "MatMul", "MatMulNBits"}
_RANGES = {
    "INT8": (-128, 127),
    "UINT8": (0, 255),
    "INT16": (-32768, 32767),
    "UINT16": (0, 65535),
    "INT4": (-8, 7),
    "UINT4": (0, 15),
}


@dataclass
class Graph:
    """The main graph of a file: who makes a tensor, who reads it, and which tensors are constant."""

    nodes: list[Node]
    producer: dict[str, Node]
    consumers: dict[str, list[Node]]
    constants: dict[str, Any]
    outputs: set[str]
    home: Path

    @classmethod
    def read(cls, path: Path) -> "Graph":
        """Read a file, without the weights it keeps outside."""
        graph = import_module("onnx").load(str(path), load_external_data=False).graph
        constants = {tensor.name: tensor for tensor in graph.initializer}
        consumers: dict[str, list[Node]] = defaultdict(list)
        for node in graph.node:
            if node.op_type == "Constant" and node.attribute[0].name == "value":
                constants[node.output[0]] = node.attribute[0].t
            for name in node.input:
                consumers[name].append(node)
        producer = {name: node for node in graph.node for name in node.output}
        outputs = {value.name for value in graph.output}
        return cls(list(graph.node), producer, consumers, constants, outputs, path.parent)

    def value(self, name: str) -> np.ndarray:
        """A constant as an array."""
        onnx = import_module("onnx")
        return onnx.numpy_helper.to_array(self.constants[name], base_dir=str(self.home))

    def made_by(self, tensor: str, through: Set[str]) -> Node | None:
        """The node that makes `tensor`, looking back through nodes of the kinds `through`."""
        node = self.producer.get(tensor)
        while node is not None and node.op_type in through:
            node = self.producer.get(node.input[0])
        return node

    def dequantizer(self, tensor: str, through: Set[str] = frozenset()) -> Node | None:
        """The DequantizeLinear that makes `tensor`, if it is one."""
        node = self.made_by(tensor, through)
        return node if node is not None and node.op_type == "DequantizeLinear" else None

    def only_reader(self, tensor: str) -> Node | None:
        """The one node that reads `tensor`; None if several do, or if it is an output of the graph."""
        readers = self.consumers.get(tensor, [])
        return readers[0] if len(readers) == 1 and tensor not in self.outputs else None

    def code_type(self, quantizer: Node) -> str:
        """`INT8`, `UINT4`, …: the type of the codes of a QuantizeLinear or DequantizeLinear."""
        types = import_module("onnx").TensorProto.DataType
        for index in (2, 0):
            if len(quantizer.input) > index and quantizer.input[index] in self.constants:
                return str(types.Name(self.constants[quantizer.input[index]].data_type))
        source = self.producer.get(quantizer.input[0])
        if source is not None and source.op_type == "QuantizeLinear":
            return self.code_type(source)
        asked = (entry.i for entry in quantizer.attribute if entry.name == "output_dtype" and entry.i)
        return str(types.Name(next(asked, types.UINT8)))

    def zero_point(self, quantizer: Node) -> np.ndarray | None:
        """The zero point of a quantizer: zero if it has none, None if it is not constant."""
        if len(quantizer.input) < 3 or not quantizer.input[2]:
            return np.zeros((), np.int32)
        name = quantizer.input[2]
        return self.value(name).astype(np.int32) if name in self.constants else None

    def range(self, quantizer: Node) -> tuple[float, float] | None:
        """Smallest and largest value that a quantizer per tensor can express; None if it is not one."""
        zero_point, codes = self.zero_point(quantizer), _RANGES.get(self.code_type(quantizer))
        if quantizer.input[1] not in self.constants or zero_point is None or codes is None:
            return None
        scale = self.value(quantizer.input[1])
        if scale.size != 1 or zero_point.size != 1:
            return None
        low, high = ((code - zero_point.item()) * scale.item() for code in codes)
        return low, high
