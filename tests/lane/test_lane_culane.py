"""The metric of CULane: closed forms, a slow reference, and the rules of the official program."""

from itertools import pairwise

import cv2
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.interpolate import CubicSpline

from ptq_lane.lanes import Frame
from ptq_lane.metrics.culane import Counts, by_category, count, draw, line_width, match

CULANE = Frame(1640, 590)
SMALL = Frame(400, 150)


def vertical(x, frame=CULANE):
    """A lane across the whole height, and far beyond it, so that the ends of its band are not seen."""
    y = np.linspace(-100, frame.height + 100, 12)
    return np.stack([np.full_like(y, x), y], axis=1)


def full(band, frame):
    canvas = np.zeros((frame.height, frame.width), dtype=bool)
    height, width = band.pixels.shape
    canvas[band.top : band.top + height, band.left : band.left + width] = band.pixels
    return canvas


def overlap(left, right, frame=CULANE):
    first, second = (full(draw([lane], frame)[0], frame) for lane in (left, right))
    return (first & second).sum() / (first | second).sum()


def test_lanes_are_30_pixels_wide_in_the_images_of_culane_and_in_proportion_elsewhere():
    assert line_width(CULANE) == 30
    assert line_width(Frame(192, 96)) == 4
    assert line_width(Frame(16, 16)) == 1


@pytest.mark.parametrize("shift", [0, 1, 5, 10, 15, 29, 40])
def test_parallel_lanes_overlap_as_bands_do(shift):
    drawn = full(draw([vertical(700)], CULANE)[0], CULANE).sum(axis=1)
    assert len(set(drawn)) == 1
    width = int(drawn[0])
    assert abs(width - 30) <= 1
    expected = max(0, width - shift) / (width + min(shift, width))
    assert overlap(vertical(700), vertical(700 + shift)) == pytest.approx(expected)


def test_the_threshold_must_be_exceeded():
    threshold = overlap(vertical(700), vertical(708))
    found = count([vertical(708)], [vertical(700)], CULANE, [threshold, threshold - 1e-9])
    assert list(found.values()) == [Counts(0, 1, 1), Counts(1, 0, 0)]


def by_hand(points, frame):
    """The band as the distance to a finely sampled spline of scipy, in float."""
    lengths = np.append(0, np.cumsum(np.hypot(*np.diff(points, axis=0).T)))
    spline = CubicSpline(lengths, points, bc_type="natural")
    curve = spline(np.linspace(0, lengths[-1], 500))
    y, x = np.mgrid[: frame.height, : frame.width]
    nearest = np.full(y.shape, np.inf)
    for px, py in curve:
        np.minimum(nearest, (x - px) ** 2 + (y - py) ** 2, out=nearest)
    return np.sqrt(nearest) <= line_width(frame) / 2


@pytest.mark.parametrize("seed", range(3))
def test_bands_are_those_of_a_slow_reference(seed):
    rng = np.random.default_rng(seed)
    y = np.arange(140.0, 20, -20)
    frame = Frame(820, 150)
    pair = [
        np.stack([400 + rng.uniform(-2, 2) * (140 - y) + rng.uniform(-8, 8, len(y)) + shift, y], axis=1)
        for shift in (0, 4)
    ]
    found = [full(band, frame) for band in draw(pair, frame)]
    slow = [by_hand(points, frame) for points in pair]
    for drawn, expected in zip(found, slow, strict=True):
        border = expected ^ cv2.erode(expected.astype(np.uint8), np.ones((3, 3))).astype(bool)
        border |= expected ^ cv2.dilate(expected.astype(np.uint8), np.ones((3, 3))).astype(bool)
        assert not (drawn ^ expected)[~border].any()
    ratio = [(left & right).sum() / (left | right).sum() for left, right in (found, slow)]
    assert ratio[0] == pytest.approx(ratio[1], abs=0.03)


def official(points, frame):
    """Every step of the spline by cv2.line, rounded alone, on the whole frame."""
    lengths = np.append(0, np.cumsum(np.hypot(*np.diff(points, axis=0).T)))
    steps = [np.linspace(*part, 50, endpoint=False) for part in pairwise(lengths)]
    at = np.concatenate([*steps, lengths[-1:]])
    curve = points if len(points) == 2 else CubicSpline(lengths, points, bc_type="natural")(at)
    canvas = np.zeros((frame.height, frame.width), dtype=np.uint8)
    pixels = np.rint(curve.astype(np.float32)).astype(int)
    for first, second in pairwise(pixels):
        cv2.line(canvas, tuple(map(int, first)), tuple(map(int, second)), 1, line_width(frame))
    return canvas.astype(bool)


