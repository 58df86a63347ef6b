"""Factors and offsets that are learned: variables, what is computed with them, the step, whole runs."""

from dataclasses import replace

import pytest
import tiny_lm
import torch
import zoo
from one_block import OneBlock
from tiny_blocks import difference, unified
from torch import nn

import ptqcore
from ptq_llm.groups import Group
from ptq_llm.learned_rescaling import LearnedRescaling
from ptq_llm.learned_scale import LearnedScale
from ptq_llm.rescale import Rescaling
from ptq_llm.scaling import ChannelStatistics
from ptq_llm.smoothquant import smoothing
from ptqcore import ExportError, ModelError, attachments_of, find_recipe
from ptqcore.rounding import Round

TOKENS = {"granularity": "token", "dynamic": True, "symmetric": False}
CHANNELS = {"granularity": "channel", "symmetric": False}
W4A4 = {"weights": {"bits": 4} | CHANNELS, "activations": {"bits": 4} | TOKENS}
QUANT = {
    "w4a4": W4A4,
    "w3": {"weights": {"bits": 3} | CHANNELS},
    "w3 groups": {"weights": {"bits": 3, "granularity": "group", "group_size": 16}},
    "w8a4 static": {"weights": {"bits": 8} | CHANNELS, "activations": {"bits": 4, "symmetric": False}},
    "w4 tensor": {"weights": {"bits": 4, "symmetric": False}},
}
BLOCKS = {
    "llama": "model.layers.1",
    "gemma2": "model.layers.1",
    "phi3": "model.layers.0",
    "opt": "model.decoder.layers.1",
    "bert": "bert.encoder.layer.1",
    "gpt_neox": "gpt_neox.layers.0",
    "mixtral": "model.layers.0",
}


def random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def of_zoo(name="llama", quant=W4A4, samples=3):
    model = unified(name)
    inputs = [zoo.tokens(model, 2, 16, seed) for seed in range(samples)]
    return OneBlock(model, BLOCKS[name], inputs, quant)


def transformed(one, **options):
    step = one.step(LearnedScale, **options)
    step.transform(one.block, one.calibration)
    return step


def error_of(one):
    """‖Y′ − Y‖² / ‖Y‖² of the block, once rounded."""
    one.step(Round).block(one.block, one.calibration)
    pairs = list(zip(one.calibration.io.run_tensors(), one.calibration.exact, strict=True))
    error = sum(float((found[0] - wanted[0]).double().square().sum()) for found, wanted in pairs)
    return error / sum(float(wanted[0].double().square().sum()) for _, wanted in pairs)


def predictions(one):
    with torch.no_grad():
        return one.model(zoo.tokens(one.model, 3, 20, seed=99)).logits.clone()


# The variables

SEEN = ChannelStatistics(
    low=torch.tensor([-1.0, -2.0, 3.0, -4.0]).double(),
    high=torch.tensor([1.0, 6.0, 5.0, 0.0]).double(),
    magnitude=torch.ones(4).double(),
    weight=torch.tensor([1.0, 0.5, 2.0, 0.25]).double(),
)
NORM = Group("norm", "norm", ("layer",))
ROWS = Group("linear", "value", ("output",), rows=torch.tensor([2, 2, 5, 5]))


def test_at_first_nothing_changes():
    for group in (NORM, ROWS):
        assert LearnedRescaling(group, SEEN, shifts=False).change().is_identity


def test_factors_are_relative_to_their_start_and_offsets_to_the_width_of_the_channel():
    learned = LearnedRescaling(NORM, SEEN, shifts=True)
    learned.begin(Rescaling(torch.tensor([1.0, 2.0, 3.0, 4.0]), torch.tensor([0.0, 1.0, 2.0, 3.0])))
    factors, offsets = learned.variables
    factors.data.fill_(0.5)
    offsets.data.fill_(0.1)
    expected = torch.tensor([1.0, 2.0, 3.0, 4.0]) * torch.tensor(0.5).exp()
    torch.testing.assert_close(learned.scale, expected)
    torch.testing.assert_close(learned.shift, torch.tensor([0.1, 1.4, 2.1, 3.2]))


def test_channels_that_are_one_row_share_their_factor_and_its_gradient():
    learned = LearnedRescaling(ROWS, SEEN, shifts=False)
    (factors,) = learned.variables
    factors.data = torch.tensor([0.0, 2.0]).log1p()
    torch.testing.assert_close(learned.scale, torch.tensor([1.0, 1.0, 3.0, 3.0]))
    torch.testing.assert_close(learned.divisors(7), torch.tensor([1.0, 1, 1, 1, 1, 3, 1]))
    (learned.scale * torch.tensor([1.0, 10.0, 100.0, 1000.0])).sum().backward()
    torch.testing.assert_close(factors.grad, torch.tensor([11.0, 1100.0 * 3]))


