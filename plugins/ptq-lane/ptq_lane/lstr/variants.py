"""The two published trainings of LSTR, and how both see an image."""

from dataclasses import dataclass

import cv2
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ptqcore import ModelError, nearest

MEAN = (0.40789654, 0.44719302, 0.47026115)
STD = (0.28863828, 0.27408164, 0.27809835)
"""Of blue, green and red, in units of 0 to 1."""


@dataclass(frozen=True)
class Variant:
    """classes: background, lane, and for CULane one that is never trained. size: (height, width) of the
    images that the network was trained on.

    lowest_bound: whether a lane ends at its lower bound too; else it goes on to the bottom of the image
    and exists only inside it.
    """

    name: str
    classes: int
    size: tuple[int, int]
    lowest_bound: bool


VARIANTS = {
    variant.name: variant
    for variant in (
        Variant("tusimple", classes=2, size=(360, 640), lowest_bound=True),
        Variant("culane", classes=3, size=(295, 820), lowest_bound=False),
    )
}


def find_variant(name: str) -> Variant:
    """The variant of a name.

    Raises:
        ModelError: if there is none.
    """
    if name not in VARIANTS:
        raise ModelError(f"LSTR has no variant {name!r}{nearest(name, VARIANTS)}")
    return VARIANTS[name]


def prepare(image: NDArray[np.uint8], size: tuple[int, int]) -> Tensor:
    """An image [height, width, 3] (RGB) as LSTR takes it: [3, *size], blue first, normalised."""
    height, width = size
    resized = cv2.resize(image[:, :, ::-1], (width, height)).astype(np.float32) / 255
    normalised = (resized - np.array(MEAN, np.float32)) / np.array(STD, np.float32)
    return torch.from_numpy(normalised.transpose(2, 0, 1).copy())
