"""Ranges for each timestep: the look-up by value, quantizers, observers, and whole runs."""

import warnings

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tiny_task import TinyTask, manifest_of, run
from torch import nn

import ptqcore
from ptqcore import BugError, ExportError, FakeQuant, MinMax, ModelError, QuantSpec, Step
from ptqcore.observers.per_timestep import PerTimestep
from ptqcore.quantizers import LearnedStep
from ptqcore.rounding import Round
from ptqcore.timesteps import Moment, Timesteps, along, at, current, timesteps_of

SCHEDULE = [801.0, 1.0, 401.5, 801.0, 201.0]


def rows(timestep, unseen="nearest"):
    moment = Timesteps.of(SCHEDULE, "t", unseen).moment(timestep)
    return moment.lower.tolist(), moment.upper.tolist(), moment.share


def test_repeated_and_fractional_timesteps_are_known_by_value_in_rising_order():
    assert Timesteps.of(SCHEDULE, "t").values.tolist() == [1.0, 201.0, 401.5, 801.0]
    assert rows(401.5) == (2, 2, None)
    assert rows(torch.tensor([801, 1, 801])) == ([3, 0, 3], [3, 0, 3], None)
    assert rows(torch.tensor(401.5 * (1 + 1e-6))) == (2, 2, None)


@given(st.lists(st.floats(0, 1000, width=32), min_size=1, max_size=9), st.floats(-10, 1100, width=32))
def test_others_get_the_nearest(schedule, timestep):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = Timesteps.of(schedule, "t")
        row = int(found.moment(timestep).lower)
    distances = (found.values - timestep).abs()
    assert distances[row] <= distances.min() * (1 + 1e-5) + 1e-5


def test_of_two_as_near_the_later_is_taken():
    found = Timesteps.of([0.0, 1.0, 3.0], "t")
    nearest, seen = found.nearest(torch.tensor([0.5, 2.0, 3.0, -1.0]))
    assert nearest.tolist() == [1, 2, 2, 0]
    assert seen.tolist() == [False, False, True, False]


def test_between_two_timesteps_ranges_are_between_theirs():
    with pytest.warns(UserWarning, match=r"timestep 301.25 is not among .* \(1 … 801, 4 of them\)"):
        lower, upper, share = rows(301.25, "interpolate")
    assert (lower, upper) == (1, 2)
    assert share == pytest.approx((301.25 - 201) / 200.5)
    made, low, high = (
        FakeQuant(spec(symmetric=False)),
        torch.tensor([-1.0, -2, -8, -4]),
        torch.tensor([3.0, 4.5, 8, 6]),
    )
    made.set_range(low, high)
    half = Moment(torch.tensor(0), torch.tensor(1), torch.tensor(0.5))
    expected = FakeQuant(QuantSpec(bits=4, symmetric=False))
    expected.set_range(torch.tensor(-1.5), torch.tensor(3.75))
    x = torch.linspace(-2, 5, 50)
    with at(half):
        assert (made(x) - expected(x)).abs().max() <= 1.01 * expected.scale
        scale, zero_point = made.parameters_for(x)
    torch.testing.assert_close(scale.view(1), expected.scale)
    assert abs(float(zero_point) - float(expected.zero_point)) <= 1  # those of both sides are rounded


def test_an_unseen_timestep_is_refused_where_one_wants_that_and_warned_of_once():
    with pytest.raises(ModelError, match=r"^timestep 300 is not among those that the model was calibrated"):
        rows(300, "refuse")
    found = Timesteps.of(SCHEDULE, "t")
    with pytest.warns(UserWarning, match="of the nearest one"):
        found.moment(300)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert int(found.moment(299).lower) == 1


def spec(**changes):
    return QuantSpec(bits=4, granularity="timestep", timesteps=4, **changes)


@pytest.mark.parametrize("changes", [{}, {"symmetric": False}, {"dtype": "e4m3", "bits": 8}])
def test_each_row_of_a_batch_is_rounded_as_a_quantizer_of_its_timestep_alone_would(changes):
    made = FakeQuant(QuantSpec(**({"bits": 4} | changes), granularity="timestep", timesteps=4))
    low, high = -torch.tensor([1.0, 2, 0.5, 3]), torch.tensor([2.0, 2, 4, 1])
    made.set_range(low, high)
    assert made.scale.shape == (4,)
    x = torch.randn(6, 5, 3, generator=torch.Generator().manual_seed(0))
    order = torch.tensor([2, 0, 3])
    with at(Moment(order, order)):
        found = made(x)
    for place, row in enumerate(order.tolist()):
        alone = FakeQuant(QuantSpec(**({"bits": 4} | changes)))
        alone.set_range(low[row], high[row])
        assert torch.equal(found[2 * place : 2 * place + 2], alone(x[2 * place : 2 * place + 2]))
        with at(Moment(torch.tensor(row), torch.tensor(row))):
            assert torch.equal(made(x), alone(x))


