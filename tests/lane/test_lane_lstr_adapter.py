"""LSTR's outputs read as lanes: curves of the paper's equation 5 at the rows of a frame."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ptq_lane.lanes import Frame
from ptq_lane.lstr import LSTRAdapter
from ptqcore import ModelError

FRAME = Frame(width=1000, height=128)  # bounds of whole 128ths are exact
ROWS = FRAME.rows
SURE = 8.0


def outputs(lanes, bounds=(0.25, 0.75), shared=(0.0, -1.0, 0.0, 0.0), specific=(0.5, 0.0), classes=2):
    """One image; `lanes`: which class each query has; other groups the same for all queries."""
    logits = torch.zeros(1, len(lanes), classes)
    logits[0, range(len(lanes)), lanes] = SURE
    return {
        "class": logits,
        "bounds": torch.tensor(bounds).expand(1, len(lanes), 2).clone(),
        "shared": torch.tensor([[shared]]),
        "specific": torch.tensor(specific).expand(1, len(lanes), 2).clone(),
    }


def decoded(found, variant="tusimple", frame=FRAME):
    (lanes,) = LSTRAdapter(frame, variant).decode(found)
    return lanes


def rows_of(lanes):
    return ROWS[~np.isnan(lanes.x[0])].tolist()


def test_straight_lane_is_found_by_hand():
    """x = 0.5 y + 0.125 in widths and heights: from 125 pixels, 500 more over all 128 rows."""
    lanes = decoded(outputs([1], specific=(0.5, -0.125)))
    assert rows_of(lanes) == list(range(32, 97))
    np.testing.assert_allclose(lanes.x[0, 32:97], 500 / 128 * ROWS[32:97] + 125, rtol=1e-12)
    assert np.array_equal(lanes.rows, ROWS)


def test_curve_is_equation_5():
    k, f, m, n, b, c = 0.01, 0.2, -0.02, 0.3, 0.4, 0.05
    lanes = decoded(outputs([1], shared=(k, f, m, n), specific=(b, c)))
    for row in (32, 47, 96):
        y = row / 128
        x = k / (y - f) ** 2 + m / (y - f) + n + b * y - c
        assert lanes.x[0, row] == pytest.approx(1000 * x, rel=1e-5)


def test_bounds_belong_to_the_lane_in_tusimple():
    assert rows_of(decoded(outputs([1], bounds=(0.5, 0.625)))) == list(range(64, 81))
    assert rows_of(decoded(outputs([1], bounds=(0.501, 0.624)))) == list(range(65, 80))


def test_only_the_second_bound_of_culane_counts_and_lanes_go_on_to_the_bottom():
    assert rows_of(decoded(outputs([1], bounds=(0.9, 0.5)), "culane")) == list(range(64, 128))


def test_lanes_of_culane_exist_only_inside_the_image():
    """x = 4 y - 2: from 0 at row 64 to 1000 at row 96, where 999 is the last column."""
    lanes = decoded(outputs([1], bounds=(0.9, 0.375), specific=(4.0, 2.0)), "culane")
    assert rows_of(lanes) == list(range(64, 96))


def test_lanes_of_tusimple_may_leave_the_image():
    lanes = decoded(outputs([1], specific=(4.0, 2.0)))
    assert lanes.x[0, 32] == -1000
    assert lanes.x[0, 96] == 1000


def test_lane_of_culane_with_one_row_is_dropped():
    assert len(decoded(outputs([1], bounds=(0.0, 126 / 128)), "culane")) == 1
    assert len(decoded(outputs([1], bounds=(0.0, 127 / 128)), "culane")) == 0


def test_lane_without_rows_is_dropped():
    assert len(decoded(outputs([1], bounds=(0.75, 0.25)))) == 0


def test_class_1_is_a_lane_and_no_other_is():
    lanes = decoded(outputs([0, 1, 2, 1, 0], bounds=(0.0, 0.5), classes=3), "culane")
    assert lanes.slots.tolist() == [1, 3]


def test_likeliest_class_decides_even_below_one_half():
    found = outputs([1], classes=3)
    found["class"] = torch.tensor([[[0.0, 0.1, 0.0]]])
    assert len(decoded(found, "culane")) == 1


def test_image_without_lanes():
    lanes = decoded(outputs([0, 0]))
    assert lanes.x.shape == (0, len(ROWS))
    assert lanes.slots.tolist() == []


def test_images_of_a_batch_are_apart():
    first, second = outputs([1, 0]), outputs([0, 1], specific=(0.2, 0.0))
    both = {name: torch.cat([first[name], second[name]]) for name in first}
    lanes = LSTRAdapter(FRAME).decode(both)
    assert [image.slots.tolist() for image in lanes] == [[0], [1]]
    np.testing.assert_allclose(lanes[1].x, decoded(second).x)


def test_shared_parameters_may_be_given_for_every_query():
    found = outputs([1, 1], shared=(0.01, 0.1, 0.02, 0.3))
    expanded = found | {"shared": found["shared"].expand(1, 2, 4)}
    np.testing.assert_array_equal(decoded(found).x, decoded(expanded).x)


@settings(max_examples=30, deadline=None)
@given(
    width=st.integers(100, 2000),
    curve=st.tuples(*[st.floats(-0.1, 0.1)] * 2, *[st.floats(-1, 1)] * 3),
)
def test_frames_scale_lanes(width, curve):
    k, m, n, b, c = curve
    found = outputs([1], shared=(k, 0.1, m, n), specific=(b, c))
    x = decoded(found).x
    np.testing.assert_allclose(decoded(found, frame=Frame(width, 128)).x, x * width / 1000, rtol=1e-9)


def test_confidence_is_the_probability_of_a_lane():
    found = outputs([1, 0], classes=3)
    found["class"][0, 1] = torch.tensor([1.0, 2.0, 0.5])
    confidence = LSTRAdapter(FRAME, "culane").confidence(found)
    first = np.exp(SURE) / (np.exp(SURE) + 2)
    second = np.exp(2.0) / (np.exp(1.0) + np.exp(2.0) + np.exp(0.5))
    for name in ("class", "bounds", "specific"):
        assert confidence[name][0, :, 0].tolist() == pytest.approx([first, second], rel=1e-5)
    assert confidence["shared"].flatten().tolist() == pytest.approx([first], rel=1e-5)
    for name, head in LSTRAdapter(FRAME).heads(found).items():
        assert torch.broadcast_shapes(confidence[name].shape, head.shape) == head.shape
    assert LSTRAdapter.confidence_heads == {"class"}


@pytest.mark.parametrize("name", ["class", "bounds", "shared", "specific"])
def test_each_group_can_be_replaced_alone(name):
    adapter, found = LSTRAdapter(FRAME), outputs([1, 0])
    spliced = adapter.splice(found, {name: found[name] + 1})
    for other in found:
        assert torch.equal(spliced[other], found[other] + (other == name))


def test_geometry_is_what_decode_finds():
    found = outputs([1, 1], shared=(0.002, 0.1, 0.01, 0.3))
    found["specific"][0, 1] = torch.tensor([0.2, -0.1])
    x, weights = LSTRAdapter(FRAME).geometry(found)
    lanes = decoded(found)
    present = ~np.isnan(lanes.x)
    np.testing.assert_allclose(x[0].numpy()[present], lanes.x[present], rtol=1e-4)
    certain = np.exp(SURE) / (np.exp(SURE) + 1)
    np.testing.assert_allclose(weights[0].numpy(), np.where(present, certain, 0), rtol=1e-5)


def test_geometry_has_the_gradients_of_equation_5():
    found = outputs([1], shared=(0.02, 0.1, 0.03, 0.3))
    for name in ("shared", "specific"):
        found[name] = found[name].double().requires_grad_()
    x, _ = LSTRAdapter(FRAME).geometry(found)
    x[0, 0, 80].backward()
    y, f, k, m = 0.625, 0.1, 0.02, 0.03
    expected = [1 / (y - f) ** 2, 2 * k / (y - f) ** 3 + m / (y - f) ** 2, 1 / (y - f), 1]
    assert found["shared"].grad.flatten().tolist() == pytest.approx([1000 * d for d in expected], rel=1e-5)
    assert found["specific"].grad.flatten().tolist() == pytest.approx([1000 * y, -1000], rel=1e-5)


def test_nothing_is_infinite_at_the_horizon():
    found = outputs([1], bounds=(0.0, 1.0), shared=(0.02, 0.25, 0.03, 0.3))
    leaves = {name: head.double().requires_grad_() for name, head in found.items()}
    x, weights = LSTRAdapter(FRAME).geometry(leaves)
    (x * weights).sum().backward()
    assert x.isfinite().all()
    assert all(leaves[name].grad.isfinite().all() for name in ("class", "shared", "specific"))
    assert np.isfinite(decoded(found).x).all()


@pytest.mark.parametrize("broken", [float("inf"), float("nan")])
def test_curve_that_is_no_number_is_no_lane(broken):
    assert len(decoded(outputs([1], shared=(broken, -1.0, 0.0, 0.0)))) == 0


def test_unknown_variant_is_refused():
    with pytest.raises(ModelError, match="'llamas': LSTR has no such variant; known: culane, tusimple"):
        LSTRAdapter(FRAME, "llamas")
