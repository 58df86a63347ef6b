"""Lanes by cells of rows: what is planted in the logits is what is decoded."""

import numpy as np
import pytest
import torch
from planted_lanes import (
    FRAME,
    check_confidence,
    check_geometry,
    check_gradient,
    check_onnx,
    check_trace,
    check_views,
)

from ptq_lane import Frame
from ptq_lane.families.row_anchor import RowAnchor
from ptq_lane.networks.row_anchor import RowAnchorNet
from ptqcore import ModelError

CELLS, SLOTS = 25, 4
SURE = 200.0


def planted(cells, anchors=10):
    """Outputs for one image, {slot: place of the line in cells at each anchor, NaN where there is none};
    the two cells beside a place share the probability so that the expectation is the place."""
    location = torch.full((1, CELLS, anchors, SLOTS), -SURE)
    existence = torch.zeros(1, 2, anchors, SLOTS)
    existence[:, 0] = SURE
    for slot, places in cells.items():
        for anchor in np.flatnonzero(~np.isnan(places)):
            left = min(int(places[anchor]), CELLS - 2)
            share = places[anchor] - left
            location[0, left, anchor, slot] = np.log(max(1 - share, 1e-30))
            location[0, left + 1, anchor, slot] = np.log(max(share, 1e-30))
            existence[0, :, anchor, slot] = torch.tensor([-SURE, SURE])
    return {"location": location, "existence": existence}


def one_tensor(cells, anchors=10):
    """The same as UFLD has it: a last cell that stands for no lane."""
    outputs = planted(cells, anchors)
    absent = torch.where(outputs["existence"][:, :1] > 0, 2 * SURE, -2 * SURE)
    return torch.cat([outputs["location"], absent], 1)


def places(values, first=0, last=9, anchors=10):
    """Cells [anchors]: the values at the anchors first to last, NaN at the others."""
    found = np.full(anchors, np.nan)
    found[first : last + 1] = values
    return found


def test_a_planted_line_is_decoded_between_its_anchors():
    line = places(np.linspace(12, 6.5, 7), 2, 8)
    [lanes] = RowAnchor(FRAME).decode(planted({1: line}))
    assert lanes.slots.tolist() == [1]
    y = np.linspace(0.42, 1, 10) * 96
    x = (line + 0.5) * 192 / 24
    expected = np.interp(FRAME.rows, y[2:9], x[2:9], left=np.nan, right=np.nan)
    np.testing.assert_allclose(lanes.x[0], expected, atol=1e-4)
    assert np.array_equal(np.isnan(lanes.x[0]), np.isnan(expected))


def test_anchors_of_the_user_count_from_the_top_of_the_frame():
    frame = Frame(1640, 590)
    outputs = planted({0: places(10.0, anchors=4)}, anchors=4)
    for anchors in ((0.4, 0.5, 0.7, 0.9), (0.9, 0.7, 0.5, 0.4)):
        [lanes] = RowAnchor(frame, anchors).decode(outputs)
        present = lanes.rows[~np.isnan(lanes.x[0])]
        assert (present.min(), present.max()) == (240, 528)
        np.testing.assert_allclose(lanes.x[0][~np.isnan(lanes.x[0])], 10.5 * 1640 / 24)


def test_the_tensor_of_ufld_is_read_by_its_own_grid():
    """x of cell k is k + 1 cells of 799 / 24 of 800 pixels, less one; y is a pixel higher."""
    frame = Frame(800, 288)
    anchors = np.array([121, 131, 141, 287]) / 288
    [lanes] = RowAnchor(frame, anchors).decode(one_tensor({3: places(10.0, anchors=4)}, anchors=4))
    assert lanes.slots.tolist() == [3]
    present = ~np.isnan(lanes.x[0])
    assert (lanes.rows[present].min(), lanes.rows[present].max()) == (120, 284)
    np.testing.assert_allclose(lanes.x[0][present], 11 * 799 / 24 - 1, rtol=1e-6)


