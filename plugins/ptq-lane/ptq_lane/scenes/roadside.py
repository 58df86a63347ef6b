"""What stands beside and above the road: trees, posts, barriers, houses and signs."""

from collections.abc import Callable

import numpy as np
from numpy.random import Generator

from ptq_lane.scenes.noise import Field
from ptq_lane.scenes.road import Road
from ptq_lane.scenes.stage import Stage

Paint = Callable[[Stage], None]

_LEAVES = ((0.2, 0.3, 0.12), (0.16, 0.25, 0.13), (0.3, 0.32, 0.14), (0.34, 0.26, 0.12))
_WALLS = ((0.7, 0.66, 0.6), (0.55, 0.35, 0.28), (0.75, 0.7, 0.55), (0.5, 0.5, 0.52), (0.62, 0.52, 0.45))
_BARRIERS = (
    (0.0, 0.8, (0.6, 0.6, 0.58)),
    (0.45, 0.75, (0.62, 0.64, 0.66)),
    (0.0, 3.2, (0.5, 0.52, 0.5)),
    (0.0, 1.4, (0.2, 0.28, 0.13)),
)


def random_roadside(random: Generator, road: Road) -> list[tuple[float, Paint]]:
    """Things with their distances ahead, each to be painted into a stage by a call."""
    things = _posts(random, road)
    for edge, outside in zip(road.edges, (-1, 1), strict=True):
        kind = random.random()
        if kind < 0.45:
            things += _trees(random, edge, outside)
        elif kind < 0.7:
            things += _houses(random, edge, outside)
        if random.random() < 0.4:
            things += _barrier(random, edge + outside * random.uniform(0.2, 0.8))
    if random.random() < 0.15:
        things.append(_gantry(random, road))
    return things


def _trees(random: Generator, edge: float, outside: int) -> list[tuple[float, Paint]]:
    spacing, colour = random.uniform(5, 15), np.array(_LEAVES[random.integers(len(_LEAVES))])
    trees, z = [], random.uniform(6, 20)
    while z < 120:
        offset = edge + outside * random.uniform(2.5, 9)
        blobs = random.uniform(-1, 1, (8, 2)) * np.array([0.6, 0.5])
        trees.append(
            (z, _tree(offset, z, random.uniform(3.5, 9), colour * random.uniform(0.75, 1.25), blobs))
        )
        z += spacing * random.uniform(0.5, 1.5)
    return trees


def _tree(offset: float, z: float, tall: float, colour: Field, blobs: Field) -> Paint:
    """A trunk and a crown of discs around its middle, at shares of half its width [n, 2]."""

    def paint(stage: Stage) -> None:
        across = offset + np.array([-0.02, -0.015, 0.015, 0.02]) * tall
        trunk = stage.place(across, np.array([0, 0.5, 0.5, 0]) * tall, np.full(4, z))
        stage.fill(trunk, stage.lit((0.16, 0.13, 0.1), offset, z))
        metre = stage.camera.scale(stage.frame)[1] / z
        middle = stage.place(np.float64(offset), np.float64(0.65 * tall), np.float64(z))
        for right, down in blobs:
            light = stage.lit(colour * (1 - 0.45 * down), offset, z)
            stage.disc(middle + np.array([right, down]) * 0.36 * tall * metre, 0.2 * tall * metre, light)

    return paint


def _posts(random: Generator, road: Road) -> list[tuple[float, Paint]]:
    """Lamp posts along one edge, in half of the scenes."""
    z, spacing, tall = random.uniform(5, 30), random.uniform(22, 40), random.uniform(6, 10)
    side = int(random.integers(2))
    offset = road.edges[side] + (0.7 if side else -0.7)
    if random.random() < 0.5:
        return []
    return [(at, _post(offset, at, tall)) for at in np.arange(z, 150, spacing)]


def _post(offset: float, z: float, tall: float) -> Paint:
    arm = -1.6 * np.sign(offset)

    def paint(stage: Stage) -> None:
        light = stage.lit((0.35, 0.36, 0.37), offset, z)
        for across, up in (
            ([-0.09, -0.06, 0.06, 0.09], [0, 1, 1, 0]),
            ([0, 0, arm, arm], [0.985, 1, 1.02, 1.005]),
        ):
            stage.fill(stage.place(offset + np.array(across), tall * np.array(up), np.full(4, z)), light)
        if stage.weather.night:
            lamp = stage.place(np.float64(offset + arm), np.float64(tall), np.float64(z))
            stage.glow(lamp, 0.35 / z + 0.004, (1.4, 1.1, 0.7))

    return paint


