"""OpenVINO on the CPU in float32 where it is not integer; what ran is read from its runtime model."""

from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np

from ptqcore.engines.execution import Arrays, ExecutedNode

_INTEGERS = {"i8", "u8", "i4", "u4"}
_PRODUCTS = {"Convolution", "Deconvolution", "FullyConnected", "MatMul"}
# Whatever type these read and write, they compute in float.
_FLOAT_INSIDE = {"Subgraph", "Eltwise", "FakeQuantize", "Convert", "Reorder", "Math", "Softmax"}
_NOT_RUN = {"Input", "Output", "Const"}


def open_session(model: Path, threads: int, profile_in: Path | None) -> "OpenVinoSession":
    """Load `model`; with `profile_in`, count the time of every node."""
    return OpenVinoSession(model, threads, profile_in is not None)


class OpenVinoSession:
    """A compiled model and its one request."""

    def __init__(self, model: Path, threads: int, profile: bool) -> None:
        core = import_module("openvino").Core()
        settings = {
            "INFERENCE_PRECISION_HINT": "f32",  # it would choose bfloat16 where the CPU has it
            "DYNAMIC_QUANTIZATION_GROUP_SIZE": 0,  # it would round float inputs beside narrow weights
            "INFERENCE_NUM_THREADS": threads,
            "PERFORMANCE_HINT": "LATENCY",
            "PERF_COUNT": profile,
        }
        graph = core.read_model(str(model))
        # The compiled model may call an output by the name of a tensor that it found to be the same.
        self._names: list[str] = [output.get_any_name() for output in graph.outputs]
        self._compiled: Any = core.compile_model(graph, "CPU", settings)
        self._request: Any = self._compiled.create_infer_request()

    def run(self, sample: Arrays) -> Arrays:
        """The outputs by name for one sample."""
        self._request.infer(sample)
        tensors = (self._request.get_output_tensor(i) for i in range(len(self._names)))
        return {name: np.array(tensor.data) for name, tensor in zip(self._names, tensors, strict=True)}

    def nodes(self) -> list[ExecutedNode]:
        """What ran, in order."""
        graph = self._compiled.get_runtime_model().get_ordered_ops()
        return [_executed(op) for op in graph if _entry(op, "layerType") not in _NOT_RUN]


def _executed(op: Any) -> ExecutedNode:
    kind = _entry(op, "layerType")
    types = [port.get_element_type().get_type_name() for port in op.inputs()]
    operands = types[:2] if kind in _PRODUCTS else types[:1]
    reads_integers = bool(operands) and all(name in _INTEGERS for name in operands)
    time = _entry(op, "execTimeMcs")
    return ExecutedNode(
        name=op.get_friendly_name(),
        op=kind,
        inputs_integer=reads_integers,
        integer=reads_integers and kind not in _FLOAT_INSIDE,
        microseconds=float(time) if time.isdecimal() else 0.0,
        sources=(op.get_friendly_name(), *filter(None, _entry(op, "originalLayersNames").split(","))),
    )


def _entry(op: Any, key: str) -> str:
    info = op.get_rt_info()
    if key not in info:
        return ""
    entry = info[key]
    return str(getattr(entry, "value", entry))
