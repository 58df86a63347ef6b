"""Anchors: how outputs of their family are read, what they learn, and the small network."""

import numpy as np
import planted_lanes as planted
import pytest
import torch
from lane_targets import anchor as learner

from ptq_lane import Frame
from ptq_lane.anchor_lines import AnchorLines, road_anchors
from ptq_lane.families.anchor import Anchor
from ptq_lane.networks.anchor import AnchorNet
from ptqcore import ModelError

# Rows at 9, 6, 3, 0 of images 20 x 10: upright at x = 4 and x = 12 from the bottom, and from (0, 6) at 45°.
LINES = AnchorLines(
    20, 10, np.array([[4.0, 9.0], [12.0, 9.0], [0.0, 6.0]]), np.array([90.0, 90.0, 45.0]), 4
)


def outputs(logits, lengths, offsets=None):
    """Of one image: how likely each anchor has a lane, its length and its offsets."""
    offsets = np.zeros((len(LINES), LINES.count)) if offsets is None else np.asarray(offsets)
    lane = torch.tensor(logits, dtype=torch.float32)
    return {
        "class": torch.stack([torch.zeros_like(lane), lane], 1)[None],
        "length": torch.tensor(lengths, dtype=torch.float32)[None],
        "offsets": torch.from_numpy(offsets).float()[None],
    }


def rows_of(lanes):
    return [np.flatnonzero(~np.isnan(line)).tolist() for line in lanes.x]


def test_lines_start_at_their_anchor_and_run_up():
    np.testing.assert_allclose(LINES.rows, [9, 6, 3, 0])
    assert LINES.first.tolist() == [0, 0, 1]
    np.testing.assert_allclose(LINES.x(LINES.rows), [[4] * 4, [12] * 4, [-3, 0, 3, 6]], atol=1e-12)


def test_road_anchors_start_at_a_border_and_mirror_each_other():
    anchors = road_anchors()
    x, y = anchors.starts.T
    assert len(anchors) == 66
    assert np.all((x == 0) | (x == 191) | (y == 95))
    lines = anchors.x(anchors.rows)
    mirrored = 191 - lines
    distance = np.abs(lines[:, None] - mirrored[None]).max(2)
    np.testing.assert_allclose(distance.min(0), 0, atol=1e-9)


def test_a_lane_is_its_anchor_plus_offsets_from_start_to_length():
    adapter = Anchor(Frame(20, 10), LINES)
    (lanes,) = adapter.decode(outputs([5, -5, -5], [3.4, 9, 9], [[0, 1, 3, 9], [0] * 4, [0] * 4]))
    assert lanes.slots.tolist() == [0]
    assert rows_of(lanes) == [[3, 4, 5, 6, 7, 8, 9]]
    np.testing.assert_allclose(
        lanes.x[0, 3:], [7, 6 + 1 / 3, 5 + 2 / 3, 5, 4 + 2 / 3, 4 + 1 / 3, 4], rtol=1e-6
    )


@pytest.mark.parametrize(("length", "top"), [(1.6, 6), (2.4, 6), (2.6, 3), (9.0, 0)])
def test_lengths_are_rounded_and_end_at_the_top(length, top):
    (lanes,) = Anchor(Frame(20, 10), LINES).decode(outputs([5, -5, -5], [length, 1, 1]))
    assert rows_of(lanes)[0][0] == top


def test_a_lane_of_one_row_is_none():
    (lanes,) = Anchor(Frame(20, 10), LINES).decode(outputs([5, -5, -5], [1.0, 1, 1]))
    assert len(lanes) == 0
    assert lanes.x.shape == (0, 10)


def test_below_its_start_a_lane_goes_on_until_it_leaves_the_image():
    adapter = Anchor(Frame(20, 10), LINES)
    (inside,) = adapter.decode(outputs([-5, -5, 5], [1, 1, 3], [[0] * 4, [0] * 4, [4, 4, 4, 4]]))
    assert rows_of(inside) == [list(range(10))]
    (outside,) = adapter.decode(outputs([-5, -5, 5], [1, 1, 3]))
    assert rows_of(outside) == [list(range(7))]


def test_the_more_probable_of_two_near_candidates_stays():
    near = [[0] * 4, [-6] * 4, [0] * 4]
    adapter = Anchor(Frame(20, 10), LINES, distance=3.0)
    (lanes,) = adapter.decode(outputs([1, 2, -5], [4, 4, 1], near))
    assert lanes.slots.tolist() == [1]
    (lanes,) = adapter.decode(outputs([1, 2, -5], [4, 4, 1]))
    assert lanes.slots.tolist() == [1, 0]
    (lanes,) = Anchor(Frame(20, 10), LINES, distance=3.0, most=1).decode(outputs([1, 2, -5], [4, 4, 1]))
    assert lanes.slots.tolist() == [1]


def test_the_threshold_must_be_exceeded():
    assert len(Anchor(Frame(20, 10), LINES).decode(outputs([0, 0, 0], [4, 4, 3]))[0]) == 0


