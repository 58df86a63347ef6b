"""Targets of the small networks: the answer that fits them best is decoded to the lanes behind them."""

import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from planted_lanes import FRAME, far_apart, road_lanes, stacked

from ptq_lane import Lanes, detectors
from ptq_lane.metrics.culane import Counts, count
from ptq_lane.networks.images import normalised
from ptq_lane.scenes import Scenes

sys.path.append(str(Path(__file__).parents[2] / "tools"))

from lane_targets import FAMILIES, by_slot, family, mirrored

OURS = ("segmentation", "row-anchor")


def perfect_segmentation(targets):
    """Logits of the least loss: the logarithm of what each pixel is wanted to be."""
    column = targets["column"][..., None]
    likely = (1 - (torch.arange(96) - column).abs() / 2).clamp(min=0).nan_to_num(0)
    likely = likely / likely.sum(1, keepdim=True).clamp(min=1)
    pixels = torch.cat([1 - likely.sum(1, keepdim=True), likely], 1)
    return {"lanes": pixels.clamp(1e-6).log(), "existence": 20 * (2 * targets["existence"] - 1)}


def perfect_row_anchor(targets):
    """Logits of the least loss: the two cells beside each place share the probability."""
    cell = targets["cell"]
    likely = (1 - (torch.arange(32)[:, None, None] - cell[:, None]).abs()).clamp(min=0).nan_to_num(0)
    present = (~cell.isnan()).float()
    return {
        "location": likely.clamp(1e-9).log(),
        "existence": 20 * torch.stack([1 - present, present], 1),
    }


PERFECT = {"segmentation": perfect_segmentation, "row-anchor": perfect_row_anchor}
# Largest distance in pixels, and largest number of rows that only one has.
EXACT = {"segmentation": (1.5, 4), "row-anchor": (3.0, 6)}


@pytest.mark.parametrize("name", OURS)
def test_perfect_answers_are_decoded_to_the_lanes(name):
    learner = family(name)
    lanes = road_lanes(24)
    outputs = PERFECT[name](stacked([learner.targets(one, FRAME) for one in lanes]))
    pairs = list(zip(learner.adapter(FRAME).decode(outputs), lanes, strict=True))
    assert all(found.slots.tolist() == wanted.slots.tolist() for found, wanted in pairs)
    distances, alone = zip(*[far_apart(found, wanted) for found, wanted in pairs], strict=True)
    assert max(distances) <= EXACT[name][0]
    assert max(alone) <= EXACT[name][1]


@pytest.mark.parametrize("name", OURS)
def test_perfect_answers_cost_less_than_others(name):
    learner = family(name)
    targets = stacked([learner.targets(one, FRAME) for one in road_lanes(4)])
    outputs = PERFECT[name](targets)
    best = learner.loss(outputs, targets)
    for group, value in outputs.items():
        noisy = value + 30 * torch.randn(value.shape, generator=torch.Generator().manual_seed(0))
        assert learner.loss(outputs | {group: noisy}, targets) > best


@pytest.mark.parametrize("name", OURS)
def test_the_loss_is_a_mean_over_images(name):
    learner = family(name)
    targets = stacked([learner.targets(one, FRAME) for one in road_lanes(1)])
    outputs = learner.network().eval()(torch.zeros(1, 3, 96, 192))
    twice = [
        {key: value.repeat(2, *[1] * (value.ndim - 1)) for key, value in one.items()}
        for one in (outputs, targets)
    ]
    torch.testing.assert_close(learner.loss(*twice), learner.loss(outputs, targets))


@pytest.mark.parametrize("name", OURS)
def test_every_output_is_learned(name):
    learner = family(name)
    targets = stacked([learner.targets(one, FRAME) for one in road_lanes(2)])
    network = learner.network().train()
    torch.autograd.backward(learner.loss(network(torch.randn(2, 3, 96, 192)), targets))
    assert all(bool(parameter.grad.isfinite().all()) for parameter in network.parameters())
    assert all(bool((parameter.grad != 0).any()) for parameter in network.parameters())


@pytest.mark.parametrize("name", OURS)
def test_a_road_without_lines_can_be_learned_from(name):
    learner = family(name)
    nothing = Lanes(FRAME.rows, np.zeros((0, 96)), np.zeros(0, dtype=np.int64))
    unseen = Lanes(FRAME.rows, np.full((1, 96), np.nan), np.array([2]))
    outside = Lanes(FRAME.rows, np.full((1, 96), 500.0), np.array([2]))
    for lanes in (nothing, unseen, outside):
        targets = stacked([learner.targets(lanes, FRAME)])
        outputs = learner.network().eval()(torch.zeros(1, 3, 96, 192))
        assert bool(learner.loss(outputs, targets).isfinite())
        assert len(learner.adapter(FRAME).decode(PERFECT[name](targets))[0]) == 0


def test_the_mirror_image_of_a_mirror_image_is_the_road():
    for lanes in road_lanes(5):
        again = mirrored(mirrored(lanes, FRAME), FRAME)
        assert again.slots.tolist() == lanes.slots.tolist()
        np.testing.assert_allclose(again.x, lanes.x, rtol=0, atol=1e-12)


def test_mirrored_lines_change_sides_and_slots():
    line = np.where(FRAME.rows > 50, FRAME.rows, np.nan)
    lanes = Lanes(FRAME.rows, np.stack([line, line + 5]), np.array([0, 2]))
    turned = mirrored(lanes, FRAME)
    assert turned.slots.tolist() == [1, 3]
    np.testing.assert_array_equal(turned.x, np.stack([191 - line - 5, 191 - line]))
    assert np.isnan(by_slot(turned)[[0, 2]]).all()


def test_every_family_has_its_targets():
    for name in FAMILIES:
        learner = family(name)
        assert all(callable(getattr(learner, part)) for part in ("network", "adapter", "targets", "loss"))


@pytest.mark.parametrize("name", FAMILIES)
def test_the_weights_that_we_ship_find_nearly_all_lines(name):
    """F1 by CULane's rule, on scenes that no figure of ours was measured on."""
    detector = detectors.find(name)
    scenes = Scenes(60, seed=1)[:]
    images = normalised(torch.from_numpy(np.stack([scene.image for scene in scenes])))
    with torch.no_grad():
        found = detector.adapter(FRAME).decode(detector.load(None)(images))
    counts = [
        count(lanes.points(), scene.lanes.points(), FRAME, (0.5,))[0.5]
        for lanes, scene in zip(found, scenes, strict=True)
    ]
    assert sum(counts, Counts()).f1 > 0.93
