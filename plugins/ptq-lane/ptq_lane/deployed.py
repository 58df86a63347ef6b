"""A finished detector: images go in, lanes come out."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

import ptqcore
from ptq_lane import detectors
from ptq_lane.adapter import Adapter
from ptq_lane.lanes import Frame, Lanes
from ptq_lane.preprocess import Preprocess
from ptqcore import ArtifactError, DataError, one_line, read_json

ASSETS = "detector.json"
_LARGEST = 2**16


class LaneDetector:
    """Finds lanes on images of one size; `model` and `adapter` may be used on their own."""

    def __init__(self, model: nn.Module, adapter: Adapter, preprocess: Preprocess) -> None:
        self.model, self.adapter, self.preprocess = model, adapter, preprocess

    @torch.no_grad()
    def __call__(self, images: Sequence[NDArray[np.uint8]]) -> list[Lanes]:
        """The lanes of each image [height, width, 3], red first, of the size of `adapter.frame`.

        Raises:
            DataError: if an image is of another size.
        """
        frame = self.adapter.frame
        for image in images:
            if image.shape != (frame.height, frame.width, 3):
                raise DataError(
                    f"an image is {list(image.shape)}, but lanes are found on "
                    f"{frame.width}x{frame.height}: give [{frame.height}, {frame.width}, 3]"
                )
        return self.adapter.decode(
            self.model(torch.stack([self.preprocess.prepare(one) for one in images]))
        )


def load(folder: str | Path) -> LaneDetector:
    """The quantized detector of an artifact, with what reads its outputs.

    Raises:
        ArtifactError: if the artifact is not whole, or of another kind.
    """
    model = ptqcore.load(folder)
    found = sorted(Path(folder).glob(f"*/{ASSETS}"))
    try:
        described = read_json(found[0])
        detector = detectors.find_saved(described, found[0])
        frame = _frame(**described["frame"])
        preprocess = Preprocess.model_validate(described["preprocess"])
    except (IndexError, OSError, ValueError, TypeError, KeyError) as error:
        raise ArtifactError(f"{folder} holds no lane detector: {one_line(error)}") from error
    return LaneDetector(model, detector.adapter(frame), preprocess)


def _frame(width: Any, height: Any) -> Frame:
    for side in (width, height):
        if type(side) is not int or not 1 <= side <= _LARGEST:
            raise ValueError(f"its frame is {width!r:.20}x{height!r:.20}: sides are 1 to {_LARGEST} pixels")
    return Frame(width, height)
