"""Pictures made of nothing but a seed, with the statistics of photographs.

Dead leaves: shapes that hide one another, their sizes drawn from a power law, give the edges and the
1/f spectrum of natural images (Lee, Mumford & Huang, IJCV 2001). Each leaf has a colour, a texture
(1/f noise or stripes) and a shading of its own; a light falls over all, and a little noise.
"""

from functools import lru_cache

import numpy as np
from numpy.random import Generator
from numpy.typing import NDArray

from ptq_vision.images import ImageSet
from ptq_vision.preprocess import Pixels

_LEAVES = 110
_SMALLEST, _LARGEST = 0.03, 0.6
_NOISE_SIDE = 256
_MOST_KEPT = 256
_ROUGHNESS = (1.0, 1.4, 1.8)

Field = NDArray[np.float64]


def rendered_images(count: int, height: int, width: int, seed: int, series: int = 0) -> ImageSet:
    """Pictures [height, width, 3]; the same for the same arguments.

    Args:
        count: how many.
        height: of each, in pixels.
        width: of each, in pixels.
        seed: of everything random.
        series: pictures of different series have nothing in common.
    """

    @lru_cache(maxsize=_MOST_KEPT)
    def read(index: int) -> Pixels:
        return render(height, width, np.random.default_rng([seed, series, index]))

    return ImageSet([f"rendered {index}" for index in range(count)], read)


def render(height: int, width: int, random: Generator) -> Pixels:
    """One picture."""
    canvas = _colour(random) * (1 + 0.3 * _noise((height, width), random)[..., None])
    for _ in range(_LEAVES):
        _paint_leaf(canvas, random)
    canvas *= 1 + random.uniform(0, 0.5) * _slope((height, width), random)[..., None]
    low, high = random.uniform(0, 0.08), random.uniform(0.8, 1.2)
    canvas = low + (high - low) * canvas + random.normal(0, random.uniform(0, 0.02), canvas.shape)
    return (canvas.clip(0, 1) * 255).round().astype(np.uint8)


def _paint_leaf(canvas: Field, random: Generator) -> None:
    """Paint one shape over a canvas [h, w, 3], in place."""
    height, width = canvas.shape[:2]
    radius = _radius(random) * min(height, width)
    y, x = random.uniform(0, height), random.uniform(0, width)
    top, bottom = max(int(y - radius), 0), min(int(y + radius) + 2, height)
    left, right = max(int(x - radius), 0), min(int(x + radius) + 2, width)
    rows, columns = np.mgrid[top:bottom, left:right]
    cover = _cover((rows - y) / radius, (columns - x) / radius, 1 / radius, random)[..., None]
    shape = (bottom - top, right - left)
    if random.random() < 0.85:
        texture = random.uniform(0, 0.3) * _noise(shape, random)
    else:
        texture = random.uniform(0.1, 0.4) * np.sin(random.uniform(6, 60) * _slope(shape, random))
    shading = random.uniform(0, 0.5) * _slope(shape, random)
    colour = _colour(random) * (1 + texture + shading)[..., None]
    place = canvas[top:bottom, left:right]
    place += cover * (colour.clip(0, 1) - place)


def _radius(random: Generator) -> float:
    """Half the size of a leaf, by the density 1 / r² between the smallest and the largest."""
    return float(1 / random.uniform(1 / _LARGEST, 1 / _SMALLEST))


def _cover(rows: Field, columns: Field, pixel: float, random: Generator) -> Field:
    """How much of each pixel a random ellipse or polygon within the unit circle covers, 0 to 1."""
    angle = random.uniform(0, np.pi)
    along = np.cos(angle) * columns + np.sin(angle) * rows
    across = np.cos(angle) * rows - np.sin(angle) * columns
    flatness = random.uniform(0.35, 1)
    if random.random() < 0.5:
        distance = np.hypot(along, across / flatness)
    else:
        sides = random.integers(3, 7)
        turns = 2 * np.pi * (np.arange(sides) + random.uniform(-0.2, 0.2, sides)) / sides
        edges = [np.cos(turn) * along + np.sin(turn) * across / flatness for turn in turns]
        distance = np.maximum.reduce(edges) / np.cos(np.pi / sides)
    return ((1 - distance) / pixel + 0.5).clip(0, 1)


def _colour(random: Generator) -> Field:
    """A colour [3]: mostly dull, now and then vivid, warm where bright, as under the sun."""
    brightness = random.beta(1.2, 1.6)
    tint = random.normal(0, 1, 3)
    saturation = 0.03 + 0.3 * random.random() ** 3
    warmth = 0.04 * (2 * brightness - 0.5)
    return (brightness + saturation * (tint - tint.mean()) + np.array([warmth, 0, -warmth])).clip(0.01, 1)


def _slope(shape: tuple[int, int], random: Generator) -> Field:
    """A plane [h, w] of a random direction, within -1 and 1."""
    angle = random.uniform(0, 2 * np.pi)
    rows, columns = np.linspace(-1, 1, shape[0])[:, None], np.linspace(-1, 1, shape[1])
    return (np.cos(angle) * columns + np.sin(angle) * rows) / np.sqrt(2)


def _noise(shape: tuple[int, int], random: Generator) -> Field:
    """A piece [h, w] of noise of a random roughness; the noise repeats itself without a seam."""
    field = _noise_field(_ROUGHNESS[random.integers(len(_ROUGHNESS))])
    top, left = random.integers(0, _NOISE_SIDE, 2)
    rows, columns = top + np.arange(shape[0]), left + np.arange(shape[1])
    return field[rows[:, None] % _NOISE_SIDE, columns % _NOISE_SIDE]


@lru_cache(maxsize=len(_ROUGHNESS))
def _noise_field(exponent: float) -> Field:
    """Noise of unit variance whose amplitude falls as frequency to the power of -exponent."""
    side = _NOISE_SIDE
    frequency = np.hypot(np.fft.fftfreq(side)[:, None], np.fft.rfftfreq(side))
    frequency[0, 0] = np.inf
    white = np.random.default_rng(0).normal(size=(side, side))
    noise = np.fft.irfft2(np.fft.rfft2(white) / frequency**exponent, s=(side, side))
    return noise / noise.std()
