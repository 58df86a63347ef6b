"""Calibration: what padding may not touch, what changes with the block, and whose ranges are used."""

import pytest
import torch
from torch import nn

from ptqcore import Block, Calibration, MinMax, QuantSection
from ptqcore.grids import Grids
from ptqcore.rounding import Round
from ptqcore.step import Context, StepOptions
from ptqcore.walk import Walk

STATIC = {
    "weights": {"bits": 4, "granularity": "channel"},
    "activations": {"bits": 8, "symmetric": False},
}


class Layers(nn.Module):
    """Two layers that read the same tensor, and one behind them."""

    def __init__(self):
        super().__init__()
        self.left, self.right, self.last = nn.Linear(4, 6), nn.Linear(4, 6), nn.Linear(6, 3)

    def forward(self, x):
        return self.last(self.left(x).relu() * self.right(x))


class Net(nn.Module):
    def __init__(self, block=None):
        super().__init__()
        self.block = block or Layers()

    def forward(self, x):
        return self.block(x)


LEFT, RIGHT, LAST = "block.left", "block.right", "block.last"


def calibrated(samples, masks=None, quant=STATIC, model=None, observe=MinMax):
    torch.manual_seed(0)
    model = (model or Net()).eval().requires_grad_(False)
    block = Block(model, "block")
    io = next(iter(Walk([block], samples, model)))
    section = QuantSection.model_validate(quant)
    return Calibration(block, io, Grids(section), lambda each: observe(each.spec), masks=masks)


def draw(*shape, seed=1):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


# Masks


PADDED = torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1], [1, 0, 0, 0, 0]]).bool()


def padded():
    """Three lines of 5 positions, in the padding of which are values that nothing may see."""
    x = draw(3, 5, 4)
    x[~PADDED] = 1e4
    return x


def test_statistics_are_those_of_the_tokens_that_count():
    x = padded()
    gram = calibrated([x], [PADDED]).gram(LEFT)
    alone = calibrated([x[PADDED][None]]).gram(LEFT)
    assert gram.count == alone.count == 9
    for name in ("matrix", "sum", "magnitude", "low", "high"):
        torch.testing.assert_close(getattr(gram, name), getattr(alone, name))


def test_static_ranges_of_inputs_are_too():
    x = padded()
    found = calibrated([x], [PADDED])
    for path in (LEFT, LAST):
        ends = found.observer(path).range()
        assert max(float(end.abs().max()) for end in ends) < 1e3
        assert all(
            torch.equal(*pair)
            for pair in zip(ends, calibrated([x[PADDED][None]]).observer(path).range(), strict=True)
        )


def test_every_sample_has_its_own_mask_or_none():
    x, y = padded(), draw(2, 3, 4, seed=2)
    found = calibrated([x, y], [PADDED, None])
    assert found.gram(LEFT).count == 9 + 6
    torch.testing.assert_close(found.counted(x, 0), x[PADDED])
    torch.testing.assert_close(found.counted(y, 1), y.flatten(0, 1))


def test_layers_that_see_tokens_without_padding_count_all():
    """Experts are given some of the tokens: fewer than the sample has positions."""
    tokens = draw(7, 4)
    assert torch.equal(calibrated([padded()], [PADDED]).counted(tokens, 0), tokens)


def test_without_masks_all_tokens_count():
    assert calibrated([padded()]).gram(LEFT).count == 15


def test_values_may_count_differently_for_every_sample():
    samples = [draw(5, 4), draw(5, 4, seed=2)]
    asked = []

    def weigh(x, sample):
        asked.append((tuple(x.shape), sample))
        return torch.arange(5)[:, None] < 2 if sample else None

    found = calibrated(samples)
    found.weigh(weigh)
    low, high = found.observer(LEFT).range()
    counted = torch.cat([samples[0], samples[1][:2]])
    assert (float(low), float(high)) == (float(counted.min()), float(counted.max()))
    assert set(asked) == {((5, 4), 0), ((5, 4), 1), ((5, 6), 0), ((5, 6), 1)}


# What changes


def test_d3_statistics_are_of_every_sample_not_of_the_first_alone():
    samples = [draw(5, 4), 3 * draw(2, 4, seed=2), draw(7, 4, seed=3) - 5]
    gram, x = calibrated(samples).gram(LEFT), torch.cat(samples)
    torch.testing.assert_close(gram.matrix.diagonal(), x.square().sum(0))
    torch.testing.assert_close(gram.mean_magnitude.float(), x.abs().mean(0))
    assert torch.equal(gram.low, x.amin(0))
    assert gram.count == 14


def test_layers_that_read_one_tensor_share_a_gram():
    found = calibrated([draw(5, 4)])
    assert found.gram(LEFT) is found.gram(RIGHT)
    assert found.gram(LAST) is not found.gram(LEFT)


def test_statistics_are_of_the_block_as_it_was_until_a_step_says_that_it_changed():
    x = draw(5, 4)
    found = calibrated([x])
    layers = found.block.module
    before = found.gram(LAST).matrix.clone()
    layers.left.weight.mul_(3)
    layers.left.bias.mul_(3)
    assert torch.equal(found.gram(LAST).matrix, before)
    found.changed()
    torch.testing.assert_close(found.gram(LAST).matrix, 9 * before)
    assert found.gram(LAST).count == 5
    high = (layers.left(x).relu() * layers.right(x)).max()
    torch.testing.assert_close(found.observer(LAST).range()[1].reshape(()), high)


