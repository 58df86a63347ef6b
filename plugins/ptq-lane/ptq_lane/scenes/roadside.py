"""What stands beside and above the road: trees, lamp posts, barriers, houses and signs."""

import numpy as np
from numpy.random import Generator
from numpy.typing import NDArray

from ptq_lane.scenes.noise import Field
from ptq_lane.scenes.road import Road
from ptq_lane.scenes.stage import Paint, Stage

_LEAVES = ((0.2, 0.3, 0.12), (0.16, 0.25, 0.13), (0.3, 0.32, 0.14), (0.34, 0.26, 0.12))
_WALLS = ((0.7, 0.66, 0.6), (0.55, 0.35, 0.28), (0.75, 0.7, 0.55), (0.5, 0.5, 0.52), (0.62, 0.52, 0.45))
_BARRIERS = (
    (0.0, 0.8, (0.6, 0.6, 0.58)),
    (0.45, 0.75, (0.62, 0.64, 0.66)),
    (0.0, 3.2, (0.5, 0.52, 0.5)),
    (0.0, 1.4, (0.2, 0.28, 0.13)),
)
_GREY, _WINDOW, _LIT_WINDOW = (0.4, 0.41, 0.42), (0.14, 0.16, 0.19), np.array([0.8, 0.6, 0.3])
_LAMP = np.array([1.4, 1.1, 0.7])
_BLOBS = 14

Things = list[tuple[float, Paint]]


def random_roadside(random: Generator, road: Road) -> Things:
    """Things with their distances ahead, each to be painted by a call."""
    things = _posts(road)
    for edge, outside in zip(road.edges, (-1, 1), strict=True):
        kind, fenced = random.random(2)
        if kind < 0.45:
            things += _trees(random, edge, outside)
        elif kind < 0.7:
            things += _houses(random, edge, outside)
        if fenced < 0.4:
            things += _barrier(random, edge + outside * random.uniform(0.2, 0.8))
    if random.random() < 0.15:
        things.append(_gantry(random, road))
    return things


def _trees(random: Generator, edge: float, outside: int) -> Things:
    spacing, colour = random.uniform(5, 15), np.array(_LEAVES[random.integers(len(_LEAVES))])
    trees, z = [], random.uniform(6, 20)
    while z < 120:
        offset, tall = edge + outside * random.uniform(2.5, 9), random.uniform(3.5, 9)
        angle, radius = random.uniform(0, 2 * np.pi, _BLOBS), np.sqrt(random.random(_BLOBS))
        size = random.uniform(0.07, 0.17, _BLOBS)
        blobs = np.stack([0.24 * radius * np.cos(angle), 0.22 * radius * np.sin(angle), size], axis=1)
        trees.append((z, _tree(offset, z, tall, colour * random.uniform(0.75, 1.25), blobs)))
        z += spacing * random.uniform(0.5, 1.5)
    return trees


def _tree(offset: float, z: float, tall: float, colour: Field, blobs: Field) -> Paint:
    """A trunk and a crown of discs [n, 3]: right, down and radius of each, in heights of the tree."""

    def paint(stage: Stage) -> None:
        across = offset + np.array([-0.02, -0.012, 0.012, 0.02]) * tall
        trunk = stage.place(across, np.array([0, 0.5, 0.5, 0]) * tall, z)
        stage.fill(trunk, stage.lit((0.16, 0.13, 0.1), offset, z))
        scale = np.array(stage.camera.scale(stage.frame)) * tall / z
        middle = stage.place(offset, 0.66 * tall, z)
        green = stage.lit(colour, offset, z)
        for right, down, radius in blobs:
            shade = 0.9 - 1.6 * down + (radius - 0.12)
            stage.disc(middle + scale * (right, down), radius * scale[1], green * shade)

    return paint


def _posts(road: Road) -> Things:
    if road.lamps is None:
        return []
    return [(z, _post(road.lamps.offset, z, road.lamps.height)) for z in road.lamps.places]


def _post(offset: float, z: float, tall: float) -> Paint:
    arm = -1.6 * np.sign(offset)

    def paint(stage: Stage) -> None:
        light = stage.lit(_GREY, offset, z)
        stage.fill(stage.place(offset + np.array([-0.09, -0.06, 0.06, 0.09]), [0, tall, tall, 0], z), light)
        up = tall * np.array([0.985, 1, 1.02, 1.005])
        stage.fill(stage.place(offset + arm * np.array([0, 0, 1, 1]), up, z), light)
        if stage.weather.night:
            stage.glow(stage.place(offset + arm, tall, z), 0.3 / z + 0.004, _LAMP)

    return paint


