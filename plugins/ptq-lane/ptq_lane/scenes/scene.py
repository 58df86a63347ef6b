"""Road scenes by number: each a pure function of the seed, the series, the number and the size."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import overload

import numpy as np
from numpy.typing import NDArray

from ptq_lane.lanes import Frame, Lanes
from ptq_lane.scenes.camera import random_camera
from ptq_lane.scenes.picture import picture
from ptq_lane.scenes.road import lanes_of, random_road
from ptq_lane.scenes.weather import random_weather

CATEGORIES = {"normal": 0.3, "curve": 0.16, "shadow": 0.14, "night": 0.14, "dazzle": 0.1, "crowd": 0.16}


@dataclass(frozen=True)
class Scene:
    """A picture of a road.

    image: [height, width, 3], red, green, blue.
    lanes: every line around the car at the rows of the frame, in pixels (whole numbers are the centres of
        pixels); slots 0 to 3 are the second left, left, right and second right line. A line runs through
        its gaps and behind vehicles, up to 55 m ahead, the crest of the road or the border of the image.
    category: normal, curve, shadow, night, dazzle or crowd.
    """

    image: NDArray[np.uint8]
    lanes: Lanes
    category: str


class Scenes(Sequence[Scene]):
    """Scenes, drawn when asked for.

    The same seed, series, number and size give the same scene. Another size shows the same view, scaled
    across and down.

    Args:
        count: how many.
        seed: of everything random.
        series: scenes of different series have nothing in common.
        width: of each, in pixels.
        height: of each, in pixels.
    """

    def __init__(self, count: int, seed: int, series: int = 0, width: int = 192, height: int = 96) -> None:
        self._count, self._key = count, (seed, series)
        self.frame = Frame(width, height)

    def __len__(self) -> int:
        return self._count

    @overload
    def __getitem__(self, index: int) -> Scene: ...
    @overload
    def __getitem__(self, index: slice) -> list[Scene]: ...
    def __getitem__(self, index: int | slice) -> Scene | list[Scene]:
        if isinstance(index, slice):
            return [self[number] for number in range(*index.indices(self._count))]
        if not -self._count <= index < self._count:
            raise IndexError(f"scene {index} of {self._count}")
        random = np.random.default_rng([*self._key, index % self._count])
        category = str(random.choice(list(CATEGORIES), p=list(CATEGORIES.values())))
        camera, road = random_camera(random), random_road(random, curved=category == "curve")
        weather = random_weather(random, category)
        image = picture(self.frame, camera, road, weather, random)
        return Scene(image, lanes_of(self.frame, camera, road), category)
