"""Pictures from a folder or from an .npz file, read one at a time."""

import math
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Any
from zipfile import ZipFile

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from ptq_vision.preprocess import Pixels
from ptqcore import DataError, one_line, read_bytes, stated_size

SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".webp", ".ppm")
_ARRAYS = ".npz"
_ROOM = 2**28  # bytes of an unpacked array that nobody is refused
_MOST_COMPRESSED = 64
_MOST_BYTES = 2**28  # of a picture
_MOST_PIXELS = 2**23  # of a picture that nobody is refused
_PIXELS_A_BYTE = 1000  # of a larger one
_HEADERS = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}


@dataclass(frozen=True)
class ImageSet:
    """Pictures in a fixed order.

    names: of each picture; for files the path below the folder, with `/`.
    read: picture number i as pixels [h, w, 3].
    labels: those that lie in the same .npz file: classes [n] or label maps [n, h, w].
    """

    names: Sequence[str]
    read: Callable[[int], Pixels]
    labels: NDArray[Any] | None = None

    def __len__(self) -> int:
        return len(self.names)


def read_images(source: str, key: str) -> ImageSet:
    """The pictures of a folder and its subfolders, sorted by path, or of an .npz file.

    Args:
        source: a folder of jpeg, png, bmp, webp or ppm files, or an .npz file with `images`
            [n, 3, h, w] uint8 and maybe `labels`.
        key: the recipe key that names it, for errors.

    Raises:
        DataError: if there is nothing to read. A damaged picture raises it when it is read.
    """
    path = Path(source).expanduser()
    if path.is_dir():
        return _folder(path, f"{key} {source!r}")
    if path.is_file() and path.suffix == _ARRAYS:
        return _arrays(path, f"{key} {source!r}")
    if path.is_file():
        raise DataError(f"{key} {source!r} is a file, but not an .npz one: give the folder of the pictures")
    raise DataError(f"{key} {source!r} does not exist: give a folder of pictures, or an .npz file")


def spread(total: int, count: int) -> list[int]:
    """`count` of the numbers 0 to total - 1, evenly spaced; all of them if there are fewer."""
    if count >= total:
        return list(range(total))
    return [int(number) for number in np.linspace(0, total - 1, count).round()]


def open_picture(path: Path, label: str) -> Image.Image:
    """A decoded picture.

    Raises:
        DataError: beginning with the label, if the file is damaged.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            content = read_bytes(path, _MOST_BYTES)  # no parts of a file are read that are only claimed
            _check_size(stated_size(content) or (0, 0), len(content))
            picture = Image.open(BytesIO(content))
            _check_size(picture.size, len(content))
            picture.load()
    except (OSError, SyntaxError, ValueError, Warning, Image.DecompressionBombError) as error:
        reason = " ".join(str(error).split())
        raise DataError(f"{label}: {path.name!r} cannot be read, replace or remove it: {reason}") from error
    return picture


def _check_size(size: tuple[int, int], stored: int) -> None:
    """Raises ValueError if a picture claims far more pixels than its bytes can hold."""
    width, height = size
    if width * height > max(_MOST_PIXELS, _PIXELS_A_BYTE * stored):
        raise ValueError(f"it claims {width}x{height} pixels, in {stored} bytes")


def _folder(folder: Path, label: str) -> ImageSet:
    files = sorted(
        file
        for file in folder.rglob("*")
        if file.suffix.lower() in SUFFIXES and not file.name.startswith(".") and file.is_file()
    )
    if not files:
        raise DataError(f"{label} holds no picture: it needs files ending in {', '.join(SUFFIXES)}")

    def read(index: int) -> Pixels:
        picture = open_picture(files[index], label)
        if picture.mode.startswith(("I", "F")):
            raise DataError(
                f"{label}: {files[index].name!r} has more than 8 bits a channel: convert it to 8 bits"
            )
        return np.asarray(picture.convert("RGB"))

    return ImageSet([file.relative_to(folder).as_posix() for file in files], read)


def _arrays(file: Path, label: str) -> ImageSet:
    try:
        _check_archive(file)
        with np.load(file, allow_pickle=False) as content:
            arrays = {name: content[name] for name in content.files if name in ("images", "labels")}
    except Exception as error:  # damaged archives raise what they like
        reason = one_line(error)
        raise DataError(f"{label} cannot be read as an .npz file of plain arrays: {reason}") from error
    images = arrays.get("images")
    if images is None:
        raise DataError(f"{label} has no array 'images': it must be [n, 3, height, width], uint8")
    if images.dtype != np.uint8 or images.ndim != 4 or images.shape[1] != 3 or not images.size:
        shape = f"{list(images.shape)} {images.dtype}"
        raise DataError(f"{label}: 'images' is {shape}, it must be [n, 3, height, width] uint8, red first")
    labels = arrays.get("labels")
    if labels is not None and (labels.shape[:1] != images.shape[:1] or labels.dtype.kind not in "iu"):
        shape = f"{list(labels.shape)} {labels.dtype}"
        raise DataError(f"{label}: 'labels' is {shape}, it must hold one integer entry per image")
    names = [str(index) for index in range(len(images))]
    return ImageSet(names, lambda index: images[index].transpose(1, 2, 0), labels)


def _check_archive(file: Path) -> None:
    """Refuse, before it is allocated, what an .npz file does not hold.

    Raises:
        ValueError: if an array claims more numbers than its record has, or a record is an archive bomb.
    """
    most = max(_ROOM, _MOST_COMPRESSED * file.stat().st_size)
    with ZipFile(file) as archive:
        for record in archive.infolist():
            if record.file_size > most:
                raise ValueError(f"{record.filename!r} has {record.file_size} bytes unpacked, too many")
            with archive.open(record) as stream:
                shape, _, dtype = _HEADERS[np.lib.format.read_magic(stream)](stream)
            needed = math.prod(shape) * dtype.itemsize
            if needed > record.file_size:
                raise ValueError(f"{record.filename!r} needs {needed} bytes, but has {record.file_size}")
