"""From an image to a model's input, as the config's test pipeline and data preprocessor do it."""

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ptq_vision.openmmlab.description import Description
from ptqcore import ModelError

Pair = tuple[int, int]


@dataclass(frozen=True)
class Prepared:
    """One image as the network reads it, and how it came to be.

    Attributes:
        image: [1, 3, h, w], normalized and padded.
        original: height and width of the image as it was read.
        resized: height and width of the part of the input that holds it; the rest is padding.
        scale: width and height of that part, by those of the original.
    """

    image: Tensor
    original: Pair
    resized: Pair
    scale: tuple[float, float]


@dataclass(frozen=True)
class Preprocessing:
    """Resize, pad at the right and the bottom, normalize, pad to a multiple.

    Attributes:
        size: height and width that the image is resized to; None leaves it as it is.
        keep_ratio: resize to the largest size within `size` of the image's own proportions.
        square: pad to a square.
        padded: height and width that the image is padded to.
        pixel: the value of padding that is added before normalization.
        rgb: whether the channels are red, green, blue; else blue, green, red.
        mean: of each channel, in that order.
        std: of each channel, in that order.
        divisor: the sides of the input are padded to multiples of it.
        value: the value of padding that is added after normalization.
    """

    size: Pair | None = None
    keep_ratio: bool = False
    square: bool = False
    padded: Pair | None = None
    pixel: float = 0.0
    rgb: bool = True
    mean: tuple[float, float, float] = (0.0, 0.0, 0.0)
    std: tuple[float, float, float] = (1.0, 1.0, 1.0)
    divisor: int = 1
    value: float = 0.0

    @classmethod
    def of(cls, description: Description, size: Pair | None = None) -> "Preprocessing":
        """The preparation that a config describes.

        Args:
            description: of the model.
            size: height and width to resize and pad to, instead of what the config says.

        Raises:
            ModelError: if the config prepares images in a way that is not known here.
        """
        steps = {step["type"]: step for step in description.pipeline}
        resize, pad = steps.get("Resize", {}), steps.get("Pad", {})
        given = description.model.get("data_preprocessor") or {}
        if resize and not resize.get("scale"):
            raise ModelError("the config's test pipeline resizes by a factor: set the size of images")
        testing = given if description.scope == "mmdet" else given.get("test_cfg") or {}
        return cls(
            size=size or _height_width(resize.get("scale")),
            keep_ratio=resize.get("keep_ratio", False),
            square=pad.get("pad_to_square", False),
            padded=size or _height_width(pad.get("size")) or _pair(testing.get("size")),
            pixel=float(_first(_image_value(pad.get("pad_val", 0)))),
            rgb=bool(given.get("bgr_to_rgb", False)),
            mean=_three(given.get("mean"), 0.0),
            std=_three(given.get("std"), 1.0),
            divisor=int(testing.get("pad_size_divisor") or testing.get("size_divisor") or 1),
            value=float(given.get("pad_value", given.get("pad_val", 0.0))),
        )

    def __call__(self, image: np.ndarray) -> Prepared:
        """Args:
        image: uint8 [height, width, 3], red, green, blue.
        """
        height, width = image.shape[:2]
        pixels = self._resize(image if self.rgb else image[..., ::-1])
        resized = pixels.shape[:2]
        x = torch.from_numpy(np.ascontiguousarray(pixels)).permute(2, 0, 1).float()
        x = _pad(x, self._padded_size(resized), self.pixel)
        x = (x - torch.tensor(self.mean).view(3, 1, 1)) / torch.tensor(self.std).view(3, 1, 1)
        multiple = tuple(-(-side // self.divisor) * self.divisor for side in x.shape[1:])
        x = _pad(x, multiple, self.value)
        return Prepared(x[None], (height, width), resized, (resized[1] / width, resized[0] / height))

    def _resize(self, image: np.ndarray) -> np.ndarray:
        """With mmcv's own function, so that the network sees what it was trained to see."""
        if self.size is None:
            return image
        import mmcv

        scale = self.size[::-1]
        return mmcv.imrescale(image, scale) if self.keep_ratio else mmcv.imresize(image, scale)

    def _padded_size(self, resized: Pair) -> Pair:
        height, width = self.padded or resized
        if self.square:
            height = width = max(height, width)
        return max(height, resized[0]), max(width, resized[1])


def _pad(x: Tensor, size: tuple[int, ...], value: float) -> Tensor:
    """Pad [3, h, w] at the right and the bottom."""
    return torch.nn.functional.pad(x, (0, size[1] - x.shape[2], 0, size[0] - x.shape[1]), value=value)


def _height_width(scale: Any) -> Pair | None:
    """A width and height, or one side for both, as a height and width."""
    pair = _pair(scale)
    return None if pair is None else (pair[1], pair[0])


def _pair(size: Any) -> Pair | None:
    if size is None:
        return None
    return (int(size), int(size)) if isinstance(size, int | float) else (int(size[0]), int(size[1]))


def _image_value(value: Any) -> Any:
    return value.get("img", 0) if isinstance(value, dict) else value


def _first(value: Any) -> Any:
    return value[0] if isinstance(value, list | tuple) else value


def _three(values: Any, default: float) -> tuple[float, float, float]:
    if not values:
        return (default,) * 3
    first, second, third = (list(values) * 3)[:3] if len(values) == 1 else values
    return float(first), float(second), float(third)
