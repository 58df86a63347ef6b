"""The metric of TuSimple, rule by rule; and the ego pair."""

import gzip
import json
import os
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ptq_lane.lanes import Frame
from ptq_lane.metrics.ego import ego_pair
from ptq_lane.metrics.tusimple import Rates, image_rates, mean_rates

ROWS = np.arange(160.0, 720, 10)


def straight(*places):
    return np.repeat(np.array(places, dtype=float)[:, None], len(ROWS), axis=1)


def lanes_of(count):
    return straight(*(100 + 200 * np.arange(count)))


NONE = np.zeros((0, len(ROWS)))


@given(st.integers(0, 5), st.floats(0, 19.99))
def test_below_20_pixels_everything_is_found(count, shift):
    lanes = lanes_of(count)
    assert image_rates(lanes + shift, lanes, ROWS) == Rates(1.0 if count else 0.0, 0.0, 0.0)


def test_20_pixels_are_too_far():
    assert image_rates(lanes_of(3) + 20, lanes_of(3), ROWS) == Rates(0, 1, 1)


@pytest.mark.parametrize("slope", [-2.0, -0.7, 1.5])
def test_pixels_count_across_the_direction_of_the_label(slope):
    label = (900 + slope * (ROWS - 500))[None]
    limit = 20 * np.sqrt(1 + slope**2)
    assert image_rates(label + limit - 0.01, label, ROWS).accuracy == 1
    assert image_rates(label + limit + 0.01, label, ROWS).accuracy == 0


def test_the_direction_is_that_of_the_present_points_alone():
    label = (600 + 3.0 * (ROWS - 400))[None]
    label[:, ROWS < 400] = -2
    found = label + 40
    found[:, ROWS < 400] = -2
    assert image_rates(found, label, ROWS).accuracy == 1


def test_absence_on_both_sides_is_right_and_on_one_side_wrong():
    label, found = straight(500), straight(500)
    label[:, :14] = -2
    assert image_rates(label, label, ROWS).accuracy == 1
    assert image_rates(found, label, ROWS) == Rates(42 / 56, 1, 1)
    found[:, :14] = np.nan
    assert image_rates(found, label, ROWS).accuracy == 1


def test_85_percent_of_the_rows_make_a_lane():
    rows = ROWS[:40]
    label = straight(500)[:, :40]
    for wrong, matched in ((6, True), (7, False)):
        found = label.copy()
        found[:, :wrong] += 30
        expected = Rates(1 - wrong / 40, 0 if matched else 1, 0 if matched else 1)
        assert image_rates(found, label, rows) == expected


def test_of_five_lanes_one_miss_is_forgiven():
    labels = lanes_of(5)
    assert image_rates(labels[:4], labels, ROWS) == Rates(1, 0, 0)
    assert image_rates(labels[:3], labels, ROWS) == Rates(3 / 4, 0, 1 / 4)
    assert image_rates(labels[:3], labels[:4], ROWS) == Rates(3 / 4, 0, 1 / 4)


def test_two_labels_may_claim_one_lane_so_that_fp_is_negative():
    assert image_rates(straight(500), straight(495, 505), ROWS) == Rates(1, -1, 0)


def test_too_many_lanes_or_too_much_time_count_as_nothing():
    nothing = Rates(0, 0, 1)
    assert image_rates(lanes_of(4), lanes_of(2), ROWS) == Rates(1, 0.5, 0)
    assert image_rates(lanes_of(5), lanes_of(2), ROWS) == nothing
    assert image_rates(lanes_of(2), lanes_of(2), ROWS, run_time=200) == Rates(1, 0, 0)
    assert image_rates(lanes_of(2), lanes_of(2), ROWS, run_time=201) == nothing


def test_images_without_lanes():
    assert image_rates(NONE, lanes_of(2), ROWS) == Rates(0, 0, 1)
    assert image_rates(lanes_of(2), NONE, ROWS) == Rates(0, 1, 0)
    assert image_rates(NONE, NONE, ROWS) == Rates(0, 0, 0)


def test_lanes_at_other_rows_are_refused():
    with pytest.raises(ValueError, match="rows"):
        image_rates(lanes_of(2)[:, :48], lanes_of(2), ROWS)


def test_rates_are_means_over_images():
    assert mean_rates([Rates(1, 0, 0), Rates(0.5, -1, 0.25)]) == Rates(0.75, -0.5, 0.125)


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (lambda lanes: lanes, (1.0, 0.0, 0.0)),
        (lambda lanes: np.where(lanes >= 0, lanes + 15, lanes), (1.0, 0.0, 0.0)),
        (lambda lanes: np.where(lanes >= 0, lanes + 25, lanes), (0.9505, 0.0656, 0.0600)),
        (lambda lanes: lanes[:-1], (0.8247, -0.0022, 0.2512)),
    ],
)
def test_the_labels_of_the_test_set_against_themselves(change, expected):
    folder = os.environ.get("PTQ_LANE_DATA")
    if folder is None:
        pytest.skip("PTQ_LANE_DATA names no folder with tusimple/test_label.json.gz")
    rates = []
    with gzip.open(Path(folder) / "tusimple/test_label.json.gz", "rt") as stream:
        for label in map(json.loads, stream):
            lanes, rows = np.array(label["lanes"], dtype=float), np.array(label["h_samples"], dtype=float)
            rates.append(image_rates(change(lanes), lanes, rows))
    assert len(rates) == 2782
    found = mean_rates(rates)
    assert (found.accuracy, found.fp, found.fn) == pytest.approx(expected, abs=5e-5)


FRAME = Frame(200, 100)


def line(bottom, top, lowest=100):
    """A straight line from x = bottom at y = 100 to x = top at y = 20, cut off below `lowest`."""
    y = np.arange(20.0, lowest + 1, 10)
    return np.stack([top + (bottom - top) * (y - 20) / 80, y], axis=1)


def test_the_ego_pair_are_the_nearest_lines_left_and_right():
    lanes = [line(170, 110), line(20, 90), line(-40, 80), line(240, 120)]
    assert ego_pair(lanes, FRAME) == [1, 0]
    assert ego_pair([lane[::-1] for lane in lanes], FRAME) == [1, 0]


def test_a_line_that_ends_early_goes_on_to_the_bottom():
    # At its end the outer line is nearer to the middle than the inner line at the bottom.
    assert ego_pair([line(-200, 80, lowest=30), line(20, 90)], FRAME) == [1]


def test_a_side_without_lines_has_no_place():
    assert ego_pair([line(20, 90), line(60, 95)], FRAME) == [1]
    assert ego_pair([line(100, 100)], FRAME) == [0]
    assert ego_pair([np.zeros((0, 2)), np.array([[90.0, 50.0]])], FRAME) == []
    assert ego_pair([], FRAME) == []


@given(st.lists(st.integers(-100, 300), max_size=6, unique=True))
def test_nothing_lies_between_the_ego_pair(places):
    pair = [places[index] for index in ego_pair([line(place, 100) for place in places], FRAME)]
    assert sorted(pair) == pair
    left = max((place for place in places if place < 100), default=None)
    right = min((place for place in places if place >= 100), default=None)
    assert pair == [place for place in (left, right) if place is not None]