def test_targets_stay_those_of_the_block_before_it_was_changed():
    x = draw(5, 4)
    found = calibrated([x])
    layers = found.block.module
    expected = layers(x)
    found.changed()  # before anything was asked
    layers.last.weight.mul_(2)
    ((target,),) = found.targets
    assert torch.equal(target, expected)


# Ranges of weights


def test_the_range_of_a_weight_is_what_the_recipes_observer_finds():
    found = calibrated([draw(5, 4)])
    layer = found.block.module.left
    low, high = found.weight_range(LEFT, layer)
    assert torch.equal(low, layer.weight.amin(1, keepdim=True).clamp(max=0))
    assert torch.equal(high, layer.weight.amax(1, keepdim=True).clamp(min=0))


def test_it_is_that_of_the_weight_as_it_now_is():
    found = calibrated([draw(5, 4)])
    layer = found.block.module.left
    before = found.weight_range(LEFT, layer)[1].clone()
    layer.weight.mul_(2)
    assert torch.equal(found.weight_range(LEFT, layer)[1], 2 * before)


def test_a_range_that_a_step_has_set_is_what_those_behind_get():
    found = calibrated([draw(5, 4)])
    layer = found.block.module.left
    low, high = torch.full((6, 1), -0.1), torch.full((6, 1), 0.2)
    found.set_weight_range(LEFT, low, high)
    assert all(
        one is other for one, other in zip(found.weight_range(LEFT, layer), (low, high), strict=True)
    )
    assert not torch.equal(found.weight_range(RIGHT, found.block.module.right)[1], high)


def test_rounding_uses_the_range_that_was_set():
    found, section = calibrated([draw(5, 4)]), QuantSection.model_validate(STATIC)
    _ = found.targets  # a run asks for them first
    found.set_weight_range(LEFT, torch.full((6, 1), -0.8), torch.full((6, 1), 0.7))
    context = Context(section, lambda each: MinMax(each.spec), {}, 0, Grids(section), None)
    Round(StepOptions(), context).block(found.block, found)
    scale = found.block.quantized_layers()[LEFT].quantized_weight.scale
    torch.testing.assert_close(scale, torch.full((6, 1), 0.1))


# Experts without tokens


def test_a_layer_that_no_token_reaches_has_no_statistics():
    class Empty(Layers):
        def forward(self, x):
            self.right(x[:0])
            return self.last(self.left(x))

    found = calibrated([draw(5, 4)], model=Net(Empty()))
    assert found.gram(RIGHT) is None
    assert found.observer(RIGHT) is None
    assert found.gram(LEFT).count == 5


def test_a_sample_whose_tokens_are_all_padding_adds_nothing():
    x = draw(2, 3, 4)
    found = calibrated([x, x], [torch.zeros(2, 3).bool(), torch.ones(2, 3).bool()])
    assert found.gram(LEFT).count == 6
    assert found.gram(LEFT).low.isfinite().all()


@pytest.mark.parametrize("outputs", [False, True])
def test_records_are_of_the_block_as_it_now_is(outputs):
    x = draw(5, 4)
    found = calibrated([x, 2 * x])
    layer = found.block.module.left
    layer.weight.mul_(5)
    ones = found.record([LEFT], outputs=outputs)[LEFT]
    expected = [layer(y) if outputs else y for y in (x, 2 * x)]
    assert all(torch.equal(*pair) for pair in zip(ones, expected, strict=True))


# Some layers alone


def test_refreshed_statistics_are_those_of_a_whole_collection_and_the_rest_waits():
    samples = [draw(7, 4, seed=seed) for seed in range(3)]
    one, whole = calibrated(samples), calibrated(samples)
    calls = []
    one.block.model.block.last.register_forward_hook(lambda *_: calls.append(1))
    for each in (one, whole):
        _ = each.targets
        each.block.model.block.left.weight.data *= 2
        each.changed()
    calls.clear()
    one.refresh([LEFT, RIGHT])
    assert torch.equal(one.gram(LEFT).matrix, whole.gram(LEFT).matrix)
    assert one.gram(LEFT) is one.gram(RIGHT)
    assert one.observer(LEFT).range() == whole.observer(LEFT).range()
    assert len(calls) == 1  # the first pass shows where to stop
    assert torch.equal(one.gram(LAST).matrix, whole.gram(LAST).matrix)
    assert len(calls) == 4
    one.refresh([LEFT])  # nothing has changed
    assert len(calls) == 4


def test_where_a_layer_is_not_called_once_passes_run_to_the_end():
    class Twice(Layers):
        def forward(self, x):
            return super().forward(x) + self.last(self.left(2 * x))

    samples = [draw(7, 4, seed=seed) for seed in range(3)]
    one, whole = (calibrated(samples, model=Net(Twice())) for _ in range(2))
    for each in (one, whole):
        _ = each.targets
        each.changed()
    one.refresh([LEFT])
    assert one.gram(LEFT).count == 2 * 21
    assert torch.equal(one.gram(LEFT).matrix, whole.gram(LEFT).matrix)
