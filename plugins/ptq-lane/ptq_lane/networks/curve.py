"""A small network that gives curves, in the manner of BezierLaneNet (arXiv 2203.02431)."""

import torch
from torch import Tensor, nn

from ptq_lane.networks.backbone import STRIDE, Backbone, ConvNormAct

_REDUCED = 16
_HIDDEN = 64
_TOP = 0.5  # how high up a curve goes that the network knows nothing of


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

    def __init__(self, inputs: int, outputs: int, kernel: int = 1, dilation: int = 1) -> None:
        super().__init__()
        padding = (0, dilation * (kernel // 2))
        self.conv = nn.Conv2d(
            inputs, outputs, (1, kernel), padding=padding, dilation=(1, dilation), bias=False
        )
        self.norm = nn.BatchNorm2d(outputs)
        self.act = nn.ReLU()


class CurveNet(nn.Module):
    """Images [n, 3, height, width] to the outputs of `ptq_lane.families.curve`, a curve every 8 pixels.

    `existence` [n, width / 8]; `points` [n, 8, width / 8]. A column sees all its rows at once, and the
    columns around it; curves are told relative to a line straight up from the column's place.
    """

    upright: Tensor

    def __init__(self, height: int = 96, width: int = 192) -> None:
        """Args:
        height, width: of the images, multiples of 8.
        """
        super().__init__()
        self.backbone = Backbone()
        channels = self.backbone.out_channels
        self.fusion = FlipFusion(channels)
        self.reduce = ConvNormAct(channels, _REDUCED)
        self.columns = nn.Sequential(
            ColumnConv(_REDUCED * (height // STRIDE), _HIDDEN),
            ColumnConv(_HIDDEN, _HIDDEN, kernel=5),
            ColumnConv(_HIDDEN, _HIDDEN, kernel=5, dilation=2),
        )
        self.existence = nn.Conv2d(_HIDDEN, 1, 1)
        self.points = nn.Conv2d(_HIDDEN, 8, 1)
        self.register_buffer("upright", _upright(width // STRIDE), persistent=False)

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        features = self.reduce(self.fusion(self.backbone(images)))
        columns = self.columns(features.flatten(1, 2)[:, :, None])
        return {
            "existence": self.existence(columns).flatten(1),
            "points": self.points(columns).flatten(2) + self.upright,
        }


def _upright(columns: int) -> Tensor:
    """The control points [8, columns] of lines straight up from the middle of each column."""
    x = (torch.arange(columns) + 0.5) / columns
    y = torch.linspace(1, _TOP, 4)
    return torch.stack([x.expand(4, -1), y[:, None].expand(-1, columns)], 1).flatten(0, 1)
