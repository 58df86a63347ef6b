"""Tiny quantized graphs in the real engines: their outputs, what ran in integer, and how failures read."""

import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pytest

from ptqcore.engines import ENGINES, ExecutedNode, Execution, execute, execution, fallback_reasons
from ptqcore.errors import ExportError

onnx = pytest.importorskip("onnx")

CHANNELS, SIZE = 8, 6
SCALE, ZERO_POINT = 0.03, 120
WEIGHT_SCALE = 0.01


@dataclass
class Writer:
    """Writes a graph node by node; every value is named after the node that makes it."""

    nodes: list = field(default_factory=list)
    constants: list = field(default_factory=list)
    inputs: list = field(default_factory=list)
    outputs: list = field(default_factory=list)

    def input(self, name: str, shape: list) -> str:
        self.inputs.append(onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, shape))
        return name

    def output(self, name: str) -> None:
        self.outputs.append(onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, None))

    def constant(self, array, kind: str | None = None) -> str:
        name, array = f"constant{len(self.constants)}", np.asarray(array)
        if kind is None:
            tensor = onnx.numpy_helper.from_array(array, name)
        else:
            codes = array.ravel().tolist()
            tensor = onnx.helper.make_tensor(name, getattr(onnx.TensorProto, kind), array.shape, codes)
        self.constants.append(tensor)
        return name

    def node(self, op: str, *inputs: str, name: str | None = None, **attributes) -> str:
        output = f"{name or op}{len(self.nodes)}.out"
        made = onnx.helper.make_node(op, list(inputs), [output], name=name or output[:-4], **attributes)
        self.nodes.append(made)
        return output

    def quantized(self, x: str, scale=SCALE, zero_point=ZERO_POINT, kind="UINT8") -> str:
        parameters = [self.constant(np.float32(scale)), self.constant(zero_point, kind)]
        return self.node("DequantizeLinear", self.node("QuantizeLinear", x, *parameters), *parameters)

    def weight(self, shape, kind="INT8", zero_point=0, axis=0, **attributes) -> str:
        low, high = (-8, 8) if kind.endswith("INT4") else (-127, 128)
        codes = np.random.default_rng(0).integers(low, high, shape) + max(zero_point, 0)
        scales = np.full(shape[axis], WEIGHT_SCALE, np.float32)
        zeros = self.constant(np.full(shape[axis], zero_point), kind)
        codes = self.constant(codes, kind)
        return self.node("DequantizeLinear", codes, self.constant(scales), zeros, axis=axis, **attributes)

    def bias(self, n: int) -> str:
        codes = np.random.default_rng(1).integers(-2000, 2000, n, np.int32)
        scales = np.full(n, np.float32(SCALE) * np.float32(WEIGHT_SCALE), np.float32)
        zeros = self.constant(np.zeros(n, np.int32))
        return self.node("DequantizeLinear", self.constant(codes), self.constant(scales), zeros, axis=0)

    def write(self, path: Path) -> Path:
        graph = onnx.helper.make_graph(self.nodes, "graph", self.inputs, self.outputs, self.constants)
        opset = [onnx.helper.make_opsetid("", 21)]
        onnx.save(onnx.helper.make_model(graph, opset_imports=opset, ir_version=10), path)
        return path


@pytest.fixture(params=list(ENGINES), scope="module")
def engine(request) -> str:
    pytest.importorskip(request.param)
    return request.param


def convolution(w: Writer, x: str, name: str) -> str:
    return w.node("Conv", x, w.weight((CHANNELS, CHANNELS, 1, 1)), w.bias(CHANNELS), name=name)


def write_convolution(path: Path, input_name: str = "x", batch: int | str = 1) -> Path:
    w = Writer()
    x = w.quantized(w.input(input_name, [batch, CHANNELS, SIZE, SIZE]))
    w.output(w.quantized(convolution(w, x, "conv"), 0.05, 100))
    return w.write(path)


def sample(seed: int = 0, batch: int = 1) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((batch, CHANNELS, SIZE, SIZE)).astype(np.float32)


