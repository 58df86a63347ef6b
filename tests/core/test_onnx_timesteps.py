"""Ranges for each timestep in an ONNX file: engines look them up by value and compute in integers."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from tiny_task import TinyTask, run
from torch import nn

import ptqcore
from ptqcore import ExportError, QuantSpec, Step, Timesteps, TimestepTable
from ptqcore.engines import execute
from ptqcore.export.onnx import OnnxQDQ
from ptqcore.export.parity import in_turn
from ptqcore.modules import QuantConv2d, QuantLinear
from ptqcore.packed import QuantizedTensor

onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")
pytest.importorskip("openvino")

ENGINES = ["onnxruntime", "openvino"]
VALUES = [0.0, 10.0, 30.0]
LOW, HIGH = torch.tensor([-4.5, -1.0, -8.0]), torch.tensor([4.0, 3.0, 0.0])


def quantized(layer, bits=8, weight_bits=8):
    """A layer whose weight is on its grid already, with the ranges above."""
    kind = QuantConv2d if isinstance(layer, nn.Conv2d) else QuantLinear
    weights = QuantSpec(bits=weight_bits, granularity="channel")
    inputs = QuantSpec(bits=bits, symmetric=False, granularity="timestep", timesteps=len(VALUES))
    made, rows = kind(layer, weights, inputs), layer.weight.detach().flatten(1)
    low, high = rows.amin(1, keepdim=True), rows.amax(1, keepdim=True)
    made.set_weight(QuantizedTensor.from_range(layer.weight, low, high, weights))
    made.input_quantizer.set_range(LOW, HIGH)
    return made


class Timed(nn.Module):
    def __init__(self, layer):
        super().__init__()
        self.layer = layer

    def forward(self, x, timestep):
        return self.layer(x)


def exported(layer, sample, folder, unseen="nearest"):
    model = Timed(layer).eval()
    Timesteps.of(VALUES, "timestep", unseen).attach(model)
    task = TinyTask(TinyTask.Options(), 0, folder)
    OnnxQDQ().export(model, task, [sample], folder)
    return model, task


def outputs(folder, engine, *samples):
    inputs = [{name: one.numpy() for name, one in sample.items()} for sample in samples]
    return [one["output"] for one in execute(engine, folder / "model.onnx", inputs).outputs]


def rounded(x, row, levels=255):
    """The closed form of an asymmetric grid."""
    scale = (HIGH[row] - LOW[row]) / levels
    zero_point = torch.round(-LOW[row] / scale)
    return ((torch.round(x / scale) + zero_point).clamp(0, levels) - zero_point) * scale


def identity():
    layer = nn.Linear(8, 8)
    layer.weight.data, layer.bias.data = torch.eye(8) * 127 / 128, torch.arange(8.0)
    return layer


GENERATOR = torch.Generator().manual_seed(0)
X = 3 * torch.randn(6, 8, generator=GENERATOR)


@pytest.mark.parametrize("bits", [8, 4])
def test_each_row_is_rounded_to_the_grid_of_the_nearest_timestep(bits, tmp_path):
    exported(quantized(identity(), bits), {"x": X[:2], "timestep": torch.tensor([10, 0])}, tmp_path)
    times = [-5, 5, 19, 20, 21, 1000]  # half way between two: the later one
    rows = [0, 1, 1, 2, 2, 2]
    for engine in ENGINES:
        (found,) = outputs(tmp_path, engine, {"x": X, "timestep": torch.tensor(times)})
        for place, row in enumerate(rows):
            expected = rounded(X[place], row, 2**bits - 1) * 127 / 128 + torch.arange(8.0)
            np.testing.assert_allclose(found[place], expected.numpy(), rtol=1e-5, atol=1e-5)


def test_one_timestep_may_be_that_of_the_whole_batch(tmp_path):
    exported(quantized(identity()), {"x": X, "timestep": torch.tensor(10.0)}, tmp_path)
    wider = torch.cat([X, X])
    for engine in ENGINES:
        (found,) = outputs(tmp_path, engine, {"x": wider, "timestep": torch.tensor(31.5)})
        expected = rounded(wider, 2) * 127 / 128 + torch.arange(8.0)
        np.testing.assert_allclose(found, expected.numpy(), rtol=1e-5, atol=1e-5)


def test_convolutions_are_padded_with_zeros_whatever_their_code(tmp_path):
    layer = nn.Conv2d(1, 1, 3, padding=1, bias=False)
    layer.weight.data.fill_(127 / 128)
    sample = {"x": torch.ones(2, 1, 4, 4), "timestep": torch.tensor([0, 10])}
    exported(quantized(layer), sample, tmp_path)
    counts = F.conv2d(torch.ones(1, 1, 4, 4), torch.ones(1, 1, 3, 3), padding=1)
    assert sorted(set(counts.flatten().tolist())) == [4, 6, 9]
    for engine in ENGINES:
        (found,) = outputs(tmp_path, engine, {"x": sample["x"], "timestep": torch.tensor([0, 10])})
        for place in range(2):
            expected = counts[0] * rounded(torch.tensor(1.0), place) * 127 / 128
            np.testing.assert_allclose(found[place], expected.numpy(), rtol=1e-5)


@pytest.mark.parametrize(
    "sizes", [{"stride": 2}, {"dilation": 2, "padding": 1}, {"kernel_size": 1, "stride": 2}]
)
def test_windows_of_any_kind_are_those_of_the_convolution(sizes, tmp_path):
    layer = nn.Conv2d(2, 3, **{"kernel_size": (3, 2)} | sizes)
    x = torch.randn(2, 2, 9, 8, generator=GENERATOR)
    model, task = exported(quantized(layer), {"x": x, "timestep": torch.tensor([0, 30])}, tmp_path)
    samples = [{"x": x, "timestep": torch.tensor([first, 30])} for first in (0, 10)]
    record = OnnxQDQ().verify(model, task, samples, tmp_path)
    assert record.largest_difference == 0
    for engine in record.engines:
        assert not engine.problem
        assert engine.layers == {"layer": None}
        assert engine.largest_steps < 1e-3


def test_sums_that_are_not_those_of_the_weight_are_seen(tmp_path):
    sample = {"x": X, "timestep": torch.tensor(10)}
    model, _ = exported(quantized(identity(), weight_bits=4), sample, tmp_path)
    assert OnnxQDQ().difference(tmp_path / "model.onnx", model) == 0
    file = onnx.load(tmp_path / "model.onnx")
    (sums,) = (tensor for tensor in file.graph.initializer if tensor.name == "layer.sums")
    changed = onnx.numpy_helper.to_array(sums) + np.float32(1e-3)
    sums.CopyFrom(onnx.numpy_helper.from_array(changed, sums.name))
    onnx.save(file, tmp_path / "model.onnx")
    with pytest.raises(ExportError, match="layer layer is corrected by other sums"):
        OnnxQDQ().difference(tmp_path / "model.onnx", model)


class Mixed(nn.Module):
    """Convolutions, linear layers, sums and attention with heads folded into the batch, and a feature of
    the timestep alone."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.stem, self.down = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 3, stride=2, padding=1)
        self.norm, self.shortcut = nn.GroupNorm(2, 8), nn.Conv2d(8, 8, 1)
        self.time, self.feature = nn.Linear(4, 8), nn.Linear(8, 8)
        self.qkv, self.out = nn.Linear(8, 24), nn.Linear(8, 8)
        self.last = nn.Conv2d(8, 3, 3, padding=1)

    def forward(self, x, timestep):
        t = timestep.float()[:, None] / 40
        embedded = F.silu(self.time(torch.cat([t, t**2, torch.sin(9 * t), torch.cos(9 * t)], 1)))
        x = self.stem(x) * (1 + t[:, :, None, None])
        x = self.down(F.relu(x)) + self.feature(embedded)[:, :, None, None]
        x = self.shortcut(x) + F.silu(self.norm(x))
        q, k, v = (self._heads(part) for part in self.qkv(x.flatten(2).transpose(1, 2)).chunk(3, -1))
        mixed = torch.matmul(torch.matmul(q, k.transpose(1, 2)).softmax(-1), v)
        mixed = mixed.reshape(-1, 2, 16, 4).transpose(1, 2).reshape(-1, 16, 8)
        return self.last(x + self.out(mixed).transpose(1, 2).reshape(x.shape))

    def _heads(self, x):
        return x.reshape(-1, 16, 2, 4).transpose(1, 2).reshape(-1, 16, 4)


