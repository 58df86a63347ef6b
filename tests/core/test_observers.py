"""Observers against closed forms, numpy's percentiles and brute force."""

import numpy as np
import pytest
import torch
from pydantic import ValidationError

from ptqcore.observers import MSE, MinMax, MovingAverage, Percentile
from ptqcore.spec import QuantSpec

QUARTER = 2**18  # a quarter of the values kept at most
PER_TENSOR = QuantSpec(bits=4)
PER_CHANNEL = QuantSpec(bits=4, granularity="channel")
PER_GROUP = QuantSpec(bits=4, granularity="group", group_size=4)
ALL = [MinMax, MovingAverage, Percentile, MSE]


def random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def heavy_tailed(*shape, seed=0):
    return random(*shape, seed=seed) ** 3


def observed(observer, *tensors):
    for x in tensors:
        observer.update(x)
    return observer


def assert_same_range(first, second):
    for a, b in zip(first.range(), second.range(), strict=True):
        assert torch.equal(a, b)


# All observers


@pytest.mark.parametrize("kind", ALL)
def test_range_without_data_is_an_error(kind):
    with pytest.raises(
        ValueError, match=f"{kind.name.replace('minmax', 'min-max')} observer has seen no tensor"
    ):
        kind(PER_TENSOR).range()


@pytest.mark.parametrize("kind", ALL)
@pytest.mark.parametrize("spec", [PER_TENSOR, PER_CHANNEL, PER_GROUP], ids=str)
def test_range_has_the_layout_of_the_spec_and_contains_zero(kind, spec):
    low, high = observed(kind(spec), random(3, 10) + 5).range()
    shape = {"tensor": (1, 1), "channel": (3, 1), "group": (3, 3)}[spec.granularity]
    assert low.shape == high.shape == shape
    assert (low <= 0).all()
    assert (high >= 0).all()


@pytest.mark.parametrize("kind", ALL)
def test_constant_zero_has_an_empty_range(kind):
    low, high = observed(kind(PER_TENSOR), torch.zeros(2, 5)).range()
    assert not low.any()
    assert not high.any()


@pytest.mark.parametrize("kind", ALL)
def test_range_of_a_trained_parameter_carries_no_graph(kind):
    low, high = observed(kind(PER_CHANNEL), torch.nn.Parameter(random(3, 10))).range()
    assert not low.requires_grad
    assert not high.requires_grad


@pytest.mark.parametrize("kind", ALL)
def test_merge_into_an_observer_without_data_takes_the_other_range(kind):
    empty, full = kind(PER_TENSOR), observed(kind(PER_TENSOR), random(4, 9))
    empty.merge(full)
    assert_same_range(empty, full)


@pytest.mark.parametrize("kind", [MinMax, Percentile, MSE])
def test_merge_equals_one_observer_that_has_seen_all(kind):
    data = [heavy_tailed(n, 3, seed=n) for n in (5, 17, 2, 40)]
    first, second = observed(kind(PER_TENSOR), *data[:2]), observed(kind(PER_TENSOR), *data[2:])
    first.merge(second)
    assert_same_range(first, observed(kind(PER_TENSOR), *data))


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        (MinMax, {"momentum": 0.5}),
        (MovingAverage, {"momentum": 1.0}),
        (MovingAverage, {"momentum": -0.1}),
        (MovingAverage, {"momentun": 0.5}),
        (Percentile, {"percentile": 50.0}),
        (Percentile, {"percentile": 100.1}),
        (Percentile, {"percentile": "most"}),
        (MSE, {"norm": 0}),
        (MSE, {"candidates": 0}),
        (MSE, {"shrink": 1.0}),
        (MSE, {"shrink": 0.0}),
    ],
)
def test_wrong_options_are_refused(kind, options):
    with pytest.raises(ValidationError, match=next(iter(options))):
        kind(PER_TENSOR, **options)


# Min-max


def test_minmax_per_tensor_is_the_smallest_and_largest_of_all_tensors():
    low, high = observed(
        MinMax(PER_TENSOR), torch.tensor([[-1.0, 2.0]]), torch.tensor([[0.5, 7.0]])
    ).range()
    assert (low.item(), high.item()) == (-1.0, 7.0)


