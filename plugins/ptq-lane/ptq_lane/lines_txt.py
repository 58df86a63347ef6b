"""The files `.lines.txt` of CULane: a lane a line, as `x y x y ...` in pixels, from the bottom up."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from ptq_lane.lanes import Numbers
from ptqcore import DataError, read_bytes, write_text

ENDING = ".lines.txt"
_MOST_BYTES = 2**20


def read_lines_txt(path: Path, label: str) -> list[Numbers]:
    """The points [points, 2] of each lane as (x, y), in the order of the file; empty lines are no lanes.

    Raises:
        DataError: beginning with the label and naming the line, if a line is not made of pairs of numbers.
    """
    try:
        lines = read_bytes(path, _MOST_BYTES).decode("utf-8").splitlines()
    except (OSError, ValueError) as error:
        raise DataError(f"{label}: {path.name!r} cannot be read: {error}") from error
    return [_points(line, f"{label}: {path.name!r}, line {number}") for number, line in _filled(lines)]


def write_lines_txt(lanes: Sequence[Numbers], path: Path) -> None:
    """Write the lanes of one image, each by its points [points, 2], for the official program of CULane.

    Lanes without points are left out, since that program would count them.
    """
    ordered = [points[np.argsort(-points[:, 1], kind="stable")] for points in lanes if len(points)]
    write_text(path, "".join(" ".join(f"{value:.6g}" for value in lane.ravel()) + "\n" for lane in ordered))


def _filled(lines: Sequence[str]) -> list[tuple[int, str]]:
    return [(number, line) for number, line in enumerate(lines, start=1) if line.strip()]


def _points(line: str, place: str) -> Numbers:
    try:
        values = np.array([float(word) for word in line.split()])
    except ValueError as error:
        raise DataError(f"{place}: {error}: a lane is a line of numbers, x y x y ...") from None
    if len(values) % 2 or not np.isfinite(values).all():
        fault = "holds a value that is not finite" if len(values) % 2 == 0 else f"has {len(values)} numbers"
        raise DataError(f"{place} {fault}: a lane needs an x and a y for each point, x y x y ...")
    return values.reshape(-1, 2)
