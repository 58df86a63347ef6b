"""Images of the road, from a folder of pictures or from a video, read one at a time."""

import os
import sys
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np
from numpy.typing import NDArray

from ptq_lane.lanes import Frame
from ptqcore import DataError, read_bytes, stated_size

Pixels = NDArray[np.uint8]

SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".webp", ".ppm")
LAYOUTS = ("driver_*", "clips")
"""The folders in which CULane and TuSimple keep their pictures, beside others with label maps."""

_KEPT_BYTES = 256 * 2**20
# What decoding a video may take: always, for each thread (a stack, frames of 4K), for each byte of a file.
_DECODER_BYTES = 128 * 2**20
_THREAD_BYTES = 32 * 2**20
_MOST_THREADS = 16
_DECODED = 64
_ROUNDED_FRAMES = 2
_MOST_BYTES = 2**28
_ROOM = 2**23  # pixels that nobody is refused
_MOST_COMPRESSED = 1000  # pixels for each byte of a larger picture


@dataclass(frozen=True)
class Frames:
    """Images of one size in a fixed order.

    names: of each; for pictures the path below the folder, with `/`, for a video the number, six digits.
    frame: their size.
    read: image number i as RGB [h, w, 3]; raises DataError where it is damaged or of another size.
    """

    names: Sequence[str]
    frame: Frame
    read: Callable[[int], Pixels]

    def __len__(self) -> int:
        return len(self.names)


def read_frames(source: str, key: str) -> Frames:
    """The pictures of a folder and its subfolders, sorted by path, or the frames of a video.

    Of a folder in the layout of CULane or TuSimple, those below `driver_*` or `clips`.

    Args:
        source: a folder of jpeg, png, bmp, webp or ppm files, or a video that OpenCV can read.
        key: the recipe key that names it, for errors.

    Raises:
        DataError: if there is nothing to read.
    """
    path, label = Path(source).expanduser(), f"{key} {source!r}"
    if path.is_dir():
        return _folder(path, label)
    if path.suffix.lower() in SUFFIXES:
        raise DataError(f"{label} is a single picture: give the folder that it lies in")
    if path.is_file():
        return _Video(path, label).frames()
    raise DataError(f"{label} does not exist: give a folder of pictures, or a video")


def _folder(folder: Path, label: str) -> Frames:
    roots = [root for layout in LAYOUTS for root in folder.glob(layout) if root.is_dir()] or [folder]
    files = sorted(
        file
        for root in roots
        for file in root.rglob("*")
        if file.suffix.lower() in SUFFIXES and not file.name.startswith(".") and file.is_file()
    )
    if not files:
        raise DataError(f"{label} holds no picture: it needs files ending in {', '.join(SUFFIXES)}")
    names = [file.relative_to(folder).as_posix() for file in files]
    frame = _size(_picture(files[0], names[0], label))

    def read(index: int) -> Pixels:
        picture = _picture(files[index], names[index], label)
        if _size(picture) != frame:
            height, width = picture.shape[:2]
            raise DataError(
                f"{label}: picture {names[index]!r} is {width}x{height}, but the first, {names[0]!r}, is "
                f"{frame.width}x{frame.height}: give pictures of one size"
            )
        return picture

    return Frames(names, frame, read)


def _size(picture: Pixels) -> Frame:
    return Frame(width=picture.shape[1], height=picture.shape[0])


def _picture(file: Path, name: str, label: str) -> Pixels:
    damaged = f"{label}: picture {name!r} cannot be read, replace or remove it"
    try:
        picture = _decode(read_bytes(file, _MOST_BYTES))
    except (OSError, ValueError, cv2.error) as error:
        raise DataError(f"{damaged}: {' '.join(str(error).split())}") from error
    if picture is None:
        raise DataError(f"{damaged}: it is cut off, damaged, or no picture at all")
    if picture.dtype != np.uint8:
        raise DataError(f"{label}: picture {name!r} has more than 8 bits a channel: convert it to 8 bits")
    return _rgb(picture)


def _decode(content: bytes) -> NDArray | None:
    # Some versions of OpenCV paint the missing part of a JPEG grey: its image (marker DA) must end (D9).
    cut_off = content.startswith(b"\xff\xd8") and content.rfind(b"\xff\xd9") < content.rfind(b"\xff\xda")
    if cut_off or not content:
        return None
    size = stated_size(content)
    if size is None:
        return None
    width, height = size
    if width * height > max(_ROOM, _MOST_COMPRESSED * len(content)):
        raise ValueError(f"it claims {width}x{height} pixels, in {len(content)} bytes")
    return cv2.imdecode(np.frombuffer(content, np.uint8), cv2.IMREAD_COLOR | cv2.IMREAD_ANYDEPTH)


