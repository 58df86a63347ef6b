"""Tables in the place of layers of the timestep alone: rows, and runs with a step that makes tables."""

import pytest
import torch
from tiny_task import TinyTask, manifest_of, run, weights_of
from torch import nn

import ptqcore
from ptqcore import (
    Attachment,
    ExportError,
    ModelError,
    QuantLinear,
    QuantSpec,
    Step,
    Timesteps,
    TimestepTable,
    attach,
    packed_bytes,
    replace_by_table,
    timesteps_of,
)
from ptqcore.dataflow import Site
from ptqcore.edges import applying
from ptqcore.export.onnx import OnnxQDQ
from ptqcore.modules import state_bytes
from ptqcore.placement import Edge
from ptqcore.rounding import Round

VALUES = [0.0, 2.0, 10.0]
ROWS = torch.tensor([[1.0, -1.0], [2.0, -2.0], [4.0, -4.0]])


def table(rows=ROWS, layer=None):
    return TimestepTable(layer or nn.Linear(3, 2), rows)


def during(timestep, unseen="nearest"):
    return Timesteps.of(VALUES, "t", unseen).during(torch.as_tensor(timestep))


def test_every_row_of_the_batch_gets_the_row_of_its_timestep():
    made, x = table(), torch.zeros(4, 3)
    with during(2.0):
        assert torch.equal(made(x), ROWS[[1, 1, 1, 1]])
    with during([10.0, 0.0, 2.0, 0.0]):
        assert torch.equal(made(x), ROWS[[2, 0, 1, 0]])
    with during([10.0, 0.0]):  # two rows for each timestep
        assert torch.equal(made(x), ROWS[[2, 2, 0, 0]])
    with during([[10.0, 0.0], [2.0, 2.0]]):  # a timestep for each token, tokens folded into the batch
        assert torch.equal(made(x), ROWS[[2, 0, 1, 1]])
    with during([0.0, 2.0, 10.0]), pytest.raises(ModelError, match="4 rows, with 3 timesteps"):
        made(x)
    with pytest.raises(ModelError, match="outside of their model"):
        made(x)


def test_rows_of_images_keep_their_dimensions_and_the_dtype_of_what_comes_in():
    made = TimestepTable(nn.Conv2d(3, 2, 1), ROWS[:, :, None, None])
    with during(10.0):
        found = made(torch.zeros(2, 3, 1, 1, dtype=torch.bfloat16))
    assert found.dtype == torch.bfloat16
    assert torch.equal(found.float(), ROWS[[2, 2], :, None, None])


@pytest.mark.parametrize(("unseen", "expected"), [("nearest", 2.0), ("interpolate", 2.5)])
def test_other_timesteps_get_the_nearest_row_or_one_in_between(unseen, expected):
    with pytest.warns(UserWarning, match="timestep 4 is not among"), during(4.0, unseen):
        assert torch.equal(table()(torch.zeros(1, 3)), torch.tensor([[expected, -expected]]))


def test_other_timesteps_are_refused_where_one_wants_that():
    with pytest.raises(ModelError, match="timestep 4 is not among"), during(4.0, "refuse"):
        pass


def test_a_table_without_rows_gives_zeros_at_any_time():
    made = table(torch.empty(0, 2))
    assert made.is_vacant
    assert torch.equal(made(torch.ones(5, 3)), torch.zeros(5, 2))
    assert not table().is_vacant


def test_a_table_stands_wherever_the_layer_stood():
    shared = nn.Linear(3, 2)
    model = nn.ModuleDict({"one": shared, "other": shared})
    made = replace_by_table(model, "one", ROWS)
    assert model["one"] is model["other"] is made
    assert (made.weight_shape, made.replaced_bytes) == ((2, 3), 4 * (6 + 2))
    assert not list(model.parameters())


def test_what_has_no_quantized_kind_has_no_table():
    with pytest.raises(ModelError, match="a Embedding has no kind of table"):
        table(layer=nn.Embedding(3, 2))
    with pytest.raises(ModelError, match="Embedding has no quantized kind"):
        packed_bytes(nn.Embedding(3, 2), QuantSpec(bits=4, symmetric=True))