def test_without_a_timestep_there_is_no_range():
    made = FakeQuant(spec())
    made.set_range(-torch.ones(4), torch.ones(4))
    with pytest.raises(ModelError, match="outside of their model"):
        made(torch.ones(2, 3))
    with at(Moment(torch.tensor(1), torch.tensor(1))), at(None):
        assert int(current().lower) == 1


def test_entries_lie_along_the_batch():
    assert along(torch.tensor(3.0), torch.ones(2, 3)).shape == ()
    assert along(torch.tensor([3.0, 5.0]), torch.ones(4, 3, 2)).flatten().tolist() == [3, 3, 5, 5]


def test_what_has_no_rows_of_the_batch_has_one_entry():
    assert along(torch.tensor([3.0, 3.0]), torch.ones(5, 2)).shape == ()
    with pytest.raises(
        ModelError, match=r"5 rows, no multiple of the 2 timesteps .* one timestep at a time"
    ):
        along(torch.tensor([3.0, 5.0]), torch.ones(5, 2))


def test_learned_steps_of_all_timesteps_grow_and_shrink_together():
    made = FakeQuant(spec(symmetric=False))
    made.set_range(-torch.arange(1.0, 5), torch.arange(1.0, 5))
    start, learned = made.scale.clone(), LearnedStep(made)
    x = torch.randn(4, 7, generator=torch.Generator().manual_seed(0))
    order = torch.tensor([3, 0, 1, 1])
    with at(Moment(order, order)):
        assert torch.equal(learned(x), made(x))
        learned(x).square().sum().backward()
        values = made(x)
    low, high = -start[order, None] * made.zero_point[order, None], start[order, None] * 15 + 0
    high = high + low
    clipped = (x < low - start[order, None] / 2) | (x > high + start[order, None] / 2)
    slope = torch.where(clipped, values, values - x)
    assert learned.variable.grad.item() == pytest.approx(float((2 * values * slope).sum()), rel=1e-4)
    learned.variable.data.fill_(-0.5)
    learned.finish()
    torch.testing.assert_close(made.scale, start * torch.tensor(-0.5).exp())


def test_observers_see_the_tensors_of_their_timestep_and_unseen_ones_take_the_nearest():
    found = PerTimestep(spec(symmetric=False), MinMax)
    with pytest.raises(ValueError, match="has seen no tensor"):
        found.range()
    for row, x in ((1, [-1.0, 2.0]), (1, [0.5, 3.0]), (3, [-7.0, 1.0])):
        with at(Moment(torch.tensor(row), torch.tensor(row))):
            found.update(torch.tensor([x]))
    low, high = found.range()
    assert (low.tolist(), high.tolist()) == ([-1, -1, -1, -7], [3, 3, 3, 1])
    other = PerTimestep(spec(symmetric=False), MinMax)
    for row, x in ((0, [-2.0, 0.0]), (3, [0.0, 9.0])):
        with at(Moment(torch.tensor(row), torch.tensor(row))):
            other.update(torch.tensor([x]))
    found.merge(other)
    low, high = found.range()
    assert (low.tolist(), high.tolist()) == ([-2, -1, -1, -7], [0, 3, 3, 9])


# Whole runs


