"""Lane Distortion Score: how far the lanes of a quantized model lie from those of the model itself.

After Fan et al., "Selective Focus" (AAAI 2024), who name a distance between lane points plus a penalty for
points that only one side has; the formula is ours.
"""

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import linear_sum_assignment

from ptq_lane.lanes import Frame, Lanes, Numbers

Indices = NDArray[np.int64]


def default_cap(frame: Frame) -> float:
    """The distance in pixels from which a point counts as lost: 50 in images 1640 wide."""
    return 50 * frame.width / 1640


def lane_distortion(reference: Lanes, found: Lanes, cap: float) -> float:
    """The mean distance of two sets of lanes, over the rows in which either has a lane.

    A row of a pair of lanes costs the distance of its two points, at most `cap`, and `cap` where only one
    of them is present; so does every row of a lane without partner. Lanes of the same slot are partners;
    the others find theirs by the smallest total of mean distances (Hungarian method), for a lane that has
    moved on to the next anchor has not moved in the image.

    Args:
        reference, found: lanes of one image at the same rows.
        cap: the most that a row costs, in pixels.

    Returns:
        pixels, 0 (the same lanes, or none on either side) to `cap` (nothing in common).
    """
    if not np.array_equal(reference.rows, found.rows):
        raise ValueError("the two sets of lanes are given at different rows")
    cost, rows = _pairs(reference.x, found.x, cap)
    left, right = _partners(reference, found, cost / np.maximum(rows, 1))
    alone = _present(np.delete(reference.x, left, axis=0)) + _present(np.delete(found.x, right, axis=0))
    total = rows[left, right].sum() + alone
    return float((cost[left, right].sum() + cap * alone) / total) if total else 0.0


def _pairs(left: Numbers, right: Numbers, cap: float) -> tuple[Numbers, Indices]:
    """Of every pair of lanes [left, right]: the sum of the costs of its rows, and the number of rows in
    which either is present."""
    distance = np.abs(left[:, None] - right[None])
    both = ~np.isnan(distance)
    either = ~(np.isnan(left)[:, None] & np.isnan(right)[None])
    cost = np.where(both, np.minimum(distance, cap), cap * either)
    return cost.sum(axis=2), either.sum(axis=2)


def _partners(reference: Lanes, found: Lanes, distance: Numbers) -> tuple[Indices, Indices]:
    """The places of partners on both sides: those of one slot, then what is left by its distances."""
    left = right = np.zeros(0, np.int64)
    if reference.slots is not None and found.slots is not None:
        _, left, right = np.intersect1d(
            reference.slots, found.slots, assume_unique=True, return_indices=True
        )
    others = np.setdiff1d(np.arange(len(reference)), left), np.setdiff1d(np.arange(len(found)), right)
    more = _assigned(reference.x[others[0]], found.x[others[1]], distance[np.ix_(*others)])
    return np.append(left, others[0][more[0]]), np.append(right, others[1][more[1]])


def _assigned(left: Numbers, right: Numbers, distance: Numbers) -> tuple[Indices, Indices]:
    # Equal totals may pair differently by the order of the sides; a fixed order keeps the score symmetric.
    if left.tobytes() > right.tobytes():
        return linear_sum_assignment(distance.T)[::-1]
    return linear_sum_assignment(distance)


def _present(x: Numbers) -> int:
    return int(np.count_nonzero(~np.isnan(x)))