def integer_convolution(x: np.ndarray) -> np.ndarray:
    """What the graph of `write_convolution` says, computed in integers with numpy."""
    weight = np.random.default_rng(0).integers(-127, 128, (CHANNELS, CHANNELS))
    bias = np.random.default_rng(1).integers(-2000, 2000, CHANNELS, np.int32)
    codes = np.clip(np.rint(x / np.float32(SCALE)) + ZERO_POINT, 0, 255).astype(np.int64) - ZERO_POINT
    sums = np.einsum("oc,nchw->nohw", weight, codes) + bias[:, None, None]
    return (np.clip(np.rint(sums * (SCALE * WEIGHT_SCALE / 0.05)) + 100, 0, 255) - 100) * 0.05


def test_outputs_are_those_of_integer_arithmetic_for_every_sample(engine, tmp_path):
    model = write_convolution(tmp_path / "m.onnx", "in/put:0", "batch")
    arrays = [sample(0), sample(1, batch=3)]
    done = execute(engine, model, [{"in/put:0": array} for array in arrays])
    assert done.engine == engine
    assert (done.nodes, done.milliseconds, done.minimum, done.median) == ([], [], None, None)
    for array, outputs in zip(arrays, done.outputs, strict=True):
        (output,) = outputs.values()
        assert list(outputs) == [onnx.load(model).graph.output[0].name]
        assert np.abs(output - integer_convolution(array)).max() < 1e-4


def test_a_profiled_and_timed_run_reports_both(engine, tmp_path):
    model = write_convolution(tmp_path / "m.onnx")
    done = execute(engine, model, [{"x": sample()}], repeats=5, profile=True)
    assert len(done.milliseconds) == 5
    assert 0 < done.minimum <= done.median
    (product,) = [node for node in done.nodes if "Conv" in node.op and "Convert" not in node.op]
    assert (product.integer, product.inputs_integer) == (True, True)
    assert product.microseconds > 0
    assert fallback_reasons(model, done) == {"conv": None}


def test_conversions_left_in_the_graph_are_counted():
    ops = ["QuantizeLinear", "QLinearConv", "Reshape", "DequantizeLinear", "FakeQuantize", "Convert"]
    nodes = [ExecutedNode(str(i), op, False, False, 1.0) for i, op in enumerate(ops)]
    assert Execution("openvino", [], [3.0, 1.0, 2.0], nodes).conversions == 4
    assert Execution("openvino", [], [3.0, 1.0, 2.0], nodes).median == 2.0


def activation(op: str, scale: float = SCALE, zero_point: int = 0, **limits: float):
    def build(w: Writer, x: str, name: str) -> str:
        bounds = [w.constant(np.float32(limit)) for limit in limits.values()]
        return w.quantized(w.node(op, convolution(w, x, name), *bounds), scale, zero_point)

    return build


def weighted(**how):
    def build(w: Writer, x: str, name: str) -> str:
        weight = w.weight((CHANNELS, CHANNELS, 1, 1), **how)
        return w.quantized(w.node("Conv", x, weight, name=name))

    return build


def behind(op: str, *extra: Callable[[Writer], str], **attributes):
    def build(w: Writer, x: str, name: str) -> str:
        moved = w.node(op, x, *(make(w) for make in extra), **attributes)
        return w.quantized(convolution(w, moved, name))

    return build


def float_weight(w: Writer, x: str, name: str) -> str:
    weight = w.constant(np.ones((CHANNELS, CHANNELS, 1, 1), np.float32))
    return w.node("Conv", x, weight, name=name)


def also_unquantized(w: Writer, x: str, name: str) -> str:
    y = convolution(w, x, name)
    w.output(w.node("ReduceMax", y))
    return w.quantized(y)


def sixteen_bits(w: Writer, x: str, name: str) -> str:
    return w.quantized(convolution(w, w.quantized("x", 0.001, 30000, "UINT16"), name))


def transposed(zero_point: int):
    def build(w: Writer, x: str, name: str) -> str:
        x = w.quantized(x, SCALE, zero_point)
        return w.quantized(
            w.node("ConvTranspose", x, w.weight((CHANNELS, CHANNELS, 1, 1), axis=1), name=name)
        )

    return build


def gemm(quantized: bool, float_bias: bool):
    def build(w: Writer, x: str, name: str) -> str:
        x = w.quantized(w.node("Reshape", x, w.constant(np.array([-1, CHANNELS]))))
        bias = w.constant(np.ones(CHANNELS, np.float32)) if float_bias else w.bias(CHANNELS)
        y = w.node("Gemm", x, w.weight((CHANNELS, CHANNELS)), bias, name=name, transB=1)
        return w.quantized(y) if quantized else y

    return build


