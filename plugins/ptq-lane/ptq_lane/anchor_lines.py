"""Anchors: straight lines that start at a border of the image, which lanes are described against.

As in LaneATT (Tabelini et al., CVPR 2021, section 3.1).
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ptq_lane.lanes import Numbers

# Shares of the width and the height: where anchors start, and what they lead to.
_BOTTOM = (0.04, 0.1, 0.16, 0.22, 0.28, 0.34)
_SIDE = (0.58, 0.64, 0.7, 0.76, 0.84)
_AIMS = (0.42, 0.5, 0.58)
_HORIZON = 0.4


@dataclass(frozen=True)
class AnchorLines:
    """Straight lines in the images that a network sees.

    width, height: of those images, in pixels.
    starts: (x, y) where each line starts [anchors, 2], in pixels.
    angles: of each line [anchors], in degrees from the x axis, counter-clockwise: 90 is straight up.
    count: the number of rows in which lanes are described, evenly spaced from the bottom row of the image
        to the top row.
    """

    width: int
    height: int
    starts: Numbers
    angles: Numbers
    count: int

    def __len__(self) -> int:
        return len(self.starts)

    @property
    def step(self) -> float:
        """Pixels from one row to the next."""
        return (self.height - 1) / (self.count - 1)

    @property
    def rows(self) -> Numbers:
        """y of each row [rows], in pixels, bottom to top."""
        return self.height - 1 - self.step * np.arange(self.count, dtype=np.float64)

    @property
    def first(self) -> NDArray[np.int64]:
        """The index of the row nearest to each start [anchors]."""
        return np.round((self.height - 1 - self.starts[:, 1]) / self.step).astype(np.int64)

    def x(self, y: Numbers) -> Numbers:
        """x of each line [anchors, heights] where it has the heights y [heights], in pixels; may lie
        outside the image."""
        slope = 1 / np.tan(np.radians(self.angles))
        return self.starts[:, :1] + (self.starts[:, 1:] - y) * slope[:, None]


def road_anchors(width: int = 192, height: int = 96, count: int = 32) -> AnchorLines:
    """66 anchors for the view from a car: from 22 places of the left, right and bottom border, each towards
    three points beside the middle of the horizon."""
    left = [(x, 1.0) for x in _BOTTOM] + [(0.0, y) for y in _SIDE]
    right = [(1 - x, y) for x, y in left]
    starts = np.repeat(left + right, len(_AIMS), axis=0) * (width - 1, height - 1)
    aims = np.tile(_AIMS, len(left + right)) * (width - 1)
    rise = starts[:, 1] - _HORIZON * (height - 1)
    return AnchorLines(width, height, starts, np.degrees(np.arctan2(rise, aims - starts[:, 0])), count)
