"""Keypoints: how outputs of their family are read, what they learn, and the small network."""

import numpy as np
import planted_lanes as planted
import pytest
import torch
from lane_targets import keypoint as learner

from ptq_lane import Frame
from ptq_lane.families.keypoint import Keypoint
from ptq_lane.networks.keypoint import KeypointNet
from ptqcore import ModelError

# 16 x 32 cells of 4 pixels.
FRAME = Frame(128, 64)
SIZE = (16, 32)


def nothing():
    """Outputs of one image without a lane."""
    return {
        "keypoints": torch.full((1, 1, *SIZE), -9.0),
        "starts": torch.full((1, 1, *SIZE), -9.0),
        "to_start": torch.zeros(1, 2, *SIZE),
        "subpixel": torch.full((1, 2, *SIZE), 0.5),
    }


def put_lane(outputs, columns, rows=range(4, 12), start=None, score=5.0, aim=None):
    """Points at (row, column), which point to a start; by default the lowest one, which is marked."""
    cells = list(zip(rows, columns, strict=True))
    if start is None:
        start = cells[-1]
        outputs["starts"][0, 0, start[0], start[1]] = score
    aim = aim or start
    for row, column in cells:
        outputs["keypoints"][0, 0, row, column] = score
        outputs["to_start"][0, :, row, column] = torch.tensor([aim[1] - column, aim[0] - row])
    return outputs


def decode(outputs, frame=FRAME, **options):
    (lanes,) = Keypoint(frame, **options).decode(outputs)
    return lanes


def test_points_that_point_to_a_start_are_a_lane():
    lanes = decode(put_lane(nothing(), [10] * 8))
    assert lanes.slots.tolist() == [11 * 32 + 10]
    present = ~np.isnan(lanes.x[0])
    assert np.flatnonzero(present).tolist() == list(range(18, 46))
    np.testing.assert_allclose(lanes.x[0, present], 41.5)


def test_points_lie_where_the_subpixel_says():
    outputs = put_lane(nothing(), [10] * 8)
    outputs["subpixel"][0, 0] = 0.25
    outputs["subpixel"][0, 1, 4] = 1.0
    lanes = decode(outputs)
    present = ~np.isnan(lanes.x[0])
    np.testing.assert_allclose(lanes.x[0, present], 40.5)
    assert np.flatnonzero(present)[0] == 20


def test_two_lanes_that_cross_no_start_stay_apart():
    outputs = put_lane(put_lane(nothing(), range(10, 18)), [26] * 8)
    lanes = decode(outputs)
    assert lanes.slots.tolist() == [11 * 32 + 17, 11 * 32 + 26]
    assert len(lanes) == 2


def test_starts_within_the_radius_are_one_and_the_likeliest_names_the_lane():
    outputs = put_lane(nothing(), [10] * 8)
    outputs["starts"][0, 0, 11, 13] = 7.0
    assert decode(outputs).slots.tolist() == [11 * 32 + 13]
    assert len(decode(outputs, radius=1.0)) == 1
    assert decode(outputs, radius=1.0).slots.tolist() == [11 * 32 + 10]


def test_a_point_joins_the_first_start_within_the_radius_not_the_nearest():
    outputs = put_lane(nothing(), [10] * 8, start=(9, 10), aim=(11, 10))
    outputs["starts"][0, 0, 9, 10] = 2.0
    outputs["starts"][0, 0, 12, 10] = 8.0
    assert decode(outputs, radius=2.5).slots.tolist() == [9 * 32 + 10]
    assert decode(outputs, radius=1.5).slots.tolist() == [12 * 32 + 10]


def test_points_that_point_elsewhere_are_dropped():
    outputs = put_lane(nothing(), [10] * 8)
    put_lane(outputs, [20] * 8, start=(11, 10), aim=(2, 2))
    lanes = decode(outputs)
    assert len(lanes) == 1
    np.testing.assert_allclose(lanes.x[0, 18:46], 41.5)


@pytest.mark.parametrize(("more_than", "found"), [(7, 1), (8, 0)])
def test_a_lane_needs_points(more_than, found):
    lanes = decode(put_lane(nothing(), [10] * 8), more_than=more_than)
    assert len(lanes) == found
    assert lanes.x.shape == (found, 64)
    assert lanes.slots.shape == (found,)


def test_of_a_row_the_likeliest_point_counts():
    outputs = put_lane(nothing(), [10] * 8)
    put_lane(outputs, [13] * 8, start=(11, 10), score=4.0)
    np.testing.assert_allclose(decode(outputs).x[0, 18:46], 41.5)
    put_lane(outputs, [13] * 8, start=(11, 10), score=6.0)
    np.testing.assert_allclose(decode(outputs).x[0, 18:46], 53.5)


