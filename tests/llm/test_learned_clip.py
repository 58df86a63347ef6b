"""Ranges of weights that are learned: rounding and its gradients, the variables, the step, whole runs."""

import pytest
import tiny_lm
import torch
import zoo
from gram_data import SPECS, heavy_tailed
from one_block import OneBlock
from torch import nn

import ptqcore
from ptq_llm.clip import Clip
from ptq_llm.learned_clip import LearnedClip
from ptq_llm.learned_range import LearnedRange
from ptq_llm.straight_through import round_dynamic, round_in_range, value_range
from ptqcore import FakeQuant, QuantizedTensor, QuantSpec, find_recipe, grid
from ptqcore.rounding import Round

TOKENS = {"granularity": "token", "dynamic": True, "symmetric": False}
W3 = {"weights": {"bits": 3, "granularity": "channel"}}
W3_GROUPS = {"weights": {"bits": 3, "granularity": "group", "group_size": 8, "symmetric": False}}
W2_SIGNED = {"weights": {"bits": 2, "granularity": "group", "group_size": 16, "signed_scale": True}}
W4A4 = {"weights": {"bits": 4, "granularity": "channel"}, "activations": {"bits": 4} | TOKENS}
W4A4_STATIC = {
    "weights": {"bits": 4, "granularity": "channel"},
    "activations": {"bits": 4, "symmetric": False},
}
ALL = {"w3": W3, "w3 groups": W3_GROUPS, "w2 signed": W2_SIGNED, "w4a4": W4A4, "w4a4 static": W4A4_STATIC}


def random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


# Rounding


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS)
def test_weights_are_rounded_as_the_quantized_layer_has_them(spec, dtype):
    weight = heavy_tailed(6, 20, seed=1).to(dtype)
    low, high = (end * 0.7 for end in grid.value_range(weight.float(), spec))
    expected = QuantizedTensor.from_range(weight, low, high, spec).dequantize()
    assert torch.equal(round_in_range(weight.float(), low, high, spec, dtype).to(dtype), expected)


