"""The road: its lines, and where they appear in an image."""

from dataclasses import dataclass

import numpy as np
from numpy.random import Generator
from numpy.typing import NDArray

from ptq_lane.lanes import Frame, Lanes
from ptq_lane.scenes.camera import Camera
from ptq_lane.scenes.noise import Field

LABELLED = 55.0
_SHORTEST = 0.1
_PLACES = 4000

WHITE, YELLOW = (1.0, 1.0, 0.97), (1.0, 0.76, 0.24)


@dataclass(frozen=True)
class Line:
    """One painted line along the road.

    slot: 0..3, second left, left, right, second right of the car.
    offset: X of its centre beside the car, in metres.
    width: of its paint, in metres; a double line has two such strips.
    gap: between the strips of a double line, in metres; 0: one strip.
    colour: of its paint, red, green, blue.
    dash: from dash to dash, length of a dash, and where one starts, in metres; None: solid.
    wear: 0 (new) to 1 (nothing left).
    """

    slot: int
    offset: float
    width: float
    gap: float
    colour: tuple[float, float, float]
    dash: tuple[float, float, float] | None
    wear: float


@dataclass(frozen=True)
class Lamps:
    """A row of lamp posts: offset, Z of the first, distance to the next, height, in metres."""

    offset: float
    start: float
    spacing: float
    height: float

    @property
    def places(self) -> list[float]:
        """Z of each, as far as any matters."""
        return [float(z) for z in np.arange(self.start, 150, self.spacing)]


@dataclass(frozen=True)
class Road:
    """A road around the car.

    bends: c1, c2, c3 of X(Z) = offset + c1 Z + c2 Z² / 2 + c3 Z³ / 6.
    rise: curvature upwards, in 1 / metre.
    lines: left to right.
    edges: where the asphalt ends, left and right, as offsets in metres.
    two_way: vehicles left of the car come towards it.
    lamps: posts along one edge, if any.
    """

    bends: tuple[float, float, float]
    rise: float
    lines: tuple[Line, ...]
    edges: tuple[float, float]
    two_way: bool
    lamps: Lamps | None

    def shift(self, z: Field) -> Field:
        """X of the road beyond its offset at Z."""
        c1, c2, c3 = self.bends
        return z * (c1 + z * (c2 / 2 + z * (c3 / 6)))

    def place(self, frame: Frame, camera: Camera, offset: Field, up: Field, z: Field) -> Field:
        """Where points at an offset along the road and a height above it appear [..., 2], in pixels."""
        y = camera.height - self.rise * z * z / 2 - up
        return np.stack(camera.project(frame, offset + self.shift(z), y, z), axis=-1)


def lanes_of(frame: Frame, camera: Camera, road: Road) -> Lanes:
    """The lines of a road at the rows of a frame, from the bottom up to LABELLED metres, the crest of the
    road or the border of the image; lines with less than a tenth of the image's height are left out."""
    crest = 0.85 * np.sqrt(2 * camera.height / -road.rise) if road.rise < 0 else np.inf
    z = 1 / np.linspace(1 / min(LABELLED, crest), 1, _PLACES)
    rows, xs, slots = frame.rows, [], []
    for line in road.lines:
        x, y = road.place(frame, camera, np.full(_PLACES, line.offset), np.zeros(_PLACES), z).T
        at = np.interp(rows, y, x, left=np.nan, right=np.nan)
        at[~((at >= 0) & (at <= frame.width - 1))] = np.nan
        present = np.flatnonzero(~np.isnan(at))
        if len(present) and len(present) * (rows[1] - rows[0]) >= _SHORTEST * frame.height:
            apart = np.flatnonzero(np.diff(present) > 1)
            if len(apart):
                at[: present[apart[-1] + 1]] = np.nan
            xs.append(at)
            slots.append(line.slot)
    return Lanes(rows, np.array(xs), np.array(slots, dtype=np.int64))


def random_road(random: Generator, curved: bool) -> Road:
    """A road with the car in one of its lanes."""
    width = random.uniform(3.2, 3.8)
    left = -width / 2 + random.uniform(-0.4, 0.4)
    outer = random.random(2) < 0.68
    two_way = bool(random.random() < 0.35)
    lines = []
    dash = _random_dash(random)
    for slot in range(4):
        line = _random_line(random, slot, left + (slot - 1) * width, dash, two_way, outer)
        if slot in (1, 2) or outer[slot // 2]:
            lines.append(line)
    beyond = random.uniform(0.3, 2.5, 2)
    edges = (
        float(left - width * (outer[0] or two_way) - beyond[0]),
        float(left + width * (1 + outer[1]) + beyond[1]),
    )
    bends, rise, lamps = _random_bends(random, curved), _random_rise(random), _random_lamps(random, edges)
    return Road(bends, rise, tuple(lines), edges, two_way, lamps)


def _random_line(
    random: Generator,
    slot: int,
    offset: float,
    dash: tuple[float, float],
    two_way: bool,
    outer: NDArray[np.bool_],
) -> Line:
    """Mostly dashed between lanes of one direction and solid at edges."""
    middle = slot == 1 and two_way
    between = (slot == 1 and outer[0]) or (slot == 2 and outer[1])
    kind, shade, doubled = random.random(3)
    dashed = kind < (0.4 if middle else 0.9 if between else 0.2)
    start = random.uniform(0, dash[0])
    yellow = kind < 0.7 if middle else slot < 2 and not between and shade < 0.25
    width = random.uniform(0.12, 0.2)
    wear = 0.75 * random.beta(1.2, 3)
    double = middle and not dashed and doubled < 0.6
    return Line(
        slot,
        offset,
        width,
        gap=width if double else 0.0,
        colour=YELLOW if yellow else WHITE,
        dash=(*dash, start) if dashed else None,
        wear=wear,
    )


def _random_dash(random: Generator) -> tuple[float, float]:
    period = random.uniform(6, 14)
    return period, period * random.uniform(0.35, 0.65)


def _random_bends(random: Generator, curved: bool) -> tuple[float, float, float]:
    heading = random.uniform(-0.02, 0.02)
    side = random.choice([-1.0, 1.0])
    if curved:
        return heading, side / random.uniform(90, 300), random.uniform(-6e-5, 6e-5)
    return heading, side / random.uniform(500, 4000), random.uniform(-1e-5, 1e-5)


def _random_rise(random: Generator) -> float:
    """Level in half of the roads, else a dip or a crest."""
    rise = random.uniform(-1 / 1400, 1 / 1000)
    return rise if random.random() < 0.5 else 0.0


def _random_lamps(random: Generator, edges: tuple[float, float]) -> Lamps | None:
    """Lamp posts in half of the scenes."""
    side, shown = random.integers(2), random.random()
    offset = edges[side] + (0.7 if side else -0.7)
    lamps = Lamps(offset, random.uniform(5, 30), random.uniform(22, 40), random.uniform(6, 10))
    return lamps if shown < 0.5 else None
