"""The ground as each pixel sees it: asphalt, verge, painted lines and shadows."""

from dataclasses import dataclass

import numpy as np
from numpy.random import Generator
from numpy.typing import NDArray

from ptq_lane.lanes import Frame
from ptq_lane.scenes.camera import Camera
from ptq_lane.scenes.lighting import night_light
from ptq_lane.scenes.noise import SIDE, Field, noise_at
from ptq_lane.scenes.road import Line, Road
from ptq_lane.scenes.weather import Weather

_VERGES = ((0.36, 0.42, 0.22), (0.30, 0.36, 0.2), (0.5, 0.44, 0.33), (0.55, 0.54, 0.52), (0.44, 0.42, 0.4))


@dataclass(frozen=True)
class Ground:
    """What the pixels [h, w] below a row see of the ground.

    top: that row.
    seen: whether a pixel sees any.
    x, z: in metres; 0 aside and far ahead where none is seen.
    offset: x less the road's own shift at z.
    wide, deep: how much offset and z change over a pixel.
    """

    top: int
    seen: NDArray[np.bool_]
    x: Field
    z: Field
    offset: Field
    wide: Field
    deep: Field


def ground_seen(frame: Frame, camera: Camera, road: Road) -> Ground:
    """The ground in an image."""
    columns, rows = np.arange(frame.width, dtype=np.float64), np.arange(frame.height, dtype=np.float64)
    edges = camera.ground(frame, road.rise, np.linspace(0, frame.width - 1, 9), rows)[1]
    top = max(int(np.argmax((~np.isnan(edges)).any(1))) - 2, 0)
    x, z = camera.ground(frame, road.rise, columns, rows[top:])
    seen = ~np.isnan(z)
    x, z = np.where(seen, x, np.float32(0)), np.where(seen, z, np.float32(1e3))
    offset = (x - road.shift(z)).astype(np.float32)
    deep = np.abs(_change(z, 0))
    wide = np.abs(_change(offset, 1)) + np.abs(_change(offset, 0))
    return Ground(top, seen, x, z, offset, wide, deep)


def _change(field: Field, axis: int) -> Field:
    """The difference of neighbouring pixels along an axis, never 0."""
    change = np.diff(field, axis=axis)
    last = change[-1:] if axis == 0 else change[:, -1:]
    return np.concatenate([change, last], axis=axis) + np.float32(1e-6)


def paint_ground(ground: Ground, road: Road, weather: Weather, random: Generator) -> Field:
    """The light that comes from the ground, before haze [3, h, w]."""
    colour = _asphalt(ground, road, random)
    bright = random.uniform(0.8, 1.0) * (1.3 if weather.night else 1)
    for line in road.lines:
        _blend(colour, _painted(ground, line, random), line.colour, bright)
    _paint_verges(colour, ground, road, random)
    light = weather.light * _unshaded(ground, weather, random)
    if weather.night:
        light = light + random.uniform(0.7, 1.2) * night_light(road, ground.offset, ground.z)
    return colour * light


def _blend(colour: Field, cover: Field, paint: tuple[float, float, float], brightness: float) -> None:
    """Lay paint over a colour [3, h, w] where it covers [h, w], in place."""
    for channel, shade in zip(colour, paint, strict=True):
        channel += cover * (np.float32(shade * brightness) - channel)


def _texture(ground: Ground, cell: float, stretch: float, roughness: float, random: Generator) -> Field:
    """Noise in cells of so many metres across and `stretch` times as many along, fading where a pixel
    is longer than a cell."""
    x0, z0 = random.uniform(0, SIDE, 2)
    noise = noise_at(ground.offset / cell + x0, ground.z / (cell * stretch) + z0, roughness)
    return noise / (1 + ground.deep / (cell * stretch * 2 ** (2 * roughness)))


def _asphalt(ground: Ground, road: Road, random: Generator) -> Field:
    """Asphalt with grain, stains along the road, tracks of tyres and repaired patches [3, h, w]."""
    shade = 1 + random.uniform(0.02, 0.08) * _texture(ground, 0.04, 1.5, 0.3, random)
    shade += random.uniform(0.02, 0.1) * _texture(ground, 0.15, 8, 1.2, random)
    shade += random.uniform(-0.12, 0.06) * _tracks(ground, road)
    for _ in range(random.integers(0, 4)):
        shade += random.uniform(-0.15, 0.1) * _patch(ground, random)
    brightness = random.uniform(0.26, 0.52)
    warmth = random.normal(0, 0.03)
    tint = np.array([1 + warmth, 1, 1 - warmth], dtype=np.float32) * np.float32(brightness)
    return (tint[:, None, None] * shade).astype(np.float32)