class Denoise(TinyTask):
    def timestep(self, sample):
        return float(sample["timestep"][0])


class Refusing(Denoise):
    unseen_timesteps = "refuse"


class Interpolating(Denoise):
    unseen_timesteps = "interpolate"


class EveryTimestep(Step):
    """A range for each timestep everywhere."""

    name = "every-timestep"

    def prepare(self, model, flow, run):
        self.context.grids.range_for_each_timestep([path for path, _ in model.named_modules()])


SAMPLES = [
    {
        "x": torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(index)),
        "timestep": torch.full((2,), value),
    }
    for index, value in enumerate([30, 0, 20, 30, 10, 20])
]
STEPS = {"every-timestep": f"{__name__}:EveryTimestep"}
WEIGHTS = {"bits": 8, "granularity": "channel"}


def export(folder, scope="dataflow", task=Denoise, weights=WEIGHTS):
    quant = {"weights": weights, "activations": {"symmetric": False}, "scope": scope}
    chosen = {"steps": STEPS, "task": task, "export": ["onnx-qdq"]}
    run(folder, lambda: Mixed().eval(), SAMPLES, ["every-timestep", "round"], quant, **chosen)
    return ptqcore.load(folder, Mixed().eval())


@pytest.mark.parametrize("scope", ["layers", "dataflow"])
def test_every_product_runs_in_integers_and_is_the_simulations_at_every_timestep(scope, tmp_path):
    model = export(tmp_path, scope)
    folder = tmp_path / "exports" / "onnx-qdq"
    record = OnnxQDQ().verify(model, Denoise(Denoise.Options(), 0, tmp_path), SAMPLES, folder)
    assert record.largest_difference == 0
    assert record.notes[0] == "compared at 4 of the 4 timesteps that it has rows for"
    for engine in record.engines:
        assert not engine.problem
        products = {name for name, reason in engine.layers.items() if reason is None}
        floats = (
            {name for name in engine.layers if name.startswith("MatMul")} if scope == "layers" else set()
        )
        assert products == engine.layers.keys() - floats
        assert engine.within_one_step > 0.99
    file = onnx.load(folder / "model.onnx").graph
    assert sum(node.op_type == "ArgMin" for node in file.node) == 1
    assert [size.dim_param for size in file.input[1].type.tensor_type.shape.dim] == ["batch"]