def test_beside_a_likelier_point_there_is_none():
    outputs = put_lane(nothing(), [10] * 8)
    outputs["keypoints"][0, 0, 4:12, 11] = 4.0
    outputs["subpixel"][0, 0, 4:12, 11] = 9.0
    np.testing.assert_allclose(decode(outputs).x[0, 18:46], 41.5)


def test_lanes_are_scaled_to_a_larger_frame():
    outputs = put_lane(nothing(), range(10, 18))
    one, other = decode(outputs), decode(outputs, Frame(1280, 640))
    y = (other.rows + 0.5) / 10 - 0.5
    present = ~np.isnan(other.x[0])
    seen = ~np.isnan(one.x[0])
    inside = present & (y >= one.rows[seen][0]) & (y <= one.rows[seen][-1])
    expected = (np.interp(y, one.rows[seen], one.x[0, seen]) + 0.5) * 10 - 0.5
    assert inside.sum() > 20
    np.testing.assert_allclose(other.x[0][inside], expected[inside])


def test_noise_decodes_to_lanes_of_different_slots():
    random = torch.Generator().manual_seed(0)
    sizes = {"keypoints": 1, "starts": 1, "to_start": 2, "subpixel": 2}
    outputs = {name: 3 * torch.randn(4, size, *SIZE, generator=random) for name, size in sizes.items()}
    for lanes in Keypoint(FRAME).decode(outputs):
        assert len(set(lanes.slots.tolist())) == len(lanes)


def test_the_adapter_keeps_its_promises():
    outputs = put_lane(put_lane(nothing(), range(10, 18)), [26] * 8)
    adapter = Keypoint(FRAME)
    planted.check_views(adapter, outputs)
    planted.check_confidence(adapter, outputs)
    assert adapter.geometry(outputs) is None


def test_confidence_is_that_of_the_likeliest_cell_around():
    confidence = Keypoint(FRAME).confidence(put_lane(nothing(), [10] * 8))
    likely = torch.sigmoid(torch.tensor(5.0))
    near = torch.zeros(SIZE, dtype=torch.bool)
    near[3:13, 9:12] = True
    for name in ("keypoints", "to_start", "subpixel"):
        assert torch.equal(confidence[name][0, 0] == likely, near)
    near = torch.zeros(SIZE, dtype=torch.bool)
    near[10:13, 9:12] = True
    assert torch.equal(confidence["starts"][0, 0] == likely, near)


def test_outputs_that_do_not_fit_are_refused():
    with pytest.raises(ModelError, match="keypoints, starts, to_start, subpixel"):
        Keypoint(FRAME).heads([torch.zeros(1)])


def answers(targets):
    """Outputs that answer targets perfectly."""
    images, points = targets["cell"].shape
    found = {
        name: torch.where(targets[name] == 255, 9.0, -9.0 * (1 - targets[name] / 255))
        for name in ("keypoints", "starts")
    }
    height, width = found["keypoints"].shape[2:]
    for name in ("to_start", "subpixel"):
        at = torch.zeros(images, height * width, 2)
        # Cells beside a point first: where two lanes are near, the point's own cell has the last word.
        for side in (0, 2, 1):
            for point in range(side, points, 3):
                cell = targets["cell"][:, point]
                at[cell >= 0, cell[cell >= 0]] = targets[name][cell >= 0, point]
        found[name] = at.transpose(1, 2).reshape(images, 2, height, width)
    return found


def test_what_is_learned_decodes_to_the_lanes():
    lines = planted.road_lanes(24)
    targets = planted.stacked([learner.targets(lanes, planted.FRAME) for lanes in lines])
    decoded = learner.adapter(planted.FRAME).decode(answers(targets))
    for found, wanted in zip(decoded, lines, strict=True):
        distance, alone = planted.far_apart(found, wanted)
        assert distance < 4  # straight lines between points cut the corners of sharp bends
        assert alone <= 6  # a line's last row of cells may be lost


def test_the_loss_of_perfect_answers_is_next_to_nothing():
    targets = planted.stacked([learner.targets(lanes, planted.FRAME) for lanes in planted.road_lanes(4)])
    given = answers(targets)
    good = learner.loss(given, targets)
    given["subpixel"] = given["subpixel"] + 0.5
    assert good < 0.3 < learner.loss(given, targets)


def test_the_network_answers_at_stride_4_and_is_traced():
    network = KeypointNet()
    planted.check_trace(network)
    found = network(torch.zeros(2, 3, 96, 192))
    assert {name: tuple(value.shape) for name, value in found.items()} == {
        "keypoints": (2, 1, 24, 48),
        "starts": (2, 1, 24, 48),
        "to_start": (2, 2, 24, 48),
        "subpixel": (2, 2, 24, 48),
    }


def test_the_network_runs_in_onnx_runtime(tmp_path):
    planted.check_onnx(KeypointNet(), tmp_path)
