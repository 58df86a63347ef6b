"""Light by night: the car's own headlights and the lamps beside the road; and lights that blind."""

import numpy as np
from numpy.typing import NDArray

from ptq_lane.scenes.noise import Field
from ptq_lane.scenes.road import Road

_HEADLIGHTS, _LAMP = 1.1, 0.45
_REACH = 5.0


def night_light(road: Road, offset: Field, z: Field) -> Field:
    """The light of headlights and lamps at places near the ground."""
    x = offset + road.shift(z)
    beam = np.exp(-np.square(x / (2.5 + 0.22 * z))) / (1 + np.square(z / 24)) * np.clip(z / 5, 0.4, 1)
    if road.lamps is None:
        return _HEADLIGHTS * beam
    posts = (z - road.lamps.start) / road.lamps.spacing
    along = (posts - np.round(posts)) * road.lamps.spacing
    pools = np.exp(-np.square(along / 9) - np.square((offset - road.lamps.offset) / 9))
    return _HEADLIGHTS * beam + _LAMP * pools


def add_glow(image: NDArray[np.float32], x: float, y: float, reach: float, light: Field) -> None:
    """Add a light [3] that falls off around a point to a picture [h, w, 3], in place; all in pixels."""
    height, width = image.shape[:2]
    span = _REACH * reach
    left, right = max(int(x - span), 0), min(int(x + span) + 2, width)
    top, bottom = max(int(y - span), 0), min(int(y + span) + 2, height)
    if left >= right or top >= bottom:
        return
    columns = np.arange(left, right, dtype=np.float32) - np.float32(x)
    rows = np.arange(top, bottom, dtype=np.float32)[:, None] - np.float32(y)
    distance = np.sqrt(columns * columns + rows * rows) / np.float32(reach)
    halo = np.maximum(np.exp(-distance) - np.float32(np.exp(-_REACH)), 0)
    image[top:bottom, left:right] += halo[..., None] * light.astype(np.float32)
