"""A small network that gives curves, in the manner of BezierLaneNet (arXiv 2203.02431)."""

import torch
from torch import Tensor, nn

from ptq_lane.networks.backbone import STRIDE, Backbone

_HIDDEN = 64


class FlipFusion(nn.Module):
    """Adds what a convolution sees in the mirror image: act(own(x) + other(flipped x)).

    The feature flip fusion of BezierLaneNet (section 3.3) with plain convolutions.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.own = nn.Sequential(nn.Conv2d(channels, channels, 1, bias=False), nn.BatchNorm2d(channels))
        self.other = nn.Sequential(
            nn.Conv2d(channels, channels, 3, padding=1, bias=False), nn.BatchNorm2d(channels)
        )
        self.act = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.own(x) + self.other(torch.flip(x, (3,))))


class ColumnConv(nn.Sequential):
    """Convolution along a row of columns, batch norm, ReLU: `conv`, `norm`, `act`."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(inputs, outputs, (1, 3), padding=(0, 1), bias=False)
        self.norm = nn.BatchNorm2d(outputs)
        self.act = nn.ReLU()


class CurveNet(nn.Module):
    """Images [n, 3, height, width] to the outputs of `ptq_lane.families.curve`, a curve every 8 pixels.

    `existence` [n, width / 8]; `points` [n, 8, width / 8].
    """

    def __init__(self, height: int = 96) -> None:
        """Args:
        height: of the images, a multiple of 8.
        """
        super().__init__()
        self.backbone = Backbone()
        channels = self.backbone.out_channels
        self.fusion = FlipFusion(channels)
        self.pool = nn.AvgPool2d((height // STRIDE, 1))
        self.columns = nn.Sequential(ColumnConv(channels, _HIDDEN), ColumnConv(_HIDDEN, _HIDDEN))
        self.existence = nn.Conv2d(_HIDDEN, 1, 1)
        self.points = nn.Conv2d(_HIDDEN, 8, 1)

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        columns = self.columns(self.pool(self.fusion(self.backbone(images))))
        return {
            "existence": self.existence(columns).flatten(1),
            "points": self.points(columns).flatten(2),
        }
