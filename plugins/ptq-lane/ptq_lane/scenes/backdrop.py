"""What lies beyond the ground: sky, clouds, hills, woods and houses."""

import numpy as np
from numpy.random import Generator

from ptq_lane.lanes import Frame
from ptq_lane.scenes.camera import Camera
from ptq_lane.scenes.noise import SIDE, Field, noise_at, noise_line
from ptq_lane.scenes.weather import Weather

_WOODS = ((0.16, 0.24, 0.12), (0.2, 0.26, 0.16), (0.26, 0.24, 0.14), (0.14, 0.2, 0.16))


def sky_colours(weather: Weather, random: Generator) -> tuple[Field, Field]:
    """The colours of the sky high up and at the horizon [3], lit."""
    grey = np.array([0.78, 0.8, 0.83])
    high = np.array([0.3, 0.5, 0.85]) * random.uniform(0.8, 1.1)
    low = np.array([0.8, 0.86, 0.93]) * random.uniform(0.9, 1.1)
    high += weather.clouds**2 * (grey * random.uniform(0.75, 1.1) - high)
    low += weather.clouds**2 * (grey * random.uniform(0.9, 1.15) - low)
    if weather.night:
        glow = np.array([0.9, 0.7, 0.5]) * random.uniform(0, 0.5)
        high, low = high * 0.25, low * 0.4 + glow
    light = weather.light * np.array(weather.tint)
    return (high * light).astype(np.float32), (low * light).astype(np.float32)


def paint_backdrop(
    frame: Frame, camera: Camera, weather: Weather, high: Field, low: Field, random: Generator
) -> Field:
    """The backdrop of an image [3, h, w]."""
    columns, rows = np.arange(frame.width, dtype=np.float32), np.arange(frame.height, dtype=np.float32)
    horizon = camera.horizon(frame, columns).astype(np.float32)
    bottom = min(int(horizon.max() + 0.12 * frame.height), frame.height)
    above = (horizon - rows[:bottom, None]) / frame.height
    across = columns / frame.height
    canvas = np.zeros((3, frame.height, frame.width), dtype=np.float32)
    sky = canvas[:, :bottom]
    rising = np.clip(above / 0.45, 0, 1) ** np.float32(0.6)
    sky[:] = low[:, None, None] + rising * (high - low)[:, None, None]
    _paint_clouds(sky, above, across, weather, random)
    for distance in (1.0, 0.5, 0.0):
        _paint_skyline(sky, above, across, distance, weather, low, random)
    return canvas


def _paint_clouds(sky: Field, above: Field, across: Field, weather: Weather, random: Generator) -> None:
    """Clouds, flatter towards the horizon, in place."""
    x0, y0 = random.uniform(0, SIDE, 2)
    depth = 1 / (np.clip(above, 0, 1) + 0.08)
    noise = noise_at((across - 1) * depth * 3 + np.float32(x0), depth * 6 + np.float32(y0), 1.4)
    cover = np.clip(noise * 0.6 + np.float32(weather.clouds - 0.6), 0, 1) * np.clip(above * 12, 0, 1)
    brightness = weather.light * random.uniform(0.7, 1.1)
    for channel, shade in zip(sky, (1.0, 1.0, 1.02), strict=True):
        channel += cover * (np.float32(shade * brightness) - channel)


def _paint_skyline(
    sky: Field,
    above: Field,
    across: Field,
    distance: float,
    weather: Weather,
    low: Field,
    random: Generator,
) -> None:
    """One row of hills, woods or houses along the horizon, in place; distance: 1 (hazy) to 0 (near)."""
    kind, start = random.random(), random.uniform(0, SIDE)
    tall = random.uniform(0.01, 0.07 if distance else 0.13)
    wood = np.array(_WOODS[random.integers(len(_WOODS))]) * random.uniform(0.7, 1.4)
    house = np.array([0.5, 0.48, 0.46]) * random.uniform(0.5, 1.3) + random.normal(0, 0.03, 3)
    roughness, cells = (1.6, 10) if kind < 0.35 else (1.0, 40)
    ridge = tall * (1 + 0.4 * noise_line(across * np.float32(cells), start, roughness))
    if kind > 0.65:
        block = np.floor(across * np.float32(random.uniform(6, 14)) + np.float32(start))
        ridge = np.float32(tall) * (1.2 + 0.8 * noise_line(block * np.float32(17.3), start, 0.2))
    pixel = abs(float(above[1, 0] - above[0, 0]))
    cover = np.clip((ridge - above) / pixel + 0.5, 0, 1)
    texture = noise_at(np.broadcast_to(across * 60, above.shape), above * 90, 0.8 if kind < 0.65 else 0.2)
    shade = (1 + np.float32(0.2 * (1 - distance)) * texture) * np.float32(weather.light)
    if kind > 0.65:
        shade *= 1 + 0.25 * np.cos(block * 12.9)
    hidden = np.float32(1 - np.exp(-weather.haze * (150 + 1200 * distance)))
    for channel, own, far in zip(sky, wood if kind < 0.65 else house, low, strict=True):
        colour = np.float32(own) * shade
        channel += cover * (colour + hidden * (far - colour) - channel)
