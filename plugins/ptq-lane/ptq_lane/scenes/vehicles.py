"""Vehicles on the road: boxes with cabins, windows, wheels and lights."""

from dataclasses import dataclass

import numpy as np
from numpy.random import Generator
from numpy.typing import ArrayLike

from ptq_lane.scenes.noise import Field
from ptq_lane.scenes.road import Road
from ptq_lane.scenes.stage import Stage

_PAINTS = (
    (0.85, 0.85, 0.85),
    (0.8, 0.8, 0.78),
    (0.6, 0.61, 0.63),
    (0.45, 0.46, 0.48),
    (0.3, 0.31, 0.33),
    (0.09, 0.09, 0.1),
    (0.12, 0.12, 0.13),
    (0.5, 0.09, 0.08),
    (0.12, 0.19, 0.38),
    (0.45, 0.4, 0.32),
    (0.14, 0.27, 0.2),
)
_GLASS, _RUBBER, _PLATE = (
    np.array([0.12, 0.15, 0.18]),
    np.array([0.04, 0.04, 0.045]),
    np.array([0.8, 0.8, 0.75]),
)
_RED, _LAMP = np.array([0.7, 0.05, 0.04]), np.array([0.95, 0.95, 0.85])
_SILL, _SPILL = 0.24, 0.2


@dataclass(frozen=True)
class Vehicle:
    """One vehicle.

    offset, z: the middle of its near end, on the road and ahead, in metres.
    width, height, length: in metres.
    cabin: width of the roof as a share of the width; 1: a lorry, a plain box on a frame.
    deck: how far the cabin is set back from the near end, as a share of the length.
    paint: its colour [3].
    oncoming: whether it shows its front.
    braking: whether its brake lights shine.
    """

    offset: float
    z: float
    width: float
    height: float
    length: float
    cabin: float
    deck: float
    paint: Field
    oncoming: bool
    braking: bool

    @property
    def belt(self) -> float:
        """How high the windows begin, in metres."""
        return 0.6 * self.height

    @property
    def slope(self) -> float:
        """How far the near window leans away, as a share of the length."""
        return 0.1 if self.deck else 0.03


def random_vehicles(random: Generator, road: Road, most: int) -> list[Vehicle]:
    """Up to so many vehicles in the lanes around the car, none overlapping another."""
    left, right = (next(line.offset for line in road.lines if line.slot == slot) for slot in (1, 2))
    slots = {line.slot for line in road.lines}
    lanes = [0] + [-1] * (0 in slots or road.two_way) + [1] * (3 in slots)
    reached = {lane: random.uniform(9, 25) if lane == 0 else random.uniform(2.5, 20) for lane in lanes}
    spacing = 30 / max(most, 1)
    vehicles = []
    for _ in range(most):
        lane = int(random.choice(lanes))
        middle = (left + right) / 2 + lane * (right - left) + random.normal(0, 0.2)
        vehicle = _random_vehicle(random, middle, reached[lane], oncoming=lane == -1 and road.two_way)
        reached[lane] += vehicle.length + random.uniform(2, 6) + random.exponential(spacing)
        if vehicle.z < 90:
            vehicles.append(vehicle)
    return vehicles


def _random_vehicle(random: Generator, offset: float, z: float, oncoming: bool) -> Vehicle:
    kind, brake = random.random(2)
    deck = random.uniform(0.2, 0.28) if oncoming else max(random.uniform(-0.12, 0.16), 0.0)
    if kind < 0.75:
        size = random.uniform(1.7, 1.9), random.uniform(1.4, 1.75), random.uniform(3.8, 4.9)
        cabin = random.uniform(0.7, 0.82)
    elif kind < 0.88:
        size, cabin = (random.uniform(1.9, 2.1), random.uniform(1.9, 2.5), random.uniform(4.8, 6)), 0.92
        deck *= 0.4
    else:
        size, cabin = (random.uniform(2.4, 2.55), random.uniform(2.9, 3.9), random.uniform(7, 12)), 1.0
    paint = np.array(_PAINTS[random.integers(len(_PAINTS))]) * random.uniform(0.8, 1.15)
    return Vehicle(offset, z, *size, cabin, deck, paint, oncoming, bool(brake < 0.35))


def paint_vehicle(stage: Stage, vehicle: Vehicle) -> None:
    """Paint a vehicle: its shadow, its side, then its near end."""
    near, far = vehicle.z - 0.1, vehicle.z + vehicle.length
    left, right = vehicle.offset - vehicle.width / 2, vehicle.offset + vehicle.width / 2
    sides = np.array([left - _SPILL, right + _SPILL, right + _SPILL, left - _SPILL])
    stage.dim(stage.place(sides, 0, [near, near, far, far]), 0.5)
    if right < 0:
        _paint_side(stage, vehicle, right)
    elif left > 0:
        _paint_side(stage, vehicle, left)
    if vehicle.cabin < 1:
        _paint_car_end(stage, vehicle)
    else:
        _paint_lorry_end(stage, vehicle)
    _paint_lights(stage, vehicle)