def test_lanes_are_scaled_to_a_larger_frame():
    small, large = (Anchor(Frame(20 * k, 10 * k), LINES) for k in (1, 8))
    given = outputs([5, -5, -5], [4, 1, 1], [[0, 1, 3, 9], [0] * 4, [0] * 4])
    (one,), (other,) = small.decode(given), large.decode(given)
    y = (other.rows + 0.5) / 8 - 0.5
    inside = (y >= 0) & (y <= 9)
    expected = (np.interp(y, one.rows, one.x[0]) + 0.5) * 8 - 0.5
    np.testing.assert_allclose(other.x[0][inside], expected[inside], rtol=1e-5)
    assert np.isnan(other.x[0][~inside]).all()


@pytest.fixture(scope="module")
def random_outputs():
    random = torch.Generator().manual_seed(0)
    count, rows = 66, 32
    return {
        "class": 2 * torch.randn(3, count, 2, generator=random),
        "length": 20 + 8 * torch.randn(3, count, generator=random),
        "offsets": 3 * torch.randn(3, count, rows, generator=random),
    }


@pytest.mark.parametrize("frame", [planted.FRAME, Frame(1640, 590)])
def test_the_adapter_keeps_its_promises(random_outputs, frame):
    adapter = Anchor(frame)
    planted.check_views(adapter, random_outputs)
    planted.check_confidence(adapter, random_outputs)
    planted.check_geometry(adapter, random_outputs, (3, 66))
    planted.check_gradient(adapter, random_outputs, ["offsets"])


def test_confidence_is_the_probability_of_a_lane(random_outputs):
    confidence = Anchor(planted.FRAME).confidence(random_outputs)
    expected = random_outputs["class"].softmax(2)[..., 1]
    assert torch.equal(confidence["length"], expected)
    assert torch.equal(confidence["offsets"], expected[..., None])


def test_outputs_that_do_not_fit_are_refused():
    with pytest.raises(ModelError, match="class, length, offsets"):
        Anchor(planted.FRAME).heads({"class": torch.zeros(1, 66, 2)})
    with pytest.raises(ModelError, match="give the adapter the anchors of the network"):
        Anchor(planted.FRAME).heads(outputs([0, 0, 0], [1, 1, 1]))


def test_what_is_learned_decodes_to_the_lanes():
    lines = planted.road_lanes(24)
    targets = planted.stacked([learner.targets(lanes, planted.FRAME) for lanes in lines])
    nearness = -targets["offsets"].abs().mean(2) / 100
    lane = torch.where(targets["class"] == 1, 5 + nearness, torch.tensor(-5.0))
    given = {
        "class": torch.stack([torch.zeros_like(lane), lane], 2),
        "length": targets["length"],
        "offsets": targets["offsets"],
    }
    for found, wanted in zip(learner.adapter(planted.FRAME).decode(given), lines, strict=True):
        distance, alone = planted.far_apart(found, wanted)
        assert distance < 2.5
        assert alone <= 6  # a step of the rows at each end


def test_the_loss_of_perfect_answers_is_next_to_nothing():
    targets = planted.stacked([learner.targets(lanes, planted.FRAME) for lanes in planted.road_lanes(4)])
    lane = torch.where(targets["class"] == 1, 20.0, -20.0)
    given = {
        "class": torch.stack([torch.zeros_like(lane), lane], 2),
        "length": targets["length"],
        "offsets": targets["offsets"],
    }
    assert learner.loss(given, targets) < 1e-5
    given["offsets"] = given["offsets"] + 1
    assert learner.loss(given, targets) > 0.5


def test_an_image_without_lanes_has_no_near_anchor():
    (empty,) = Anchor(planted.FRAME).decode(
        {
            "class": torch.zeros(1, 66, 2),
            "length": torch.zeros(1, 66),
            "offsets": torch.zeros(1, 66, 32),
        }
    )
    assert not learner.targets(empty, planted.FRAME)["class"].any()


def test_each_anchor_sees_the_features_on_its_line():
    """A network that passes on where a feature lies, read by the anchors."""
    network = AnchorNet()
    rows, columns = np.indices((12, 24)).astype(np.float32)
    place = torch.from_numpy(100 * (rows + 1) + columns + 1)[None, None]
    seen = (place.flatten(2)[0, 0, network.cells] * network.inside).unflatten(0, (-1, 12))
    x = road_anchors().x((np.arange(12) + 0.5) * 8 - 0.5)
    for anchor in range(66):
        for row in range(12):
            column = np.floor((x[anchor, row] + 0.5) / 8)
            expected = 100 * (row + 1) + column + 1 if 0 <= column < 24 else 0
            assert seen[anchor, row] == expected


def test_the_network_answers_for_every_anchor_and_is_traced():
    network = AnchorNet()
    assert not any("cells" in name for name in network.state_dict())
    planted.check_trace(network)
    found = network(torch.zeros(2, 3, 96, 192))
    assert {name: tuple(value.shape) for name, value in found.items()} == {
        "class": (2, 66, 2),
        "length": (2, 66),
        "offsets": (2, 66, 32),
    }


def test_the_network_runs_in_onnx_runtime(tmp_path):
    planted.check_onnx(AnchorNet(), tmp_path)
