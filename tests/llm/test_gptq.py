"""GPTQ: never worse than rounding, held-out data, scales fitted again, few tokens, the step."""

import itertools

import pytest
import torch
from gram_data import SPECS, damped, gram_of, heavy_tailed, inputs, objective, output_error, rounded
from hypothesis import given, settings
from hypothesis import strategies as st
from one_block import OneBlock
from torch import nn

from ptq_llm import gptq as module
from ptq_llm.clip import Clip, clip
from ptq_llm.gptq import GPTQ, gptq
from ptq_llm.gptq_sweep import compensate, factorize
from ptq_llm.scale_refit import refit_scales
from ptq_llm.sequence import in_sequence
from ptq_llm.shrinkage import shrunk
from ptqcore import Block, Gram, QuantizedTensor, QuantLinear, QuantSpec, grid
from ptqcore.dataflow import trace

CHANNELS = 24


# The best of several ranges


@settings(max_examples=60, deadline=None)
@given(
    name=st.sampled_from(sorted(SPECS)),
    rows=st.integers(1, 6),
    channels=st.integers(1, 20),
    tokens=st.integers(1, 60),
    tries=st.integers(1, 4),
    refit=st.booleans(),
    act_order=st.booleans(),
    seed=st.integers(0, 1000),
)
def test_gptq_never_has_more_error_on_its_gram_than_rounding(
    name, rows, channels, tokens, tries, refit, act_order, seed
):
    spec, weight = SPECS[name], heavy_tailed(rows, channels, seed=seed)
    gram = gram_of(inputs(tokens, channels, seed)).matrix
    low, high = grid.value_range(weight, spec)
    narrow = low * 0.7, high * 0.7
    factor = factorize(gram, act_order=act_order)
    (found,) = gptq([weight], [narrow], spec, factor, tries, refit)
    before = objective(
        damped(gram, factor.damping), weight, QuantizedTensor.from_range(weight, *narrow, spec)
    )
    after = objective(damped(gram, factor.damping), weight, found)
    if spec.granularity == "tensor":
        before, after = before.sum(), after.sum()
    assert (after <= before * (1 + 1e-3) + 1e-5).all()


@pytest.mark.parametrize("name", ["asymmetric groups", "signed groups", "channels"])
def test_more_ranges_are_never_worse_than_the_given_or_the_whole_one(name):
    spec, weight, gram = (
        SPECS[name],
        heavy_tailed(9, CHANNELS, seed=5),
        gram_of(inputs(90, CHANNELS)).matrix,
    )
    whole, factor = grid.value_range(weight, spec), factorize(gram)
    narrow = clip(weight, gram, *whole, spec, two_sided=True)
    (best,) = gptq([weight], [narrow], spec, factor, tries=3, refit=False)
    found = objective(damped(gram, factor.damping), weight, best)
    for ends in (narrow, whole):
        (alone,) = gptq([weight], [ends], spec, factor, tries=1, refit=False)
        assert (found <= objective(damped(gram, factor.damping), weight, alone) * (1 + 1e-4)).all()


def test_a_tensor_with_one_scale_takes_one_range_for_all_rows():
    spec, weight, gram = (
        SPECS["tensor"],
        heavy_tailed(9, CHANNELS, seed=5),
        gram_of(inputs(90, CHANNELS)).matrix,
    )
    low, high = grid.value_range(weight, spec)
    (found,) = gptq([weight], [(low * 0.3, high * 0.3)], spec, factorize(gram), tries=4)
    assert found.scale.shape == (1, 1)


def test_with_the_whole_range_given_one_sweep_is_all(monkeypatch):
    calls = []
    monkeypatch.setattr(module, "compensate", lambda *args: calls.append(1) or compensate(*args))
    spec, weight = SPECS["asymmetric groups"], heavy_tailed(9, CHANNELS, seed=5)
    factor = factorize(gram_of(inputs(90, CHANNELS)).matrix)
    gptq([weight], [grid.value_range(weight, spec)], spec, factor, tries=5)
    assert len(calls) == 1


def test_half_precision_stays_so():
    spec, weight = SPECS["asymmetric groups"], heavy_tailed(9, CHANNELS, seed=5).bfloat16()
    factor = factorize(gram_of(inputs(90, CHANNELS)).matrix)
    (found,) = gptq([weight], [grid.value_range(weight.float(), spec)], spec, factor)
    assert found.scale.dtype == found.zero_point.dtype == torch.bfloat16
    assert found.dequantize().dtype == torch.bfloat16


