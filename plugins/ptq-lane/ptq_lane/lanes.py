"""Lanes as every family's decoder gives them: x at fixed rows of an image."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Numbers = NDArray[np.float64]

MOST_ROWS = 72


@dataclass(frozen=True)
class Frame:
    """The images that lanes are drawn in; width, height: in pixels."""

    width: int
    height: int

    @property
    def rows(self) -> Numbers:
        """y of the rows at which lanes are given [rows], top to bottom: whole pixels, evenly spaced, 72 or
        a few more (every 10th of 720, every one of 96 or fewer)."""
        step = max(1, self.height // MOST_ROWS)
        return np.arange(0, self.height, step, dtype=np.float64)


@dataclass(frozen=True)
class Lanes:
    """The lanes of one image.

    rows: y of each row [rows], in pixels, ascending.
    x: [lanes, rows] in pixels, NaN where a lane is absent; may lie outside the image.
    slots: the identity of each lane [lanes] (anchor, query, slot of a segmentation class), the same in
        every state of one model; None where the model has none.
    """

    rows: Numbers
    x: Numbers
    slots: NDArray[np.int64] | None = None

    def __len__(self) -> int:
        return len(self.x)

    def points(self) -> list[Numbers]:
        """The points [points, 2] of each lane as (x, y), top to bottom, absent rows left out."""
        found = []
        for x in self.x:
            present = ~np.isnan(x)
            found.append(np.stack([x[present], self.rows[present]], axis=1))
        return found

    @classmethod
    def from_points(
        cls, rows: Numbers, lanes: list[Numbers], slots: NDArray[np.int64] | None = None
    ) -> "Lanes":
        """Lanes given as points (x, y) [points, 2] each, at the rows within their ends, by straight lines
        between the points; lanes that reach no row are kept, absent everywhere."""
        x = np.full((len(lanes), len(rows)), np.nan)
        for lane, points in enumerate(lanes):
            points = points[np.argsort(points[:, 1], kind="stable")]
            if len(points):
                x[lane] = np.interp(rows, points[:, 1], points[:, 0], left=np.nan, right=np.nan)
        return cls(rows, x, slots)

    def at(self, rows: Numbers) -> "Lanes":
        """The same lanes at other rows, by straight lines between neighbouring rows; absent outside."""
        return self.from_points(rows, self.points(), self.slots)
