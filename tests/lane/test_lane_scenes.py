"""Road scenes of a seed."""

import math
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ptq_lane.lanes import Frame
from ptq_lane.scenes import Scenes
from ptq_lane.scenes.camera import Camera, random_camera
from ptq_lane.scenes.road import Line, Road, lanes_of, random_road

COUNT = 150
SIZES = [(192, 96), (512, 288), (1640, 590), (100, 61)]


@pytest.fixture(scope="module")
def scenes():
    return list(Scenes(COUNT, seed=0))


def test_the_same_seed_gives_the_same_bytes_in_any_order(scenes):
    again = Scenes(COUNT, seed=0)
    for index in (7, 3, -1):
        scene, before = again[index], scenes[index]
        assert np.array_equal(scene.image, before.image)
        assert np.array_equal(scene.lanes.x, before.lanes.x, equal_nan=True)
        assert scene.category == before.category


def test_the_number_of_scenes_changes_none(scenes):
    assert np.array_equal(Scenes(4, seed=0)[3].image, scenes[3].image)


@pytest.mark.parametrize(("seed", "series", "index"), [(1, 0, 0), (0, 1, 0), (0, 0, 1)])
def test_seed_series_and_number_make_other_scenes(scenes, seed, series, index):
    other = Scenes(2, seed, series)[index]
    assert np.abs(other.image.astype(int) - scenes[0].image).mean() > 10


def test_scenes_are_a_sequence(scenes):
    some = Scenes(3, seed=0)
    assert len(some) == 3
    assert [scene.category for scene in some[1:]] == [scene.category for scene in scenes[1:3]]
    with pytest.raises(IndexError, match="scene 3 of 3"):
        some[3]


@pytest.mark.parametrize(("width", "height"), SIZES)
def test_any_size(width, height):
    frame = Frame(width, height)
    for scene in Scenes(3, seed=5, width=width, height=height):
        assert scene.image.shape == (height, width, 3)
        assert scene.image.dtype == np.uint8
        assert np.array_equal(scene.lanes.rows, frame.rows)
        assert scene.lanes.x.shape == (len(scene.lanes.slots), len(frame.rows))


@pytest.mark.parametrize("index", range(6))
def test_another_size_shows_the_same_view_scaled(scenes, index):
    small, large = scenes[index], Scenes(COUNT, seed=0, width=960, height=288)[index]
    assert large.category == small.category
    across = large.image.reshape(96, 3, 192, 5, 3).mean((1, 3))
    assert np.abs(across.mean((0, 1)) - small.image.mean((0, 1))).max() < 12
    scaled = large.lanes.at((small.lanes.rows + 0.5) * 3 - 0.5)
    for slot, x in zip(small.lanes.slots, small.lanes.x, strict=True):
        other = (scaled.x[scaled.slots == slot][0] + 0.5) / 5 - 0.5
        both = ~np.isnan(x) & ~np.isnan(other)
        assert both.sum() > 5
        assert np.abs(other - x)[both].max() < 0.4


def test_every_category_comes_about_as_often_as_any_other(scenes):
    found = Counter(scene.category for scene in scenes)
    assert set(found) == {"normal", "curve", "shadow", "night", "dazzle", "crowd"}
    assert min(found.values()) > COUNT / 20


def test_nights_are_dark_and_scenes_differ_in_light(scenes):
    light = {category: [] for category in ("normal", "curve", "shadow", "night", "dazzle", "crowd")}
    for scene in scenes:
        light[scene.category].append(scene.image.mean())
    night = light.pop("night")
    assert min(np.mean(days) for days in light.values()) > 1.5 * np.mean(night)
    assert all(np.std(days) > 8 for days in light.values())


def test_curves_bend_more_than_other_roads(scenes):
    def bend(scene):
        """How far the line left of the car strays from the line through its ends."""
        x, y = scene.lanes.points()[list(scene.lanes.slots).index(1)].T
        return np.abs(x - np.interp(y, y[[0, -1]], x[[0, -1]])).max()

    curves = [bend(scene) for scene in scenes if scene.category == "curve"]
    others = [bend(scene) for scene in scenes if scene.category != "curve"]
    assert np.median(curves) > 2 * np.median(others)


def test_lines_lie_inside_the_image_in_one_piece(scenes):
    for scene in scenes:
        x = scene.lanes.x
        present = ~np.isnan(x)
        assert (x[present] >= 0).all()
        assert (x[present] <= 191).all()
        assert (present.sum(1) >= 9).all()
        assert (np.abs(np.diff(present.astype(int), axis=1)).sum(1) <= 2).all()


