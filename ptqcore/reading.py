"""Files that strangers may have written: plain ones of a bounded size, not nested too deeply."""

import json
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ptqcore.errors import PtqError

MOST_TEXT = 64 * 2**20
MOST_DEEP = 100


def plain_size(path: Path) -> int:
    """Bytes of a file.

    Raises:
        OSError: if there is no such file.
        ValueError: if it is a folder, a pipe or a device: reading one may never end.
    """
    found = path.stat()
    if not stat.S_ISREG(found.st_mode):
        raise ValueError(f"{path.name!r} is no plain file")
    return found.st_size


def read_bytes(path: Path, most: int = MOST_TEXT) -> bytes:
    """What a file holds, if that is not more than `most` bytes.

    Raises:
        OSError: if it cannot be read.
        ValueError: if it is no plain file, or too large.
    """
    size = plain_size(path)
    if size > most:
        raise ValueError(f"{path.name!r} has {size} bytes, it may have {most} at most")
    with path.open("rb") as file:
        return file.read(size)  # so much memory is taken at once


def read_json(path: Path, most: int = MOST_TEXT) -> Any:
    """The JSON value in a UTF-8 file.

    Raises:
        OSError: if it cannot be read.
        ValueError: if it is no plain file, too large, no JSON, or nested more than 100 deep.
    """
    return parse_json(read_bytes(path, most).decode("utf-8"))


def parse_json(text: str) -> Any:
    """The JSON value of a text.

    Raises:
        ValueError: if it is no JSON, or nested more than 100 deep.
    """
    too_deep = f"it is nested more than {MOST_DEEP} deep"
    try:
        value = json.loads(text)
    except RecursionError:
        raise ValueError(too_deep) from None
    level = [value]
    for _ in range(MOST_DEEP):
        level = [inner for outer in level for inner in _inside(outer)]
        if not level:
            return value
    raise ValueError(too_deep)


def _inside(value: Any) -> list[Any]:
    """The containers right inside a container."""
    if isinstance(value, dict):
        value = value.values()
    elif not isinstance(value, list):
        return []
    return [inner for inner in value if isinstance(inner, dict | list)]


@contextmanager
def one_sentence(label: str, kind: type[PtqError]) -> Iterator[None]:
    """Turn whatever a parser raises over a file, its own errors and those of Python, into one sentence.

    Args:
        label: begins it, for example `x.onnx cannot be read back`.
        kind: the class of the error.
    """
    try:
        yield
    except PtqError:
        raise
    except Exception as error:
        raise kind(f"{label}: {one_line(error)}") from error


def one_line(error: BaseException, most: int = 300) -> str:
    """What an error of another library says, on one line."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= most else text[: most - 3] + "..."
