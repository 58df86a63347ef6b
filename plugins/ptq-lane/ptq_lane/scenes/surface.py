"""The light that comes from the ground: asphalt, markings, verges and the shadows on them."""

import numpy as np
from numpy.random import Generator

from ptq_lane.scenes.ground import Ground, blend, share_within
from ptq_lane.scenes.lighting import night_light
from ptq_lane.scenes.markings import paint_markings
from ptq_lane.scenes.noise import SIDE, Field, noise_at
from ptq_lane.scenes.road import Road
from ptq_lane.scenes.weather import Weather

_VERGES = ((0.36, 0.42, 0.22), (0.30, 0.36, 0.2), (0.5, 0.44, 0.33), (0.55, 0.54, 0.52), (0.44, 0.42, 0.4))
_KERB = (0.62, 0.61, 0.59)


def paint_surface(ground: Ground, road: Road, weather: Weather, random: Generator) -> Field:
    """The light from the ground, before haze [3, h, w]."""
    colour = _asphalt(ground, road, random)
    bright = random.uniform(0.8, 1.0) * (1.3 if weather.night else 1)
    paint_markings(colour, ground, road, bright, random)
    _paint_verges(colour, ground, road, random)
    light = np.float32(weather.light) * _unshaded(ground, weather, random)
    if weather.night:
        light = light + np.float32(random.uniform(0.7, 1.2)) * night_light(road, ground.offset, ground.z)
    return colour * light * np.array(weather.tint, np.float32)[:, None, None]


def _asphalt(ground: Ground, road: Road, random: Generator) -> Field:
    """Asphalt with grain, stains along the road, tracks of tyres, cracks and repaired patches [3, h, w]."""
    shade = 1 + random.uniform(0.02, 0.08) * ground.texture(0.04, 1.5, 0.3, random)
    shade += random.uniform(0.02, 0.1) * ground.texture(0.15, 8, 1.2, random)
    shade += random.uniform(-0.12, 0.06) * _tracks(ground, road)
    for _ in range(random.integers(0, 4)):
        shade += random.uniform(-0.15, 0.1) * _patch(ground, random)
    for _ in range(max(int(random.integers(-2, 3)), 0)):
        shade -= random.uniform(0.15, 0.45) * _crack(ground, random)
    if random.random() < 0.25:
        newer = share_within(ground.offset, ground.wide, 500 + random.uniform(-4, 4), 1000)
        shade += random.uniform(-0.2, 0.12) * newer
    brightness, warmth = random.uniform(0.29, 0.54), random.normal(0, 0.03)
    tint = np.array([1 + warmth, 1, 1 - warmth], dtype=np.float32) * np.float32(brightness)
    return (tint[:, None, None] * shade).astype(np.float32)


def _tracks(ground: Ground, road: Road) -> Field:
    """Where tyres run: bands 0.8 m either side of the middle of each lane."""
    first, width = road.lines[0].offset, road.lines[1].offset - road.lines[0].offset
    across = np.abs((ground.offset - np.float32(first)) / width % 1 - 0.5) * width
    return np.exp(-np.square((across - 0.8) / 0.3))


def _patch(ground: Ground, random: Generator) -> Field:
    """How much of each pixel a random rectangle on the road covers."""
    across = share_within(ground.offset, ground.wide, random.uniform(-6, 6), random.uniform(0.6, 3.5))
    return across * share_within(ground.z, ground.deep, random.uniform(4, 40), random.uniform(1, 15))


def _crack(ground: Ground, random: Generator) -> Field:
    """How much of each pixel a winding crack along the road covers."""
    start = np.float32(random.uniform(0, SIDE))
    winding = 0.12 * noise_at(ground.z / 4, np.broadcast_to(start, ground.z.shape), 1.2)
    return share_within(
        ground.offset, ground.wide, random.uniform(-5, 5) + winding, random.uniform(0.03, 0.07)
    )


def _paint_verges(colour: Field, ground: Ground, road: Road, random: Generator) -> None:
    """Cover what lies beyond the edges of the asphalt with grass, earth or stone, in place; some edges
    have a kerb."""
    grain = 1 + random.uniform(0.1, 0.25) * ground.texture(0.1, 3, 0.9, random)
    for edge, outside in zip(road.edges, (-1, 1), strict=True):
        cover = share_within(ground.offset, ground.wide, edge + outside * 500, 1000)
        verge = np.array(_VERGES[random.integers(len(_VERGES))]) * random.uniform(0.7, 1.2)
        blend(colour, cover, verge, grain)
        kerbed, shade = random.random(2)
        if kerbed < 0.3:
            kerb = share_within(ground.offset, ground.wide, edge + outside * 0.12, 0.24)
            blend(colour, kerb, _KERB, 0.7 + 0.4 * shade)


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
        shaded = np.maximum(shaded, share_within(along, depth, z, length))
    if leafy:
        leaves = noise_at(ground.x / cell, along / (2 * cell), 1.3)
        shaded = np.maximum(shaded, np.clip((leaves - np.float32(cover)) * 2.5, 0, 1))
    return 1 - np.float32(weather.shade) * shaded
