"""Targets and loss of ptq-lane's anchor network."""

import numpy as np
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional as F

from ptq_lane import Adapter, Frame, Lanes
from ptq_lane.anchor_lines import AnchorLines, road_anchors
from ptq_lane.families.anchor import Anchor
from ptq_lane.networks.anchor import AnchorNet

Numbers = NDArray[np.float64]

_ANCHORS = road_anchors()
_NEAR = 5.0
_FAR = 8.0
_FEWEST_ROWS = 2
_IGNORED = -1


def network() -> nn.Module:
    return AnchorNet(_ANCHORS)


def adapter(frame: Frame) -> Adapter:
    return Anchor(frame, _ANCHORS)


def targets(lanes: Lanes, frame: Frame) -> dict[str, NDArray]:
    """class [anchors]: 1 near a line, and for the nearest anchor of each; 0 far from all; -1 in between.
    length [anchors] and offsets [anchors, rows] to the nearest line; reach [anchors, rows]: where the line
    is, and where it would be down to the anchor's start."""
    anchors = _ANCHORS
    lines = _at_anchor_rows(lanes, anchors)
    base = anchors.x(anchors.rows)
    shape = base.shape
    found: dict[str, NDArray] = {
        "class": np.zeros(shape[:1], np.int64),
        "length": np.zeros(shape[:1], np.float32),
        "offsets": np.zeros(shape, np.float32),
        "reach": np.zeros(shape, bool),
    }
    if not len(lines):
        return found
    distance = np.stack([_distance(line, base, anchors) for line in lines])
    nearest = distance.argmin(0)
    closest = distance.min(0)
    found["class"][closest < _FAR] = _IGNORED
    found["class"][closest < _NEAR] = 1
    for number, anchor in enumerate(distance.argmin(1)):
        found["class"][anchor], nearest[anchor] = 1, number
    index = np.arange(anchors.count)
    for anchor, line in enumerate(lines[nearest]):
        seen = np.flatnonzero(~np.isnan(line))
        found["length"][anchor] = seen[-1] - anchors.first[anchor] + 1
        found["offsets"][anchor] = _extended(line) - base[anchor]
        found["reach"][anchor] = (index >= min(seen[0], anchors.first[anchor])) & (index <= seen[-1])
    return found


def _at_anchor_rows(lanes: Lanes, anchors: AnchorLines) -> Numbers:
    """x of the lines [lines, rows] at the rows of the anchors, of those with two rows or more."""
    x = lanes.at(anchors.rows[::-1]).x[:, ::-1]
    return x[(~np.isnan(x)).sum(1) >= _FEWEST_ROWS]


def _extended(line: Numbers) -> Numbers:
    """A line led on straight at both ends."""
    seen = np.flatnonzero(~np.isnan(line))
    first, last = seen[0], seen[-1]
    index = np.arange(len(line))
    down = line[first] + (index - first) * (line[first + 1] - line[first])
    up = line[last] + (index - last) * (line[last] - line[last - 1])
    return np.where(index < first, down, np.where(index > last, up, line))


def _distance(line: Numbers, base: Numbers, anchors: AnchorLines) -> NDArray:
    """From a line to every anchor [anchors]: mean distance in x over the rows of the line, and that of the
    starts in y."""
    seen = np.flatnonzero(~np.isnan(line))
    apart = np.abs(base[:, seen] - line[seen]).mean(1)
    return apart + np.abs(anchors.first - seen[0]) * anchors.step / 2


def loss(outputs: dict[str, Tensor], targets: dict[str, Tensor]) -> Tensor:
    """Cross-entropy of the classes, and distances of offsets in pixels and lengths in rows."""
    positive = targets["class"] == 1
    count = positive.sum().clamp(min=1)
    classes = F.cross_entropy(
        outputs["class"].transpose(1, 2), targets["class"], ignore_index=_IGNORED, reduction="sum"
    )
    length = F.smooth_l1_loss(outputs["length"][positive], targets["length"][positive], reduction="sum")
    reach = targets["reach"][positive]
    apart = F.smooth_l1_loss(
        outputs["offsets"][positive], targets["offsets"][positive], reduction="none", beta=0.5
    )
    offsets = (apart * reach).sum(1) / reach.sum(1).clamp(min=1)
    return (classes + 0.5 * length + offsets.sum()) / count