def test_rows_of_one_batch_may_be_of_different_timesteps(tmp_path):
    model = export(tmp_path)
    joined = {name: torch.cat([sample[name] for sample in SAMPLES]) for name in ("x", "timestep")}
    with torch.no_grad():
        expected = model(**joined).numpy()
    for engine in ENGINES:
        (found,) = outputs(tmp_path / "exports" / "onnx-qdq", engine, joined)
        assert np.abs(found - expected).max() < np.abs(expected).max() / 100


def test_what_cannot_be_said_in_a_graph_is_refused_or_noted(tmp_path):
    with pytest.raises(ExportError, match=r"takes the nearest timestep .* not to interpolate$"):
        export(tmp_path / "one", task=Interpolating)
    model = export(tmp_path / "other", task=Refusing)
    folder = tmp_path / "other" / "exports" / "onnx-qdq"
    record = OnnxQDQ().verify(model, Refusing(Refusing.Options(), 0, tmp_path), SAMPLES[:1], folder)
    assert record.notes == (
        "compared at 1 of the 4 timesteps that it has rows for",
        "computes any other timestep as the nearest of these, where the model refuses it",
    )


def test_tables_are_looked_up_by_the_same_row(tmp_path):
    table = torch.randn(3, 5, generator=GENERATOR)

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer, self.feature = quantized(identity()), TimestepTable(nn.Linear(8, 5), table)

        def forward(self, x):
            return torch.cat([self.layer(x), self.feature(x)], 1)

    exported(Net(), {"x": X[:2], "timestep": torch.tensor([10, 0])}, tmp_path)
    for engine in ENGINES:
        (found,) = outputs(tmp_path, engine, {"x": X[:3], "timestep": torch.tensor([30, 0, 11])})
        assert np.array_equal(found[:, 8:], table[[2, 0, 1]].numpy())
    kinds = [node.op_type for node in onnx.load(tmp_path / "model.onnx").graph.node]
    assert kinds.count("ArgMin") == 1


def test_a_timestep_that_is_a_number_is_refused(tmp_path):
    with pytest.raises(ExportError, match="the model is given timestep as a number"):
        exported(quantized(identity()), {"x": X, "timestep": 10.0}, tmp_path)


def test_samples_are_compared_at_every_timestep_before_any_comes_again(tmp_path):
    task = Denoise(Denoise.Options(), 0, tmp_path)
    turn = [task.timestep(sample) for sample in in_turn(task, SAMPLES)]
    assert turn == [30, 0, 20, 10, 30, 20]
    many = [{"timestep": torch.tensor([value])} for value in range(40)]
    assert len(in_turn(task, [*many, *many])) == 40
    assert len(in_turn(TinyTask(TinyTask.Options(), 0, tmp_path), many)) == 32
