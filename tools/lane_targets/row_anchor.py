"""Targets and loss of ptq-lane's row-anchor network."""

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional as F

from lane_targets import SLOTS, by_slot
from ptq_lane import Adapter, Frame, Lanes
from ptq_lane.families.row_anchor import RowAnchor
from ptq_lane.lanes import Numbers
from ptq_lane.networks.row_anchor import RowAnchorNet

_CELLS = 32
_ANCHORS = 18
_HORIZON = 0.42
_END = 3


def network() -> nn.Module:
    return RowAnchorNet(_CELLS, _ANCHORS, SLOTS)


def adapter(frame: Frame) -> Adapter:
    return RowAnchor(frame)


def targets(lanes: Lanes, frame: Frame) -> dict[str, NDArray]:
    """cell [anchors, slots]: of each line at each anchor, not whole, NaN where it is absent.

    Lines go straight on to the next anchor if it is nearer than half the way between two.
    """
    rows = np.linspace(_HORIZON, 1, _ANCHORS) * frame.height
    half = (rows[1] - rows[0]) / 2
    points = [_longer(line, half) for line in lanes.points()]
    x = by_slot(Lanes.from_points(rows, points, lanes.slots)).T
    cell = x / (frame.width / (_CELLS - 1)) - 0.5
    cell[~((cell > -0.5) & (cell < _CELLS - 1))] = np.nan
    return {"cell": np.maximum(cell, 0).astype(np.float32)}


def _longer(points: Numbers, by: float) -> Numbers:
    """A line [points, 2] with both ends moved straight on by some rows."""
    if len(points) < 2:
        return points
    ends = points[[0, -1]]
    steps = points[[0, -1]] - points[[min(_END, len(points) - 1), -min(_END, len(points) - 1) - 1]]
    ends = ends + steps / np.abs(steps[:, 1:]) * by
    return np.concatenate([ends[:1], points, ends[1:]])


def loss(outputs: dict[str, Tensor], targets: dict[str, Tensor]) -> Tensor:
    """Cross-entropy of the two cells that a line lies between, of existence, and the distance in cells."""
    cell = targets["cell"]
    present = ~cell.isnan()
    cells = torch.arange(outputs["location"].shape[1])[:, None, None]
    likely = outputs["location"].log_softmax(1)
    wanted = (1 - (cells - cell[:, None]).abs()).clamp(min=0).nan_to_num(0)
    expected = (likely.exp() * cells).sum(1)
    count = present.sum().clamp(min=1)
    location = -(wanted * likely).sum() / count
    distance = F.smooth_l1_loss(expected[present], cell[present], reduction="sum", beta=0.1) / count
    return location + distance + F.cross_entropy(outputs["existence"], present.long())