def test_tiny_factors_are_truncated():
    learned = LearnedRescaling(NORM, SEEN, shifts=False)
    learned.begin(Rescaling(torch.tensor([1e-5, 1.0, 1.0, 1.0]), torch.zeros(4)))
    learned.variables[0].data[1] = -20.0
    assert learned.scale.tolist() == pytest.approx([1e-2, 1e-2, 1.0, 1.0])


def test_smoothing_is_of_the_channels_as_they_will_be():
    plain = LearnedRescaling(NORM, SEEN, shifts=False).smoothing(0.5)
    assert torch.equal(plain.scale, smoothing(SEEN, 0.5).scale)
    assert not plain.shifts
    centred = LearnedRescaling(NORM, SEEN, shifts=True).smoothing(0.5)
    assert centred.shift.tolist() == [0.0, 2.0, 4.0, -2.0]
    half = (SEEN.high - SEEN.low) / 2
    assert torch.equal(centred.scale, smoothing(replace(SEEN, low=-half, high=half), 0.5).scale)


# The function stays


@pytest.mark.parametrize("name", BLOCKS)
def test_what_is_learned_leaves_the_function_as_it_is(name):
    one = of_zoo(name)
    before, kept = predictions(one), {n: p.clone() for n, p in one.block.module.named_parameters()}
    transformed(one, rate=0.05, epochs=2)
    assert difference(predictions(one), before) <= 1e-5
    now = dict(one.block.module.named_parameters())
    assert any(not torch.equal(now[name], kept[name]) for name in kept)


def test_grouped_queries_have_one_factor_for_the_channels_of_one_value():
    one = of_zoo("llama")
    layer = f"{one.block.path}.self_attn.o_proj"
    before = one.model.get_submodule(layer).weight.clone()
    transformed(one, rate=0.05, alpha=None)
    factors = (one.model.get_submodule(layer).weight / before).mean(0).view(2, 2, 16)  # values, queries
    torch.testing.assert_close(factors[:, 0], factors[:, 1])
    assert float((factors - 1).abs().max()) > 0.05


def test_layers_beside_a_residual_get_their_factors_in_front():
    one = of_zoo("bert")
    step = transformed(one)
    assert "residual" in step.attaches
    queries = one.model.get_submodule(f"{one.block.path}.attention.self.query")
    assert len(attachments_of(queries)) == 1


def test_offsets_move_only_where_norm_and_layers_hold_them():
    for name, moves in (("opt", True), ("llama", False)):
        step = of_zoo(name).step(LearnedScale)
        one = of_zoo(name)
        groups = step.groups(one.block, one.calibration)
        shifting = [step.shifts(group, one.block) for group in groups if group.kind == "norm"]
        assert shifting
        assert set(shifting) == {moves}


# What is learned


@pytest.mark.parametrize("name", ["llama", "opt", "bert", "mixtral"])
@pytest.mark.parametrize("quant", QUANT.values(), ids=QUANT)
def test_what_it_learns_on_is_what_is_deployed(quant, name, monkeypatch):
    """The error that is minimised, for any factors, is that of the block with these factors in its weights,
    rounded; but for roundings that fall another way."""
    one, totals = of_zoo(name, quant), []

    def changed(variables, output, *rest):
        for place, (variable, _) in enumerate(variables):
            variable.data = random(*variable.shape, seed=place) * 0.3
        totals.append(output.total())
        return []

    monkeypatch.setattr("ptq_llm.learned_scale.tune", changed)
    transformed(one)
    assert totals == [pytest.approx(error_of(one), rel=0.02)]


def test_weights_are_rounded_in_the_ranges_that_the_observer_chooses(monkeypatch):
    one, totals = of_zoo("llama", {"weights": {"bits": 3, "observer": "mse"} | CHANNELS}), []
    monkeypatch.setattr(
        "ptq_llm.learned_scale.tune", lambda _, output, *rest: totals.append(output.total()) or []
    )
    transformed(one, alpha=None)
    assert totals == [pytest.approx(error_of(one), rel=1e-5)]


@pytest.mark.parametrize("quant", QUANT.values(), ids=QUANT)
def test_the_block_is_not_further_off_than_before(quant):
    before = error_of(of_zoo("llama", quant))
    for rate in (5e-3, 1.0):
        one = of_zoo("llama", quant)
        transformed(one, rate=rate)
        assert error_of(one) <= before * 1.02


def test_learning_helps():
    before, smoothed, learned = of_zoo(), of_zoo(), of_zoo()
    transformed(smoothed, epochs=0)
    transformed(learned, epochs=10, rate=0.02)
    errors = [error_of(one) for one in (before, smoothed, learned)]
    assert errors[2] < errors[1] < errors[0]


