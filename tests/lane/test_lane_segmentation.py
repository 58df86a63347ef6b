"""Segmentation of lanes: what is planted in the logits is what is decoded."""

import numpy as np
import pytest
import torch
from planted_lanes import FRAME, check_confidence, check_onnx, check_trace, check_views

from ptq_lane import Frame
from ptq_lane.families.segmentation import Segmentation
from ptq_lane.networks.segmentation import SegmentationNet, ShiftSum
from ptqcore import ModelError

SLOTS = 4


def planted(columns, height=48, width=96, slots=SLOTS):
    """Logits [1, 1 + slots, h, w] with one line a slot, the pixels to its sides half as likely.

    columns: {slot: column of the grid at each row [h], NaN where there is none}.
    """
    logits = torch.zeros(1, 1 + slots, height, width)
    logits[:, 0] = 5.0
    for slot, column in columns.items():
        for row in np.flatnonzero(~np.isnan(column)):
            place = int(column[row])
            logits[0, 1 + slot, row, max(0, place - 1) : place + 2] = 5.0
            logits[0, 1 + slot, row, place] = 15.0
    return logits


def rows_with(values, first, last, height=48):
    """Columns [h]: the values in the rows first to last, NaN in the others."""
    column = np.full(height, np.nan)
    column[first : last + 1] = values
    return column


def existence(*slots):
    return torch.tensor([[9.0 if slot in slots else -9.0 for slot in range(SLOTS)]])


def test_a_planted_line_is_decoded_at_the_centres_of_its_pixels():
    column = rows_with(np.arange(60, 40, -1), 20, 39)
    [lanes] = Segmentation(FRAME).decode({"lanes": planted({2: column}), "existence": existence(2)})
    assert lanes.slots.tolist() == [2]
    centres = np.arange(48) * 2 + 0.5
    present = ~np.isnan(column)
    expected = np.interp(FRAME.rows, centres[present], column[present] * 2 + 0.5, left=np.nan, right=np.nan)
    np.testing.assert_array_equal(lanes.x[0], expected)


def test_a_map_as_large_as_scnns_is_blurred_and_read_at_every_ninth_row():
    logits = torch.zeros(1, 2, 288, 800)
    logits[:, 0] = 5.0
    logits[0, 1, 150:, 390:411] = 6.0
    logits[0, 1, 278, 100] = 20.0
    [lanes] = Segmentation(Frame(800, 288)).decode(logits)
    present = ~np.isnan(lanes.x[0])
    assert (lanes.rows[present].min(), lanes.rows[present].max()) == (152, 284)
    assert np.all(np.abs(lanes.x[0][present] - 400) <= 10)


def test_a_frame_of_another_size_stretches_the_lanes():
    outputs = planted({1: rows_with(30, 10, 47)})
    [small], [large] = (Segmentation(frame).decode(outputs) for frame in (FRAME, Frame(1640, 590)))
    assert np.unique(small.x[~np.isnan(small.x)]).tolist() == [60.5]
    assert np.unique(large.x[~np.isnan(large.x)]).tolist() == [30.5 * 1640 / 96 - 0.5]


def test_slots_that_do_not_exist_are_no_lanes():
    logits = planted({slot: rows_with(20 * slot + 10, 20, 47) for slot in range(SLOTS)})
    adapter = Segmentation(FRAME)
    [lanes] = adapter.decode({"lanes": logits, "existence": existence(1, 2)})
    assert lanes.slots.tolist() == [1, 2]
    for alone in (logits, {"lanes": logits}):
        assert adapter.decode(alone)[0].slots.tolist() == [0, 1, 2, 3]


def test_rows_below_the_threshold_have_no_point():
    logits = planted({0: rows_with(50, 20, 47)})
    logits[0, 1, 20:30, 50] = 5.0 + np.log(
        2
    )  # half as likely as the background and both neighbours together
    strict, loose = (Segmentation(FRAME, threshold).decode(logits)[0] for threshold in (0.7, 0.6))
    assert FRAME.rows[~np.isnan(strict.x[0])].min() == 61
    assert FRAME.rows[~np.isnan(loose.x[0])].min() == 41


def test_a_single_point_is_no_lane():
    assert len(Segmentation(FRAME).decode(planted({0: rows_with(50, 20, 20)}))[0]) == 0
    assert len(Segmentation(FRAME).decode(planted({0: rows_with(50, 20, 21)}))[0]) == 1


def test_nothing_but_background_is_no_lane():
    assert [len(lanes) for lanes in Segmentation(FRAME).decode(planted({}).repeat(3, 1, 1, 1))] == [0, 0, 0]


def test_confidence_is_what_is_not_background():
    outputs = {"lanes": planted({3: rows_with(50, 20, 47)}), "existence": existence(3)}
    check_confidence(Segmentation(FRAME), outputs)
    confidence = Segmentation(FRAME).confidence(outputs)
    assert confidence["lanes"].shape == (1, 1, 48, 96)
    assert confidence["lanes"][0, 0, 30, 50] > 0.99
    assert confidence["lanes"][0, 0, 30, 70] < 0.05
    assert (confidence["existence"] > 0.5).tolist() == [[False, False, False, True]]
    assert confidence.keys() == outputs.keys()


def test_groups_are_views():
    check_views(Segmentation(FRAME), {"lanes": planted({}), "existence": existence(0)})
    logits = planted({})
    assert Segmentation(FRAME).heads(logits)["lanes"] is logits


@pytest.mark.parametrize("outputs", [[torch.zeros(1, 5, 4, 4)], {"seg": torch.zeros(1, 5, 4, 4)}])
def test_other_outputs_are_refused(outputs):
    with pytest.raises(ModelError, match=r"segmentation .* lanes"):
        Segmentation(FRAME).heads(outputs)


@pytest.mark.parametrize(("dim", "shift"), [(2, 3), (3, -2)])
def test_shift_and_sum_carries_features_across_the_image(dim, shift):
    layer = ShiftSum(2, dim, shift)
    torch.nn.init.dirac_(layer.conv.weight)
    x = torch.randn(1, 2, 6, 8, generator=torch.Generator().manual_seed(0))
    assert torch.equal(layer(x), x + torch.roll(x, shift, dim).relu())


def test_the_network_gives_logits_at_half_the_size():
    outputs = SegmentationNet(slots=3)(torch.zeros(2, 3, FRAME.height, FRAME.width))
    assert outputs["lanes"].shape == (2, 4, 48, 96)
    assert outputs["existence"].shape == (2, 3)


def test_the_network_is_traced():
    check_trace(SegmentationNet())


def test_the_network_runs_in_onnx_runtime(tmp_path):
    torch.manual_seed(0)
    check_onnx(SegmentationNet(), tmp_path)