def test_minmax_per_channel_treats_each_row_alone():
    low, high = observed(MinMax(PER_CHANNEL), torch.tensor([[1.0, 3.0], [-4.0, -2.0]])).range()
    assert low.tolist() == [[0.0], [-4.0]]
    assert high.tolist() == [[3.0], [0.0]]


# Moving average


@pytest.mark.parametrize("momentum", [0.0, 0.5, 0.9])
def test_moving_average_is_the_geometric_sum(momentum):
    """m_k = momentum·m_(k−1) + (1 − momentum)·x_k, written out over all tensors."""
    highs = [3.0, 1.0, 8.0, 2.0, 5.0]
    observer = MovingAverage(PER_TENSOR, momentum=momentum)
    low, high = observed(observer, *(torch.tensor([-2 * h, h]) for h in highs)).range()
    last = len(highs) - 1
    weights = [momentum**last] + [(1 - momentum) * momentum ** (last - k) for k in range(1, last + 1)]
    expected = sum(w * h for w, h in zip(weights, highs, strict=True))
    assert high.item() == pytest.approx(expected, rel=1e-6)
    assert low.item() == pytest.approx(-2 * expected, rel=1e-6)


def test_first_tensor_starts_the_average():
    _, high = observed(MovingAverage(PER_TENSOR), torch.tensor([0.0, 4.0])).range()
    assert high.item() == 4.0


def test_merged_averages_are_weighted_by_their_number_of_tensors():
    first = observed(MovingAverage(PER_TENSOR), *[torch.tensor([-1.0, 4.0])] * 3)
    second = observed(MovingAverage(PER_TENSOR), torch.tensor([-5.0, 8.0]))
    first.merge(second)
    low, high = first.range()
    assert low.item() == pytest.approx((3 * -1 + -5) / 4)
    assert high.item() == pytest.approx((3 * 4 + 8) / 4)


def test_merging_one_after_the_other_weights_every_tensor_alike():
    first, *others = (observed(MovingAverage(PER_TENSOR), torch.tensor([0.0, h])) for h in (1.0, 2.0, 6.0))
    for other in others:
        first.merge(other)
    assert first.range()[1].item() == pytest.approx((1 + 2 + 6) / 3)


# Percentile


@pytest.mark.parametrize("percentile", [75.0, 99.0, 99.9, 100.0])
def test_percentile_per_tensor_equals_numpy(percentile):
    data = [heavy_tailed(50, 7, seed=s) for s in range(3)]
    low, high = observed(Percentile(PER_TENSOR, percentile=percentile), *data).range()
    values = torch.cat(data).double().numpy().ravel()
    assert low.item() == pytest.approx(np.percentile(values, 100 - percentile), rel=1e-5)
    assert high.item() == pytest.approx(np.percentile(values, percentile), rel=1e-5)


def test_percentile_per_channel_equals_numpy_row_by_row():
    x = heavy_tailed(4, 101)
    low, high = observed(Percentile(PER_CHANNEL, percentile=95), x).range()
    expected = np.percentile(x.double().numpy(), [5, 95], axis=1, keepdims=True)
    np.testing.assert_allclose(low.numpy(), expected[0], rtol=1e-5)
    np.testing.assert_allclose(high.numpy(), expected[1], rtol=1e-5)


def test_percentile_of_a_ragged_group_counts_only_its_own_values():
    x = random(3, 10)
    low, high = observed(Percentile(PER_GROUP, percentile=75), x).range()
    for group, start in enumerate((0, 4, 8)):
        own = x[:, start : start + 4].double().numpy()
        expected = np.percentile(own, [25, 75], axis=1)
        np.testing.assert_allclose(low[:, group].numpy(), expected[0].clip(max=0), rtol=1e-5)
        np.testing.assert_allclose(high[:, group].numpy(), expected[1].clip(min=0), rtol=1e-5)


def test_percentile_100_equals_minmax():
    x = random(6, 33)
    assert_same_range(observed(Percentile(PER_TENSOR, percentile=100), x), observed(MinMax(PER_TENSOR), x))


