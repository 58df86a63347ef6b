"""Timesteps that a model was not calibrated for: ranges of their own, and ranges added to the tables."""

import warnings

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from test_timesteps import QUANT, Denoise
from tiny_task import manifest_of, run
from torch import nn

import ptqcore
from ptqcore import FakeQuant, MinMax, ModelError, QuantSpec, Step, add_timesteps, artifact, timesteps_of
from ptqcore.observers.per_timestep import PerTimestep
from ptqcore.timesteps import Timesteps

KNOWN = [0.0, 4.0, 8.0]
GRIDS = [{"symmetric": False}, {}, {"dtype": "e4m3", "bits": 8}]


def spec(of_timestep=True, count=3, **changes):
    options = {"bits": 4, "granularity": "timestep", "timesteps": count, "of_timestep": of_timestep}
    return QuantSpec(**(options | changes))


def value(timestep):
    """What a function of the timestep gives [1, 4]: ranges are not linear in it."""
    t = float(timestep)
    return torch.tensor([[-1.0 - t * t, 0.5, 3.0 + t, 0.1 * t]])


def calibrated(timesteps, **changes):
    """A quantizer of such values that has seen exactly these timesteps."""
    known = Timesteps.of(timesteps, "t")
    made = FakeQuant(spec(count=len(known.values), **changes))
    observer = PerTimestep(made.spec, MinMax)
    for timestep in timesteps:
        with known.during(timestep):
            observer.update(value(timestep))
    made.set_range(*observer.range())
    return made, known


OTHER = st.integers(1, 150).map(lambda sixteenths: sixteenths / 16)


@pytest.mark.parametrize("changes", GRIDS)
@given(timestep=OTHER)
def test_a_function_of_the_timestep_is_rounded_as_if_any_had_been_calibrated(changes, timestep):
    made, known = calibrated(KNOWN, **changes)
    native, its = calibrated([timestep], **changes)
    with known.accepting(), known.during(timestep):
        found = made(value(timestep))
    with its.during(timestep):
        assert torch.equal(found, native(value(timestep)))


@pytest.mark.parametrize("changes", GRIDS)
def test_rows_at_known_and_other_timesteps_are_rounded_each_for_itself(changes):
    made, known = calibrated(KNOWN, **changes)
    timesteps = torch.tensor([4.0, 5.5, 0.0, 2.0])
    batch = torch.cat([value(t).expand(2, 4) for t in timesteps])  # two rows for each, as of two heads
    with known.accepting():
        with known.during(timesteps):
            together = made(batch)
        for place, timestep in enumerate(timesteps):
            with known.during(timestep):
                assert torch.equal(together[2 * place : 2 * place + 2], made(value(timestep)).expand(2, 4))


def test_with_interpolation_too_a_function_of_the_timestep_has_a_range_of_its_own():
    made, _ = calibrated(KNOWN)
    native, its = calibrated([5.5])
    between = Timesteps.of(KNOWN, "t", "interpolate")
    with pytest.warns(UserWarning, match=r"other activations and tables those of the two beside it"):
        between.moment(5.5)
    with between.during(torch.tensor([5.5, 4.0])):
        found = made(torch.cat([value(5.5), value(4.0)]))
    with its.during(5.5):
        assert torch.equal(found[:1], native(value(5.5)))


def test_other_activations_have_the_range_of_the_nearest():
    made, known = calibrated(KNOWN)
    made.spec = spec(of_timestep=False)
    with known.accepting():
        with known.during(5.5):
            near = made(value(5.5))
        with known.during(4.0):
            assert torch.equal(near, made(value(5.5)))


def test_timesteps_are_refused_again_behind_a_look_at_others():
    known = Timesteps.of(KNOWN, "t", "refuse")
    with known.accepting(), known.accepting():
        pass
    with pytest.raises(ModelError, match=r"timestep 3 is not among .* \(0 … 8, 3 of them\)"):
        known.moment(3.0)


def test_only_ranges_for_each_timestep_can_be_of_the_timestep_alone():
    with pytest.raises(ValueError, match="of_timestep true without granularity timestep"):
        QuantSpec(of_timestep=True)


# Whole models


