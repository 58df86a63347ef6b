"""From the pixels of a picture to the tensor that a network takes."""

from typing import Any, Literal, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from pydantic import BaseModel, ConfigDict, Field, field_validator
from torch import Tensor

Pixels: TypeAlias = NDArray[np.uint8]
"""A picture [height, width, 3], red first."""

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


class Preprocess(BaseModel):
    """Resize, crop, order the channels, and `(pixel · scale - mean) / std`; keys of `task.preprocess`."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    size: int | tuple[int, int] | None = Field(
        default=224,
        description="int: the shorter side is resized, and a square of that size cut from the centre; "
        "[height, width]: resized without keeping the proportions; null: pictures stay as they are",
    )
    crop: float = Field(
        default=1.0,
        gt=0,
        le=1,
        description="share of the resized sides that is kept; unused where size is null",
    )
    interpolation: Literal["nearest", "bilinear", "bicubic", "lanczos"] = "bicubic"
    order: Literal["rgb", "bgr"] = Field(default="rgb", description="order of the network's channels")
    scale: float = Field(default=1 / 255, gt=0)
    mean: tuple[float, float, float] = Field(default=(0.0, 0.0, 0.0), description="in the network's order")
    std: tuple[float, float, float] = Field(default=(1.0, 1.0, 1.0), description="in the network's order")

    @field_validator("size", mode="before")
    @classmethod
    def _size(cls, value: Any) -> Any:
        sides = value if isinstance(value, list | tuple) and len(value) == 2 else [value]
        if value is not None and not all(type(side) is int and side > 0 for side in sides):
            raise ValueError(f"size {value!r}: give a number of pixels, [height, width], or null")
        return tuple(value) if isinstance(value, list) else value

    @field_validator("std")
    @classmethod
    def _no_zero(cls, value: tuple[float, float, float]) -> tuple[float, float, float]:
        if not all(value):
            raise ValueError(f"std {list(value)}: pixels are divided by it, zero is not possible")
        return value


def prepare(pixels: Pixels, how: Preprocess) -> Tensor:
    """The network's input [3, h, w], float32, for one picture."""
    cut = _resized(pixels, how)
    if how.order == "bgr":
        cut = cut[:, :, ::-1]
    mean, std = (np.array(value, dtype=np.float32) for value in (how.mean, how.std))
    values = (cut.astype(np.float32) * np.float32(how.scale) - mean) / std
    return torch.from_numpy(np.ascontiguousarray(values.transpose(2, 0, 1)))


def native_size(how: Preprocess) -> tuple[int, int]:
    """Height and width of pictures that need no resizing; 224 x 224 where any size is taken."""
    if how.size is None:
        return (224, 224)
    height, width = (how.size, how.size) if isinstance(how.size, int) else how.size
    return int(height / how.crop), int(width / how.crop)


def _resized(pixels: Pixels, how: Preprocess) -> Pixels:
    """Resized and cut from the centre."""
    if how.size is None:
        return pixels
    wanted = native_size(how)
    if isinstance(how.size, int):
        ratio = wanted[0] / min(pixels.shape[:2])
        wanted = (round(pixels.shape[0] * ratio), round(pixels.shape[1] * ratio))
        final = (how.size, how.size)
    else:
        final = how.size
    if wanted != pixels.shape[:2]:
        method = Image.Resampling[how.interpolation.upper()]
        pixels = np.asarray(Image.fromarray(pixels).resize(wanted[::-1], method))
    return _centre(pixels, *final)


def _centre(pixels: Pixels, height: int, width: int) -> Pixels:
    top, left = (pixels.shape[0] - height) // 2, (pixels.shape[1] - width) // 2
    return pixels[top : top + height, left : left + width]