@pytest.mark.parametrize(
    "spec",
    [
        QuantSpec(bits=4, **TOKENS),
        QuantSpec(bits=6, granularity="token", dynamic=True),
        QuantSpec(bits=4, granularity="group", group_size=8, dynamic=True),
        QuantSpec(bits=8, dynamic=True),
        QuantSpec(dtype="e4m3", granularity="token", dynamic=True),
    ],
    ids=str,
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_activations_are_rounded_as_their_quantizer_does(spec, dtype):
    x = heavy_tailed(2, 5, 20, seed=2).to(dtype)
    assert torch.equal(round_dynamic(x, spec), FakeQuant(spec)(x))


def straight(x):
    """x rounded; the gradient is that of x."""
    return x + (x.round() - x).detach()


def by_definition(x, low, high, spec):
    """Round, with nothing but torch functions, for one scale a row."""
    if spec.symmetric:
        middle = 2 ** (spec.bits - 1)
        scale, zero = torch.maximum(-low / middle, high / (middle - 1)), middle
    else:
        scale = (high - low) / (2**spec.bits - 1)
        zero = straight(-low / scale)
    return (torch.clamp(straight(x / scale) + zero, 0, 2**spec.bits - 1) - zero) * scale


@pytest.mark.parametrize("cut", [1.0, 0.6])
@pytest.mark.parametrize("symmetric", [True, False])
def test_gradients_are_those_of_straight_through_rounding(symmetric, cut):
    spec = QuantSpec(bits=3, symmetric=symmetric, granularity="channel")
    x = heavy_tailed(5, 30, seed=3)
    low, high = (end * cut for end in grid.value_range(x, spec))
    toward = random(5, 30, seed=4)
    found = []
    for function in (round_in_range, by_definition):
        given = [tensor.double().requires_grad_(True) for tensor in (x, low, high)]
        (function(*given, spec).double() * toward).sum().backward()
        found.append([tensor.grad for tensor in given])
    for ours, theirs in zip(*found, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


def test_what_is_clipped_moves_with_its_end_alone():
    spec = QuantSpec(bits=2, symmetric=False, granularity="channel")
    x = torch.tensor([[-9.0, 9.0]])
    for place, expected in ((0, (1.0, 0.0)), (1, (0.0, 1.0))):
        ends = [torch.tensor([[-1.0]]).requires_grad_(True), torch.tensor([[2.0]]).requires_grad_(True)]
        round_in_range(x, *ends, spec)[0, place].backward()
        assert tuple(float(end.grad) for end in ends) == pytest.approx(expected)


def test_the_range_of_a_token_moves_with_its_extremes():
    x = torch.tensor([[-1.0, 0.2, 3.0]], requires_grad=True)
    low, high = value_range(x, QuantSpec(bits=4, **TOKENS))
    (low.sum() + 10 * high.sum()).backward()
    assert x.grad.tolist() == [[1.0, 0.0, 10.0]]


# The variables


def learned(spec, share, weight=None):
    weight = heavy_tailed(6, 20, seed=5) if weight is None else weight
    low, high = (end * share for end in grid.value_range(weight, spec))
    return LearnedRange(weight, low, high, spec), weight, low, high


@pytest.mark.parametrize("share", [1.0, 0.99, 0.5, 1e-3])
@pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS)
def test_it_begins_with_the_very_range_that_is_given(spec, share):
    found, _, low, high = learned(spec, share)
    assert torch.equal(found.ends()[0], low)
    assert torch.equal(found.ends()[1], high)


@pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS)
def test_the_range_is_the_sigmoid_s_share_of_the_extremes(spec):
    found, weight, _, _ = learned(spec, 0.6)
    for value in (-1.0, 0.0, 2.0):
        found.variable.data.fill_(value)
        share = torch.tensor(value).sigmoid()
        for end, extreme in zip(found.ends(), grid.value_range(weight, spec), strict=True):
            torch.testing.assert_close(end, extreme * share)


@pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS)
def test_a_share_of_one_is_rounding_to_nearest(spec):
    found, weight, _, _ = learned(spec, 0.6)
    found.variable.data.fill_(50)
    nearest = QuantizedTensor.from_range(weight, *grid.value_range(weight, spec), spec).dequantize()
    torch.testing.assert_close(found.rounded(weight), nearest)


def test_both_ends_are_learned_on_an_asymmetric_grid_and_one_number_on_others():
    for name, spec in SPECS.items():
        found, _, low, _ = learned(spec, 1.0)
        assert found.variable.shape == (1 if spec.symmetric else 2, *low.shape), name


def test_weights_of_zero_learn_nothing_and_stay_finite():
    weight = torch.zeros(3, 16)
    weight[1] = random(16)
    found, *_ = learned(QuantSpec(bits=3, symmetric=False, granularity="channel"), 1.0, weight)
    found.rounded(weight).square().sum().backward()
    assert bool(found.variable.grad.isfinite().all())
    assert torch.equal(found.rounded(weight)[0], weight[0])


# The step


class OneLayer(nn.Module):
    def __init__(self, weight):
        super().__init__()
        self.block = nn.Sequential(nn.Linear(weight.shape[1], weight.shape[0], bias=False))
        self.block[0].weight.data = weight.clone()

    def forward(self, x):
        return self.block(x)


def of_block(one):
    """‖Y′ − Y‖² / ‖Y‖² of the block as it now is."""
    pairs = list(zip(one.calibration.io.run_tensors(), one.calibration.exact, strict=True))
    error = sum(float((found[0] - wanted[0]).double().square().sum()) for found, wanted in pairs)
    return error / sum(float(wanted[0].double().square().sum()) for _, wanted in pairs)


def after(make, *steps, **options):
    """The error of a block made anew, behind steps that are each a class and its options."""
    one = make()
    for kind, given in steps:
        one.step(kind, **given).block(one.block, one.calibration)
    one.step(Round).block(one.block, one.calibration)
    return of_block(one)


