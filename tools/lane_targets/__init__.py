"""What each small network of ptq-lane is to answer, and how far its answers are from that.

One module a family, named after it (`row-anchor` is row_anchor.py), with the four functions of `Family`.
`tools/train_lanes.py` builds `network()`, calls `targets` once for every scene and once for its mirror
image, keeps the results, stacks those of a batch, and trains by `loss`. `adapter` decodes when F1 is
measured.

Not part of any distribution: only the weights are.
"""

from importlib import import_module
from typing import Protocol, cast

import numpy as np
from numpy.typing import NDArray
from torch import Tensor, nn

from ptq_lane import Adapter, Frame, Lanes

FAMILIES = ("segmentation", "row-anchor", "anchor", "keypoint", "curve")
SLOTS = 4
"""Lines around the car: second left, left, right, second right; the car drives between 1 and 2."""


class Family(Protocol):
    """What train_lanes.py calls; every function is at module level."""

    def network(self) -> nn.Module:
        """The network to train, freshly initialised from torch's global generator; takes images
        [n, 3, 96, 192], returns a dict of tensors, batch first."""
        ...

    def adapter(self, frame: Frame) -> Adapter:
        """The reader of the network's outputs, with lanes in pixels of `frame`."""
        ...

    def targets(self, lanes: Lanes, frame: Frame) -> dict[str, NDArray]:
        """What the network is to answer for one image.

        Args:
            lanes: at `frame.rows`, NaN where a line is absent or out of sight, at most one of each slot,
                any number of lines, lines without any row included; x may lie outside the image.
            frame: the size of the image, 192 x 96; pixel i has its centre at i.

        Returns:
            arrays of the same names, shapes and types for every image (float32, int64, bool or uint8:
            small types save memory), without a batch dimension.
        """
        ...

    def loss(self, outputs: dict[str, Tensor], targets: dict[str, Tensor]) -> Tensor:
        """One number to minimise, a mean over the batch, so that its size does not depend on it.

        Args:
            outputs: of the network in training mode, for n images.
            targets: those of `targets` as tensors of the same types, stacked [n, ...].
        """
        ...


def family(name: str) -> Family:
    """The module of a family of `FAMILIES`."""
    return cast(Family, import_module(f"lane_targets.{name.replace('-', '_')}"))


def by_slot(lanes: Lanes) -> NDArray[np.float64]:
    """x [SLOTS, rows] in pixels, NaN where there is no line."""
    x = np.full((SLOTS, len(lanes.rows)), np.nan)
    if lanes.slots is not None:
        x[lanes.slots] = lanes.x
    return x


def mirrored(lanes: Lanes, frame: Frame) -> Lanes:
    """The lanes of the mirror image: left and right slots change places; slots stay ascending."""
    x = frame.width - 1 - by_slot(lanes)[::-1]
    present = ~np.isnan(x).all(axis=1)
    return Lanes(lanes.rows, x[present], np.flatnonzero(present))
