"""A small network that describes lanes against anchors, in the manner of LaneATT (arXiv 2010.12035)."""

import numpy as np
import torch
from torch import Tensor, nn

from ptq_lane.anchor_lines import AnchorLines, road_anchors
from ptq_lane.networks.backbone import STRIDE, Backbone

_REDUCED = 16


class AnchorNet(nn.Module):
    """Images [n, 3, height, width] to the outputs of `ptq_lane.families.anchor`.

    `class` [n, anchors, 2], background first; `length` [n, anchors]; `offsets` [n, anchors, rows]. Each
    anchor sees the features that lie on its line, one of each row of features and zeros outside the image,
    and the mean of those of all anchors, weighted by attention (LaneATT, section 3.3).
    """

    cells: Tensor
    inside: Tensor

    def __init__(self, anchors: AnchorLines | None = None) -> None:
        """Args:
        anchors: in images of the network's size, a multiple of 8; default: `road_anchors()`.
        """
        super().__init__()
        anchors = anchors or road_anchors()
        self.rows = anchors.height // STRIDE
        self.backbone = Backbone()
        self.reduce = nn.Conv2d(self.backbone.out_channels, _REDUCED, 1)
        local = _REDUCED * self.rows
        self.attention = nn.Linear(local, len(anchors))
        self.classes = nn.Linear(2 * local, 2)
        self.length = nn.Linear(2 * local, 1)
        self.offsets = nn.Linear(2 * local, anchors.count)
        cells, inside = _cells(anchors)
        self.register_buffer("cells", cells, persistent=False)
        self.register_buffer("inside", inside, persistent=False)

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        features = self.reduce(self.backbone(images)).flatten(2)
        pooled = (features[:, :, self.cells] * self.inside).unflatten(2, (-1, self.rows))
        local = pooled.transpose(1, 2).flatten(2)
        attention = self.attention(local).softmax(2)
        seen = torch.cat([local, attention @ local], 2)
        return {
            "class": self.classes(seen),
            "length": self.length(seen).flatten(1),
            "offsets": self.offsets(seen),
        }


def _cells(anchors: AnchorLines) -> tuple[Tensor, Tensor]:
    """Where each anchor's features lie in a map, and 1 where inside it, else 0: [anchors * rows]."""
    row = np.arange(anchors.height // STRIDE, dtype=np.float64)
    across = anchors.width // STRIDE
    column = np.floor((anchors.x((row + 0.5) * STRIDE - 0.5) + 0.5) / STRIDE)
    inside = (column >= 0) & (column < across)
    cells = row * across + column.clip(0, across - 1)
    return torch.from_numpy(cells.astype(np.int64).ravel()), torch.from_numpy(inside.ravel()).float()
