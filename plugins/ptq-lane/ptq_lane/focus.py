"""Semantic guided focus: errors count where the full-precision model sees lanes.

After Fan et al., "Selective Focus" (AAAI 2024), whose text says that the model's own confidence stands for
the foreground; the weights are ours.
"""

from typing import Any, Literal

import cv2
import numpy as np
import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor

from ptq_lane.adapter import Adapter
from ptq_lane.lanes import Frame, Lanes
from ptq_lane.metrics.culane import line_width

_NEAR = 3  # how many times as wide as the lines of the CULane metric a lane is drawn


class Focus(BaseModel):
    """How much each position counts, from the confidence m that a lane is there (0 to 1).

    mode: soft: m itself; threshold: 1 where m exceeds `threshold`, else 0; top-k: 1 for the share `top` of
    the positions with the largest m; none: every position counts the same. floor: the least weight of
    positions of groups that say whether there is a lane, where nothing else would hold false positives
    back; geometry_floor: of all other groups, of which nothing is read where there is no lane.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    mode: Literal["soft", "threshold", "top-k", "none"] = "soft"
    threshold: float = Field(default=0.5, ge=0, lt=1)
    top: float = Field(default=0.1, gt=0, le=1)
    floor: float = Field(default=0.1, ge=0, le=1)
    geometry_floor: float = Field(default=0.0, ge=0, le=1)

    def weights(self, adapter: Adapter, outputs: Any) -> dict[str, Tensor]:
        """The weight of every position of each group, for full-precision outputs of one image.

        Returns:
            group → weights that broadcast to it, each with a sum above 0.
        """
        heads, confidence = adapter.heads(outputs), adapter.confidence(outputs)
        found = {}
        for name, head in heads.items():
            floor = self.floor if name in adapter.confidence_heads else self.geometry_floor
            weight = torch.ones((1,) * head.ndim)
            if self.mode != "none" and name in confidence:
                weight = floor + (1 - floor) * self._chosen(confidence[name].detach().float())
            found[name] = weight if bool(weight.sum() > 0) else torch.full_like(weight, 1e-6)
        return found

    def _chosen(self, confidence: Tensor) -> Tensor:
        if self.mode == "soft":
            return confidence
        if self.mode == "threshold":
            return (confidence > self.threshold).float()
        kept = max(1, round(self.top * confidence.numel()))
        least = confidence.flatten().topk(kept).values[-1]
        return (confidence >= least).float()


def lane_map(lanes: Lanes, frame: Frame) -> Tensor:
    """Where lanes are, as an image [1, 1, height, width] of 0 and 1, drawn three times as wide as in the
    metric of CULane."""
    canvas = np.zeros((frame.height, frame.width), np.uint8)
    for points in lanes.points():
        line = np.round(points).astype(np.int32)
        cv2.polylines(canvas, [line[:, None]], False, 1, _NEAR * line_width(frame))
    return torch.from_numpy(canvas)[None, None].float()
