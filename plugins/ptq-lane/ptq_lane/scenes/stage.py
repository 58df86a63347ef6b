"""The picture while things that stand on the ground are painted into it, far ones first."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property

import cv2
import numpy as np
from numpy.typing import NDArray

from ptq_lane.lanes import Frame
from ptq_lane.scenes.camera import Camera
from ptq_lane.scenes.noise import Field
from ptq_lane.scenes.road import Road
from ptq_lane.scenes.weather import Weather, headlight

Colour = Sequence[float] | Field

_SUBPIXELS = 4


@dataclass(frozen=True)
class Glow:
    """A light that blinds: where it is and how far it reaches, in heights of the image, and its light."""

    x: float
    y: float
    reach: float
    light: tuple[float, float, float]


@dataclass
class Stage:
    """A picture [h, w, 3] of light, and what is needed to place and light things in it.

    far: the colour of the air far ahead.
    glows: lights to be added when the picture is complete.
    """

    image: NDArray[np.float32]
    frame: Frame
    camera: Camera
    road: Road
    weather: Weather
    far: Field
    glows: list[Glow] = field(default_factory=list)

    @cached_property
    def _bound(self) -> float:
        return 4.0 * max(self.frame.width, self.frame.height)

    def place(self, offset: Field, up: Field, z: Field) -> Field:
        """Where points appear [..., 2], in pixels."""
        return self.road.place(self.frame, self.camera, offset, up, z)

    def lit(self, colour: Colour, offset: float, z: float) -> Field:
        """The light from a thing of a colour [3] at a place, through the haze."""
        weather = self.weather
        light = weather.light * np.array(weather.tint)
        if weather.night:
            light = light + 0.8 * headlight(np.float64(offset), np.float64(z))
        hidden = 1 - np.exp(-weather.haze * z)
        return np.asarray(colour) * light * (1 - hidden) + hidden * self.far

    def fill(self, corners: Field, light: Field) -> None:
        """Fill a convex shape with corners [n, 2] in pixels."""
        cv2.fillConvexPoly(self.image, self._fixed(corners), light.tolist(), shift=_SUBPIXELS)

    def dim(self, corners: Field, left: float) -> None:
        """Leave only so much of the light within a convex shape [n, 2]."""
        low = np.clip(np.floor(corners.min(0)), 0, None).astype(int)
        high = np.ceil(corners.max(0)).astype(int) + 1
        part = self.image[low[1] : max(high[1], 0), low[0] : max(high[0], 0)]
        if part.size:
            mask = np.ones(part.shape[:2], dtype=np.float32)
            cv2.fillConvexPoly(mask, self._fixed(corners - low), left, shift=_SUBPIXELS)
            part *= mask[..., None]

    def disc(self, centre: Field, radius: float, light: Field) -> None:
        """Fill a disc around a point [2]; radius in pixels."""
        if radius >= 0.5 and np.abs(centre).max() < self._bound:
            at = (int(round(centre[0] * 16)), int(round(centre[1] * 16)))
            cv2.circle(self.image, at, int(radius * 16), light.tolist(), -1, shift=_SUBPIXELS)

    def glow(self, at: Field, reach: float, light: Colour) -> None:
        """Remember a light at a point [2] in pixels; reach in heights of the image."""
        x, y = (np.asarray(at, dtype=np.float64) + 0.5) / self.frame.height
        red, green, blue = (float(part) for part in light)
        self.glows.append(Glow(float(x), float(y), reach, (red, green, blue)))

    def _fixed(self, corners: Field) -> NDArray[np.int32]:
        return np.round(corners.clip(-self._bound, self._bound) * 2**_SUBPIXELS).astype(np.int32)


def add_glow(image: NDArray[np.float32], glow: Glow) -> None:
    """Add a light to a picture [h, w, 3], brightest at its middle, in place."""
    height, width = image.shape[:2]
    span = 5 * glow.reach * height
    x, y = glow.x * height - 0.5, glow.y * height - 0.5
    left, right = max(int(x - span), 0), min(int(x + span) + 2, width)
    top, bottom = max(int(y - span), 0), min(int(y + span) + 2, height)
    if left >= right or top >= bottom:
        return
    columns = np.arange(left, right, dtype=np.float32) - np.float32(x)
    rows = np.arange(top, bottom, dtype=np.float32)[:, None] - np.float32(y)
    distance = np.sqrt(columns * columns + rows * rows) / np.float32(glow.reach * height)
    halo = np.maximum(np.exp(-distance) - np.float32(np.exp(-5)), 0)
    image[top:bottom, left:right] += halo[..., None] * np.array(glow.light, dtype=np.float32)
