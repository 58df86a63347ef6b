"""Variables that are learned: rounding (AdaRound), steps (LSQ), and which elements are rounded (QDrop)."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ptqcore import grid
from ptqcore.packed import QuantizedTensor
from ptqcore.quantizers import FakeQuant, LearnedCodes, LearnedRounding, LearnedStep, random_mask
from ptqcore.spec import QuantSpec

SPECS = st.builds(
    lambda bits, kind, granularity: QuantSpec(
        bits=bits,
        symmetric=kind != "asymmetric",
        signed_scale=kind == "signed scale",
        granularity=granularity,
        group_size=4 if granularity == "group" else None,
    ),
    st.integers(2, 8),
    st.sampled_from(["symmetric", "asymmetric", "signed scale"]),
    st.sampled_from(["tensor", "channel", "group"]),
)


def random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def nearest(weight, spec, cut=1.0):
    """The weight rounded to nearest on a grid that covers a share of its range."""
    low, high = grid.value_range(weight.flatten(1), spec)
    return QuantizedTensor.from_range(weight, low * cut, high * cut, spec)


KINDS = [LearnedRounding, LearnedCodes]

# Weights: where they start


@settings(max_examples=150, deadline=None)
@given(
    st.sampled_from(KINDS),
    SPECS,
    st.integers(0, 1000),
    st.sampled_from([1.0, 0.7]),
    st.sampled_from([1e-6, 1.0, 1e6]),
)
def test_before_anything_is_learned_weights_go_to_the_nearest_value(kind, spec, seed, cut, unit):
    weight = random(5, 10, seed=seed) * unit
    start = nearest(weight, spec, cut)
    hard = kind(weight, start).hard()
    assert torch.equal(hard.codes, start.codes)
    assert torch.equal(hard.dequantize(), start.dequantize())
    assert (hard.spec, hard.shape) == (start.spec, start.shape)


@settings(max_examples=50, deadline=None)
@given(st.sampled_from(KINDS), SPECS, st.integers(0, 1000))
def test_ties_and_values_on_the_grid_start_as_rounding_has_them(kind, spec, seed):
    generator = torch.Generator().manual_seed(seed)
    steps = torch.randint(-3 * spec.levels, 3 * spec.levels, (4, 8), generator=generator)
    weight = steps * 0.25
    start = nearest(weight, spec, 0.5)
    assert torch.equal(kind(weight, start).hard().codes, start.codes)


@settings(max_examples=100, deadline=None)
@given(SPECS, st.integers(0, 1000))
def test_the_soft_weight_starts_at_the_full_precision_weight(spec, seed):
    weight = random(5, 10, seed=seed)
    start = nearest(weight, spec)
    soft = LearnedRounding(weight, start).soft().detach()
    position = grid.position(weight, start.scale, start.zero_point, spec)
    inside = (position >= 0) & (position <= spec.levels)
    difference = position - grid.position(soft, start.scale, start.zero_point, spec)
    assert float(difference[inside].abs().max()) < 2e-4


def test_the_soft_weight_outside_the_range_is_at_its_end():
    spec = QuantSpec(bits=3, granularity="channel")
    weight = torch.tensor([[-10.0, 10.0, 0.3]])
    start = QuantizedTensor.from_range(weight, torch.tensor([[-4.0]]), torch.tensor([[3.0]]), spec)
    soft = LearnedRounding(weight, start).soft()
    torch.testing.assert_close(soft.detach(), torch.tensor([[-4.0, 3.0, 0.3]]))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", [(6, 5), (4, 3, 3, 3)])
def test_weights_keep_their_shape(kind, shape):
    weight = random(*shape)
    rounding = kind(weight, nearest(weight, QuantSpec(bits=4, granularity="channel")))
    assert rounding.soft().shape == rounding.hard().dequantize().shape == shape


# Codes: how they learn


def test_codes_are_rounded_and_their_gradient_is_the_step_inside_the_grid():
    spec = QuantSpec(bits=3, granularity="channel")  # -4 … 3 steps of 0.5
    weight = torch.tensor([[-10.0, -1.1, 0.3, 10.0]])
    start = QuantizedTensor.from_range(weight, torch.tensor([[-2.0]]), torch.tensor([[1.5]]), spec)
    codes = LearnedCodes(weight, start)
    with torch.no_grad():
        codes.variable += torch.tensor([[0.0, 2.3, -0.4, 0.0]])
    soft = codes.soft()
    assert soft.tolist() == [[-2.0, 0.0, 0.0, 1.5]]
    assert torch.equal(codes.hard().dequantize(), soft)
    soft.sum().backward()
    assert codes.variable.grad.tolist() == [[0.0, 0.5, 0.5, 0.0]]


# Rounding: how it learns


def learnable(bits=4, seed=0):
    weight = random(3, 6, seed=seed)
    return LearnedRounding(weight, nearest(weight, QuantSpec(bits=bits, granularity="channel")))


def test_the_share_is_the_rectified_sigmoid():
    rounding = learnable()
    rounding.variable.data = torch.tensor([[-9.0, -1.0, 0.0, 1.0, 9.0, 2.0]]).expand(3, -1).clone()
    expected = [0, 1.2 / (1 + math.e) - 0.1, 0.5, 1.2 * math.e / (1 + math.e) - 0.1, 1]
    torch.testing.assert_close(rounding.share_up()[0, :5].detach(), torch.tensor(expected))


def test_up_is_one_step_above_down():
    rounding = learnable()
    rounding.variable.data.fill_(-10)
    down = rounding.hard()
    assert torch.equal(rounding.soft().detach(), down.dequantize())
    rounding.variable.data.fill_(10)
    up = rounding.hard()
    assert torch.equal(rounding.soft().detach(), up.dequantize())
    assert bool((up.codes - down.codes == 1).logical_or(up.codes == 15).all())


def test_the_gradient_of_the_soft_weight_is_that_of_the_sigmoid_times_the_step():
    rounding = learnable()
    rounding.soft().sum().backward()
    s = torch.sigmoid(rounding.variable.detach())
    inside = (rounding.share_up() > 0) & (rounding.share_up() < 1)
    expected = 1.2 * s * (1 - s) * rounding.start.scale * inside
    position = grid.position(rounding.soft(), rounding.start.scale, None, rounding.start.spec)
    free = (position > 1e-3) & (position < rounding.start.spec.levels - 1e-3)
    torch.testing.assert_close(rounding.variable.grad[free], expected[free])


def test_gradients_gathered_between_begin_and_end_are_those_of_the_soft_weight():
    ours, plain = learnable(), learnable()
    factors = [random(3, 6, seed=seed) for seed in (1, 2, 3)]
    ours.begin()
    for factor in factors:
        (ours.weight.square() * factor).sum().backward()
    ours.end()
    sum((plain.soft().square() * factor).sum() for factor in factors).backward()
    torch.testing.assert_close(ours.variable.grad, plain.variable.grad)


def test_an_update_that_does_not_use_the_weight_has_no_gradient():
    rounding = learnable()
    rounding.begin()
    rounding.end()
    assert rounding.variable.grad is None


# Steps


def quantizer(low, high, bits=4, symmetric=False):
    made = FakeQuant(QuantSpec(bits=bits, symmetric=symmetric))
    made.set_range(torch.tensor(low), torch.tensor(high))
    return made


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", [2, 4, 8])
def test_a_step_starts_as_its_quantizer(bits, symmetric):
    made, x = quantizer(-1.0, 2.0, bits, symmetric), random(40, 50) * 2
    assert torch.equal(LearnedStep(made)(x).detach(), made(x))


def test_the_gradient_of_the_step_is_that_of_lsq():
    """Inside the grid round(x/s) − x/s, outside the codes at its ends (Esser et al., eq. 3)."""
    made = quantizer(-1.0, 2.0)
    scale, zero = float(made.scale), float(made.zero_point)
    x, weights = random(40, 50) * 2, random(40, 50, seed=1)
    step = LearnedStep(made)
    (step(x) * weights).sum().backward()
    position = x / scale + zero
    inside = (position.round() >= 0) & (position.round() <= 15)
    slope = torch.where(inside, position.round() - position, position.clamp(0, 15) - zero)
    assert 0.1 < float(inside.float().mean()) < 0.9
    expected = (slope * weights).sum() * scale  # the variable is the logarithm of the step
    torch.testing.assert_close(step.variable.grad, expected.view(1), rtol=1e-4, atol=1e-4)


def test_outside_the_grid_the_gradient_of_the_step_is_the_numerical_one():
    step = LearnedStep(quantizer(-1.0, 2.0))
    x = torch.tensor([-7.0, 9.0, 30.0, -11.0])
    step(x).pow(2).sum().backward()

    def value(variable):
        step.variable.data.fill_(variable)
        return float(step(x).detach().double().pow(2).sum())

    numerical = (value(1e-3) - value(-1e-3)) / 2e-3
    assert float(step.variable.grad) == pytest.approx(numerical, rel=1e-3)


def test_the_gradient_of_the_input_passes_inside_the_grid_only():
    step, x = (
        LearnedStep(quantizer(-1.0, 2.0)),
        torch.tensor([-5.0, -0.9, 0.0, 1.9, 5.0], requires_grad=True),
    )
    step(x).sum().backward()
    assert x.grad.tolist() == [0, 1, 1, 1, 0]


def test_elements_that_are_not_kept_pass_as_they_are():
    step = LearnedStep(quantizer(-1.0, 2.0))
    x = torch.tensor([-5.0, 0.123, 5.0, 0.456], requires_grad=True)
    keep = torch.tensor([False, False, True, True])
    y = step(x, keep)
    assert torch.equal(y[:2], x[:2])
    assert torch.equal(y[2:], step(x)[2:])
    y.sum().backward()
    assert x.grad.tolist() == [1, 1, 0, 1]


def test_elements_that_are_not_kept_do_not_move_the_step():
    x, keep = random(6, 7) * 2, random(6, 7, seed=1) > 0
    masked, kept = LearnedStep(quantizer(-1.0, 2.0)), LearnedStep(quantizer(-1.0, 2.0))
    masked(x, keep).sum().backward()
    kept(x[keep]).sum().backward()
    torch.testing.assert_close(masked.variable.grad, kept.variable.grad, rtol=1e-4, atol=1e-4)


def test_the_quantizer_gets_the_learned_step():
    made = quantizer(-1.0, 2.0)
    first = made.scale.clone()
    step = LearnedStep(made)
    step.variable.data.fill_(math.log(0.75))
    expected = step(random(5, 5)).detach()
    step.finish()
    torch.testing.assert_close(made.scale, first * 0.75)
    torch.testing.assert_close(made(random(5, 5)), expected)


def test_a_range_never_grows():
    made = quantizer(-1.0, 2.0)
    first = made.scale.clone()
    step = LearnedStep(made)
    step.variable.data.fill_(0.3)
    step.finish()
    assert torch.equal(made.scale, first)


# Which elements are rounded


@pytest.mark.parametrize("probability", [0.0, 0.25, 0.5, 0.9, 0.999, 1.0])
def test_elements_are_chosen_with_their_probability(probability):
    count = 2**18
    mask = random_mask(torch.empty(count), probability, torch.Generator().manual_seed(1))
    assert mask.dtype == torch.bool
    deviation = math.sqrt(probability * (1 - probability) / count)
    assert float(mask.float().mean()) == pytest.approx(probability, abs=5 * deviation + 1 / 512)


def test_elements_are_chosen_independently():
    mask = random_mask(torch.empty(2**18), 0.5, torch.Generator().manual_seed(2)).float() - 0.5
    for distance in (1, 2, 7, 8, 64):
        correlation = float((mask[distance:] * mask[:-distance]).mean()) * 4
        assert abs(correlation) < 5 / 2**9


def test_the_gradient_of_the_step_does_not_depend_on_how_images_lie_in_memory():
    x, weights = random(2, 3, 4, 5) * 2, random(2, 3, 4, 5, seed=1)
    gradients = []
    for layout in (torch.contiguous_format, torch.channels_last):
        step = LearnedStep(quantizer(-1.0, 2.0))
        (
            step(x.contiguous(memory_format=layout)) * weights.contiguous(memory_format=layout)
        ).sum().backward()
        gradients.append(step.variable.grad)
    torch.testing.assert_close(*gradients)


@pytest.mark.parametrize("shape", [(1,), (7,), (3, 5), (2, 3, 4, 5), (0, 4), ()])
def test_masks_have_the_shape_that_was_asked_for(shape):
    assert random_mask(torch.empty(shape), 0.5, torch.Generator()).shape == shape


def test_masks_lie_in_memory_as_what_they_are_for():
    images = torch.empty(2, 3, 4, 5, memory_format=torch.channels_last)
    assert random_mask(images, 0.5, torch.Generator()).stride() == images.stride()


def test_masks_follow_from_the_generator():
    first, again, other = (torch.Generator().manual_seed(seed) for seed in (1, 1, 2))
    masks = [random_mask(torch.empty(100), 0.5, generator) for generator in (first, again, other)]
    assert torch.equal(masks[0], masks[1])
    assert not torch.equal(masks[0], masks[2])
    assert not torch.equal(masks[0], random_mask(torch.empty(100), 0.5, first))