def _tracks(ground: Ground, road: Road) -> Field:
    """Where tyres run: bands 0.8 m either side of the middle of each lane."""
    left = road.lines[-1].offset
    width = road.lines[1].offset - road.lines[0].offset
    across = np.abs((ground.offset - np.float32(left)) / width % 1 - 0.5) * width
    return np.exp(-np.square((across - 0.8) / 0.3))


def _patch(ground: Ground, random: Generator) -> Field:
    """How much of each pixel a random rectangle on the road covers."""
    x, z = random.uniform(-6, 6), random.uniform(4, 40)
    return _strip(ground.offset, ground.wide, x, random.uniform(0.6, 3.5)) * _strip(
        ground.z, ground.deep, z, random.uniform(1, 15)
    )


def _strip(at: Field, pixel: Field, centre: float, width: float) -> Field:
    """How much of each pixel, spread over `pixel` around `at`, lies within a strip."""
    low, high = np.float32(centre - width / 2), np.float32(centre + width / 2)
    half = pixel / 2
    return (np.clip(at + half, low, high) - np.clip(at - half, low, high)) / pixel


def _painted(ground: Ground, line: Line, random: Generator) -> Field:
    """How much of each pixel a line's paint covers."""
    apart = (line.gap + line.width) / 2 if line.gap else 0.0
    cover = _strip(ground.offset, ground.wide, line.offset - apart, line.width)
    if apart:
        cover += _strip(ground.offset, ground.wide, line.offset + apart, line.width)
    if line.dash:
        cover *= _dashes(ground, *line.dash)
    worn = 0.5 + 0.6 * _texture(ground, 0.03, 4, 0.6, random)
    return cover * (1 - line.wear * np.clip(worn + line.wear, 0, 1))


def _dashes(ground: Ground, period: float, length: float, start: float) -> Field:
    """How much of each pixel's depth lies in dashes."""

    def painted_up_to(z: Field) -> Field:
        periods = (z - np.float32(start)) / np.float32(period)
        whole = np.floor(periods)
        return whole * np.float32(length) + np.minimum(
            (periods - whole) * np.float32(period), np.float32(length)
        )

    return (
        painted_up_to(ground.z + ground.deep / 2) - painted_up_to(ground.z - ground.deep / 2)
    ) / ground.deep


def _paint_verges(colour: Field, ground: Ground, road: Road, random: Generator) -> None:
    """Cover what lies beyond the edges of the asphalt with grass, earth or stone, in place."""
    grain = 1 + random.uniform(0.1, 0.25) * _texture(ground, 0.1, 3, 0.9, random)
    for edge, outside in zip(road.edges, (-1, 1), strict=True):
        cover = _strip(ground.offset, ground.wide, edge + outside * 500, 1000)
        verge = np.array(_VERGES[random.integers(len(_VERGES))]) * random.uniform(0.7, 1.2)
        for channel, shade in zip(colour, verge, strict=True):
            channel += cover * (np.float32(shade) * grain - channel)


def _unshaded(ground: Ground, weather: Weather, random: Generator) -> Field:
    """How much of the sun's light reaches each pixel: bands across the road and the crowns of trees."""
    slant, cell, cover = random.uniform(-1.5, 1.5), random.uniform(0.05, 0.15), random.uniform(-0.6, 0.8)
    bands = [(random.uniform(3, 60), random.uniform(0.4, 7)) for _ in range(random.integers(1, 6))]
    leafy = random.random() < 0.6
    if not weather.shade:
        return np.ones_like(ground.z)
    along = ground.z + np.float32(slant) * ground.x
    depth = ground.deep + np.float32(abs(slant)) * ground.wide + np.float32(0.1)
    shaded = np.zeros_like(ground.z)
    for z, length in bands:
        shaded = np.maximum(shaded, _strip(along, depth, z, length))
    if leafy:
        leaves = noise_at(ground.x / cell, along / (2 * cell), 1.3)
        shaded = np.maximum(shaded, np.clip((leaves - np.float32(cover)) * 2.5, 0, 1))
    return 1 - np.float32(weather.shade) * shaded