class Timed(nn.Module):
    """`embed` is given what depends on the timestep alone, `first` and `second` what depends on x too."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.embed, self.first, self.second = nn.Linear(4, 8), nn.Linear(4, 8), nn.Linear(8, 4)

    def forward(self, x, timestep):
        times = torch.as_tensor(timestep, dtype=x.dtype).reshape(-1, 1)
        made = torch.cat([-1 - times * times, times * 0 + 0.5, 3 + times, times * 0.1], dim=1)
        return self.second(torch.tanh(self.first(x)) * times + torch.sigmoid(self.embed(made)))


class Marked(Step):
    """A range for each timestep in front of every layer; `embed` reads what is of the timestep alone."""

    name = "marked"

    def prepare(self, model, flow, run):
        self.context.grids.range_for_each_timestep(["embed", "first", "second"], of_timestep=["embed"])


X = torch.randn(16, 4, generator=torch.Generator().manual_seed(0))
CALLS = [{"x": X * (1 + t), "timestep": torch.tensor(t)} for t in KNOWN]
LOOSE = {"bits": 4, "symmetric": False, "observer": {"percentile": {"percentile": 90.0}}}
FURTHER = [5.0, 4.0, 2.0, 9.0, 5.0]


def quantizers(model):
    named = model.named_modules()
    return {path: each for path, each in named if isinstance(each, FakeQuant) and each.spec.timesteps}


def made(folder, scope="layers"):
    quant = QUANT | {"activations": LOOSE, "scope": scope}
    steps = {"marked": f"{__name__}:Marked"}
    run(folder, Timed, CALLS, ["marked", "round"], quant, steps=steps, task=Denoise)
    return ptqcore.load(folder, Timed())


def prepared(model):
    """The model with ranges for further timesteps, from one row of x."""
    added = add_timesteps(model, FURTHER, lambda timestep: model(X[:1], torch.tensor(timestep)))
    assert added == [2, 5, 9]
    assert timesteps_of(model).values.tolist() == [0, 2, 4, 5, 8, 9]
    return model


@pytest.mark.parametrize("scope", ["layers", "dataflow"])
def test_the_only_value_of_a_timestep_has_the_range_of_that_value_whatever_the_observer(tmp_path, scope):
    model = made(tmp_path / "out", scope)
    alone = [each for each in quantizers(model).values() if each.spec.of_timestep]
    expected, _ = calibrated(KNOWN, symmetric=False)
    assert len(alone) == 1
    assert torch.equal(alone[0].scale, expected.scale)
    assert torch.equal(alone[0].zero_point, expected.zero_point)
    if scope == "layers":
        entries = manifest_of(tmp_path / "out")["layers"]
        marked = {path: entry["input"]["of_timestep"] for path, entry in entries.items()}
        assert marked == {"embed": True, "first": False, "second": False}


@pytest.mark.parametrize("scope", ["layers", "dataflow"])
def test_added_ranges_are_those_of_calibration_or_between_their_neighbours(tmp_path, scope):
    model = made(tmp_path / "out", scope)
    before = {path: (each.scale, each.zero_point) for path, each in quantizers(model).items()}
    prepared(model)
    native, _ = calibrated([0.0, 2.0, 4.0, 5.0, 8.0, 9.0], symmetric=False)
    for path, quantizer in quantizers(model).items():
        old, zero_point = before[path]
        assert quantizer.spec.timesteps == 6
        assert torch.equal(quantizer.scale[[0, 2, 4]], old)
        assert torch.equal(quantizer.zero_point[[0, 2, 4]], zero_point)
        if quantizer.spec.of_timestep:
            # in the scope dataflow what is joined was rounded to 8 bits before, in the calibrated range
            exact = scope == "layers"
            inside = slice(None) if exact else slice(5)
            tolerance = {"rtol": 0, "atol": 0} if exact else {"rtol": 0.01, "atol": 0}
            torch.testing.assert_close(quantizer.scale[inside], native.scale[inside], **tolerance)
            assert torch.equal(quantizer.zero_point[inside], native.zero_point[inside])
        else:
            between = torch.stack([(old[0] + old[1]) / 2, 0.75 * old[1] + 0.25 * old[2], old[2]])
            torch.testing.assert_close(quantizer.scale[[1, 3, 5]], between)


@pytest.mark.parametrize("scope", ["layers", "dataflow"])
def test_added_timesteps_are_known_ones_and_saved_with_the_model(tmp_path, scope):
    model = made(tmp_path / "out", scope)
    calls = [{"x": X, "timestep": torch.tensor(t)} for t in (0.0, 5.0, 9.0, 8.0)]
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        before = [model(**call) for call in calls]
    prepared(model)
    timesteps_of(model).unseen = "refuse"
    with torch.no_grad():
        after = [model(**call) for call in calls]
    assert torch.equal(before[0], after[0])
    assert torch.equal(before[3], after[3])
    artifact.save(model, tmp_path / "out", "tiny", "tiny", "0")
    again = ptqcore.load(tmp_path / "out", Timed())
    with torch.no_grad():
        assert all(torch.equal(again(**call), found) for call, found in zip(calls, after, strict=True))
    with pytest.raises(ModelError, match="timestep 6 is not among"):
        again(X, torch.tensor(6.0))


def test_what_is_not_computed_is_an_error_and_changes_nothing(tmp_path):
    model = made(tmp_path / "out")
    with pytest.raises(ModelError, match=r"'embed.input_quantizer' rounds was not computed"):
        add_timesteps(model, FURTHER, lambda _: None)
    assert timesteps_of(model).values.tolist() == KNOWN
    assert {each.spec.timesteps for each in quantizers(model).values()} == {3}
    assert all("forward" not in vars(each) for each in quantizers(model).values())
    assert add_timesteps(model, KNOWN, lambda _: pytest.fail("nothing is to be computed")) == []


def test_a_model_with_one_range_has_nothing_to_add_to():
    with pytest.raises(ModelError, match="no ranges for each timestep"):
        add_timesteps(Timed(), [1.0], lambda _: None)


@pytest.mark.parametrize("unseen", ["nearest", "interpolate"])
def test_a_compiled_model_gives_the_same_without_asking_which_timesteps_are_known(
    tmp_path, monkeypatch, unseen
):
    model = made(tmp_path / "out")
    known, timesteps = timesteps_of(model), [torch.tensor([4.0, 5.5] * 8), torch.tensor(8.0)]
    known.unseen = unseen
    with torch.no_grad(), known.accepting():
        expected = [model(X, each) for each in timesteps]
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    monkeypatch.setattr(known, "_tell", lambda _: pytest.fail("a compiled model cannot warn"))
    with torch.no_grad():
        assert all(torch.equal(model(X, t), one) for t, one in zip(timesteps, expected, strict=True))


def test_what_a_table_has_replaced_cannot_be_computed_for_others(tmp_path):
    model = made(tmp_path / "out")
    model.embed = nn.Linear(4, 8)
    ptqcore.replace_by_table(model, "embed", torch.zeros(3, 8))
    with pytest.raises(ModelError, match=r"in the place of 'embed', and the layer that could say more is"):
        add_timesteps(model, FURTHER, lambda timestep: model(X, torch.tensor(timestep)))
    assert add_timesteps(model, KNOWN, lambda _: None) == []
