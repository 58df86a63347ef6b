"""Vehicles on the road: boxes with cabins, windows, wheels and lights."""

from dataclasses import dataclass

import numpy as np
from numpy.random import Generator

from ptq_lane.scenes.noise import Field
from ptq_lane.scenes.road import Road
from ptq_lane.scenes.stage import Stage

_PAINTS = (
    (0.85, 0.85, 0.85),
    (0.6, 0.61, 0.63),
    (0.32, 0.33, 0.35),
    (0.08, 0.08, 0.09),
    (0.55, 0.08, 0.07),
    (0.1, 0.18, 0.4),
    (0.45, 0.4, 0.3),
    (0.1, 0.3, 0.2),
)
_GLASS = np.array([0.12, 0.15, 0.18])
_RUBBER = np.array([0.04, 0.04, 0.045])
_RED, _LAMP, _PLATE = np.array([0.7, 0.05, 0.04]), np.array([0.95, 0.95, 0.85]), np.array([0.8, 0.8, 0.75])


@dataclass(frozen=True)
class Vehicle:
    """One vehicle.

    offset, z: the middle of its near end, on the road and ahead, in metres.
    width, height, length: in metres.
    cabin: width of the roof as a share of the width; 1: a lorry or van, a plain box.
    paint: its colour.
    oncoming: whether it shows its front.
    braking: whether its brake lights shine.
    """

    offset: float
    z: float
    width: float
    height: float
    length: float
    cabin: float
    paint: tuple[float, float, float]
    oncoming: bool
    braking: bool


def random_vehicles(random: Generator, road: Road, most: int) -> list[Vehicle]:
    """Up to so many vehicles in the lanes around the car, none overlapping another."""
    lane_width = road.lines[-1].offset - road.lines[-2].offset
    left = next(line.offset for line in road.lines if line.slot == 1)
    slots = {line.slot for line in road.lines}
    lanes = [0] + [-1] * (0 in slots or road.two_way) + [1] * (3 in slots)
    reached = {lane: random.uniform(9, 25) if lane == 0 else random.uniform(2.5, 20) for lane in lanes}
    spacing = 30 / max(most, 1)
    vehicles = []
    for _ in range(most):
        lane = int(random.choice(lanes))
        middle = left + (lane + 0.5) * lane_width + random.normal(0, 0.2)
        vehicle = _random_vehicle(random, middle, reached[lane], oncoming=lane == -1 and road.two_way)
        reached[lane] += vehicle.length + random.uniform(2, 6) + random.exponential(spacing)
        if vehicle.z < 90:
            vehicles.append(vehicle)
    return vehicles


def _random_vehicle(random: Generator, offset: float, z: float, oncoming: bool) -> Vehicle:
    kind, brake = random.random(2)
    paint = np.array(_PAINTS[random.integers(len(_PAINTS))]) * random.uniform(0.8, 1.15)
    if kind < 0.75:
        size = random.uniform(1.7, 1.9), random.uniform(1.4, 1.75), random.uniform(3.8, 4.9)
        cabin = random.uniform(0.68, 0.8)
    elif kind < 0.88:
        size, cabin = (random.uniform(1.9, 2.1), random.uniform(1.9, 2.5), random.uniform(4.8, 6)), 0.92
    else:
        size, cabin = (random.uniform(2.4, 2.55), random.uniform(2.9, 3.9), random.uniform(7, 12)), 1.0
    red, green, blue = (float(part) for part in paint)
    return Vehicle(offset, z, *size, cabin, (red, green, blue), oncoming, bool(brake < 0.35))


def paint_vehicle(stage: Stage, vehicle: Vehicle) -> None:
    """Paint a vehicle: its shadow, its side, then its near end."""
    near, far = vehicle.z, vehicle.z + vehicle.length
    left, right = vehicle.offset - vehicle.width / 2, vehicle.offset + vehicle.width / 2
    spill = 0.25
    under = np.array(
        [
            (left - spill, 0, near - 0.1),
            (right + spill, 0, near - 0.1),
            (right + spill, 0, far),
            (left - spill, 0, far),
        ]
    )
    stage.dim(stage.place(*under.T), 0.45)
    if right < 0:
        _paint_side(stage, vehicle, right)
    elif left > 0:
        _paint_side(stage, vehicle, left)
    if vehicle.cabin == 1:
        _paint_box_end(stage, vehicle)
    else:
        _paint_car_end(stage, vehicle)
    _paint_lights(stage, vehicle)


