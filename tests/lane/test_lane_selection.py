"""Sensitivity aware selection: planted truths."""

import pytest
import torch
from toy_lanes import FRAME, Toy, outputs

from ptq_lane.distortion import default_cap
from ptq_lane.focus import Focus
from ptq_lane.selection import Selection, Sensitivity, Weights, sensitivities, weighted_mean

CAP = default_cap(FRAME) * 100  # so that nothing is cut off


def measured(exact, found, adapter=None, **options):
    adapter = adapter or Toy(FRAME)
    return sensitivities(adapter, exact, found, adapter.decode(exact), CAP, **options)


def noise(like, size, seed=1):
    return size * torch.randn(like.shape, generator=torch.Generator().manual_seed(seed))


def with_error(exact, group, error):
    found = exact.clone()
    Toy(FRAME).heads(found)[group].add_(error)
    return found


def test_the_pixels_of_a_linear_head_are_recovered():
    exact = outputs()
    found = measured(exact, with_error(exact, "x", 0.01))
    assert found["x"].per_unit == pytest.approx(6.4, rel=0.05)
    found = measured(exact, with_error(exact, "slope", 0.01))
    rows = torch.from_numpy(FRAME.rows)
    assert found["slope"].per_unit == pytest.approx(float(2 * (rows - 16).abs().mean()), rel=0.05)


@pytest.mark.parametrize("scale", [1.0, 0.5, 0.1])
def test_a_smaller_probe_finds_the_same_where_the_head_is_linear(scale):
    exact = outputs()
    found = measured(exact, with_error(exact, "x", noise(exact[..., 1:2], 0.05)), scale=scale)
    whole = measured(exact, with_error(exact, "x", noise(exact[..., 1:2], 0.05)))
    assert found["x"].per_unit == pytest.approx(whole["x"].per_unit, rel=1e-3)


def test_confidence_needs_the_whole_probe_to_be_seen():
    exact = outputs()
    found = with_error(exact, "score", -8.0)
    assert measured(exact, found)["score"].distortion > 0
    assert measured(exact, found, scale=0.1)["score"].distortion == 0


def test_a_head_that_is_ignored_gets_next_to_nothing():
    exact = outputs()
    found = exact + noise(exact, 0.05)
    found[..., 3] = exact[..., 3] + 7
    weights = Selection().weights(measured(exact, found))
    shares = {name: weights[name] * one.rms**2 for name, one in measured(exact, found).items()}
    assert shares["ignored"] == pytest.approx(1e-4 * max(shares.values()))
    assert weights["ignored"] < 1e-5 * weights["x"]


@pytest.mark.parametrize("factor", [100.0, 0.01])
def test_rescaling_a_head_leaves_its_part_of_the_loss(factor):
    exact, rescaled = outputs(), outputs()
    found = exact + noise(exact, 0.05)
    other = found.clone()
    for tensor in (rescaled, other):
        tensor[..., 1] *= factor
    adapter = Toy(FRAME)
    adapter.scale = factor
    parts = []
    for one, two, reader in ((exact, found, Toy(FRAME)), (rescaled, other, adapter)):
        groups = measured(one, two, reader)
        parts.append(
            {name: value * groups[name].rms ** 2 for name, value in Selection().weights(groups).items()}
        )
    assert parts[0] == pytest.approx(parts[1], rel=1e-4)


def test_noise_on_the_background_moves_no_lane():
    exact = outputs()
    found = exact.clone()
    found[:, 2, 1:] += noise(found[:, 2, 1:], 3.0)
    focus = Focus(mode="threshold").weights(Toy(FRAME), exact)
    groups = measured(exact, found, weights=focus)
    assert [groups[name].distortion for name in ("x", "slope", "ignored")] == [0, 0, 0]
    assert [groups[name].rms for name in ("x", "slope")] == [0, 0]


def test_no_error_anywhere_divides_by_nothing():
    exact = outputs()
    assert set(Selection().weights(measured(exact, exact.clone())).values()) == {0.0}


def test_top_keeps_the_half_that_distorts_most():
    groups = {name: Sensitivity(1.0, float(pixels)) for name, pixels in zip("abcde", range(5), strict=True)}
    weights = Selection(mode="top").weights(groups)
    assert {name for name, value in weights.items() if value} == {"c", "d", "e"}
    assert weights["e"] == 16


def test_without_selection_groups_count_alike():
    groups = {"a": Sensitivity(0.1, 5.0), "b": Sensitivity(3.0, 0.0)}
    assert Selection(mode="none").weights(groups) == {"a": 1.0, "b": 1.0}


def test_weights_move_in_a_straight_line_between_evaluations():
    weights = Weights(Selection(evaluations=4, momentum=0.5), iterations=40)
    assert [number for number in range(41) if weights.due(number)] == [0, 10, 20, 30, 40]
    weights.update(0, {"a": Sensitivity(1.0, 2.0)})
    assert weights.at(0) == weights.at(9) == {"a": 4.0}
    weights.update(10, {"a": Sensitivity(1.0, 4.0)})  # 16, averaged with 4
    assert weights.at(10) == {"a": 4.0}
    assert weights.at(15) == {"a": 7.0}
    assert weights.at(20) == weights.at(25) == {"a": 10.0}


def test_weighted_means_count_every_element_that_a_weight_broadcasts_to():
    values = torch.tensor([[[1.0, 3.0], [10.0, 20.0]]])
    assert weighted_mean(values, torch.tensor([[[1.0], [0.0]]])) == 2
    assert weighted_mean(values, torch.tensor([[[1.0], [1.0]]])) == 8.5
