"""Which label belongs to which picture, by their paths."""

import re
from collections.abc import Iterator, Sequence

from ptqcore import DataError


def without_ending(path: str) -> str:
    """A path without the ending of its name and without `/` at its start."""
    return re.sub(r"\.[^./]*$", "", path.lstrip("/"))


def pair_paths(pictures: Sequence[str], files: Sequence[str], label: str) -> list[int | None]:
    """For each picture the place of its file, None if there is none.

    Two paths belong together if they are the same, or else, since folders may be named from deeper on, if
    one is the end of the other (`a/20` of `clips/a/20`).

    Args:
        pictures, files: paths with `/`, without the endings of names; no file stands there twice.
        label: begins errors.

    Raises:
        DataError: naming two files that fit one picture, or two pictures that one file fits.
    """
    fitting = _fitting(pictures, files)
    owner: dict[int, str] = {}
    for picture, places in zip(pictures, fitting, strict=True):
        if len(places) > 1:
            first, second = (files[place] for place in places[:2])
            raise DataError(
                f"{label}: both {first!r} and {second!r} fit the picture {picture!r}: give labels the "
                "paths of their pictures"
            )
        for place in places:
            if place in owner:
                raise DataError(
                    f"{label}: {files[place]!r} fits two pictures, {owner[place]!r} and {picture!r}: give "
                    "labels the paths of their pictures"
                )
            owner[place] = picture
    return [places[0] if places else None for places in fitting]


def _fitting(pictures: Sequence[str], files: Sequence[str]) -> list[list[int]]:
    """The places of the files that fit each picture. Files that are the same as one fit no other."""
    whole = {file: place for place, file in enumerate(files)}
    taken = whole.keys() & set(pictures)
    longer: dict[str, list[int]] = {}
    for place, file in enumerate(files):
        for end in _ends(file) if file not in taken else ():
            longer.setdefault(end, []).append(place)

    def fit(picture: str) -> list[int]:
        if picture in whole:
            return [whole[picture]]
        shorter = [whole[end] for end in _ends(picture) if end in whole and end not in taken]
        return longer.get(picture, []) or shorter[:1]

    return [fit(picture) for picture in pictures]


def _ends(path: str) -> Iterator[str]:
    """The ends of a path, longest first, without the path itself."""
    while "/" in path:
        path = path.split("/", 1)[1]
        yield path