def _paint_side(stage: Stage, vehicle: Vehicle, offset: float) -> None:
    """The flank that faces the camera, at an offset."""
    near, length, height = vehicle.z, vehicle.length, vehicle.height
    inwards = np.sign(vehicle.offset - offset) * vehicle.width * (1 - vehicle.cabin) / 2
    boxy = vehicle.cabin > 0.9
    belt = height if boxy else 0.6 * height
    body = np.array([(offset, 0.22, 0), (offset, belt, 0), (offset, belt, 1), (offset, 0.22, 1)])
    paint = stage.lit(0.62 * np.array(vehicle.paint), offset, near + length / 2)
    stage.fill(_along(stage, body, near, length), paint)
    if not boxy:
        ends = (0.25, 0.36, 0.62, 0.8) if vehicle.oncoming else (0.05, 0.16, 0.6, 0.78)
        cabin = np.array(
            [
                (offset, belt, ends[0]),
                (offset + inwards, height, ends[1]),
                (offset + inwards, height, ends[2]),
                (offset, belt, ends[3]),
            ]
        )
        stage.fill(_along(stage, cabin, near, length), paint)
        middle = cabin.mean(0)
        glass = middle + (cabin - middle) * np.array([1, 0.7, 0.85])
        stage.fill(_along(stage, glass, near, length), stage.lit(_GLASS, offset, near))
    radius = 0.33 if vehicle.height < 2.8 else 0.48
    turn = np.linspace(0, 2 * np.pi, 12, endpoint=False)
    for share in (0.18, 0.8):
        wheel = np.stack(
            [
                np.full(12, offset),
                radius + radius * np.sin(turn),
                near + share * length + radius * np.cos(turn),
            ]
        )
        stage.fill(stage.place(*wheel), stage.lit(_RUBBER, offset, near))


def _along(stage: Stage, corners: Field, near: float, length: float) -> Field:
    """Corners [n, 3] of offset, height and share of a vehicle's length, in pixels [n, 2]."""
    return stage.place(corners[:, 0], corners[:, 1], near + corners[:, 2] * length)


def _end(
    stage: Stage, vehicle: Vehicle, low: float, high: float, bottom: float, top: float, light: Field
) -> None:
    """Fill a trapezium of the near end between two heights, its widths given as shares of the vehicle's."""
    half = vehicle.width / 2
    across = vehicle.offset + half * np.array([-bottom, -top, top, bottom])
    up = np.array([low, high, high, low])
    stage.fill(stage.place(across, up, np.full(4, vehicle.z)), light)


def _patches(
    stage: Stage, vehicle: Vehicle, inner: float, outer: float, low: float, high: float, light: Field
) -> None:
    """Fill two rectangles, left and right, between shares of half the width and two heights."""
    half = vehicle.width / 2
    for side in (-1, 1):
        across = vehicle.offset + side * half * np.array([inner, inner, outer, outer])
        stage.fill(stage.place(across, np.array([low, high, high, low]), np.full(4, vehicle.z)), light)


def _paint_car_end(stage: Stage, vehicle: Vehicle) -> None:
    def lit(colour: Field) -> Field:
        return stage.lit(colour, vehicle.offset, vehicle.z)

    paint, tall = np.array(vehicle.paint), vehicle.height
    _patches(stage, vehicle, 0.68, 0.96, 0, 0.4, lit(_RUBBER))
    _end(stage, vehicle, 0.55 * tall, tall, 0.98, vehicle.cabin, lit(0.9 * paint))
    _end(
        stage, vehicle, 0.62 * tall, 0.94 * tall, 0.86, vehicle.cabin - 0.06, lit(_GLASS + 0.1 * stage.far)
    )
    _end(stage, vehicle, 0.28, 0.62 * tall, 0.97, 1, lit(paint))
    _end(stage, vehicle, 0.24, 0.4, 0.95, 0.97, lit(0.45 * paint))
    _end(stage, vehicle, 0.42, 0.52, 0.28, 0.28, lit(_PLATE))


def _paint_box_end(stage: Stage, vehicle: Vehicle) -> None:
    def lit(colour: Field) -> Field:
        return stage.lit(colour, vehicle.offset, vehicle.z)

    paint, tall = np.array(vehicle.paint), vehicle.height
    _patches(stage, vehicle, 0.5, 0.96, 0, 0.9, lit(_RUBBER))
    _end(stage, vehicle, 0.45, 0.75, 0.96, 0.96, lit(np.full(3, 0.12)))
    _end(stage, vehicle, 0.75, tall, 1, 1, lit(0.75 * paint))
    _end(stage, vehicle, 0.85, tall - 0.1, 0.93, 0.93, lit(paint))
    if vehicle.oncoming:
        _end(stage, vehicle, 0.5 * tall, 0.78 * tall, 0.9, 0.86, lit(_GLASS))


def _paint_lights(stage: Stage, vehicle: Vehicle) -> None:
    """Head or rear lights; by night they shine, and so do brake lights by day."""
    level = 0.55 * vehicle.height if vehicle.cabin < 1 else 0.6
    colour, shining = (
        (_LAMP, stage.weather.night) if vehicle.oncoming else (_RED, vehicle.braking or stage.weather.night)
    )
    light = colour * 1.3 if shining else stage.lit(colour, vehicle.offset, vehicle.z)
    _patches(stage, vehicle, 0.68, 0.95, level - 0.09, level + 0.09, light)
    if shining:
        reach = (0.5 if vehicle.oncoming and stage.weather.night else 0.16) / vehicle.z + 0.004
        for side in (-0.8, 0.8):
            across = vehicle.offset + side * vehicle.width / 2
            at = stage.place(np.float64(across), np.float64(level), np.float64(vehicle.z))
            stage.glow(at, reach, colour * (1.5 if vehicle.oncoming else 0.9))