def _paint_side(stage: Stage, vehicle: Vehicle, offset: float) -> None:
    """The flank that faces the camera, at an offset."""
    near, length, tall = vehicle.z, vehicle.length, vehicle.height
    paint = stage.lit(0.62 * vehicle.paint, offset, near + length / 2)
    top = tall if vehicle.cabin == 1 else vehicle.belt
    ends = near + length * np.array([0, 0, 1, 1])
    stage.fill(stage.place(offset, [_SILL, top, top, _SILL], ends), paint)
    if vehicle.cabin < 1:
        inwards = np.sign(vehicle.offset - offset) * vehicle.width * (1 - vehicle.cabin) / 2
        across = offset + inwards * np.array([0, 1, 1, 0])
        up = np.array([top, tall, tall, top])
        along = near + length * np.array([vehicle.deck, vehicle.deck + vehicle.slope, 0.68, 0.8])
        stage.fill(stage.place(across, up, along), paint)
        up, along = (
            part.mean() + share * (part - part.mean()) for part, share in ((up, 0.7), (along, 0.85))
        )
        stage.fill(stage.place(across, up, along), stage.lit(_GLASS, offset, near))
    radius, turn = (0.48 if vehicle.cabin == 1 else 0.33), np.linspace(0, 2 * np.pi, 12, endpoint=False)
    for share in (0.18, 0.8):
        along = near + share * length + radius * np.cos(turn)
        stage.fill(
            stage.place(offset, radius + radius * np.sin(turn), along), stage.lit(_RUBBER, offset, near)
        )


def _paint_car_end(stage: Stage, vehicle: Vehicle) -> None:
    paint, belt, tall = vehicle.paint, vehicle.belt, vehicle.height
    window = vehicle.z + vehicle.deck * vehicle.length
    roof = window + vehicle.slope * vehicle.length
    _pair(stage, vehicle, (0.68, 0.96), (0, 0.4), _RUBBER)
    _bar(stage, vehicle, (belt, tall), (1, vehicle.cabin), (window, roof), 0.9 * paint)
    glass = (belt + 0.04, tall - 0.07), (0.9, vehicle.cabin - 0.06)
    _bar(stage, vehicle, *glass, (window, roof), _GLASS + 0.1 * stage.air)
    _bar(stage, vehicle, (belt, belt), (1, 1), (vehicle.z, window), 1.1 * paint)
    flat = (vehicle.z, vehicle.z)
    _bar(stage, vehicle, (0.28, belt), (0.97, 1), flat, paint)
    _bar(stage, vehicle, (_SILL, 0.4), (0.95, 0.97), flat, 0.45 * paint)
    if vehicle.oncoming:
        _bar(stage, vehicle, (0.42, 0.62), (0.5, 0.6), flat, _RUBBER)
    _bar(stage, vehicle, (0.42, 0.52), (0.28, 0.28), flat, _PLATE)


def _paint_lorry_end(stage: Stage, vehicle: Vehicle) -> None:
    tall, flat = vehicle.height, (vehicle.z, vehicle.z)
    _pair(stage, vehicle, (0.5, 0.96), (0, 0.9), _RUBBER)
    _bar(stage, vehicle, (0.45, 0.75), (0.96, 0.96), flat, np.full(3, 0.12))
    _bar(stage, vehicle, (0.75, tall), (1, 1), flat, 0.75 * vehicle.paint)
    _bar(stage, vehicle, (0.85, tall - 0.1), (0.93, 0.93), flat, vehicle.paint)
    if vehicle.oncoming:
        _bar(stage, vehicle, (0.5 * tall, 0.78 * tall), (0.9, 0.86), flat, _GLASS)


def _paint_lights(stage: Stage, vehicle: Vehicle) -> None:
    """Headlights or rear lights; by night they shine, and so do brake lights by day."""
    night = stage.weather.night
    level = vehicle.belt - 0.12 if vehicle.cabin < 1 else 0.6
    colour, shining = (_LAMP, night) if vehicle.oncoming else (_RED, night or vehicle.braking)
    _pair(stage, vehicle, (0.68, 0.95), (level - 0.09, level + 0.09), colour)
    if shining:
        reach, power = (0.4, 1.6) if vehicle.oncoming else (0.14, 0.8)
        for side in (-0.8, 0.8):
            at = stage.place(vehicle.offset + side * vehicle.width / 2, level, vehicle.z)
            stage.glow(at, reach / vehicle.z + 0.003, power * colour)


def _bar(
    stage: Stage,
    vehicle: Vehicle,
    up: tuple[float, float],
    wide: tuple[float, float],
    z: tuple[float, float],
    colour: ArrayLike,
) -> None:
    """Fill a trapezium across the vehicle, lower edge to upper; widths as shares of the vehicle's."""
    across = vehicle.offset + vehicle.width / 2 * np.array([-wide[0], -wide[1], wide[1], wide[0]])
    corners = stage.place(across, [up[0], up[1], up[1], up[0]], [z[0], z[1], z[1], z[0]])
    stage.fill(corners, stage.lit(colour, vehicle.offset, vehicle.z))


def _pair(
    stage: Stage, vehicle: Vehicle, aside: tuple[float, float], up: tuple[float, float], colour: ArrayLike
) -> None:
    """Fill two rectangles of the near end, left and right, between shares of half the width."""
    light = stage.lit(colour, vehicle.offset, vehicle.z)
    for half in (-vehicle.width / 2, vehicle.width / 2):
        across = vehicle.offset + half * np.array([aside[0], aside[0], aside[1], aside[1]])
        stage.fill(stage.place(across, [up[0], up[1], up[1], up[0]], vehicle.z), light)
