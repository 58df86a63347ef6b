"""ONNX Runtime on the CPU, all optimizations on; what ran is read from its profile."""

import json
from importlib import import_module
from pathlib import Path
from typing import Any

from ptqcore.engines.execution import Arrays, ExecutedNode

_INTEGERS = {"int8", "uint8", "int4", "uint4"}
_CONVERSIONS = {"QuantizeLinear", "DequantizeLinear", "Cast"}
_KERNEL = "_kernel_time"


def open_session(model: Path, threads: int, profile_in: Path | None) -> "OnnxRuntimeSession":
    """Load `model`; with `profile_in`, record there what runs."""
    return OnnxRuntimeSession(model, threads, profile_in)


class OnnxRuntimeSession:
    """A session of the CPU execution provider."""

    def __init__(self, model: Path, threads: int, profile_in: Path | None) -> None:
        runtime = import_module("onnxruntime")
        options = runtime.SessionOptions()
        options.intra_op_num_threads = threads
        options.inter_op_num_threads = 1
        options.graph_optimization_level = runtime.GraphOptimizationLevel.ORT_ENABLE_ALL
        options.log_severity_level = 4  # what it fails of is raised; the rest is no concern of the caller
        # Else it would round the float inputs of layers with narrow weights.
        options.add_session_config_entry("session.qdq_matmulnbits_accuracy_level", "1")
        if profile_in is not None:
            options.enable_profiling = True
            options.profile_file_prefix = str(profile_in / "profile")
        self._session: Any = runtime.InferenceSession(
            str(model), options, providers=["CPUExecutionProvider"]
        )
        self._names: list[str] = [output.name for output in self._session.get_outputs()]

    def run(self, sample: Arrays) -> Arrays:
        """The outputs by name for one sample."""
        return dict(zip(self._names, self._session.run(None, sample), strict=True))

    def nodes(self) -> list[ExecutedNode]:
        """What ran; ends the profile."""
        events = json.loads(Path(self._session.end_profiling()).read_text(encoding="utf-8"))
        nodes: dict[str, ExecutedNode] = {}
        for event in events:
            if event.get("cat") == "Node" and event["name"].endswith(_KERNEL):
                node = _executed(event)
                before = nodes.get(node.name)
                if before is None or node.microseconds < before.microseconds:
                    nodes[node.name] = node
        return list(nodes.values())


def _executed(event: dict[str, Any]) -> ExecutedNode:
    name = event["name"].removesuffix(_KERNEL)
    op = event["args"]["op_name"]
    reads_integers = op.startswith("QLinear") or _first_type(event) in _INTEGERS
    return ExecutedNode(
        name=name,
        op=op,
        inputs_integer=reads_integers,
        integer=reads_integers and op not in _CONVERSIONS,
        microseconds=float(event["dur"]),
        sources=(name,),
    )


def _first_type(event: dict[str, Any]) -> str | None:
    """Type of the first input that is there: `input_type_shape` is a list of {type: shape}."""
    return next((kind for entry in event["args"]["input_type_shape"] for kind in entry), None)