@pytest.mark.parametrize("spec", [{"bits": 2}, {"bits": 3}, {"bits": 3, "signed_scale": True}], ids=str)
def test_the_best_range_of_one_layer_is_found(spec):
    """Inputs are all directions in turn, so that the error is that of the weights: of a bell and of two
    weights far out. Every share of the extremes is tried."""
    weight = torch.cat([random(1, 254), torch.tensor([[6.0, -5.0]])], 1)
    quant = {"weights": {"granularity": "channel"} | spec}

    def make():
        return OneBlock(OneLayer(weight), "block", list(torch.eye(256).split(32)), quant)

    grid_spec = QuantSpec(granularity="channel", **spec)
    ends = grid.value_range(weight, grid_spec)
    errors = []
    for share in torch.linspace(0.02, 1, 2000):
        rounded = QuantizedTensor.from_range(weight, *(end * share for end in ends), grid_spec)
        errors.append(float((rounded.dequantize() - weight).square().sum() / weight.square().sum()))
    assert after(make) == pytest.approx(errors[-1], rel=1e-5)
    assert errors[-1] > 1.2 * min(errors)  # there is something to find
    found = after(make, (LearnedClip, {"epochs": 60, "rate": 0.03}))
    assert min(errors) * (1 - 1e-6) <= found < min(errors) * 1.05


def llama(quant, samples=4):
    model = zoo.build("llama")
    inputs = [zoo.tokens(model, 2, 16, seed) for seed in range(samples)]
    return OneBlock(model, "model.layers.0", inputs, quant)


@pytest.mark.parametrize("quant", ALL.values(), ids=ALL)
def test_what_it_learns_on_is_what_is_deployed(quant, monkeypatch):
    one, totals = llama(quant), []

    def noted(variables, output, *rest):
        totals.append(output.total())
        return []

    monkeypatch.setattr("ptq_llm.learned_clip.tune", noted)
    one.step(LearnedClip).block(one.block, one.calibration)
    one.step(Round).block(one.block, one.calibration)
    assert totals == [pytest.approx(of_block(one), rel=1e-5)]


@pytest.mark.parametrize("before", [[], [(Clip, {})]], ids=["observer", "clip"])
@pytest.mark.parametrize("quant", ALL.values(), ids=ALL)
def test_the_block_is_never_further_off_than_with_the_ranges_it_begins_with(quant, before):
    start = after(lambda: llama(quant), *before)
    for rate in (None, 3e-2, 10.0):
        assert after(lambda: llama(quant), *before, (LearnedClip, {"rate": rate})) <= start * (1 + 1e-6)


def test_learning_helps_where_there_is_something_to_learn():
    assert after(lambda: llama(W3), (LearnedClip, {"epochs": 10, "rate": 3e-2})) < 0.95 * after(
        lambda: llama(W3)
    )


def ranges(one):
    layers = one.context.targets(one.block)
    return {path: one.calibration.weight_range(path, layer) for path, layer in layers.items()}


def assert_same(found, expected, same=True):
    pairs = [(end, found[path][place]) for path in expected for place, end in enumerate(expected[path])]
    assert all(torch.equal(one, other) for one, other in pairs) is same


@pytest.mark.parametrize("before", [None, Clip])
def test_no_epochs_leave_the_ranges_as_they_are(before):
    one = llama(W3_GROUPS)
    if before is not None:
        one.step(before).block(one.block, one.calibration)
    start = ranges(one)
    one.step(LearnedClip, epochs=0).block(one.block, one.calibration)
    assert_same(ranges(one), start)
    assert one.calibration.losses == []


def test_every_update_has_a_loss_in_the_report_and_a_second_run_learns_the_same():
    first, second = llama(W4A4), llama(W4A4)
    for one in (first, second):
        one.step(LearnedClip, epochs=3, rate=1e-2).block(one.block, one.calibration)
    assert len(first.calibration.losses) == 3 * 4
    assert first.calibration.losses == second.calibration.losses
    assert_same(ranges(first), ranges(second))