def matmul(quantized: bool = True, float_bias: bool = False, weight: dict | None = None):
    def build(w: Writer, x: str, name: str) -> str:
        y = w.node("MatMul", x, w.weight((SIZE, CHANNELS), **{"axis": 1, **(weight or {})}), name=name)
        if float_bias:
            y = w.node("Add", y, w.constant(np.ones(CHANNELS, np.float32)))
        return w.quantized(y) if quantized else y

    return build


def two_activations(kind: str, zero_point: int):
    def build(w: Writer, x: str, name: str) -> str:
        x, y = w.quantized(x, SCALE, zero_point, kind), w.quantized(x, SCALE / 2, zero_point, kind)
        return w.quantized(w.node("MatMul", x, y, name=name))

    return build


def residual(w: Writer, x: str, name: str) -> str:
    y = w.quantized(convolution(w, x, name), 0.05, 100)
    return w.quantized(w.node("Add", x, y), 0.06, 100)


NO_TRANSPOSED = "ONNX Runtime has no integer ConvTranspose"
SAME_SHAPE = [1, CHANNELS, SIZE, SIZE]

# How a product is written: why ONNX Runtime and why OpenVINO do not run it in integer (None: they do).
CASES = {
    "relu with zero point at the end": (activation("Relu"), None, None),
    "relu inside the range": (
        activation("Relu", zero_point=9),
        "the quantizer after its Relu reaches beyond it",
        None,
    ),
    "clip that the quantizer does": (activation("Clip", 6 / 255, low=0.0, high=6.0), None, None),
    "clip inside the range": (
        activation("Clip", 6.1 / 255, low=0.0, high=6.0),
        "the quantizer after its Clip reaches beyond it",
        None,
    ),
    "sigmoid": (
        activation("Sigmoid"),
        "there is no quantizer between it and the Sigmoid after it",
        None,
    ),
    "no quantizer after": (convolution, "its output is not quantized", None),
    "also unquantized": (also_unquantized, "its output is also used unquantized", None),
    "residual": (residual, None, None),
    "float weight": (float_weight, "its weight is not quantized", "its weight is not quantized"),
    "four bits": (
        weighted(kind="INT4"),
        "its weight is stored as INT4",
        "its weight is stored as INT4",
    ),
    "weight with zero point": (
        weighted(kind="UINT8", zero_point=127),
        None,
        "its weight has a zero point",
    ),
    "sixteen bits": (
        sixteen_bits,
        "its input is quantized to UINT16",
        "its input is quantized to UINT16",
    ),
    "behind a maxpool": (behind("MaxPool", kernel_shape=[2, 2]), None, None),
    "behind a relu": (
        behind("Relu"),
        "the output of the Relu before it is not quantized",
        "the output of the Relu before it is not quantized",
    ),
    "behind a gather": (
        behind("Gather", lambda w: w.constant(np.arange(CHANNELS)[::-1]), axis=1),
        "the output of the Gather before it is not quantized",
        None,
    ),
    "transposed with zero point": (
        transposed(7),
        NO_TRANSPOSED,
        "the zero point of its input is not 0",
    ),
    "transposed without zero point": (transposed(0), NO_TRANSPOSED, None),
    "gemm": (gemm(quantized=True, float_bias=True), None, None),
    "gemm without quantizer": (gemm(quantized=False, float_bias=False), None, None),
    "gemm without quantizer, float bias": (
        gemm(quantized=False, float_bias=True),
        "its output is not quantized and its bias is float",
        None,
    ),
    "matmul": (matmul(), None, None),
    "matmul without quantizer": (matmul(quantized=False), None, None),
    "matmul, float bias, without quantizer": (
        matmul(quantized=False, float_bias=True),
        "the Add after it has a float bias and its output is not quantized",
        None,
    ),
    "two activations with zero points": (
        two_activations("UINT8", ZERO_POINT),
        None,
        "a product of two activations needs zero points of 0",
    ),
    "two symmetric activations": (two_activations("INT8", 0), None, None),
}


