"""The label files of TuSimple: a JSON object a line, with `raw_file`, `lanes` and `h_samples`."""

import gzip
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np

from ptq_lane.lanes import Numbers
from ptqcore import DataError, parse_json

ENDINGS = (".json", ".json.gz")

_LONGEST = 2**20  # bytes of a label
_ROOM = 2**26  # bytes of labels that nobody is refused
_MOST_COMPRESSED = 64
_FARTHEST = 1e9  # pixels

_KEYS = ("raw_file", "lanes", "h_samples")


@dataclass(frozen=True)
class TuSimpleLabel:
    """The labelled lanes of one image.

    file: the picture, as a path below the data set.
    x: of each lane at each row [lanes, rows] in pixels, negative where it is absent.
    rows: y of each row, `h_samples`.
    """

    file: str
    x: Numbers
    rows: Numbers

    def points(self) -> list[Numbers]:
        """The points [points, 2] of each lane as (x, y); lanes without points are no lanes."""
        lanes = [np.stack([x[x >= 0], self.rows[x >= 0]], axis=1) for x in self.x]
        return [lane for lane in lanes if len(lane)]


def read_tusimple(path: Path, label: str) -> list[TuSimpleLabel]:
    """The labels of a file, which may be compressed by gzip.

    Raises:
        DataError: beginning with the label and naming the line, if a line is no label, or an image has two.
    """
    labels: dict[str, TuSimpleLabel] = {}
    for number, line in _lines(path, label):
        found = _parse(line, f"{label}, line {number}")
        if found.file in labels:
            raise DataError(f"{label}, line {number}: picture {found.file!r} has a label already: keep one")
        labels[found.file] = found
    return list(labels.values())


def _lines(path: Path, label: str) -> Iterator[tuple[int, str]]:
    """The lines of a file that are not blank, with their numbers."""
    opened = gzip.open if path.suffix == ".gz" else open
    left = max(_ROOM, _MOST_COMPRESSED * path.stat().st_size)
    try:
        with opened(path, "rb") as stream:
            for number in count(1):
                line = stream.readline(_LONGEST + 1)
                left -= len(line)
                if not line:
                    return
                if len(line) > _LONGEST or left < 0:
                    raise ValueError(f"line {number} is longer than any label, or the file than labels are")
                if line.strip():
                    yield number, line.decode("utf-8")
    except (OSError, EOFError, ValueError, zlib.error) as error:
        raise DataError(f"{label} cannot be read: {error}") from error


def _parse(line: str, place: str) -> TuSimpleLabel:
    try:
        content = parse_json(line)
    except ValueError:
        content = None
    if not isinstance(content, dict):
        raise DataError(f"{place} is no JSON object: each line needs one, with {', '.join(_KEYS)}")
    for key in _KEYS:
        if key not in content:
            raise DataError(f"{place} has no {key!r}: a label of TuSimple has {', '.join(_KEYS)}")
    file, lanes, rows = (content[key] for key in _KEYS)
    if not isinstance(file, str) or not isinstance(lanes, list):
        raise DataError(f"{place}: 'raw_file' must be a path, and 'lanes' a list of lists of x")
    rows = _numbers(rows, f"{place}: 'h_samples'")
    x = [_numbers(lane, f"{place}: lane {order}") for order, lane in enumerate(lanes, start=1)]
    for order, lane in enumerate(x, start=1):
        if len(lane) != len(rows):
            raise DataError(
                f"{place}: lane {order} has {len(lane)} points, but 'h_samples' has {len(rows)} rows: give "
                "an x for each row, -2 where the lane is absent"
            )
    return TuSimpleLabel(file, np.array(x).reshape(len(x), len(rows)), rows)


def _numbers(values: Any, place: str) -> Numbers:
    plain = isinstance(values, list) and all(type(value) in (int, float) for value in values)
    if not plain or not all(abs(value) < _FARTHEST for value in values):
        raise DataError(f"{place} must be a list of numbers in pixels")
    return np.array(values, dtype=np.float64)