@pytest.mark.parametrize(
    ("quant", "epochs", "expected"),
    [(W3, 5, 5 / 20), (W3, 200, 1e-2), (W4A4, 5, 5 / 20), (W4A4, 2000, 1e-3)],
)
def test_few_updates_are_larger_many_are_the_paper_s(quant, epochs, expected, monkeypatch):
    rates = set()
    monkeypatch.setattr(
        "ptq_llm.learned_clip.tune", lambda variables, *rest: rates.update(r for _, r in variables) or []
    )
    one = llama(quant)
    one.step(LearnedClip, epochs=epochs).block(one.block, one.calibration)
    assert rates == {expected}


def test_layers_that_no_token_reaches_keep_their_range():
    model = nn.ModuleDict({"block": nn.ModuleDict({n: nn.Linear(8, 8) for n in ("used", "unused")})})
    model["block"].forward = lambda x: model["block"]["used"](x)
    model.forward = lambda x: model["block"](x)
    one = OneBlock(model, "block", [random(5, 8, seed=1)], W3)
    start = ranges(one)
    one.step(LearnedClip, rate=1e-1).block(one.block, one.calibration)
    assert_same(ranges(one), {"block.unused": start["block.unused"]})


def test_padding_counts_for_nothing():
    mask = torch.ones(1, 6, dtype=torch.bool)
    mask[0, 4:] = False
    weight = random(8, 16, seed=2)
    found = []
    for padding in (0.0, 1000.0):
        samples = [random(1, 6, 16, seed=seed) for seed in range(3)]
        for x in samples:
            x[0, 4:] = padding
        one = OneBlock(OneLayer(weight), "block", samples, W3, [mask] * 3)
        one.step(LearnedClip, rate=3e-2).block(one.block, one.calibration)
        found.append(ranges(one))
    assert_same(found[0], found[1])


def test_inputs_come_from_the_stream_that_is_named():
    """The quantized prefix gives nothing but zeros, from which there is nothing to learn."""
    for inputs, learns in (("quantized", False), ("full-precision", True)):
        one = OneBlock(
            OneLayer(random(8, 16)), "block", [random(6, 16, seed=seed) for seed in range(3)], W3
        )
        for tape in one.calibration.io.tapes:
            for tensor in tape.flowing.values():
                tensor.zero_()
        start = ranges(one)
        one.step(LearnedClip, rate=3e-2, inputs=inputs).block(one.block, one.calibration)
        assert_same(ranges(one), start, same=not learns)


# Whole runs


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return tiny_lm.save(tmp_path_factory.mktemp("model"), num_hidden_layers=2)


def run(model, folder, steps):
    small = [f"task.model={model}", "task.window=24", "task.max_windows=3", "task.calibration_window=24"]
    small += ["task.calibration_samples=3", "export=[]", f"steps={steps}"]
    small += ["quant.weights.group_size=32"]
    return ptqcore.quantize(find_recipe("w3a16", "llm", small), "llm", folder)


def test_searched_ranges_are_learned_on_and_rounded_in(model, tmp_path):
    clipped = run(model, tmp_path / "clip", "[clip, round]")
    record = run(model, tmp_path / "both", "[clip, {learned-clip: {epochs: 10, rate: 0.03}}, round]")
    assert len(record.blocks) == 2
    assert all(block.losses for block in record.blocks)
    assert record.blocks[0].relative_error < clipped.blocks[0].relative_error


def test_gptq_rounds_in_learned_ranges(model, tmp_path):
    plain = run(model, tmp_path / "plain", "[{gptq: {}}]")
    record = run(model, tmp_path / "both", "[{learned-clip: {rate: 0.03}}, gptq]")
    assert record.blocks[0].relative_error != plain.blocks[0].relative_error