def _rgb(picture: NDArray) -> Pixels:
    return np.asarray(cv2.cvtColor(picture, cv2.COLOR_BGR2RGB), dtype=np.uint8)


@contextmanager
def _limited_memory(more: int) -> Iterator[None]:
    """Let this process take so many bytes more at most, for decoders allocate what a broken file claims to
    hold. Allocations beyond that fail, which decoders survive. Linux alone knows such a limit."""
    if sys.platform != "linux":
        yield
        return
    import resource

    pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[5])
    soft, hard = resource.getrlimit(resource.RLIMIT_DATA)
    limits = [pages * resource.getpagesize() + more]
    limits += [each for each in (soft, hard) if each != resource.RLIM_INFINITY]
    resource.setrlimit(resource.RLIMIT_DATA, (min(limits), hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_DATA, (soft, hard))


class _Video:
    """The frames of a video by number.

    Jumps inside a video are not exact in every format, so frames are decoded one after the other, again
    from the start to go back. The frames read last are kept, up to 256 MiB.
    """

    def __init__(self, file: Path, label: str) -> None:
        self._file = file
        self._label = label
        self._capture = self._open()
        self._next = 0
        self._kept: OrderedDict[int, Pixels] = OrderedDict()
        self._count = self._length()

    def frames(self) -> Frames:
        """Raises:
        DataError: if not even the first can be decoded.
        """
        first = self.read(0)
        return Frames([f"{number:06d}" for number in range(self._count)], _size(first), self.read)

    def read(self, index: int) -> Pixels:
        if index not in self._kept:
            self._keep(index, self._decode(range(self._count)[index]))
        self._kept.move_to_end(index)
        return self._kept[index].copy()

    def _keep(self, index: int, image: Pixels) -> None:
        self._kept[index] = image
        while len(self._kept) > max(1, _KEPT_BYTES // image.nbytes):
            self._kept.popitem(last=False)

    def _decode(self, index: int) -> Pixels:
        if index < self._next:
            self._capture = self._open()
            self._next = 0
        with self._limited():
            while self._next <= index:
                if not self._capture.grab():
                    self._fail(self._next)
                self._next += 1
            decoded, image = self._capture.retrieve()
        if not decoded or image is None:
            self._fail(index)
        return _rgb(image)

    def _fail(self, index: int) -> None:
        raise DataError(
            f"{self._label}: frame {index} of {self._count} cannot be decoded: encode the video anew, or "
            "cut it off before that frame"
        )

    @contextmanager
    def _limited(self) -> Iterator[None]:
        """Decode within a limit of memory.

        Raises:
            DataError: if it does not suffice, and OpenCV itself notices.
        """
        threads = min(os.cpu_count() or 1, _MOST_THREADS)
        most = _DECODER_BYTES + _THREAD_BYTES * threads + _DECODED * self._file.stat().st_size
        with _limited_memory(most):
            try:
                yield
            except cv2.error as error:
                raise DataError(
                    f"{self._label} cannot be decoded in the {most // 2**20} MiB of memory that a file of "
                    "its size gets: encode it anew, with smaller frames"
                ) from error

    def _open(self) -> cv2.VideoCapture:
        with self._limited():
            capture = cv2.VideoCapture(str(self._file))
        if not capture.isOpened():
            raise DataError(
                f"{self._label} cannot be read as a video: give a folder of pictures, or a video that "
                "OpenCV can decode (MP4 with H.264 is safe)"
            )
        return capture

    def _length(self) -> int:
        """The number of frames that the file states, if the last can be reached; else those that are
        found, for some formats state a rounded number, or none."""
        capture = self._open()
        stated = int(capture.get(cv2.CAP_PROP_FRAME_COUNT))
        possible = 0 < stated <= self._file.stat().st_size  # a frame has a byte at least
        with self._limited():
            if possible and capture.set(cv2.CAP_PROP_POS_FRAMES, stated - 1) and capture.grab():
                return stated
        capture = self._open()
        found = 0
        with self._limited():
            while capture.grab():
                found += 1
        if not found:
            raise DataError(f"{self._label} has no frame that can be decoded: give another video")
        if found < stated - _ROUNDED_FRAMES:
            raise DataError(
                f"{self._label} ends after {found} of {stated} frames: it is cut off or damaged, replace "
                "it or encode it anew"
            )
        return found