def test_fewer_than_three_points_are_no_lane():
    adapter = RowAnchor(FRAME)
    for make in (planted, one_tensor):
        assert len(adapter.decode(make({0: places(9.0, 4, 5)}))[0]) == 0
        assert len(adapter.decode(make({0: places(9.0, 4, 6)}))[0]) == 1


def test_a_window_keeps_a_second_peak_away():
    outputs = planted({0: places(5.0)})
    outputs["location"][0, 20, :, 0] = np.log(0.5)
    [all_cells], [near] = (RowAnchor(FRAME, window=window).decode(outputs) for window in (None, 1))
    np.testing.assert_allclose(all_cells.x[0][50], (10 + 0.5) * 8, atol=1e-4)
    np.testing.assert_allclose(near.x[0][50], (5 + 0.5) * 8, atol=1e-4)


def test_images_of_a_batch_are_read_alone():
    line, other = places(9.0), places(15.0)
    batch = {
        name: torch.cat([planted({0: line})[name], planted({2: other})[name], planted({})[name]])
        for name in ("location", "existence")
    }
    assert [lanes.slots.tolist() for lanes in RowAnchor(FRAME).decode(batch)] == [[0], [2], []]


def test_confidence_is_existence_at_the_anchor():
    outputs = planted({1: places(9.0, 3, 9)})
    for found in (outputs, one_tensor({1: places(9.0, 3, 9)})):
        check_confidence(RowAnchor(FRAME), found)
        confidence = RowAnchor(FRAME).confidence(found)
        assert confidence["location"][0, 0, :, 1].tolist() == [0.0] * 3 + [1.0] * 7
        assert confidence["existence"][0, 0, :, 0].tolist() == [0.0] * 10


def test_geometry_is_what_is_decoded():
    outputs = planted({1: places(np.linspace(12, 6.5, 7), 2, 8), 2: places(18.0)})
    for adapter in (
        RowAnchor(FRAME),
        RowAnchor(FRAME, window=1),
        RowAnchor(FRAME, np.linspace(0.9, 0.3, 10)),
    ):
        check_geometry(adapter, outputs, (1, SLOTS))


def test_geometry_moves_with_the_cells():
    random = torch.Generator().manual_seed(0)
    outputs = {
        "location": torch.randn(2, CELLS, 10, SLOTS, generator=random),
        "existence": torch.randn(2, 2, 10, SLOTS, generator=random),
    }
    check_gradient(RowAnchor(FRAME), outputs, ("location",))


def test_groups_are_views():
    check_views(RowAnchor(FRAME), planted({1: places(9.0)}))
    tensor = one_tensor({1: places(9.0)})
    adapter = RowAnchor(FRAME)
    assert {name: head.shape[1] for name, head in adapter.heads(tensor).items()} == {
        "location": CELLS,
        "existence": 1,
    }
    written = adapter.splice(tensor, {"existence": torch.full((1, 1, 10, SLOTS), 7.0)})
    assert torch.equal(written[:, :-1], tensor[:, :-1])
    assert bool((written[:, -1] == 7.0).all())


def test_other_outputs_and_anchors_are_refused():
    with pytest.raises(ModelError, match=r"row-anchor .* location, existence"):
        RowAnchor(FRAME).heads({"location": torch.zeros(1, 4, 4, 4)})
    with pytest.raises(ModelError, match="3 are given, but the model locates lanes in 10 rows"):
        RowAnchor(FRAME, (0.5, 0.7, 0.9)).decode(planted({}))


def test_the_network_gives_logits_for_every_slot_at_every_anchor():
    outputs = RowAnchorNet(cells=20, anchors=7, slots=3)(torch.zeros(2, 3, FRAME.height, FRAME.width))
    assert outputs["location"].shape == (2, 20, 7, 3)
    assert outputs["existence"].shape == (2, 2, 7, 3)


def test_the_network_is_traced():
    check_trace(RowAnchorNet())


def test_the_network_runs_in_onnx_runtime(tmp_path):
    torch.manual_seed(0)
    check_onnx(RowAnchorNet(), tmp_path)