def _barrier(random: Generator, offset: float) -> Things:
    """A rail, wall or hedge along the road."""
    low, high, colour = _BARRIERS[random.choice(len(_BARRIERS), p=(0.3, 0.4, 0.15, 0.15))]
    ends = np.geomspace(2, 200, 28)
    high *= random.uniform(0.85, 1.2)
    shades = np.array(colour) * random.uniform(0.93, 1.07, (len(ends), 1))

    def piece(near: float, far: float, shade: Field) -> Paint:
        def paint(stage: Stage) -> None:
            corners = stage.place(offset, [low, high, high, low], [near, near, far, far])
            stage.fill(corners, stage.lit(shade, offset, near))

        return paint

    return [
        (near, piece(near, far, shade)) for near, far, shade in zip(ends, ends[1:], shades, strict=False)
    ]


def _houses(random: Generator, edge: float, outside: int) -> Things:
    offset, z = edge + outside * random.uniform(3, 9), random.uniform(5, 25)
    houses = []
    while z < 110:
        length, tall = random.uniform(8, 18), random.uniform(4, 14)
        wall = np.array(_WALLS[random.integers(len(_WALLS))]) * random.uniform(0.7, 1.2)
        lit = random.random((4, 4)) < 0.35
        houses.append((z, _house((offset, outside), (z, length, tall), wall, lit)))
        z += length + (random.uniform(2, 12) if random.random() < 0.5 else 0)
    return houses


def _house(
    side: tuple[float, int], size: tuple[float, float, float], wall: Field, lit: NDArray[np.bool_]
) -> Paint:
    """A box beside the road.

    side: offset of its front and the direction away from the road.
    size: where it begins, its length along the road and its height.
    lit: which windows shine by night [storeys, windows].
    """
    offset, outside = side
    z, length, tall = size

    def paint(stage: Stage) -> None:
        up = [0, tall, tall, 0]
        gable = stage.place(offset + 10 * outside * np.array([0, 0, 1, 1]), up, z)
        stage.fill(gable, stage.lit(0.8 * wall, offset, z))
        front = stage.place(offset, up, [z, z, z + length, z + length])
        stage.fill(front, stage.lit(wall, offset, z + length / 2))
        if z > 60:
            return
        dark = stage.lit(_WINDOW, offset, z)
        for storey in range(min(int(tall / 3), len(lit))):
            low, high = 3 * storey + 1, 3 * storey + 2.3
            for window, shines in enumerate(lit[storey]):
                near, far = z + length * (window + 0.3) / 4, z + length * (window + 0.75) / 4
                corners = stage.place(offset, [low, high, high, low], [near, near, far, far])
                stage.fill(corners, _LIT_WINDOW if shines and stage.weather.night else dark)

    return paint


def _gantry(random: Generator, road: Road) -> tuple[float, Paint]:
    """A beam across the road with signs."""
    z, low = random.uniform(18, 90), random.uniform(5, 6.2)
    left, right = road.edges[0] - 1, road.edges[1] + 1
    colour = ((0.05, 0.2, 0.5), (0.03, 0.32, 0.2))[random.integers(2)]
    signs = random.uniform(left + 1, right - 4, random.integers(1, 4))

    def paint(stage: Stage) -> None:
        def bar(x: tuple[float, float], up: tuple[float, float], shade: tuple[float, float, float]) -> None:
            corners = stage.place([x[0], x[0], x[1], x[1]], [up[0], up[1], up[1], up[0]], z)
            stage.fill(corners, stage.lit(shade, sum(x) / 2, z))

        bar((left, right), (low, low + 0.4), _GREY)
        bar((left, left + 0.3), (0, low), _GREY)
        bar((right - 0.3, right), (0, low), _GREY)
        for sign in signs:
            bar((sign, sign + 3), (low - 0.3, low + 1.5), (0.8, 0.8, 0.8))
            bar((sign + 0.1, sign + 2.9), (low - 0.2, low + 1.4), colour)
            bar((sign + 0.5, sign + 2.2), (low + 0.7, low + 0.9), (0.85, 0.85, 0.85))

    return z, paint
