"""The pair of lines that the car drives between."""

from collections.abc import Sequence

import numpy as np

from ptq_lane.lanes import Frame, Numbers


def ego_pair(lanes: Sequence[Numbers], frame: Frame) -> list[int]:
    """Which lanes are nearest to the middle of the image at its bottom, one on each side.

    Lanes that end above the bottom go on in the direction of their lower half.

    Args:
        lanes: the points [points, 2] of each lane as (x, y), in any order; lanes of fewer than two points
            are passed over.
        frame: the image.

    Returns:
        the places of the left and the right line in `lanes`, as far as there are any.
    """
    offsets = np.array([_bottom(points, frame) - frame.width / 2 for points in lanes])
    pair = []
    for side in (np.flatnonzero(offsets < 0), np.flatnonzero(offsets >= 0)):
        if len(side):
            pair.append(int(side[np.argmin(np.abs(offsets[side]))]))
    return pair


def _bottom(points: Numbers, frame: Frame) -> float:
    """x at the bottom of the image; NaN for no line."""
    if len(points) < 2:
        return float("nan")
    points = points[np.argsort(points[:, 1], kind="stable")]
    x, y = points[min(len(points) // 2, len(points) - 2) :].T
    spread = y - y.mean()
    slope = x @ spread / max(spread @ spread, 1e-9)
    return float(x[-1] + slope * (frame.height - y[-1]))
