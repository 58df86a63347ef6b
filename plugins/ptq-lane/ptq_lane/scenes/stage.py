"""The picture while things that stand on the ground are painted into it, far ones first."""

from collections.abc import Callable
from dataclasses import dataclass

import cv2
import numpy as np
from numpy.typing import ArrayLike, NDArray

from ptq_lane.lanes import Frame
from ptq_lane.scenes.camera import Camera
from ptq_lane.scenes.lighting import add_glow, night_light
from ptq_lane.scenes.noise import Field
from ptq_lane.scenes.road import Road
from ptq_lane.scenes.weather import Weather

_SUBPIXELS = 4
_FARTHEST_CORNER = 20_000


@dataclass(frozen=True)
class Stage:
    """A picture [h, w, 3] of light, and what is needed to place and light things in it.

    air: the colour of the air far ahead [3].
    """

    image: NDArray[np.float32]
    frame: Frame
    camera: Camera
    road: Road
    weather: Weather
    air: Field

    def place(self, offset: ArrayLike, up: ArrayLike, z: ArrayLike) -> Field:
        """Where points at an offset along the road, above it and ahead appear [..., 2], in pixels."""
        offset, up, z = (np.asarray(part, np.float64) for part in (offset, up, z))
        return self.road.place(self.frame, self.camera, offset, up, z)

    def lit(self, colour: ArrayLike, offset: float, z: float) -> Field:
        """The light [3] from a thing of a colour [3] at a place, through the haze."""
        light = self.weather.light * np.array(self.weather.tint)
        if self.weather.night:
            light = light + 0.7 * night_light(self.road, np.array(offset), np.array(z))
        hidden = 1 - np.exp(-self.weather.haze * z)
        return np.asarray(colour) * light * (1 - hidden) + hidden * self.air

    def fill(self, corners: Field, light: Field) -> None:
        """Fill a convex shape with corners [n, 2] in pixels."""
        cv2.fillConvexPoly(self.image, _fixed(corners), light.tolist(), shift=_SUBPIXELS)

    def dim(self, corners: Field, left: float) -> None:
        """Leave only so much of the light within a convex shape [n, 2] in pixels."""
        low = np.clip(np.floor(corners.min(0)), 0, None).astype(int)
        high = np.clip(np.ceil(corners.max(0)).astype(int) + 1, 0, None)
        part = self.image[low[1] : high[1], low[0] : high[0]]
        if part.size:
            kept = np.ones(part.shape[:2], dtype=np.float32)
            cv2.fillConvexPoly(kept, _fixed(corners - low), (left,), shift=_SUBPIXELS)
            part *= kept[..., None]

    def disc(self, centre: Field, radius: float, light: Field) -> None:
        """Fill a disc around a point [2], in pixels."""
        x, y = _fixed(centre).tolist()
        cv2.circle(self.image, (x, y), int(radius * 2**_SUBPIXELS), light.tolist(), -1, shift=_SUBPIXELS)

    def glow(self, at: Field, reach: float, light: Field) -> None:
        """Add a light [3] that blinds at a point [2] in pixels; reach: in heights of the image."""
        add_glow(self.image, float(at[0]), float(at[1]), reach * self.frame.height, light)


Paint = Callable[[Stage], None]


def _fixed(points: Field) -> NDArray[np.int32]:
    return np.round(points.clip(-_FARTHEST_CORNER, _FARTHEST_CORNER) * 2**_SUBPIXELS).astype(np.int32)