def held_out_errors(bits, seed):
    """Errors on held-out tokens of the same kind: rounding, and GPTQ in the range of the weights and in
    that of the clip search, one sweep each and nothing else."""
    spec = QuantSpec(bits=bits, symmetric=False, granularity="group", group_size=32)
    weight = heavy_tailed(64, 64, seed=100 + seed)
    gram, test = gram_of(inputs(1024, 64, seed)).matrix, inputs(2048, 64, seed + 50)
    factor, whole = factorize(gram), grid.value_range(weight, spec)
    clipped = clip(weight, gram, *whole, spec, two_sided=True)
    errors = [output_error(test, weight, rounded(weight, spec))]
    for ends in (whole, clipped):
        (found,) = gptq([weight], [ends], spec, factor, tries=1, refit=False)
        errors.append(output_error(test, weight, found))
    return errors


@pytest.mark.parametrize("bits", [2, 3])
@pytest.mark.parametrize("seed", range(3))
def test_clip_then_gptq_beats_gptq_with_min_max_ranges_on_held_out_tokens(bits, seed):
    rounding, whole, clipped = held_out_errors(bits, seed)
    assert clipped < whole
    assert clipped < 0.5 * rounding


# Scales fitted again


@pytest.mark.parametrize("name", SPECS)
def test_refitted_scales_never_add_error(name):
    spec, weight, gram = (
        SPECS[name],
        heavy_tailed(9, CHANNELS, seed=6),
        gram_of(inputs(90, CHANNELS)).matrix,
    )
    before = rounded(weight, spec)
    after = refit_scales(weight, before, gram)
    assert torch.equal(after.codes, before.codes)
    errors = [objective(gram, weight, one) for one in (before, after)]
    if spec.granularity == "tensor":
        errors = [error.sum() for error in errors]
    assert (errors[1] <= errors[0] * (1 + 1e-5)).all()
    assert errors[1].sum() < errors[0].sum()


@pytest.mark.parametrize("name", ["channels", "asymmetric channels", "float channels"])
def test_the_one_scale_of_a_row_is_the_closed_form(name):
    """s = (c H wᵀ) / (c H cᵀ)."""
    spec, weight, gram = (
        SPECS[name],
        heavy_tailed(9, CHANNELS, seed=6),
        gram_of(inputs(90, CHANNELS)).matrix,
    )
    before = rounded(weight, spec)
    steps = before.dequantize().double() / before.scale.double()
    hessian = gram.double() + 2.5 * torch.eye(CHANNELS, dtype=torch.float64)
    expected = ((steps @ hessian) * weight).sum(1) / ((steps @ hessian) * steps).sum(1)
    found = refit_scales(weight, before, gram, damping=2.5).scale[:, 0]
    torch.testing.assert_close(found.double(), expected, rtol=1e-3, atol=1e-5)


def test_each_group_is_fitted_to_what_those_before_left():
    """Two groups that read the same: the second needs no change once the first has taken it all."""
    x = heavy_tailed(50, 4, seed=7)
    gram = gram_of(torch.cat([x, x], 1)).matrix
    spec = QuantSpec(bits=4, granularity="group", group_size=4)
    codes = torch.full((1, 8), 9, dtype=torch.uint8)
    quantized = QuantizedTensor(codes, torch.ones(1, 2), None, spec, (1, 8))
    weight = torch.full((1, 8), 1.1)  # each group is 0.1 too low: a scale of 1.2 and one of 1
    found = refit_scales(weight, quantized, gram).scale
    torch.testing.assert_close(found, torch.tensor([[1.2, 1.0]]), rtol=1e-4, atol=1e-4)


def test_refitted_scales_are_such_as_the_format_holds():
    spec, weight = SPECS["half scales"], heavy_tailed(9, CHANNELS, seed=6)
    found = refit_scales(weight, rounded(weight, spec), gram_of(inputs(90, CHANNELS)).matrix).scale
    assert torch.equal(found.half().float(), found)


def test_a_scale_keeps_its_sign():
    """Where the inputs of two groups are opposite, the best scale of one may be below zero."""
    x = heavy_tailed(50, 4, seed=7)
    gram = gram_of(torch.cat([x, x], 1)).matrix
    spec = QuantSpec(bits=4, granularity="group", group_size=4)
    quantized = QuantizedTensor(
        torch.full((1, 8), 9, dtype=torch.uint8), torch.ones(1, 2), None, spec, (1, 8)
    )
    found = refit_scales(torch.full((1, 8), -3.0), quantized, gram).scale
    assert (found > 0).all()


