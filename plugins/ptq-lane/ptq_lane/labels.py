"""Labelled lanes of images, in the formats of CULane and TuSimple."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ptq_lane.frames import Frames
from ptq_lane.lanes import Frame, Numbers
from ptq_lane.lines_txt import ENDING, read_lines_txt
from ptq_lane.pairing import pair_paths, without_ending
from ptq_lane.tusimple_json import ENDINGS, read_tusimple
from ptqcore import DataError, read_bytes

_SPLITS = "list/test_split"


@dataclass(frozen=True)
class Label:
    """The labelled lanes of one image.

    lanes: the points [points, 2] of each as (x, y) in pixels.
    x, rows: for labels of TuSimple, as they stand in the file: x of each lane at each row [lanes, rows],
        negative where it is absent, and y of each row (`h_samples`).
    """

    lanes: Sequence[Numbers]
    x: Numbers | None = None
    rows: Numbers | None = None


@dataclass(frozen=True)
class Labels:
    """What is known of images, each in their order.

    lanes: None where an image has no label; an image without any lane has a label without lanes.
    categories: of CULane (normal, crowd, ...); None where it is not known.
    """

    lanes: Sequence[Label | None]
    categories: Sequence[str | None]


def read_labels(source: str, frames: Frames, key: str) -> Labels:
    """The labels of images, found by the path of the picture.

    Args:
        source: a folder with a `.lines.txt` of CULane for each picture (categories are read from
            `list/test_split` in it or beside it), or a label file of TuSimple (.json or .json.gz).
        frames: the images.
        key: the recipe key that names the source, for errors.

    Raises:
        DataError: if no label belongs to any of the images, one is malformed, or they are labels of images
            of another size.
    """
    path, label = Path(source).expanduser(), f"{key} {source!r}"
    if path.is_dir():
        labels = Labels(_lines_folder(path, frames, label), _categories(path, frames, label))
    elif path.is_file() and path.name.endswith(ENDINGS):
        labels = Labels(_tusimple(path, frames, label), [None] * len(frames))
    elif path.is_file():
        raise DataError(f"{label} ends neither in .json nor in .json.gz: give a label file of TuSimple")
    else:
        raise DataError(
            f"{label} does not exist: give a folder of {ENDING} files, or a label file of TuSimple (.json)"
        )
    _check_size(labels.lanes, frames, label)
    return labels


def _lines_folder(folder: Path, frames: Frames, label: str) -> list[Label | None]:
    files = sorted(file for file in folder.rglob(f"*{ENDING}") if not file.name.startswith("."))
    if not files:
        raise DataError(f"{label} holds no label: it needs files ending in {ENDING}")
    names = [file.relative_to(folder).as_posix().removesuffix(ENDING) for file in files]
    places = _paired(names, frames, label)
    return [None if place is None else Label(read_lines_txt(files[place], label)) for place in places]


def _tusimple(file: Path, frames: Frames, label: str) -> list[Label | None]:
    found = read_tusimple(file, label)
    if not found:
        raise DataError(f"{label} is empty: it needs a JSON object for each picture, one a line")
    labels = [Label(one.points(), one.x, one.rows) for one in found]
    places = _paired([without_ending(one.file) for one in found], frames, label)
    return [None if place is None else labels[place] for place in places]


def _paired(files: Sequence[str], frames: Frames, label: str) -> list[int | None]:
    places = _pair(files, frames, label)
    if all(place is None for place in places):
        raise DataError(
            f"{label} has labels for none of the {len(frames)} images: the first image is "
            f"{frames.names[0]!r} and the first label that of {files[0]!r}, their paths must be the same"
        )
    return places


def _categories(folder: Path, frames: Frames, label: str) -> list[str | None]:
    known: dict[str, str] = {}
    for root in (folder, folder.parent):
        for file in sorted((root / _SPLITS).glob("*.txt")):
            category = re.sub(r"^test\d+_", "", file.stem)
            try:
                lines = read_bytes(file).decode("utf-8", errors="replace").splitlines()
            except (OSError, ValueError) as error:
                raise DataError(f"{label}: {file.name!r} cannot be read: {error}") from error
            known.update((without_ending(line.split()[0]), category) for line in lines if line.strip())
        if known:
            break
    files = list(known)
    return [None if place is None else known[files[place]] for place in _pair(files, frames, label)]


def _pair(files: Sequence[str], frames: Frames, label: str) -> list[int | None]:
    return pair_paths([without_ending(name) for name in frames.names], files, label)


def _check_size(labels: Sequence[Label | None], frames: Frames, label: str) -> None:
    """Make sure that lanes lie in the images; the ends of labels may lie somewhat outside."""
    frame = frames.frame
    farthest = np.zeros(2)
    for name, one in zip(frames.names, labels, strict=True):
        for points in one.lanes if one else ():
            outside = _outside(points, frame)
            if len(outside):
                x, y = outside[0]
                raise DataError(
                    f"{label}: a lane of {name!r} passes ({x:g}, {y:g}), far outside the image of "
                    f"{frame.width}x{frame.height}: give the labels of images of this size"
                )
            farthest = np.maximum(farthest, points.max(axis=0, initial=0))
    if farthest.any() and (farthest < (frame.width / 2, frame.height / 2)).all():
        raise DataError(
            f"{label}: all lanes lie in the upper left quarter of the images of {frame.width}x"
            f"{frame.height}: give the labels of images of this size"
        )


def _outside(points: Numbers, frame: Frame) -> Numbers:
    x, y = points[:, 0] / frame.width, points[:, 1] / frame.height
    return points[(x < -2) | (x > 3) | (y < -0.1) | (y > 1.1)]
