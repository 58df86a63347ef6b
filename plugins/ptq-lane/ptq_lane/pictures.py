"""The images that a run works on: from users, or rendered, with what is known of their lanes."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from ptq_lane.frames import Frames, read_frames
from ptq_lane.labels import Label, Labels, read_labels
from ptq_lane.lanes import Frame
from ptq_lane.scenes import Scene, Scenes
from ptqcore import DataError

_MOST_KEPT = 512


@dataclass(frozen=True)
class Pictures:
    """Images with labels, in a fixed order.

    read: image number i, RGB [h, w, 3]. label: what is labelled on it, None if nothing is known.
    """

    names: Sequence[str]
    frame: Frame
    read: Callable[[int], NDArray[np.uint8]]
    label: Callable[[int], Label | None]
    category: Callable[[int], str | None]

    def __len__(self) -> int:
        return len(self.names)


def rendered(count: int, size: tuple[int, int], seed: int, series: int) -> Pictures:
    """Scenes of a size (width, height); series with other numbers have nothing in common."""
    scenes = Scenes(count, seed, series, *size)

    @lru_cache(maxsize=_MOST_KEPT)
    def scene(index: int) -> Scene:
        return scenes[index]

    def label(index: int) -> Label:
        return Label([points for points in scene(index).lanes.points() if len(points) > 1])

    names = [f"scene {index}" for index in range(count)]
    frame = Frame(*size)
    return Pictures(names, frame, lambda i: scene(i).image, label, lambda i: scene(i).category)


def given(images: str, labels: str | None) -> Pictures:
    """The images of a folder or video, with labels where there are any.

    Raises:
        DataError: if they cannot be read, or the labels belong to other images.
    """
    frames = read_frames(images, "task.images")
    known: Labels | None = None if labels is None else read_labels(labels, frames, "task.labels")
    return Pictures(
        frames.names,
        frames.frame,
        frames.read,
        lambda index: None if known is None else known.lanes[index],
        lambda index: None if known is None else known.categories[index],
    )


def calibration_folder(source: str, frame: Frame) -> Frames:
    """Images to calibrate with; the network sees images of one size.

    Raises:
        DataError: if they cannot be read, or are of another size than those that are judged.
    """
    frames = read_frames(source, "task.calibration")
    if frames.frame != frame:
        raise DataError(
            f"task.calibration {source!r} holds images of {frames.frame.width}x{frames.frame.height}, but "
            f"task.images are {frame.width}x{frame.height}: give images of one size"
        )
    return frames
