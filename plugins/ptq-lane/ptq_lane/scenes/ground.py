"""The ground as each pixel sees it: what is where, and the shares of pixels that shapes on it cover."""

from dataclasses import dataclass

import numpy as np
from numpy.random import Generator
from numpy.typing import ArrayLike, NDArray

from ptq_lane.lanes import Frame
from ptq_lane.scenes.camera import Camera
from ptq_lane.scenes.noise import SIDE, Field, noise_at
from ptq_lane.scenes.road import Road


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

    def texture(self, cell: float, stretch: float, roughness: float, random: Generator) -> Field:
        """Noise in cells of so many metres across and `stretch` times as many along, fading where a pixel
        is longer than a cell [h, w]."""
        x0, z0 = random.uniform(0, SIDE, 2)
        noise = noise_at(self.offset / cell + x0, self.z / (cell * stretch) + z0, roughness)
        return noise / (1 + self.deep / (cell * stretch * 2 ** (2 * roughness)))


def ground_seen(frame: Frame, camera: Camera, road: Road) -> Ground:
    """The ground in an image."""
    columns, rows = np.arange(frame.width, dtype=np.float64), np.arange(frame.height, dtype=np.float64)
    samples = camera.ground(frame, road.rise, np.linspace(0, frame.width - 1, 9), rows)[1]
    top = max(int(np.argmax((~np.isnan(samples)).any(1))) - 2, 0)
    x, z = camera.ground(frame, road.rise, columns, rows[top:])
    seen = ~np.isnan(z)
    x, z = np.where(seen, x, np.float32(0)), np.where(seen, z, np.float32(1e3))
    offset = (x - road.shift(z)).astype(np.float32)
    deep = np.abs(_change(z, 0))
    wide = np.abs(_change(offset, 1)) + np.abs(_change(offset, 0))
    return Ground(top, seen, x, z, offset, wide, deep)


def share_within(at: Field, pixel: Field, centre: float | Field, width: float) -> Field:
    """How much of each pixel, `pixel` wide around `at`, lies within a strip."""
    half, side = pixel / 2, np.float32(width / 2)
    aside = at - np.asarray(centre, np.float32)
    return (np.clip(aside + half, -side, side) - np.clip(aside - half, -side, side)) / pixel


def blend(colour: Field, cover: Field, paint: ArrayLike, shade: float | Field) -> None:
    """Lay paint [3] of a shade over a colour [3, h, w] where it covers [h, w], in place."""
    for channel, own in zip(colour, np.asarray(paint, np.float32), strict=True):
        channel += cover * (own * np.asarray(shade, np.float32) - channel)


def _change(field: Field, axis: int) -> Field:
    """The difference of neighbouring pixels along an axis, never 0."""
    change = np.diff(field, axis=axis)
    last = change[-1:] if axis == 0 else change[:, -1:]
    return np.concatenate([change, last], axis=axis) + np.float32(1e-6)
