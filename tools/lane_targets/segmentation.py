"""Targets and loss of ptq-lane's segmentation network."""

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional as F

from lane_targets import SLOTS, by_slot
from ptq_lane import Adapter, Frame, Lanes
from ptq_lane.families.segmentation import Segmentation
from ptq_lane.networks.segmentation import SegmentationNet

_STRIDE = 2
_FEWEST_ROWS = 3
_BACKGROUND = 0.4
_EXISTENCE = 0.1


def network() -> nn.Module:
    return SegmentationNet(SLOTS)


def adapter(frame: Frame) -> Adapter:
    return Segmentation(frame)


def targets(lanes: Lanes, frame: Frame) -> dict[str, NDArray]:
    """column [slots, h]: of each line at each row of the network's grid, not whole, NaN where it is absent;
    existence [slots]: whether a line is in the image in more than one or two rows of the grid."""
    rows = (np.arange(frame.height // _STRIDE, dtype=np.float64) + 0.5) * _STRIDE - 0.5
    column = (by_slot(lanes.at(rows)) + 0.5) / _STRIDE - 0.5
    column[~((column > -0.5) & (column < frame.width // _STRIDE - 0.5))] = np.nan
    existence = (~np.isnan(column)).sum(1) >= _FEWEST_ROWS
    return {"column": column.astype(np.float32), "existence": existence.astype(np.float32)}


def loss(outputs: dict[str, Tensor], targets: dict[str, Tensor]) -> Tensor:
    """Cross-entropy of every pixel, background counting less as in SCNN, and of existence.

    A pixel on a line belongs to it with probability 1, one beside it with a half, the next not at all.
    """
    log_likely = outputs["lanes"].log_softmax(1)
    distance = (torch.arange(log_likely.shape[-1]) - targets["column"][..., None]).abs()
    line = (1 - distance / 2).clamp(min=0).nan_to_num(0)
    line = line / line.sum(1, keepdim=True).clamp(min=1)
    background = 1 - line.sum(1)
    pixel = -(line * log_likely[:, 1:]).sum(1) - _BACKGROUND * background * log_likely[:, 0]
    exists = F.binary_cross_entropy_with_logits(outputs["existence"], targets["existence"])
    return pixel.mean() + _EXISTENCE * exists