def test_a_group_whose_codes_are_all_zero_keeps_its_scale():
    spec = QuantSpec(bits=4, granularity="channel")
    quantized = QuantizedTensor(
        torch.full((2, 8), 8, dtype=torch.uint8), torch.ones(2, 1), None, spec, (2, 8)
    )
    found = refit_scales(torch.full((2, 8), 0.1), quantized, gram_of(heavy_tailed(20, 8, seed=1)).matrix)
    assert torch.equal(found.scale, quantized.scale)


# Few tokens


def shrinkage_share(x):
    """ρ of Chen et al., eq. 23, for the sample covariance with a diagonal of ones, written out."""
    n, p = x.shape
    scaled = x.double() / x.double().square().sum(0).sqrt()
    s = scaled.T @ scaled
    trace, square = s.trace(), (s @ s).trace()
    return float(((1 - 2 / p) * square + trace**2) / ((n + 1 - 2 / p) * (square - trace**2 / p)))


@pytest.mark.parametrize("tokens", [10, 40, 500])
def test_products_between_channels_shrink_by_the_published_share(tokens):
    x = inputs(tokens, 12)
    gram, share = gram_of(x).matrix, min(shrinkage_share(x), 1.0)
    found = shrunk(gram, tokens)
    expected = gram * (1 - share)
    expected.diagonal().copy_(gram.diagonal())
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-3)


def test_of_white_inputs_little_is_believed_and_of_tied_ones_much():
    white = torch.randn(48, CHANNELS, generator=torch.Generator().manual_seed(0))
    tied = white[:, :1] + 0.1 * white
    assert shrinkage_share(white) > 0.7
    assert shrinkage_share(tied) < 0.05


@pytest.mark.parametrize("bits", [2, 4])
def test_gptq_on_a_shrunk_gram_of_few_tokens_does_not_overfit(bits):
    """Half a token for each channel, weakly tied: plain GPTQ is worse than rounding on held-out tokens,
    with the shrunk Gram it is not."""
    spec = QuantSpec(bits=bits, symmetric=False, granularity="group", group_size=32)
    mix = torch.eye(64) + 0.05 * torch.randn(64, 64, generator=torch.Generator().manual_seed(3))
    train, test = heavy_tailed(32, 64, seed=1) @ mix, heavy_tailed(4000, 64, seed=2) @ mix
    weight, gram = heavy_tailed(64, 64, seed=5), gram_of(train).matrix
    ends = clip(weight, gram, *grid.value_range(weight, spec), spec, two_sided=True)
    start = output_error(test, weight, QuantizedTensor.from_range(weight, *ends, spec))
    plain, believed = (
        output_error(test, weight, gptq([weight], [ends], spec, factorize(matrix), 1, False)[0])
        for matrix in (gram, shrunk(gram, 32))
    )
    assert plain > 1.2 * start
    assert believed < 1.02 * start


def test_channels_that_are_silent_or_alone_are_left_as_they_are():
    gram = torch.diag(torch.tensor([2.0, 0.0, 3.0]))
    assert torch.equal(shrunk(gram, 5), gram)


# The step


class Attention(nn.Module):
    """As in a transformer's block: a and b read the same, c reads what they make, and d what c makes."""

    def __init__(self, width=CHANNELS):
        super().__init__()
        torch.manual_seed(1)
        self.d = nn.Linear(width, width)  # in another order than they are called
        self.c = nn.Linear(width, width)
        self.b = nn.Linear(width, width)
        self.a = nn.Linear(width, width)

    def forward(self, x):
        return x + self.d(torch.tanh(self.c(self.a(x) * torch.sigmoid(self.b(x)))))


class Model(nn.Module):
    def __init__(self, block):
        super().__init__()
        self.block = block

    def forward(self, x):
        return self.block(x)


def at_work(block=None, samples=None, **weights):
    quant = {"weights": {"bits": 3, "granularity": "group", "group_size": 8, "symmetric": False, **weights}}
    samples = samples or [inputs(60, CHANNELS, seed) for seed in range(3)]
    return OneBlock(Model(block or Attention()), "block", samples, quant)


