"""From the pixels of an image to the tensor that a network takes."""

import cv2
import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor

Three = tuple[float, float, float]


class Preprocess(BaseModel):
    """Resize, order the channels, and (pixel / 255 - mean) / std; keys of `task.preprocess`."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    size: tuple[int, int] | None = Field(
        default=None, description="[height, width] that the network sees; null: images stay as they are"
    )
    bgr: bool = Field(default=False, description="whether the network wants blue first")
    mean: Three = Field(default=(0.485, 0.456, 0.406), description="in the order of the network's channels")
    std: Three = Field(default=(0.229, 0.224, 0.225), description="in the order of the network's channels")

    def prepare(self, image: NDArray[np.uint8]) -> Tensor:
        """An image [height, width, 3], red first, as the network takes it: [3, *size]."""
        ordered: NDArray = image[:, :, ::-1] if self.bgr else image
        if self.size is not None and image.shape[:2] != self.size:
            height, width = self.size
            ordered = cv2.resize(ordered, (width, height))
        values: NDArray = ordered.astype(np.float32) / np.float32(255)
        values = (values - np.array(self.mean, np.float32)) / np.array(self.std, np.float32)
        return torch.from_numpy(np.ascontiguousarray(values.transpose(2, 0, 1)))