def test_percentile_leaves_out_an_outlier():
    x = torch.cat([torch.linspace(-1, 1, 9999), torch.tensor([1e6])])
    _, high = observed(Percentile(PER_TENSOR, percentile=99.9), x).range()
    assert 0.99 < high.item() <= 1.0


# Thinning


def long_data():
    """1.25 Mi whole numbers, exact in float32, whose extremes lie at odd positions."""
    values = torch.arange(5 * QUARTER, dtype=torch.float32)
    values[101], values[3 * QUARTER + 7] = -9e6, 9e6
    return values


def test_beyond_1_mi_values_every_second_is_kept_however_they_arrive():
    values = long_data()
    once = observed(Percentile(PER_TENSOR), values)
    pieces = observed(Percentile(PER_TENSOR), *values.split(QUARTER + 333))
    assert torch.equal(once.values(), values[None, ::2])
    assert torch.equal(pieces.values(), values[None, ::2])


def test_positions_stay_aligned_after_thinning_twice():
    values = torch.arange(9 * QUARTER, dtype=torch.float32)
    sizes = [4 * QUARTER + 1, 4 * QUARTER + 2, QUARTER - 3]
    assert torch.equal(observed(Percentile(PER_TENSOR), *values.split(sizes)).values(), values[None, ::4])


def test_thinning_keeps_the_exact_smallest_and_largest_value():
    low, high = observed(MSE(PER_TENSOR), long_data()).exact_range()
    assert (low.item(), high.item()) == (-9e6, 9e6)


def test_percentile_100_covers_everything_even_where_values_were_thinned_out():
    low, high = observed(Percentile(PER_TENSOR, percentile=100), long_data()).range()
    assert (low.item(), high.item()) == (-9e6, 9e6)


def test_up_to_1_mi_values_are_all_kept():
    assert observed(Percentile(PER_TENSOR), torch.zeros(4, QUARTER)).values().shape == (1, 4 * QUARTER)


def test_merging_a_thinned_sample_thins_the_other_alike():
    values, few = long_data(), torch.arange(1000.0)
    first, second = observed(Percentile(PER_TENSOR), values), observed(Percentile(PER_TENSOR), few)
    first.merge(second)
    assert torch.equal(first.values(), torch.cat([values[::2], few[::2]])[None])


# MSE


def brute_force_errors(x, spec, norm, candidates, shrink):
    """Total |x − q(x)|^norm in float64 for each shrunk range of the values x."""
    x = x.double().numpy()
    low, high, levels = min(x.min(), 0), max(x.max(), 0), 2**spec.bits - 1
    errors = []
    for step in range(candidates):
        ratio = 1 - shrink * step / candidates
        if spec.symmetric:
            offset = 2 ** (spec.bits - 1)
            scale = ratio * max(-low / offset, high / (offset - 1))
        else:
            scale = ratio * (high - low) / levels
            offset = np.rint(-low * ratio / scale)
        codes = np.clip(np.rint(x / scale) + offset, 0, levels)
        errors.append((np.abs(x - (codes - offset) * scale) ** norm).sum())
    return np.array(errors)


def chosen_step(ratio, candidates, shrink):
    step = (1 - ratio) * candidates / shrink
    assert step == pytest.approx(round(step), abs=1e-2)
    return round(step)


@pytest.mark.parametrize("norm", [2.0, 2.4])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_mse_range_is_the_best_of_all_candidates(bits, symmetric, norm):
    spec = QuantSpec(bits=bits, symmetric=symmetric)
    x = heavy_tailed(40, 11, seed=bits)
    low, high = observed(MSE(spec, norm=norm), x).range()
    errors = brute_force_errors(x, spec, norm, candidates=80, shrink=0.8)
    step = chosen_step(high.item() / x.max().item(), 80, 0.8)
    assert low.item() / x.min().item() == pytest.approx(high.item() / x.max().item(), rel=1e-5)
    assert errors[step] <= errors.min() * (1 + 1e-4)