class Net(nn.Module):
    """A norm in front of a layer, and beside them nothing."""

    def __init__(self, gains):
        super().__init__()
        torch.manual_seed(0)
        self.block = nn.Sequential()
        self.block.add_module("norm", nn.RMSNorm(len(gains)))
        self.block.add_module("layer", nn.Linear(len(gains), 24, bias=False))
        with torch.no_grad():
            self.block.norm.weight.mul_(gains)
            self.block.layer.weight.div_(gains)

    def forward(self, x):
        return self.block(x)


def net(gains, quant=W4A4):
    return OneBlock(Net(gains), "block", [random(16, 32, seed=seed) for seed in range(4)], quant)


def test_channels_that_were_made_larger_are_found_and_made_smaller_again():
    """Two channels of 32 are twenty times as large, with weights as much smaller: the same function, and
    with the factors 20 for them, the same error."""
    gains = torch.ones(32)
    clean = error_of(net(gains))
    gains[[3, 17]] = 20.0
    spoiled, one = error_of(net(gains)), net(gains)
    transformed(one, alpha=None, rate=0.1, epochs=30)
    assert spoiled > 5 * clean
    assert error_of(one) < 1.2 * clean


def test_no_epochs_from_a_factor_of_one_change_nothing():
    one = of_zoo()
    kept = {name: p.clone() for name, p in one.model.named_parameters()}
    transformed(one, epochs=0, alpha=None)
    assert all(torch.equal(p, kept[name]) for name, p in one.model.named_parameters())


def test_smoothquant_s_factors_are_a_start_where_they_help():
    """Two channels are twenty times as large. With inputs of 4 bits and weights of 8 they had better be
    smaller; with weights of 3 bits alone, the weights of all others would be lost beside theirs."""
    gains = torch.ones(32)
    gains[[3, 17]] = 20.0
    for quant, alpha, helps in ((QUANT["w8a4 static"], 0.5, True), (QUANT["w3"], 1.0, False)):
        model = Net(gains)
        model.block.layer.weight.data *= gains
        one = OneBlock(model, "block", [random(16, 32, seed=seed) for seed in range(4)], quant)
        before = model.block.layer.weight.clone()
        transformed(one, epochs=0, alpha=alpha)
        assert torch.equal(model.block.layer.weight, before) is not helps


def test_two_runs_learn_the_same():
    first, second = of_zoo(), of_zoo()
    for one in (first, second):
        transformed(one, epochs=2)
    assert len(first.calibration.losses) == 2 * 3
    assert first.calibration.losses == second.calibration.losses
    pairs = zip(first.model.parameters(), second.model.parameters(), strict=True)
    assert all(torch.equal(one, other) for one, other in pairs)


def test_a_rate_that_diverges_is_one_sentence():
    with pytest.raises(ModelError, match=r"learned-scale diverges in block 'model\.layers\.1': lower its"):
        transformed(of_zoo(), rate=1e4)


# Whole runs


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    base = tmp_path_factory.mktemp("models")
    return {name: tiny_lm.save(base / name, name, num_hidden_layers=2) for name in ("llama", "bert")}


def run(model, folder, steps, recipe="w8a8", *changes):
    small = [f"task.model={model}", "task.window=24", "task.max_windows=3", "task.calibration_window=24"]
    small += ["task.calibration_samples=3", "export=[]", f"steps={steps}", *changes]
    return ptqcore.quantize(find_recipe(recipe, "llm", small), "llm", folder)


def test_factors_then_ranges_are_learned_then_rounded(folders, tmp_path):
    bits = ("quant.weights.bits=4", "quant.activations.bits=4")
    plain = run(folders["llama"], tmp_path / "plain", "[round]", "w8a8", *bits)
    steps = "[{learned-scale: {rate: 0.02}}, {learned-clip: {rate: 0.03}}, round]"
    record = run(
        folders["llama"], tmp_path / "learned", steps, "w8a8", *bits, "export=[compressed-tensors]"
    )
    assert all(len(block.losses) == 2 * 5 * 3 for block in record.blocks)
    assert record.blocks[0].relative_error < 0.9 * plain.blocks[0].relative_error
    assert record.exports["compressed-tensors"].verified


@pytest.mark.parametrize("recipe", ["w8a8", "fp8", "w3a16"])
def test_models_of_half_precision_learn_too(folders, tmp_path, recipe):
    steps = "[learned-scale, learned-clip, round]"
    changes = ["task.dtype=bfloat16"] + ["quant.weights.group_size=32"] * (recipe == "w3a16")
    record = run(folders["llama"], tmp_path, steps, recipe, *changes)
    assert all(len(block.losses) == 2 * 5 * 3 for block in record.blocks)


def test_factors_in_front_of_layers_are_refused_by_formats_that_cannot_hold_them(folders, tmp_path):
    with pytest.raises(ExportError, match="learned-scale attaches"):
        run(folders["bert"], tmp_path, "[learned-scale, round]", "w8a8", "export=[compressed-tensors]")
