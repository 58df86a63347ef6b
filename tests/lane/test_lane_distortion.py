"""Lane Distortion Score: zero on identity, pixels for shifts, the cap for what is lost."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ptq_lane.distortion import default_cap, lane_distortion
from ptq_lane.lanes import Frame, Lanes

CAP = 20.0
ROWS = np.arange(12.0)


@st.composite
def some_lanes(draw, slotted=False):
    """0 to 4 lanes on a coarse grid of places, so that equal distances occur, with gaps."""
    count = draw(st.integers(0, 4))
    places = st.one_of(st.just(np.nan), st.integers(0, 15).map(lambda place: 8.0 * place))
    x = np.array(draw(st.lists(st.lists(places, min_size=12, max_size=12), min_size=count, max_size=count)))
    slots = np.array(draw(st.permutations(range(6)))[:count], dtype=np.int64) if slotted else None
    return Lanes(ROWS, x.reshape(count, 12), slots)


any_lanes = st.one_of(some_lanes(), some_lanes(slotted=True))


def straight(*places, slots=None, rows=slice(None)):
    x = np.full((len(places), len(ROWS)), np.nan)
    x[:, rows] = np.array(places)[:, None]
    return Lanes(ROWS, x, None if slots is None else np.array(slots))


def test_the_cap_is_50_pixels_in_the_images_of_culane():
    assert default_cap(Frame(1640, 590)) == 50
    assert default_cap(Frame(192, 96)) == pytest.approx(50 * 192 / 1640)


def test_two_empty_sets_are_the_same():
    assert lane_distortion(straight(), straight(), CAP) == 0


@given(any_lanes)
def test_the_same_lanes_have_no_distortion(lanes):
    assert lane_distortion(lanes, lanes, CAP) == 0


@given(any_lanes, any_lanes)
def test_it_is_symmetric_and_at_most_the_cap(left, right):
    score = lane_distortion(left, right, CAP)
    assert score == pytest.approx(lane_distortion(right, left, CAP), abs=1e-9)
    assert 0 <= score <= CAP * (1 + 1e-12)


@given(some_lanes(slotted=True), st.lists(st.floats(0, 30), min_size=2, max_size=2))
def test_a_shift_costs_its_pixels_and_never_more_than_the_cap(lanes, shifts):
    small, large = sorted(shifts)
    scores = [
        lane_distortion(lanes, Lanes(ROWS, lanes.x + shift, lanes.slots), CAP) for shift in (small, large)
    ]
    if np.isnan(lanes.x).all():
        assert scores == [0, 0]
    else:
        assert scores == pytest.approx([min(small, CAP), min(large, CAP)])
    assert scores[0] <= scores[1] + 1e-9


@given(st.floats(0, 9))
def test_without_slots_a_shift_below_half_the_gap_costs_its_pixels(shift):
    found = straight(90 + shift, 10 + shift, 50 + shift)
    assert lane_distortion(straight(10, 50, 90), found, CAP) == pytest.approx(shift)


@given(st.integers(1, 12), st.booleans())
def test_a_dropped_lane_costs_the_cap_in_its_rows(rows, slotted):
    x = np.stack([straight(10).x[0], straight(60, rows=slice(0, rows)).x[0]])
    lanes = Lanes(ROWS, x, np.array([3, 1]) if slotted else None)
    dropped = Lanes(ROWS, x[:1], lanes.slots[:1] if slotted else None)
    assert lane_distortion(lanes, dropped, CAP) == pytest.approx(CAP * rows / (12 + rows))


def test_a_row_that_one_side_lacks_costs_the_cap():
    assert lane_distortion(straight(10), straight(13, rows=slice(4, None)), CAP) == pytest.approx(
        (8 * 3 + 4 * CAP) / 12
    )


def test_nothing_against_something_is_the_cap():
    assert lane_distortion(straight(), straight(40, rows=slice(3)), CAP) == CAP


def test_slots_decide_who_belongs_together_where_they_can():
    left, right = straight(10, 12, slots=[0, 1]), straight(12, 10, slots=[0, 1])
    assert lane_distortion(left, right, CAP) == 2
    assert lane_distortion(left, Lanes(ROWS, right.x), CAP) == 0
    moved_on = straight(12, 11, slots=[0, 2])  # 0 stays a partner of 0, 2 becomes that of 1
    assert lane_distortion(left, moved_on, CAP) == 1.5


def test_lanes_at_different_rows_are_refused():
    with pytest.raises(ValueError, match="different rows"):
        lane_distortion(straight(10), Lanes(ROWS + 1, straight(10).x), CAP)