def _barrier(random: Generator, offset: float) -> list[tuple[float, Paint]]:
    """A rail, wall or hedge along the road."""
    low, high, colour = _BARRIERS[random.choice(len(_BARRIERS), p=(0.3, 0.4, 0.15, 0.15))]
    ends = np.geomspace(2, 200, 28)
    shades = random.uniform(0.93, 1.07, len(ends))
    high = high * random.uniform(0.85, 1.2)

    def piece(near: float, far: float, shade: float) -> Paint:
        def paint(stage: Stage) -> None:
            corners = stage.place(
                np.full(4, offset), np.array([low, high, high, low]), np.array([near, near, far, far])
            )
            stage.fill(corners, stage.lit(np.array(colour) * shade, offset, near))

        return paint

    return [
        (near, piece(near, far, shade))
        for near, far, shade in zip(ends[:-1], ends[1:], shades[1:], strict=True)
    ]


def _houses(random: Generator, edge: float, outside: int) -> list[tuple[float, Paint]]:
    offset, z = edge + outside * random.uniform(3, 9), random.uniform(5, 25)
    houses = []
    while z < 110:
        length, tall = random.uniform(8, 18), random.uniform(4, 14)
        wall = np.array(_WALLS[random.integers(len(_WALLS))]) * random.uniform(0.7, 1.2)
        houses.append((z, _house(offset, outside, z, length, tall, wall, lit=random.random((4, 4)) < 0.35)))
        z += length + random.choice([0.0, random.uniform(2, 12)])
    return houses


def _house(
    offset: float, outside: int, z: float, length: float, tall: float, wall: Field, lit: np.ndarray
) -> Paint:
    """A box with the front along the road and one wall across; lit: its windows by night [storeys, windows]."""

    def paint(stage: Stage) -> None:
        up = np.array([0, tall, tall, 0])
        across = offset + outside * np.array([0, 0, 10, 10])
        stage.fill(stage.place(across, up, np.full(4, z)), stage.lit(0.8 * wall, offset, z))
        front = stage.place(np.full(4, offset), up, np.array([z, z, z + length, z + length]))
        stage.fill(front, stage.lit(wall, offset, z + length / 2))
        storeys = min(int(tall / 3), len(lit)) if z < 60 else 0
        for storey in range(storeys):
            for window in range(4):
                near = z + (window + 0.3) * length / 4
                far, low = near + 0.45 * length / 4, 3 * storey + 1
                at = stage.place(
                    np.full(4, offset),
                    np.array([low, low + 1.3, low + 1.3, low]),
                    np.array([near, near, far, far]),
                )
                shines = stage.weather.night and lit[storey, window]
                stage.fill(
                    at, np.array([0.8, 0.6, 0.3]) if shines else stage.lit((0.14, 0.16, 0.19), offset, near)
                )

    return paint


def _gantry(random: Generator, road: Road) -> tuple[float, Paint]:
    """A beam across the road with signs."""
    z, low = random.uniform(18, 90), random.uniform(5, 6.2)
    left, right = road.edges[0] - 1, road.edges[1] + 1
    colour = ((0.05, 0.2, 0.5), (0.03, 0.32, 0.2))[random.integers(2)]
    signs = random.uniform(left + 1, right - 4, random.integers(1, 4))

    def paint(stage: Stage) -> None:
        def bar(x0: float, x1: float, y0: float, y1: float, shade: tuple[float, float, float]) -> None:
            corners = stage.place(np.array([x0, x0, x1, x1]), np.array([y0, y1, y1, y0]), np.full(4, z))
            stage.fill(corners, stage.lit(shade, (x0 + x1) / 2, z))

        grey = (0.45, 0.46, 0.47)
        bar(left, right, low, low + 0.4, grey)
        bar(left, left + 0.3, 0, low, grey)
        bar(right - 0.3, right, 0, low, grey)
        for sign in signs:
            bar(sign, sign + 3, low - 0.3, low + 1.5, (0.8, 0.8, 0.8))
            bar(sign + 0.1, sign + 2.9, low - 0.2, low + 1.4, colour)
            bar(sign + 0.5, sign + 2.2, low + 0.7, low + 0.9, (0.85, 0.85, 0.85))

    return z, paint
