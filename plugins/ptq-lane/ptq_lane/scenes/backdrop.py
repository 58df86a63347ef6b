"""What lies beyond the ground: sky, clouds, hills, woods and towns.

Heights above the horizon are in heights of the image, places across in half widths.
"""

from dataclasses import dataclass

import numpy as np
from numpy.random import Generator

from ptq_lane.lanes import Frame
from ptq_lane.scenes.camera import Camera
from ptq_lane.scenes.ground import blend
from ptq_lane.scenes.noise import SIDE, Field, noise_at, noise_line
from ptq_lane.scenes.weather import Weather

_WOODS = ((0.16, 0.24, 0.12), (0.2, 0.26, 0.16), (0.26, 0.24, 0.14), (0.14, 0.2, 0.16))
_LIT_WINDOW = (0.7, 0.52, 0.28)
_BELOW = 0.12


@dataclass(frozen=True)
class _Sky:
    """The part of the picture that is painted [3, h, w], and where its pixels lie: height above the
    horizon [h, w] and place across [w]."""

    canvas: Field
    above: Field
    across: Field


def sky_colours(weather: Weather, random: Generator) -> tuple[Field, Field]:
    """The colours of the sky high up and at the horizon [3], lit."""
    grey = np.array([0.78, 0.8, 0.83])
    high = np.array([0.3, 0.5, 0.85]) * random.uniform(0.8, 1.1)
    low = np.array([0.8, 0.86, 0.93]) * random.uniform(0.9, 1.1)
    high += weather.clouds**2 * (grey * random.uniform(0.75, 1.1) - high)
    low += weather.clouds**2 * (grey * random.uniform(0.9, 1.15) - low)
    if weather.night:
        high, low = high * 0.25, low * 0.4 + np.array([0.9, 0.7, 0.5]) * random.uniform(0, 0.5)
    light = weather.light * np.array(weather.tint)
    return (high * light).astype(np.float32), (low * light).astype(np.float32)


def paint_backdrop(
    frame: Frame, camera: Camera, weather: Weather, high: Field, low: Field, random: Generator
) -> Field:
    """The backdrop of an image [3, h, w] under a sky of these colours."""
    columns, rows = np.arange(frame.width, dtype=np.float32), np.arange(frame.height, dtype=np.float32)
    horizon = camera.horizon(frame, columns).astype(np.float32)
    bottom = min(int(horizon.max() + _BELOW * frame.height), frame.height)
    canvas = np.zeros((3, frame.height, frame.width), dtype=np.float32)
    above = (horizon - rows[:bottom, None]) / frame.height
    sky = _Sky(canvas[:, :bottom], above, (columns + 0.5) * np.float32(2 / frame.width))
    rising = np.clip(above / 0.45, 0, 1) ** np.float32(0.6)
    sky.canvas[:] = low[:, None, None] + rising * (high - low)[:, None, None]
    _paint_clouds(sky, weather, random)
    for distance in (1.0, 0.5, 0.0):
        hidden = float(1 - np.exp(-weather.haze * (150 + 1200 * distance)))
        if random.random() < 0.65:
            _paint_hills(sky, distance, weather, hidden, low, random)
        else:
            _paint_town(sky, weather, hidden, low, random)
    return canvas


def _paint_clouds(sky: _Sky, weather: Weather, random: Generator) -> None:
    """Clouds, flatter towards the horizon, in place."""
    x0, y0 = random.uniform(0, SIDE, 2)
    depth = 1 / (np.clip(sky.above, 0, 1) + 0.08)
    noise = noise_at((sky.across - 1) * depth * 3 + np.float32(x0), depth * 6 + np.float32(y0), 1.4)
    cover = np.clip(noise * 0.6 + np.float32(weather.clouds - 0.6), 0, 1) * np.clip(sky.above * 12, 0, 1)
    blend(sky.canvas, cover, weather.tint, weather.light * random.uniform(0.7, 1.1))


def _paint_hills(
    sky: _Sky, distance: float, weather: Weather, hidden: float, air: Field, random: Generator
) -> None:
    """Hills or woods along the horizon, in place; distance: 1 (far) to 0 (near)."""
    start, tall = random.uniform(0, SIDE), random.uniform(0.01, 0.07 if distance else 0.13)
    roughness, cells = (1.6, 10) if random.random() < 0.5 else (1.0, 40)
    ridge = tall * (1 + 0.4 * noise_line(sky.across * np.float32(cells), start, roughness))
    wood = np.array(_WOODS[random.integers(len(_WOODS))]) * random.uniform(0.7, 1.4)
    leaves = noise_at(np.broadcast_to(sky.across * 60, sky.above.shape), sky.above * 90, 0.8)
    shade = (1 + np.float32(0.2 * (1 - distance)) * leaves) * np.float32(weather.light)
    _stand(sky, ridge, wood, shade, hidden, air)


def _paint_town(sky: _Sky, weather: Weather, hidden: float, air: Field, random: Generator) -> None:
    """Blocks of houses with windows along the horizon, in place."""
    start, tall = random.uniform(0, SIDE), random.uniform(0.01, 0.1)
    wall = np.array([0.5, 0.48, 0.46]) * random.uniform(0.5, 1.3) + random.normal(0, 0.03, 3)
    block = np.floor(sky.across * np.float32(random.uniform(6, 14)) + np.float32(start))
    ridge = np.float32(tall) * (1.2 + 0.8 * noise_line(block * np.float32(17.3), start, 0.2))
    across, up = sky.across * 32, sky.above * 50
    windows = (across % 1 < 0.5) & (up % 1 < 0.45)
    shade = (1 + 0.25 * np.cos(block * np.float32(12.9))) * (1 - np.float32(0.3) * windows)
    _stand(sky, ridge, wall, shade * np.float32(weather.light), hidden, air)
    if weather.night:
        chance = noise_at(
            np.floor(across) * 17 + np.float32(start) + 0 * up, np.floor(up) * 29 + 0 * across, 0.2
        )
        blend(sky.canvas, windows * (chance > 0.6) * (sky.above < ridge) * (1 - hidden), _LIT_WINDOW, 1.0)


def _stand(sky: _Sky, ridge: Field, colour: Field, shade: Field, hidden: float, air: Field) -> None:
    """Cover the sky below a ridge [w] with a colour [3] of a shade [h, w], seen through haze, in place."""
    pixel = np.float32(sky.above[0, 0] - sky.above[1, 0])
    cover = np.clip((ridge - sky.above) / pixel + 0.5, 0, 1)
    blend(sky.canvas, cover * np.float32(1 - hidden), colour, shade)
    blend(sky.canvas, cover * np.float32(hidden), air, 1.0)
