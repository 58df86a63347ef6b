"""What is on the pictures: a class for each, from a table or from folders, or a map of classes."""

import csv
from collections.abc import Callable
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ptq_vision.images import ImageSet, open_picture
from ptqcore import DataError

FOLDERS = "folders"
_KEY = "task.labels"
_MOST_DIGITS = 19


def classes_of(images: ImageSet, option: str | None) -> NDArray[np.int64] | None:
    """The class of each picture [n]; None if nothing says it.

    Args:
        images: the pictures.
        option: a CSV file of files and classes; `folders`: every folder of pictures is a class, whose
            number is its name, or its place in alphabetical order; None: what came with the pictures.

    Raises:
        DataError: if a label or a picture is missing, or a label is no number.
    """
    if option == FOLDERS:
        return _from_folders(images)
    if option is not None:
        return _from_table(images, option)
    if images.labels is None:
        return None
    if images.labels.ndim != 1:
        raise DataError(
            f"task.images: its 'labels' have {images.labels.ndim} dimensions, classes have one: "
            "label maps are for the task segmentation"
        )
    return images.labels.astype(np.int64)


def check_range(labels: NDArray[Any], classes: int, names: Callable[[int], str]) -> None:
    """Make sure that the classes [n] exist.

    Args:
        labels: the class of each picture.
        classes: how many the model has.
        names: the name of picture number i.

    Raises:
        DataError: naming the first picture whose class does not exist.
    """
    wrong = np.flatnonzero((labels < 0) | (labels >= classes))
    if len(wrong):
        first = int(wrong[0])
        raise DataError(
            f"{_KEY}: picture {names(first)!r} is of class {int(labels[first])}, but the model has the "
            f"classes 0 to {classes - 1}: give the labels that it was trained with"
        )


def maps_of(images: ImageSet, option: str | None) -> Callable[[int], NDArray[np.int64]] | None:
    """What reads the label map [h, w] of picture i; None if there are no maps.

    Args:
        images: the pictures.
        option: a folder with a PNG of class numbers for each picture, of the same name but for the
            ending; None: what came with the pictures.

    Raises:
        DataError: if a map is missing.
    """
    if option is not None:
        return _map_files(images, option)
    maps = images.labels
    if maps is None:
        return None
    if maps.ndim != 3:
        raise DataError(
            f"task.images: its 'labels' have {maps.ndim} dimensions, label maps are [n, height, width]"
        )
    return lambda index: maps[index].astype(np.int64)


def _map_files(images: ImageSet, option: str) -> Callable[[int], NDArray[np.int64]]:
    folder, label = Path(option).expanduser(), f"{_KEY} {option!r}"
    if not folder.is_dir():
        raise DataError(f"{label} is no folder: give the folder of the label maps")
    files = [folder / PurePosixPath(name).with_suffix(".png") for name in images.names]
    for name, file in zip(images.names, files, strict=True):
        if not file.is_file():
            raise DataError(f"{label} has no {file.relative_to(folder)} for picture {name!r}: add it")

    def read(index: int) -> NDArray[np.int64]:
        ids = np.asarray(open_picture(files[index], label))
        if ids.ndim != 2:
            raise DataError(
                f"{label}: {files[index].name!r} is a colour picture: save class numbers as a grey or "
                "palette PNG"
            )
        return ids.astype(np.int64)

    return read


def _from_folders(images: ImageSet) -> NDArray[np.int64]:
    folders = [PurePosixPath(name).parent.name for name in images.names]
    if "" in folders:
        name = images.names[folders.index("")]
        raise DataError(f"{_KEY} 'folders': picture {name!r} lies in no class folder: move it into one")
    known = sorted(set(folders))
    plain = all(name.isdecimal() and len(name) < _MOST_DIGITS for name in known)
    numbers = {name: int(name) if plain else place for place, name in enumerate(known)}
    return np.array([numbers[name] for name in folders], dtype=np.int64)


def _from_table(images: ImageSet, option: str) -> NDArray[np.int64]:
    label = f"{_KEY} {option!r}"
    places = {name: place for place, name in enumerate(images.names)}
    found: dict[int, int] = {}
    for line, file, text in _rows(option, label):
        if file not in places:
            raise DataError(
                f"{label}, line {line}: there is no picture {file!r} in task.images: give paths below "
                "that folder"
            )
        if places[file] in found:
            raise DataError(f"{label}, line {line}: picture {file!r} has a label already: keep one")
        try:
            found[places[file]] = int(np.int64(int(text)))
        except (ValueError, OverflowError):
            raise DataError(
                f"{label}, line {line}: the class of {file!r} is {text!r}: it must be an integer"
            ) from None
    for place, name in enumerate(images.names):
        if place not in found:
            raise DataError(f"{label} has no line for picture {name!r} of task.images: add one")
    return np.array([found[place] for place in range(len(images))], dtype=np.int64)


def _rows(option: str, label: str) -> list[tuple[int, str, str]]:
    """Line number, file and class of every row but the header."""
    try:
        with Path(option).expanduser().open(newline="", encoding="utf-8-sig") as stream:
            rows = [(number, row) for number, row in enumerate(csv.reader(stream), start=1) if row]
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise DataError(f"{label} cannot be read as a CSV file: {reason}") from error
    if not rows:
        raise DataError(f"{label} is empty: it needs the columns file and class")
    header = [cell.strip() for cell in rows[0][1]]
    named = "file" in header and "class" in header
    file, kind = (header.index("file"), header.index("class")) if named else (0, 1)
    is_header = named or (len(header) > 1 and not header[1].lstrip("-").isdecimal())
    body = rows[1:] if is_header else rows
    for number, row in body:
        if len(row) <= max(file, kind):
            raise DataError(f"{label}, line {number} has {len(row)} columns: it needs a file and a class")
    return [(number, row[file].strip(), row[kind].strip()) for number, row in body]
