"""Detectors with a class of pixels for every lane: SCNN (arXiv 1712.06080), RESA (arXiv 2008.13719)."""

from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from ptq_lane.adapter import Adapter
from ptq_lane.families.groups import named_groups
from ptq_lane.lanes import Frame, Lanes, Numbers

# Of SCNN's map of 800 columns a window of 9 is averaged; of CULane's 590 rows every 20th is read.
_BLUR = 9 / 800
_ROW_STEP = 20 / 590
_FEWEST_POINTS = 2


class Segmentation(Adapter):
    """Outputs: {"lanes", "existence"} or "lanes" alone, as a tensor or in a dict.

    lanes: logits [n, 1 + slots, h, w], background first, of any size.
    existence: logits [n, slots]; without it every slot that reaches the threshold somewhere is a lane.
    """

    name = "segmentation"
    confidence_heads = frozenset({"lanes", "existence"})

    def __init__(self, frame: Frame, threshold: float = 0.3) -> None:
        """Args:
        frame: the images that lanes are to be given in.
        threshold: a row of a lane has a point where the largest probability exceeds it (SCNN: 0.3).
        """
        super().__init__(frame)
        self.threshold = threshold

    def heads(self, outputs: Any) -> dict[str, Tensor]:
        if isinstance(outputs, Tensor):
            return {"lanes": outputs}
        without = not isinstance(outputs, dict) or "existence" not in outputs
        return named_groups(outputs, self.name, ("lanes",) if without else ("lanes", "existence"))

    def confidence(self, outputs: Any) -> dict[str, Tensor]:
        heads = self.heads(outputs)
        found = {"lanes": 1 - heads["lanes"].softmax(1)[:, :1]}
        if "existence" in heads:
            found["existence"] = heads["existence"].sigmoid()
        return found

    @torch.no_grad()
    def decode(self, outputs: Any) -> list[Lanes]:
        """Softmax, blur, and in every 30th or so of the height the column of the largest probability."""
        heads = self.heads(outputs)
        height, width = heads["lanes"].shape[-2:]
        sampled = np.arange(height - 1, -1, -max(1, int(height * _ROW_STEP)))[::-1].copy()
        kernel = 2 * round((width * _BLUR - 1) / 2) + 1
        probabilities = F.avg_pool2d(
            heads["lanes"].softmax(1)[:, 1:], kernel, 1, kernel // 2, count_include_pad=False
        )
        largest, column = probabilities[:, :, sampled].max(-1)
        x = (column.double().numpy() + 0.5) * self.frame.width / width - 0.5
        y = (sampled + 0.5) * self.frame.height / height - 0.5
        present = (largest > self.threshold).numpy()
        if "existence" in heads:
            present &= (heads["existence"] > 0).numpy()[:, :, None]
        return [self._lanes(*image, y) for image in zip(x, present, strict=True)]

    def _lanes(self, x: Numbers, present: Numbers, y: Numbers) -> Lanes:
        """The lanes of one image; x, present: [slots, sampled rows]."""
        slots = np.flatnonzero(present.sum(1) >= _FEWEST_POINTS)
        points = [np.stack([x[slot], y], 1)[present[slot]] for slot in slots]
        return Lanes.from_points(self.frame.rows, points, slots)