def test_slots_are_left_to_right_around_the_car(scenes):
    for scene in scenes:
        slots = list(scene.lanes.slots)
        assert slots == sorted(set(slots))
        assert {1, 2} <= set(slots) <= {0, 1, 2, 3}
        left, right = (scene.lanes.points()[slots.index(slot)][-1] for slot in (1, 2))
        assert left[0] < 95.5 < right[0]
        assert min(left[1], right[1]) > 75
        for row in scene.lanes.x.T:
            seen = row[~np.isnan(row)]
            assert (np.diff(seen) > 0).all()
    assert {len(scene.lanes) for scene in scenes} == {2, 3, 4}


def projected(camera, offset, bends, rise, z, width, height):
    """Column and row of one point of a line, by turning the camera's axes one after another."""
    x = offset + bends[0] * z + bends[1] * z**2 / 2 + bends[2] * z**3 / 6
    y = camera.height - rise * z**2 / 2
    x, z = (
        x * math.cos(camera.yaw) - z * math.sin(camera.yaw),
        x * math.sin(camera.yaw) + z * math.cos(camera.yaw),
    )
    y, z = (
        y * math.cos(camera.pitch) - z * math.sin(camera.pitch),
        y * math.sin(camera.pitch) + z * math.cos(camera.pitch),
    )
    x, y = (
        x * math.cos(camera.roll) - y * math.sin(camera.roll),
        x * math.sin(camera.roll) + y * math.cos(camera.roll),
    )
    return (
        (width - 1) / 2 + camera.focal * width / 2 * x / z,
        (height - 1) / 2 + camera.focal * height * y / z,
    )


@settings(deadline=None, max_examples=40)
@given(st.integers(0, 10**6), st.booleans(), st.sampled_from(SIZES))
def test_labels_are_the_projected_lines(seed, curved, size):
    """At each labelled row, bisection finds the point of the line that appears in this row; labels are
    straight between places that are a few pixels apart."""
    random = np.random.default_rng(seed)
    camera, road = random_camera(random), random_road(random, curved)
    lanes = lanes_of(Frame(*size), camera, road)
    offsets = {line.slot: line.offset for line in road.lines}
    for slot, xs in zip(lanes.slots, lanes.x, strict=True):
        present = np.flatnonzero(~np.isnan(xs))
        for row in present[[0, len(present) // 3, 2 * len(present) // 3, -1]]:
            near, far = (
                1.0,
                55.0 if road.rise >= 0 else min(55.0, math.sqrt(2 * camera.height / -road.rise)),
            )
            for _ in range(60):
                z = (near + far) / 2
                x, y = projected(camera, offsets[slot], road.bends, road.rise, z, *size)
                near, far = (z, far) if y > lanes.rows[row] else (near, z)
            assert abs(x - xs[row]) < 0.1
            assert z < 55.0001


def test_a_level_straight_road_by_hand():
    """A line 1.5 m aside of a camera 1.5 m up runs at 45° towards the middle in square pixels."""
    camera = Camera(height=1.5, focal=1.0, pitch=0, yaw=0, roll=0)
    line = Line(slot=2, offset=1.5, width=0.15, gap=0, colour=(1, 1, 1), dash=None, wear=0)
    road = Road((0, 0, 0), 0, (line,), (-3, 3), two_way=False, lamps=None)
    (x,) = lanes_of(Frame(192, 96), camera, road).x
    rows = np.arange(96)
    assert x[51:] == pytest.approx(95.5 + rows[51:] - 47.5, abs=1e-3)
    assert np.isnan(x[: math.ceil(47.5 + 96 * 1.5 / 55)]).all()


def test_paint_is_where_the_labels_are(scenes):
    """The brightness across all labelled rows peaks at the label, symmetrically."""
    reach = np.arange(-6, 7)
    profile = np.zeros(len(reach))
    for scene in scenes:
        grey = scene.image.mean(-1)
        for x in scene.lanes.x:
            for row in np.flatnonzero(~np.isnan(x)):
                if row > 55 and 6 <= x[row] <= 185:
                    profile += np.interp(x[row] + reach, np.arange(192), grey[row])
    profile -= profile[[0, 1, -2, -1]].mean()
    assert reach[profile.argmax()] == 0
    middle = slice(3, -3)
    assert abs((profile * reach)[middle].sum() / profile[middle].sum()) < 0.15


def test_most_lines_can_be_seen_and_some_hardly(scenes):
    """Contrast of the pixels of ego lines against those 5 pixels aside, in the nearer half."""
    contrast = []
    for scene in scenes:
        grey = scene.image.mean(-1)
        for slot in (1, 2):
            x = scene.lanes.x[list(scene.lanes.slots).index(slot)]
            rows = [row for row in range(60, 96) if 6 <= x[row] <= 185]
            at = np.round(x[rows]).astype(int)
            aside = (grey[rows, at - 5] + grey[rows, at + 5]) / 2
            contrast.append(np.percentile(grey[rows, at] - aside, 80))
    contrast = np.array(contrast)
    assert (contrast > 10).mean() > 0.85
    assert (contrast < 20).mean() > 0.03