@pytest.fixture(scope="module")
def reasons(engine, tmp_path_factory) -> tuple[str, dict]:
    """All cases side by side in one file, run once per engine."""
    w = Writer()
    x = w.input("x", SAME_SHAPE)
    for name, (build, *_) in CASES.items():
        w.output(build(w, w.quantized(x), name))
    model = w.write(tmp_path_factory.mktemp("engines") / "cases.onnx")
    return engine, fallback_reasons(model, execute(engine, model, [{"x": sample()}], profile=True))


@pytest.mark.parametrize("case", CASES)
def test_integer_execution_and_the_reason_against_it(case, reasons):
    engine, found = reasons
    assert found[case] == CASES[case][1 + list(ENGINES).index(engine)]


def test_every_case_is_a_product_of_the_file(reasons):
    assert set(reasons[1]) == set(CASES)


def test_a_file_without_quantizers_runs_in_float(engine, tmp_path):
    w = Writer()
    weight = w.constant(np.ones((CHANNELS, CHANNELS, 1, 1), np.float32))
    w.output(w.node("Conv", w.input("x", SAME_SHAPE), weight, name="conv"))
    model = w.write(tmp_path / "m.onnx")
    done = execute(engine, model, [{"x": sample()}], profile=True)
    assert fallback_reasons(model, done) == {"conv": "its input is not quantized"}
    assert not any(node.integer for node in done.nodes)


def test_a_corrupt_file_is_one_sentence(engine, tmp_path):
    (tmp_path / "m.onnx").write_bytes(b"not a model")
    with pytest.raises(ExportError, match=rf"^{engine} failed on m\.onnx: .+") as caught:
        execute(engine, tmp_path / "m.onnx", [])
    assert "\n" not in str(caught.value)


def test_a_wrong_input_is_one_sentence(engine, tmp_path):
    model = write_convolution(tmp_path / "m.onnx")
    with pytest.raises(ExportError, match=rf"^{engine} failed on m\.onnx: .+") as caught:
        execute(engine, model, [{"y": sample()}])
    assert "\n" not in str(caught.value)


@pytest.fixture
def worker(monkeypatch, tmp_path):
    """Puts a shell script in the place of the worker."""
    monkeypatch.setattr(execution, "find_spec", lambda name: name)
    (tmp_path / "m.onnx").touch()

    def replace(script: str) -> Path:
        program = tmp_path / "python"
        program.write_text(f"#!/bin/sh\n{script}\n")
        program.chmod(0o755)
        monkeypatch.setattr(sys, "executable", str(program))
        return tmp_path / "m.onnx"

    return replace


@pytest.mark.skipif(sys.platform == "win32", reason="a shell script stands in for the worker")
@pytest.mark.parametrize(
    ("script", "sentence"),
    [
        ("kill -SEGV $$", "openvino crashed with SIGSEGV on m.onnx"),
        ("echo first >&2; echo last >&2; kill -KILL $$", "openvino crashed with SIGKILL on m.onnx: last"),
        ("exit 3", "openvino ended with exit code 3 on m.onnx"),
        ("exec sleep 60", "openvino did not finish m.onnx within 0.3 s"),
    ],
)
def test_a_dead_worker_is_one_sentence(worker, script, sentence):
    with pytest.raises(ExportError) as caught:
        execute("openvino", worker(script), [], timeout_s=0.3 if "sleep" in script else 60)
    assert str(caught.value) == sentence


def test_a_missing_engine_names_what_to_install(monkeypatch, tmp_path):
    monkeypatch.setattr(execution, "find_spec", lambda name: None)
    for engine, extra in ENGINES.items():
        with pytest.raises(
            ExportError, match=rf"^{engine} is not installed: pip install 'ptqcore\[{extra}\]'$"
        ):
            execute(engine, tmp_path / "m.onnx", [])


def test_a_request_that_cannot_be_met_is_refused(engine, tmp_path):
    with pytest.raises(ExportError, match=r"no engine 'onnxruntim'; did you mean 'onnxruntime'\?$"):
        execute("onnxruntim", tmp_path / "m.onnx", [])
    with pytest.raises(ExportError, match="there is no file"):
        execute(engine, tmp_path / "m.onnx", [])
    model = write_convolution(tmp_path / "m.onnx")
    with pytest.raises(ExportError, match="needs a sample of inputs"):
        execute(engine, model, [], profile=True)
    with pytest.raises(ExportError, match=r"execute m\.onnx with profile=True"):
        fallback_reasons(model, execute(engine, model, []))
