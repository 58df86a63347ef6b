"""Targets and loss of ptq-lane's curve network."""

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional as F

from ptq_lane import Adapter, Frame, Lanes
from ptq_lane.families.curve import Curve, bernstein
from ptq_lane.networks.backbone import STRIDE
from ptq_lane.networks.curve import CurveNet
from ptq_lane.networks.images import HEIGHT, WIDTH

_CROSSING = 0.58
_ALONG = 0.2
_EXISTENCE = 10.0
_SAMPLES = 32
_FEWEST_ROWS = 4
_BERNSTEIN = bernstein(_SAMPLES).float()
_TO_POINTS = np.linalg.pinv(bernstein(_SAMPLES).numpy())


def network() -> nn.Module:
    return CurveNet()


def adapter(frame: Frame) -> Adapter:
    return Curve(frame)


def targets(lanes: Lanes, frame: Frame) -> dict[str, NDArray]:
    """existence [columns]: 1 where a line crosses the row at 0.58 of the height, less farther from there;
    in this row lines are well apart. points [8, columns]: of the nearest line."""
    columns = frame.width // STRIDE
    existence = np.zeros(columns, np.float32)
    points = np.zeros((8, columns), np.float32)
    for line in lanes.points():
        if len(line) < _FEWEST_ROWS:
            continue
        crossing = np.interp(_CROSSING * (frame.height - 1), line[:, 1], line[:, 0])
        column = (crossing.clip(0, frame.width - 1) + 0.5) / STRIDE - 0.5
        near = np.exp(-((np.arange(columns) - column) ** 2) / 2)
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
    """Cross-entropy of existence, and the distance of the sampled curves in pixels where there is one;
    across the curve it counts more than along it, which only moves the ends."""
    existence = F.binary_cross_entropy_with_logits(outputs["existence"], targets["existence"])
    wanted = _sampled(targets["points"])
    apart = _sampled(outputs["points"]) - wanted
    along = F.normalize(torch.gradient(wanted, dim=1)[0], dim=2)
    forward = (apart * along).sum(2)
    aside = apart[:, :, 0] * along[:, :, 1] - apart[:, :, 1] * along[:, :, 0]
    distance = _huber(aside, 0.5) + _ALONG * _huber(forward, 1.0)
    weight = targets["existence"]
    return _EXISTENCE * existence + (distance.mean(1) * weight).sum() / weight.sum().clamp(min=1)


def _huber(values: Tensor, beta: float) -> Tensor:
    return F.smooth_l1_loss(values, torch.zeros_like(values), reduction="none", beta=beta)


def _sampled(points: Tensor) -> Tensor:
    """Control points [n, 8, columns] to samples of their curves [n, samples, 2, columns], in pixels."""
    images, _, columns = points.shape
    samples = (_BERNSTEIN @ points.reshape(images, 4, -1)).reshape(images, _SAMPLES, 2, columns)
    return samples * samples.new_tensor((WIDTH, HEIGHT))[:, None]
