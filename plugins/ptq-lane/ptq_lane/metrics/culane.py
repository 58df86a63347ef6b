"""The metric of the CULane benchmark, by the rules of its official program (XingangPan/SCNN).

Lanes are drawn as bands; a found and a labelled lane agree if the intersection of their bands over the
union is above a threshold.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import cv2
import numpy as np
from numpy.typing import NDArray
from scipy.linalg import solve_banded
from scipy.optimize import linear_sum_assignment

from ptq_lane.lanes import Frame, Numbers

THRESHOLDS = (0.3, 0.5, 0.75)
CROSS = "cross"
TOTAL = "total"

_STEPS = 50
_FARTHEST = 1e6


@dataclass(frozen=True)
class Counts:
    """Lanes found and labelled (tp), found only (fp) and labelled only (fn). A share of nothing is 1."""

    tp: int = 0
    fp: int = 0
    fn: int = 0

    def __add__(self, other: "Counts") -> "Counts":
        return Counts(self.tp + other.tp, self.fp + other.fp, self.fn + other.fn)

    @property
    def precision(self) -> float:
        return _share(self.tp, self.tp + self.fp)

    @property
    def recall(self) -> float:
        return _share(self.tp, self.tp + self.fn)

    @property
    def f1(self) -> float:
        return _share(2 * self.tp, 2 * self.tp + self.fp + self.fn)


@dataclass(frozen=True)
class Band:
    """A lane as it is drawn: the pixels [h, w] of the part of the frame that begins at left, top."""

    pixels: NDArray[np.bool_]
    left: int = 0
    top: int = 0


def count(
    found: Sequence[Numbers], labelled: Sequence[Numbers], frame: Frame, thresholds: Iterable[float]
) -> dict[float, Counts]:
    """Compare the lanes of one image.

    Args:
        found, labelled: the points [points, 2] of each lane as (x, y), in order along the lane.
        frame: the image that the lanes are drawn in.
        thresholds: intersections over union that a pair must exceed.

    Returns:
        the counts for each threshold.
    """
    return match(draw(found, frame), draw(labelled, frame), thresholds)


def match(
    found: Sequence[Band], labelled: Sequence[Band], thresholds: Iterable[float]
) -> dict[float, Counts]:
    """The same for lanes that are drawn already: each is paired with one other at most, such that the
    intersections over union of all pairs sum up to the most."""
    both = np.array([_shared(left, right) for left in found for right in labelled], dtype=np.float64)
    both = both.reshape(len(found), len(labelled))
    either = np.add.outer(_areas(found), _areas(labelled)) - both
    overlaps = both / np.maximum(either, 1)
    paired = overlaps[linear_sum_assignment(overlaps, maximize=True)]
    hits = {threshold: int(np.count_nonzero(paired > threshold)) for threshold in thresholds}
    return {threshold: Counts(tp, len(found) - tp, len(labelled) - tp) for threshold, tp in hits.items()}


def draw(lanes: Sequence[Numbers], frame: Frame) -> list[Band]:
    """The bands of lanes given by their points [points, 2]; lanes of fewer than two points are empty."""
    return [_band(points, frame) for points in lanes]


def line_width(frame: Frame) -> int:
    """How wide lanes are drawn: 30 pixels in images 1640 wide, and in proportion in others."""
    return max(1, round(30 * frame.width / 1640))


def by_category(counts: Iterable[tuple[str, Counts]]) -> dict[str, Counts]:
    """The counts of each category, sorted by name, and last of all `total`, their sum.

    The category `cross` (crossroads) is made of images without labelled lanes, so that of it only `fp` says
    something.
    """
    sums: dict[str, Counts] = {}
    for category, found in counts:
        sums[category] = sums.get(category, Counts()) + found
    return {**dict(sorted(sums.items())), TOTAL: sum(sums.values(), Counts())}


def _share(part: int, whole: int) -> float:
    return part / whole if whole else 1.0


def _band(points: Numbers, frame: Frame) -> Band:
    points = _distinct(np.clip(points, -_FARTHEST, _FARTHEST))
    if len(points) < 2:
        return Band(np.zeros((0, 0), dtype=bool))
    # Points are rounded as cv::Point does it with a Point2f; a single one is still drawn, as a dot.
    pixels = np.rint(_spline(points).astype(np.float32)).astype(np.int32)
    pixels = np.append(_distinct(pixels), pixels[-1:], axis=0)
    width = line_width(frame)
    # The part that holds all of the band, so that it looks the same as drawn in the whole frame.
    first = np.clip(pixels.min(axis=0) - width, 0, (frame.width, frame.height))
    last = np.clip(pixels.max(axis=0) + width + 1, 0, (frame.width, frame.height))
    left, top = int(first[0]), int(first[1])
    canvas = np.zeros((int(last[1]) - top, int(last[0]) - left), dtype=np.uint8)
    if canvas.size:
        cv2.polylines(canvas, [pixels - np.array([left, top], dtype=np.int32)], False, (1,), width)
    return Band(canvas.view(np.bool_), left, top)


def _distinct(points: Numbers | NDArray[np.int32]) -> NDArray:
    """The points without those that repeat the one before."""
    moved = np.any(points[1:] != points[:-1], axis=1)
    return np.concatenate([points[:1], points[1:][moved]])


def _spline(points: Numbers) -> Numbers:
    """The natural cubic spline through points [n, 2], over the length of the straight lines between them,
    with 50 steps from each point to the next; two points are joined straight."""
    if len(points) == 2:
        return points
    chords = np.diff(points, axis=0)
    lengths = np.hypot(chords[:, 0], chords[:, 1])[:, None]
    slopes = chords / lengths
    bends = np.zeros_like(points)
    """The second derivative at each point; none at the ends."""
    matrix = np.zeros((3, len(points) - 2))
    matrix[0, 1:] = matrix[2, :-1] = lengths[1:-1, 0]
    matrix[1] = 2 * (lengths[:-1, 0] + lengths[1:, 0])
    bends[1:-1] = solve_banded((1, 1), matrix, 6 * np.diff(slopes, axis=0))
    start = slopes - lengths * (2 * bends[:-1] + bends[1:]) / 6
    twist = np.diff(bends, axis=0) / (6 * lengths)
    t = (lengths * (np.arange(_STEPS) / _STEPS))[..., None]
    curve = points[:-1, None] + t * (start[:, None] + t * (bends[:-1, None] / 2 + t * twist[:, None]))
    return np.concatenate([curve.reshape(-1, 2), points[-1:]])


def _areas(bands: Sequence[Band]) -> Numbers:
    return np.array([np.count_nonzero(band.pixels) for band in bands], dtype=np.float64)


def _shared(left: Band, right: Band) -> int:
    """The number of pixels that two bands share."""
    return int(np.count_nonzero(_common(left, right) & _common(right, left)))


def _common(band: Band, other: Band) -> NDArray[np.bool_]:
    """The pixels of a band within the part of the frame that both cover."""
    rows = _span(band.top, band.pixels.shape[0], other.top, other.pixels.shape[0])
    columns = _span(band.left, band.pixels.shape[1], other.left, other.pixels.shape[1])
    return band.pixels[rows, columns]


def _span(first: int, size: int, other_first: int, other_size: int) -> slice:
    start = max(first, other_first)
    stop = max(start, min(first + size, other_first + other_size))
    return slice(start - first, stop - first)