def weights_of(one):
    return {path: layer.weight for path, layer in one.block.quantized_layers().items()}


def run(one, *steps):
    for step in steps:
        step.block(one.block, one.calibration)
    return weights_of(one)


def test_layers_come_in_the_sequence_of_their_calls():
    model = Model(Attention())
    flow = trace(model, lambda: model(torch.ones(2, CHANNELS)))
    block = Block(model, "block")
    assert in_sequence(flow, block, block.layers()) == [["block.b", "block.a"], ["block.c"], ["block.d"]]


def test_a_layer_that_the_traced_sample_does_not_reach_comes_last():
    model = Model(Attention())
    model.block.extra = nn.Linear(2, 2)
    flow = trace(model, lambda: model(torch.ones(2, CHANNELS)))
    block = Block(model, "block")
    assert in_sequence(flow, block, block.layers())[-1] == ["block.extra"]


def test_layers_that_read_the_same_tensor_share_one_factor_and_one_sweep(monkeypatch):
    factors, sweeps = [], []
    monkeypatch.setattr(module, "factorize", lambda *args: factors.append(1) or factorize(*args))
    monkeypatch.setattr(
        module, "compensate", lambda *args: sweeps.append(len(args[0])) or compensate(*args)
    )
    one = at_work()
    run(one, one.step(GPTQ, tries=1))
    assert len(factors) == 3
    assert sorted(sweeps) == [1, 1, 2]


def test_layers_of_other_widths_share_the_factor_alone(monkeypatch):
    factors = []
    monkeypatch.setattr(module, "factorize", lambda *args: factors.append(1) or factorize(*args))
    one = at_work()
    one.context.grids.bits["block.a"] = 5
    run(one, one.step(GPTQ))
    assert len(factors) == 3
    layers = one.block.quantized_layers()
    assert [layers[f"block.{name}"].weight_spec.bits for name in "abcd"] == [5, 3, 3, 3]


def test_the_step_is_the_function_on_the_grams_of_the_block():
    one = at_work()
    weight = one.model.block.c.weight.detach().clone()
    gram, spec = one.calibration.gram("block.c").matrix, one.context.grids.weights("block.c").spec
    (expected,) = gptq([weight], [grid.value_range(weight, spec)], spec, factorize(gram))
    assert torch.equal(run(one, one.step(GPTQ))["block.c"], expected.dequantize())


def test_clipped_ranges_are_taken_over():
    one = at_work()
    weight = one.model.block.c.weight.detach().clone()
    clipping = one.step(Clip)
    clipping.block(one.block, one.calibration)
    ends = one.calibration.weight_range("block.c", one.model.block.c)
    gram, spec = one.calibration.gram("block.c").matrix, one.context.grids.weights("block.c").spec
    (expected,) = gptq([weight], [ends], spec, factorize(gram), tries=1, refit=False)
    found = run(one, one.step(GPTQ, tries=1, refit=False))["block.c"]
    assert torch.equal(found, expected.dequantize())


def test_true_sequential_quantizes_a_layer_for_inputs_from_the_quantized_ones_before_it():
    plain, sequential = at_work(), at_work()
    before = {name: module.weight.detach().clone() for name, module in plain.model.block.named_children()}
    all_at_once = run(plain, plain.step(GPTQ))
    in_turn = run(sequential, sequential.step(GPTQ, true_sequential=True))
    for name in "ab":
        assert torch.equal(all_at_once[f"block.{name}"], in_turn[f"block.{name}"])
    assert not torch.equal(all_at_once["block.c"], in_turn["block.c"])
    reference = Attention()
    reference.a.weight.data, reference.b.weight.data = in_turn["block.a"], in_turn["block.b"]
    read = [(reference.a(x) * torch.sigmoid(reference.b(x))).detach() for x in sequential.samples]
    gram = gram_of(*read).matrix
    spec = sequential.context.grids.weights("block.c").spec
    ends = grid.value_range(before["c"], spec)
    (expected,) = gptq([before["c"]], [ends], spec, factorize(gram))
    assert torch.equal(in_turn["block.c"], expected.dequantize())


def test_a_second_run_gives_the_same_bytes():
    first, second = at_work(), at_work()
    options = {"true_sequential": True}
    found = run(first, first.step(Clip), first.step(GPTQ, **options))
    again = run(second, second.step(Clip), second.step(GPTQ, **options))
    assert all(torch.equal(found[path], again[path]) for path in found)


