"""The metric of the TuSimple benchmark, by the rules of its official evaluate/lane.py, quirks included."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from ptq_lane.lanes import Numbers

_NEAR = 20.0
_FOUND = 0.85
_ABSENT = -100.0
_SLOWEST = 200.0
_MOST_LANES = 4


@dataclass(frozen=True)
class Rates:
    """Of one image, or the means over images.

    accuracy: the share of the points of a labelled lane that are found.
    fp: the share of found lanes that match no label. Below 0 where two labelled lanes claim one found lane.
    fn: the share of labelled lanes that are not found.
    """

    accuracy: float
    fp: float
    fn: float


def image_rates(found: Numbers, labelled: Numbers, rows: Numbers, run_time: float = 0.0) -> Rates:
    """Compare the lanes of one image.

    A point is found if it is nearer than 20 pixels, across the direction of the labelled lane, and also
    where both are absent; a labelled lane is found if 85 % of its points are, in its best found lane. Of
    more than four labelled lanes the worst is forgiven. Nothing counts if the detector took more than
    200 ms or found more than two lanes too many.

    Args:
        found: x of each lane at each row [lanes, rows], in pixels; negative or NaN where absent.
        labelled: the same of the labels.
        rows: y of each row (`h_samples`).
        run_time: of the detector for this image, in milliseconds.

    Raises:
        ValueError: if lanes are not given at these rows.
    """
    if found.shape[1:] != rows.shape or labelled.shape[1:] != rows.shape:
        raise ValueError(f"lanes of {found.shape[1:]} and {labelled.shape[1:]} points at {len(rows)} rows")
    if run_time > _SLOWEST or len(found) > len(labelled) + 2:
        return Rates(0.0, 0.0, 1.0)
    best = np.array([_accuracy(found, lane, rows) for lane in labelled])
    matched = int(np.count_nonzero(best >= _FOUND))
    missed, total = len(best) - matched, float(best.sum())
    if len(labelled) > _MOST_LANES:
        missed = max(missed - 1, 0)
        total -= float(best.min())
    lanes = max(min(len(labelled), _MOST_LANES), 1)
    return Rates(total / lanes, (len(found) - matched) / max(len(found), 1), missed / lanes)


def mean_rates(rates: Sequence[Rates]) -> Rates:
    """The means over images; there must be one at least."""
    accuracy, fp, fn = np.mean([(rate.accuracy, rate.fp, rate.fn) for rate in rates], axis=0)
    return Rates(float(accuracy), float(fp), float(fn))


def _accuracy(found: Numbers, lane: Numbers, rows: Numbers) -> float:
    """The share of all rows at which the best of the found lanes [lanes, rows] is as labelled [rows]."""
    if not len(found):
        return 0.0
    near = np.abs(_marked(found) - _marked(lane)) < _NEAR * np.hypot(1, _slope(lane, rows))
    return float(near.mean(axis=1).max())


def _marked(x: Numbers) -> Numbers:
    return np.where(x >= 0, x, _ABSENT)


def _slope(lane: Numbers, rows: Numbers) -> float:
    """dx/dy of the straight line through the points of a lane with the least squares."""
    present = lane >= 0
    if np.count_nonzero(present) < 2:
        return 0.0
    x, y = lane[present], rows[present] - rows[present].mean()
    return float(x @ y / (y @ y))