places = st.tuples(st.integers(-60, 460), st.integers(-30, 180))


@settings(deadline=None, max_examples=60)
@given(st.lists(places, min_size=2, max_size=7, unique=True))
def test_parts_of_the_frame_hold_exactly_what_the_official_program_draws(lane):
    points = np.array(lane) + 0.25
    expected = official(points, SMALL)
    drawn = full(draw([points], SMALL)[0], SMALL)
    # The last bit of the spline may decide a coordinate that lies halfway between two pixels.
    assert (drawn ^ expected).sum() <= 0.002 * max(expected.sum(), 500)


def test_two_points_are_joined_straight_and_repeated_points_change_nothing():
    ends = np.array([[100.0, 590], [500.0, 290]])
    assert (full(draw([ends], CULANE)[0], CULANE) == official(ends, CULANE)).all()
    bent = np.array([[100.0, 590], [220.0, 500], [500.0, 290]])
    assert overlap(bent[[0, 0, 1, 1, 2]], bent) == 1


@pytest.mark.parametrize("points", [np.zeros((0, 2)), np.array([[700.0, 300.0]])])
def test_lanes_of_fewer_than_two_points_agree_with_nothing(points):
    assert count([points], [points], CULANE, [0.5]) == {0.5: Counts(0, 1, 1)}


def test_lanes_outside_the_image_or_at_infinity_agree_with_nothing():
    outside = vertical(9000)
    assert count([outside], [outside], CULANE, [0.3]) == {0.3: Counts(0, 1, 1)}
    endless = np.array([[800.0, 590], [700.0, 400], [np.inf, 390]])
    assert count([endless], [vertical(100)], CULANE, [0.3]) == {0.3: Counts(0, 1, 1)}


def test_images_without_labels_or_without_lanes_found():
    lanes = [vertical(300), vertical(900)]
    assert count(lanes, [], CULANE, [0.5]) == {0.5: Counts(0, 2, 0)}
    assert count([], lanes, CULANE, [0.5]) == {0.5: Counts(0, 0, 2)}
    assert count([], [], CULANE, [0.5]) == {0.5: Counts(0, 0, 0)}


def test_each_lane_is_paired_once_and_all_thresholds_are_counted_at_once():
    labelled = [vertical(300), vertical(900), vertical(1500)]
    found = [vertical(915), vertical(904), vertical(300), vertical(1490), vertical(20)]
    assert count(found, labelled, CULANE, [0.3, 0.5, 0.75]) == {
        0.3: Counts(3, 2, 0),
        0.5: Counts(3, 2, 0),
        0.75: Counts(2, 3, 1),
    }


def test_the_sum_of_all_overlaps_decides_and_not_the_best_pair():
    # 707 is nearest to 700, which would leave 718 and 689 for each other.
    labelled, found = [vertical(700), vertical(718)], [vertical(707), vertical(689)]
    assert count(found, labelled, CULANE, [0.4])[0.4] == Counts(2, 0, 0)


@settings(deadline=None, max_examples=30)
@given(st.lists(st.integers(0, 400), max_size=4), st.lists(st.integers(0, 400), max_size=4))
def test_exchanging_the_sides_exchanges_precision_and_recall(found, labelled):
    left, right = ([vertical(x, SMALL) for x in side] for side in (found, labelled))
    there = match(draw(left, SMALL), draw(right, SMALL), [0.5])[0.5]
    back = match(draw(right, SMALL), draw(left, SMALL), [0.5])[0.5]
    assert (there.tp, there.fp, there.fn) == (back.tp, back.fn, back.fp)
    assert there.tp + there.fp == len(found)
    assert there.tp + there.fn == len(labelled)


def test_counts_add_up_to_precision_recall_and_f1():
    counts = Counts(6, 2, 0) + Counts(0, 0, 4)
    assert counts == Counts(6, 2, 4)
    assert counts.precision == 6 / 8
    assert counts.recall == 6 / 10
    assert counts.f1 == pytest.approx(2 * 0.75 * 0.6 / (0.75 + 0.6))
    assert Counts(0, 3, 2).f1 == 0
    assert Counts().precision == Counts().recall == Counts().f1 == 1


def test_the_total_of_categories_holds_the_false_lanes_of_crossroads():
    counts = [("normal", Counts(8, 1, 1)), ("cross", Counts(0, 3, 0)), ("normal", Counts(2, 0, 0))]
    table = by_category(counts)
    assert table == {"cross": Counts(0, 3, 0), "normal": Counts(10, 1, 1), "total": Counts(10, 4, 1)}
    assert list(table)[-1] == "total"