class Unused(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(2)
        self.used, self.unused = nn.Linear(CHANNELS, 8), nn.Linear(CHANNELS, 8)

    def forward(self, x):
        return self.used(x)


def test_a_layer_that_no_token_reaches_is_rounded_and_that_is_said(capsys):
    one = at_work(Unused())
    weight, spec = one.model.block.unused.weight.detach().clone(), one.context.grids.weights("x").spec
    step = one.step(GPTQ)
    capsys.readouterr()
    found = run(one, step)
    step.finish(one.model)
    assert torch.equal(found["block.unused"], rounded(weight, spec).dequantize())
    lines = capsys.readouterr().err.splitlines()
    assert lines == [
        "gptq: block.unused rounded to nearest: its inputs have no Gram: it is not linear, or no "
        "calibration token reached it"
    ]


def test_inputs_that_are_not_finite_leave_rounding_and_that_is_said(capsys):
    """Activations that overflow would otherwise give weights that are not numbers."""
    one = at_work(Unused())
    one.calibration.gram("block.used").matrix[0, 0] = torch.nan
    step = one.step(GPTQ)
    found = run(one, step)
    step.finish(one.model)
    assert torch.isfinite(found["block.used"]).all()
    said = capsys.readouterr().err
    assert "gptq: block.used and 1 others rounded to nearest: the Gram of its inputs is not finite" in said


def test_too_few_tokens_are_said_once_for_the_worst_layer(capsys):
    one = at_work(samples=[inputs(20, CHANNELS, seed) for seed in range(2)])
    step = one.step(GPTQ)
    capsys.readouterr()
    run(one, step)
    assert capsys.readouterr().err == ""
    step.finish(one.model)
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("gptq: block.")
    assert "40 calibration tokens are 1.7 for each of 24 input channels" in line


def test_enough_tokens_are_not_mentioned_and_the_gram_is_taken_as_it_is(capsys, monkeypatch):
    one = at_work()
    step = one.step(GPTQ)
    capsys.readouterr()
    monkeypatch.setattr(module, "shrunk", lambda *_: pytest.fail("shrunk"))
    run(one, step)
    step.finish(one.model)
    assert capsys.readouterr().err == ""


def test_a_convolution_is_rounded():
    class Convolution(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(2, 3, 3)

        def forward(self, x):
            return self.conv(x)

    one = at_work(Convolution(), [torch.randn(1, 2, 6, 6)], granularity="channel", group_size=None)
    weight = one.model.block.conv.weight.detach().clone()
    spec = one.context.grids.weights("block.conv").spec
    found = run(one, one.step(GPTQ))["block.conv"]
    expected = QuantizedTensor.from_range(weight, *grid.value_range(weight.flatten(1), spec), spec)
    assert torch.equal(found, expected.dequantize())


def test_biases_stay():
    one = at_work()
    bias = one.model.block.c.bias.clone()
    run(one, one.step(GPTQ))
    layer = one.model.block.c
    assert isinstance(layer, QuantLinear)
    assert torch.equal(layer.bias, bias)


# Defects of LLMC: statistics over several batches


def test_d1_d3_every_batch_counts_whatever_their_order():
    """The Gram is a sum over all samples, so that neither the first alone nor partial sums decide."""
    samples = [inputs(60, CHANNELS, seed, mixing=seed) * 3**seed for seed in range(3)]
    orders = [at_work(samples=list(order)) for order in itertools.permutations(samples, 3)]
    grams = [one.calibration.gram("block.a").matrix for one in orders]
    whole = torch.cat(samples).double()
    for gram in grams:
        torch.testing.assert_close(gram.double(), whole.T @ whole, rtol=1e-4, atol=1e-2)
    first_alone = at_work(samples=samples[:1])
    everything = run(orders[0], orders[0].step(GPTQ))
    assert not torch.equal(run(first_alone, first_alone.step(GPTQ))["block.a"], everything["block.a"])


def test_grams_merge_like_batches():
    """Data-parallel calibration: the factor of merged Grams is that of all tokens."""
    first, second = inputs(60, CHANNELS, 1), inputs(60, CHANNELS, 2)
    merged = gram_of(first)
    merged.merge(gram_of(second))
    both: Gram = gram_of(first, second)
    torch.testing.assert_close(
        factorize(merged.matrix).unit, factorize(both.matrix).unit, atol=1e-4, rtol=1e-4
    )
