"""Targets and loss of ptq-lane's keypoint network."""

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional as F

from lane_targets import SLOTS, by_slot
from ptq_lane import Adapter, Frame, Lanes
from ptq_lane.families.keypoint import Keypoint
from ptq_lane.networks.keypoint import KeypointNet

Numbers = NDArray[np.float64]

_STRIDE = 4
_SPREAD = 0.7
_NONE = -1


def network() -> nn.Module:
    return KeypointNet()


def adapter(frame: Frame) -> Adapter:
    return Keypoint(frame)


def targets(lanes: Lanes, frame: Frame) -> dict[str, NDArray]:
    """keypoints, starts [1, h, w]: 255 in the cells of points, less beside them.
    cell [points]: index of the cell of each point and of the cells at its left and right, along rows, -1
    for none; to_start, subpixel [points, 2]: of each, (x, y).

    A line has points at the middle of every row of cells and where it ends; of two points in one row of
    cells the lower one is told of."""
    height, width = frame.height // _STRIDE, frame.width // _STRIDE
    shape = (height, width)
    heat = {name: np.zeros(shape) for name in ("keypoints", "starts")}
    cell = np.full((SLOTS, height, 3), _NONE)
    to_start = np.zeros((SLOTS, height, 3, 2), np.float32)
    subpixel = np.zeros((SLOTS, height, 3, 2), np.float32)
    for slot, x in enumerate(by_slot(lanes)):
        points = _points(x, lanes.rows, shape)
        if not len(points):
            continue
        cells = np.floor(points).astype(int)
        start = cells[-1]
        _warm(heat["starts"], start, _SPREAD)
        for point, (column, row) in zip(points, cells, strict=True):
            _warm(heat["keypoints"], (column, row), 0.0)
            beside = column + np.array([-1, 0, 1])
            cell[slot, row] = np.where((beside >= 0) & (beside < width), row * width + beside, _NONE)
            here = np.stack([beside, np.full(3, row)], 1)
            to_start[slot, row] = start - here
            subpixel[slot, row] = point - here
    return {
        **{name: np.round(255 * values)[None].astype(np.uint8) for name, values in heat.items()},
        "cell": cell.reshape(-1).astype(np.int64),
        "to_start": to_start.reshape(-1, 2),
        "subpixel": subpixel.reshape(-1, 2),
    }


def _points(
    x: NDArray[np.float64], rows: NDArray[np.float64], shape: tuple[int, int]
) -> NDArray[np.float64]:
    """The points of a line within the image, top to bottom [points, 2]: (x, y) in cells."""
    seen = np.flatnonzero(~np.isnan(x))
    if not len(seen):
        return np.zeros((0, 2))
    y = (np.arange(shape[0]) + 0.5) * _STRIDE - 0.5
    y = np.unique(y.clip(rows[seen[0]], rows[seen[-1]]))
    points = (np.stack([np.interp(y, rows[seen], x[seen]), y], 1) + 0.5) / _STRIDE
    return points[(points[:, 0] >= 0) & (points[:, 0] < shape[1])]


def _warm(heat: Numbers, cell: tuple[int, int], spread: float) -> None:
    """Raise a map around a cell (column, row): along the row, and by `spread` across rows."""
    row, column = np.indices(heat.shape)
    across = (column - cell[0]) ** 2 / _SPREAD**2
    with np.errstate(divide="ignore", invalid="ignore"):
        down = np.where(row == cell[1], 0, (row - cell[1]) ** 2 / spread**2)
    np.maximum(heat, np.exp(-(across + down) / 2), out=heat)


def loss(outputs: dict[str, Tensor], targets: dict[str, Tensor]) -> Tensor:
    """Focal loss of the two maps (Law & Deng, arXiv 1808.01244), and distances in cells."""
    heat = _focal(outputs["keypoints"], targets["keypoints"]) + _focal(outputs["starts"], targets["starts"])
    present = targets["cell"] != _NONE
    count = present.sum().clamp(min=1)
    index = targets["cell"].clamp(min=0)[:, None].expand(-1, 2, -1)
    apart = {}
    for name in ("to_start", "subpixel"):
        answered = outputs[name].flatten(2).gather(2, index).transpose(1, 2)[present]
        wanted = targets[name][present]
        apart[name] = F.smooth_l1_loss(answered, wanted, reduction="sum", beta=0.1) / count
    return heat + 0.3 * apart["to_start"] + 2 * apart["subpixel"]


def _focal(logits: Tensor, wanted: Tensor) -> Tensor:
    heat = wanted.float() / 255
    positive = heat == 1
    missing = (1 - logits.sigmoid()) ** 2 * F.logsigmoid(logits)
    false = (1 - heat) ** 4 * logits.sigmoid() ** 2 * F.logsigmoid(-logits)
    return -torch.where(positive, missing, false).sum() / positive.sum().clamp(min=1)
