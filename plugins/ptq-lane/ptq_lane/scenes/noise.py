"""Noise that repeats itself without a seam, to be looked up at any place of a plane or a line."""

from functools import lru_cache
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray

Field = NDArray[np.floating[Any]]

SIDE = 256


@lru_cache(maxsize=16)
def noise_field(roughness: float) -> NDArray[np.float32]:
    """Noise [SIDE, SIDE] of unit variance whose amplitude falls as frequency to the power of -roughness."""
    frequency = np.hypot(np.fft.fftfreq(SIDE)[:, None], np.fft.rfftfreq(SIDE))
    frequency[0, 0] = np.inf
    white = np.random.default_rng(0).normal(size=(SIDE, SIDE))
    noise = np.fft.irfft2(np.fft.rfft2(white) / frequency**roughness, s=(SIDE, SIDE))
    return (noise / noise.std()).astype(np.float32)


def noise_at(x: Field, y: Field, roughness: float) -> Field:
    """The noise at places [h, w] given in its cells."""
    at = _wrapped(x), _wrapped(y)
    noise = cv2.remap(noise_field(roughness), *at, cv2.INTER_LINEAR, borderMode=cv2.BORDER_WRAP)
    return np.asarray(noise, np.float32)


def noise_line(x: Field, start: float, roughness: float) -> Field:
    """The noise along one line at places [n] given in its cells; start: which line, in cells."""
    return noise_at(x[None], np.full_like(x, start)[None], roughness)[0]


def _wrapped(places: Field) -> NDArray[np.float32]:
    return (places - np.floor(places / SIDE) * SIDE).astype(np.float32)
