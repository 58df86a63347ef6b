"""Semantic guided focus: weights of positions."""

import pytest
import torch
from toy_lanes import FRAME, Toy, outputs

from ptq_lane.focus import Focus, lane_map
from ptq_lane.lanes import Frame, Lanes


def weights(**options):
    return Focus(**options).weights(Toy(FRAME), outputs(batch=1))


def test_geometry_counts_by_confidence_and_confidence_keeps_a_floor():
    found = weights()
    confidence = outputs(batch=1)[..., :1].sigmoid()
    torch.testing.assert_close(found["x"], confidence)
    torch.testing.assert_close(found["score"], 0.1 + 0.9 * confidence)


def test_groups_without_confidence_count_everywhere():
    assert torch.equal(weights()["ignored"], torch.ones(1, 1, 1))


def test_threshold_is_hard():
    assert weights(mode="threshold")["x"].flatten().tolist() == [1, 1, 0]
    assert weights(mode="threshold", threshold=0.9999)["x"].sum() > 0  # never nothing at all


def test_top_k_keeps_a_share():
    found = weights(mode="top-k", top=1 / 3)["x"].flatten()
    assert found.sum() == 1
    assert found[outputs(batch=1)[0, :, 0].argmax()] == 1


def test_none_counts_everything_alike():
    assert all(torch.equal(one, torch.ones(1, 1, 1)) for one in weights(mode="none").values())


def test_lanes_are_drawn_where_they_are():
    frame = Frame(width=64, height=32)
    x = torch.full((1, 32), 20.0, dtype=torch.float64)
    x[:, :10] = torch.nan
    found = lane_map(Lanes(frame.rows, x.numpy()), frame)[0, 0]
    assert found.shape == (32, 64)
    assert found[20].nonzero().flatten().tolist() in ([19, 20, 21], [18, 19, 20, 21, 22])
    assert not found[:8].any()


@pytest.mark.parametrize("key", ["threshold", "top", "floor"])
def test_shares_are_shares(key):
    with pytest.raises(ValueError, match=key):
        Focus(**{key: 2})