class Denoiser(nn.Module):
    """Its hidden values grow with the timestep."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = nn.Linear(4, 8), nn.Linear(8, 4)

    def forward(self, x, timestep):
        scale = (1 + torch.as_tensor(timestep, dtype=x.dtype)).reshape(-1, 1)
        return self.second(torch.tanh(self.first(x)) * scale) / scale


class Denoise(TinyTask):
    def timestep(self, sample):
        return float(sample["timestep"])


class EveryTimestep(Step):
    """A range for each timestep in front of every layer."""

    name = "every-timestep"

    def prepare(self, model, flow, run):
        self.context.grids.range_for_each_timestep(["first", "second"])


SAMPLES = [
    {
        "x": torch.randn(16, 4, generator=torch.Generator().manual_seed(index)),
        "timestep": torch.tensor(value),
    }
    for index, value in enumerate([7.0, 0.5, 3.0, 7.0, 0.0, 3.0])
]
QUANT = {"weights": {"bits": 8, "granularity": "channel"}, "activations": {"bits": 4, "symmetric": False}}
STEPS = {"every-timestep": f"{__name__}:EveryTimestep"}


def errors(model):
    exact = Denoiser()
    with torch.no_grad():
        return [float((model(**one) - exact(**one)).square().mean()) for one in SAMPLES]


@pytest.mark.parametrize("scope", ["layers", "dataflow"])
@pytest.mark.parametrize("last", ["round", {"qdrop": {"iterations": 40}}])
def test_a_range_for_each_timestep_is_kept_and_looked_up_by_value(tmp_path, scope, last):
    quant = QUANT | {"scope": scope}
    run(tmp_path / "one", Denoiser, SAMPLES, ["round"], quant, task=Denoise)
    run(tmp_path / "each", Denoiser, SAMPLES, ["every-timestep", last], quant, steps=STEPS, task=Denoise)
    one, each = (ptqcore.load(tmp_path / name, Denoiser()) for name in ("one", "each"))
    assert timesteps_of(one) is None
    assert timesteps_of(each).values.tolist() == [0, 0.5, 3, 7]
    assert manifest_of(tmp_path / "each")["timesteps"] == {
        "count": 4,
        "argument": "timestep",
        "unseen": "nearest",
    }
    assert sum(errors(each)) < 0.5 * sum(errors(one))
    joined = {
        "x": torch.cat([s["x"][:1] for s in SAMPLES]),
        "timestep": torch.stack([s["timestep"] for s in SAMPLES]),
    }
    with torch.no_grad():
        alone = torch.cat([each(**{**one, "x": one["x"][:1]}) for one in SAMPLES])
        torch.testing.assert_close(each(**joined), alone)
        torch.testing.assert_close(each(joined["x"], joined["timestep"]), alone)
    with pytest.warns(UserWarning, match="timestep 5.5 is not among"), torch.no_grad():
        each(SAMPLES[0]["x"], torch.tensor(5.5))


def test_a_resumed_run_gives_the_same_bytes(tmp_path, monkeypatch):
    options = {"quant": QUANT, "steps": STEPS, "task": Denoise}
    steps = ["every-timestep", "round"]
    run(tmp_path / "whole", Denoiser, SAMPLES, steps, **options)
    rounded, blocks = Round.block, []

    def stops_at_the_second(self, block, calibration):
        blocks.append(block.path)
        if blocks == ["first", "second"]:
            raise KeyboardInterrupt
        rounded(self, block, calibration)

    monkeypatch.setattr(Round, "block", stops_at_the_second)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "resumed", Denoiser, SAMPLES, steps, **options)
    run(tmp_path / "resumed", Denoiser, SAMPLES, steps, resume=True, **options)
    assert blocks == ["first", "second", "second"]
    one, other = ((tmp_path / name / "model.safetensors").read_bytes() for name in ("whole", "resumed"))
    assert one == other


def test_the_map_of_the_report_has_the_ranges_that_steps_asked_for(tmp_path):
    quant = QUANT | {"scope": "dataflow"}
    record = run(tmp_path, Denoiser, SAMPLES, ["every-timestep", "round"], quant, steps=STEPS, task=Denoise)
    each = {edge.name for edge in record.map.edges if edge.grid == "int4 asymmetric per timestep (4)"}
    assert each == {"first:linear<0", ":mul"}  # what both layers read


def test_formats_without_timesteps_are_refused_before_anything_is_quantized(tmp_path, monkeypatch):
    monkeypatch.setattr("ptqcore.quantization.Walk", lambda *_: pytest.fail("blocks are walked"))
    monkeypatch.setattr("ptqcore.export.onnx.OnnxExporter.holds_timesteps", False)
    with pytest.raises(ExportError, match=r"^export onnx-qdq cannot hold a range .* for each timestep"):
        run(
            tmp_path,
            Denoiser,
            SAMPLES,
            ["every-timestep", "round"],
            QUANT,
            steps=STEPS,
            task=Denoise,
            export=["onnx-qdq"],
        )


def test_granularity_timestep_is_a_steps_to_choose(tmp_path):
    wrong = QUANT | {"activations": {"granularity": "timestep"}}
    with pytest.raises(ptqcore.RecipeError, match=r"finite-set-calibration chooses it, set granularity to"):
        run(tmp_path, Denoiser, SAMPLES, "round", wrong, task=Denoise)


def test_samples_without_timesteps_cannot_have_ranges_for_each(tmp_path):
    with pytest.raises(BugError, match=r"'every-timestep' of plugin 'tiny' failed .*no timesteps"):
        run(tmp_path, Denoiser, SAMPLES, ["every-timestep", "round"], QUANT, steps=STEPS)


def test_a_model_whose_forward_takes_no_timestep_is_refused():
    with pytest.raises(ModelError, match=r"no parameter 'time': its parameters are x, timestep"):
        Timesteps.of([1.0], "time").attach(Denoiser())