@pytest.mark.parametrize("spec", [PER_CHANNEL, PER_GROUP], ids=str)
def test_mse_chooses_for_each_scale_alone(spec):
    x = heavy_tailed(3, 10)
    low, high = observed(MSE(spec), x).range()
    width = spec.group_size or 10
    for row in range(3):
        for part, start in enumerate(range(0, 10, width)):
            alone = observed(MSE(PER_TENSOR), x[row, start : start + width]).range()
            assert low[row, part] == alone[0]
            assert high[row, part] == alone[1]


@pytest.mark.parametrize("seed", range(5))
def test_mse_is_never_worse_than_minmax(seed):
    x = heavy_tailed(64, 8, seed=seed)
    _, high = observed(MSE(PER_TENSOR, norm=2.0), x).range()
    _, full = observed(MinMax(PER_TENSOR), x).range()
    errors = brute_force_errors(x, PER_TENSOR, 2.0, candidates=80, shrink=0.8)
    assert errors[chosen_step(high.item() / full.item(), 80, 0.8)] <= errors[0]


def test_mse_with_one_candidate_equals_minmax():
    x = heavy_tailed(9, 9)
    assert_same_range(observed(MSE(PER_TENSOR, candidates=1), x), observed(MinMax(PER_TENSOR), x))


def test_mse_keeps_the_full_range_of_values_that_lie_on_its_grid():
    x = torch.arange(16.0) - 5
    spec = QuantSpec(bits=4, symmetric=False)
    assert_same_range(observed(MSE(spec), x), observed(MinMax(spec), x))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_mse_of_small_half_precision_weights_is_that_of_their_float32_copy(dtype):
    x = (0.002 * random(64, 32)).to(dtype)
    low, high = observed(MSE(PER_TENSOR), x).range()
    expected_low, expected_high = observed(MSE(PER_TENSOR), x.float()).range()
    assert low.item() == pytest.approx(expected_low.item(), rel=0.03)
    assert high.item() == pytest.approx(expected_high.item(), rel=0.03)


# Values that count more than others


@pytest.mark.parametrize("kind", ALL)
def test_values_of_weight_zero_are_as_if_never_seen(kind):
    x, weight = heavy_tailed(6, 50), torch.arange(6)[:, None] % 2
    weighted, others = kind(PER_TENSOR), kind(PER_TENSOR)
    weighted.update_weighted(x, weight.float())
    others.update_weighted(x[1::2], torch.ones(()))
    assert_same_range(weighted, others)
    if kind is not Percentile:  # which interpolates where all count the same
        assert_same_range(weighted, observed(kind(PER_TENSOR), x[1::2].flatten()))


@pytest.mark.parametrize("kind", [MSE, Percentile])
def test_a_weight_is_how_often_a_value_was_seen(kind):
    x = heavy_tailed(40)
    weight = torch.randint(0, 4, (40,), generator=torch.Generator().manual_seed(1)).float()
    options = {} if kind is MSE else {"percentile": 90}
    weighted, one = kind(PER_TENSOR, **options), kind(PER_TENSOR, **options)
    weighted.update_weighted(x, weight)
    one.update_weighted(x.repeat_interleave(weight.long()), torch.ones(()))
    assert_same_range(weighted, one)


def test_mse_gives_up_values_that_hardly_count():
    x = torch.cat([torch.linspace(-1, 1, 200), torch.tensor([5.0])])
    equal, weighted = observed(MSE(PER_TENSOR), x), MSE(PER_TENSOR)
    weighted.update_weighted(x, torch.cat([torch.ones(200), torch.tensor([1e-3])]))
    assert float(weighted.range()[1]) < 1.5 < float(equal.range()[1])


def test_weighted_values_are_thinned_and_merged_with_their_weights():
    x = random(2 * QUARTER * 4)
    weight = (x > 0).float() + 0.5
    whole, first, second = (MSE(PER_TENSOR) for _ in range(3))
    whole.update_weighted(x, weight)
    first.update_weighted(x[: QUARTER * 4], weight[: QUARTER * 4])
    second.update_weighted(x[QUARTER * 4 :], weight[QUARTER * 4 :])
    first.merge(second)
    assert torch.equal(whole.weights(), first.weights())
    assert torch.equal(whole.weights() > 1, whole.values() > 0)
    assert_same_range(whole, first)