class Doubled(Attachment):
    name = "tiny:doubled"

    def settings(self):
        return {}

    def forward(self, x):
        return 2 * x


def test_what_is_attached_to_the_layer_is_attached_to_the_table():
    model = nn.Sequential(nn.Linear(3, 2))
    attach(model[0], Doubled(), "output")
    replace_by_table(model, "0", ROWS)
    with during(0.0):
        assert torch.equal(model(torch.zeros(1, 3)), 2 * ROWS[:1])


@pytest.mark.parametrize(("layer", "name"), [(nn.Linear(3, 2), "linear"), (nn.Conv2d(3, 2, 1), "conv2d")])
def test_the_edge_behind_the_layer_is_behind_the_table(layer, name):
    model = nn.Sequential(layer)
    replace_by_table(model, "0", ROWS)
    edge = Edge(Site("0", 0, name, 0), "output")
    with during(0.0), applying(model, "", {edge: lambda x: x + 100}):
        assert torch.equal(model(torch.zeros(1, 3)), ROWS[:1] + 100)


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("layer", [nn.Linear(9, 5), nn.Linear(9, 5, bias=False), nn.Conv2d(4, 6, 3)])
def test_packed_bytes_are_those_of_the_quantized_layer(layer, symmetric):
    spec = QuantSpec(bits=4, symmetric=symmetric, granularity="channel")
    rows, columns = layer.weight.flatten(1).shape
    words = -(-columns * 4 // 32)
    expected = rows * (4 * words + 4 + (layer.bias is not None) * 4 + (not symmetric))
    assert packed_bytes(layer, spec) == expected
    if isinstance(layer, nn.Linear):
        assert state_bytes(QuantLinear(layer, spec, None)) == expected


# Whole runs


class Denoiser(nn.Module):
    """`feature` is of the timestep alone, and alone reads `shared`."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.shared, self.feature = nn.Linear(1, 8), nn.Linear(8, 4)
        self.first, self.last = nn.Linear(4, 4), nn.Linear(4, 4)

    def time(self, timestep, x):
        return self.feature(
            torch.tanh(self.shared(torch.as_tensor(timestep, dtype=x.dtype).reshape(-1, 1)))
        )

    def forward(self, x, timestep):
        return self.last(self.first(x) + self.time(timestep, x))


class Denoise(TinyTask):
    def timestep(self, sample):
        return float(sample["timestep"])


class MakesTables(Step):
    """A table in the place of `feature`, none in that of `shared`."""

    name = "makes-tables"

    def prepare(self, model, flow, run):
        timesteps = torch.tensor(self.context.grids.timesteps)
        with torch.no_grad():
            self._table = model.time(timesteps, torch.zeros(1))
        self.context.grids.tables.update(["shared", "feature"])

    def block(self, block, calibration):
        if "feature" in block.layers():
            replace_by_table(block.model, "feature", self._table)

    def finish(self, model):
        replace_by_table(model, "shared", torch.empty(0, 8))


SAMPLES = [
    {
        "x": torch.randn(16, 4, generator=torch.Generator().manual_seed(index)),
        "timestep": torch.tensor(value),
    }
    for index, value in enumerate([7.0, 0.5, 3.0, 7.0, 0.0, 3.0])
]
QUANT = {"weights": {"bits": 3, "granularity": "channel"}, "activations": {"bits": 8, "symmetric": False}}
OPTIONS = {"quant": QUANT, "steps": {"makes-tables": f"{__name__}:MakesTables"}, "task": Denoise}
STEPS = ["makes-tables", "round"]


@pytest.mark.parametrize("scope", ["layers", "dataflow"])
@pytest.mark.parametrize("last", ["round", {"qdrop": {"iterations": 20}}, "bias-correction"])
def test_tables_are_kept_and_the_weights_that_they_replace_are_gone(tmp_path, scope, last):
    steps = ["makes-tables", "round", last] if last == "bias-correction" else ["makes-tables", last]
    record = run(tmp_path, Denoiser, SAMPLES, steps, **{**OPTIONS, "quant": QUANT | {"scope": scope}})
    model, exact = ptqcore.load(tmp_path, Denoiser()), Denoiser()
    assert timesteps_of(model).values.tolist() == [0, 0.5, 3, 7]
    assert manifest_of(tmp_path)["tables"] == {"shared": [0, 8], "feature": [4, 4]}
    assert record.size_bytes["tables"] == 4 * 4 * 4
    assert record.size_bytes["float weights replaced by tables"] == 4 * (8 + 8 + 32 + 4)
    names = {name for name in model.state_dict() if name.startswith(("shared", "feature"))}
    assert names == {"shared.table", "feature.table"}
    timesteps = torch.tensor([0, 0.5, 3, 7])
    with torch.no_grad(), timesteps_of(model).during(timesteps):
        assert torch.equal(model.time(timesteps, torch.zeros(1)), exact.time(timesteps, torch.zeros(1)))


def test_the_report_lists_tables_and_counts_what_they_replace_as_covered(tmp_path):
    record = run(tmp_path, Denoiser, SAMPLES, STEPS, **OPTIONS)
    weights = {layer.path: layer.weights for layer in record.layers}
    assert weights["feature"] == "table [4, 4]"
    assert weights["shared"] == "removed: only tables read it"
    assert weights.keys() == {"feature", "shared", "first", "last"}
    assert record.coverage == 1
    assert record.skipped == record.map.alone == {}
    assert all(block.relative_error < 0.1 for block in record.blocks)
    assert "table [4, 4]" in (tmp_path / "report.html").read_text(encoding="utf-8")


def test_a_resumed_run_gives_the_same_bytes(tmp_path, monkeypatch):
    run(tmp_path / "whole", Denoiser, SAMPLES, STEPS, **OPTIONS)
    rounded, blocks = Round.block, []

    def stops_at_the_last(self, block, calibration):
        blocks.append(block.path)
        if block.path == "last" and blocks.count("last") == 1:
            raise KeyboardInterrupt
        rounded(self, block, calibration)

    monkeypatch.setattr(Round, "block", stops_at_the_last)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "resumed", Denoiser, SAMPLES, STEPS, **OPTIONS)
    assert "feature" in blocks
    run(tmp_path / "resumed", Denoiser, SAMPLES, STEPS, resume=True, **OPTIONS)
    assert blocks.count("feature") == 1
    assert weights_of(tmp_path / "whole") == weights_of(tmp_path / "resumed")
    assert manifest_of(tmp_path / "whole") == manifest_of(tmp_path / "resumed")


def test_the_timesteps_of_rows_are_told_apart(tmp_path):
    run(tmp_path, Denoiser, SAMPLES, STEPS, **OPTIONS | {"quant": {"weights": QUANT["weights"]}})
    model = ptqcore.load(tmp_path, Denoiser())
    x, timesteps = torch.randn(3, 4), torch.tensor([3.0, 0.0, 7.0])
    with torch.no_grad():
        apart = torch.cat([model(x[n : n + 1], timesteps[n]) for n in range(3)])
        torch.testing.assert_close(model(x, timesteps), apart)


def test_formats_that_cannot_hold_tables_are_refused_before_anything_is_quantized(tmp_path, monkeypatch):
    monkeypatch.setattr(OnnxQDQ, "holds_timesteps", False)
    monkeypatch.setattr("ptqcore.quantization.Walk", lambda *_: pytest.fail("blocks are walked"))
    with pytest.raises(ExportError, match=r"^export onnx-qdq cannot hold a table .* place of feature"):
        run(tmp_path, Denoiser, SAMPLES, STEPS, export=["onnx-qdq"], **OPTIONS)


def test_an_artifact_whose_model_has_no_such_layer_is_refused(tmp_path):
    run(tmp_path, Denoiser, SAMPLES, STEPS, **OPTIONS)
    other = Denoiser()
    other.feature = nn.Identity()
    with pytest.raises(ptqcore.ArtifactError, match="table in the place of 'feature'"):
        ptqcore.load(tmp_path, other)
