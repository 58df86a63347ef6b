"""Targets and loss of ptq-lane's curve network."""

import numpy as np
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional as F

from ptq_lane import Adapter, Frame, Lanes
from ptq_lane.families.curve import Curve, bernstein
from ptq_lane.networks.backbone import STRIDE
from ptq_lane.networks.curve import CurveNet

_CROSSING = 0.58
_SPREAD = 0.8
_SAMPLES = 32
_FEWEST_ROWS = 4
_BERNSTEIN = bernstein(_SAMPLES).float()
_TO_POINTS = np.linalg.pinv(bernstein(_SAMPLES).numpy())


def network() -> nn.Module:
    return CurveNet()


def adapter(frame: Frame) -> Adapter:
    return Curve(frame)


def targets(lanes: Lanes, frame: Frame) -> dict[str, NDArray]:
    """existence [columns]: 1 where a line crosses the row at 0.58 of the height, less beside it, so that
    the columns of neighbouring lines are far from each other; points [8, columns]: of the nearest line."""
    columns = frame.width // STRIDE
    existence = np.zeros(columns, np.float32)
    points = np.zeros((8, columns), np.float32)
    for line in lanes.points():
        if len(line) < _FEWEST_ROWS:
            continue
        crossing = np.interp(_CROSSING * (frame.height - 1), line[:, 1], line[:, 0])
        column = (crossing.clip(0, frame.width - 1) + 0.5) / STRIDE - 0.5
        near = np.exp(-(((np.arange(columns) - column) / _SPREAD) ** 2) / 2)
        own = near > existence
        existence[own] = near[own]
        points[:, own] = _bezier((line + 0.5) / (frame.width, frame.height)).reshape(8, 1)
    return {"existence": existence, "points": points}


def _bezier(line: NDArray[np.float64]) -> NDArray[np.float64]:
    """The control points [4, 2] of the curve through points evenly spaced along a line, bottom first."""
    line = line[::-1]
    along = np.concatenate([[0], np.cumsum(np.linalg.norm(np.diff(line, axis=0), axis=1))])
    even = np.linspace(0, along[-1], _SAMPLES)
    return _TO_POINTS @ np.stack([np.interp(even, along, line[:, axis]) for axis in (0, 1)], 1)


def loss(outputs: dict[str, Tensor], targets: dict[str, Tensor]) -> Tensor:
    """Cross-entropy of existence, and the distance of the sampled curves where there is one."""
    existence = F.binary_cross_entropy_with_logits(outputs["existence"], targets["existence"])
    apart = _sampled(outputs["points"]) - _sampled(targets["points"])
    distance = F.smooth_l1_loss(apart, apart.new_zeros(()).expand_as(apart), reduction="none", beta=0.005)
    weight = targets["existence"] * (targets["existence"] > 0.1)
    curves = (distance.mean((1, 2)) * weight).sum() / weight.sum().clamp(min=1)
    return 5 * existence + 100 * curves


def _sampled(points: Tensor) -> Tensor:
    """Control points [n, 8, columns] to samples of their curves [n, samples, 2, columns]."""
    images, _, columns = points.shape
    return (_BERNSTEIN @ points.reshape(images, 4, -1)).reshape(images, _SAMPLES, 2, columns)
