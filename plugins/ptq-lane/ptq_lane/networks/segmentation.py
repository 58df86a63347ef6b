"""A small lane segmentation network after SCNN (arXiv 1712.06080) and RESA (arXiv 2008.13719)."""

import torch
from torch import Tensor, nn

from ptq_lane.networks.backbone import STRIDE, Backbone, ConvNormAct

_UPSAMPLED = 12
_EXISTENCE_CHANNELS = 8
_POOLED = 3


class ShiftSum(nn.Module):
    """One shift and sum of RESA (section 3.2): x + relu(conv(x, rolled by `shift` along `dim`)).

    The convolution is one-dimensional, across the direction of the shift.
    """

    def __init__(self, channels: int, dim: int, shift: int) -> None:
        super().__init__()
        self.dim, self.shift = dim, shift
        kernel = (1, 5) if dim == 2 else (5, 1)
        self.conv = nn.Conv2d(
            channels, channels, kernel, padding=(kernel[0] // 2, kernel[1] // 2), bias=False
        )
        self.act = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        return x + self.act(self.conv(torch.roll(x, self.shift, self.dim)))


class Upsample(nn.Sequential):
    """Transposed convolution to four times the size, batch norm, ReLU: `conv`, `norm`, `act`."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.conv = nn.ConvTranspose2d(inputs, outputs, 8, stride=4, padding=2, bias=False)
        self.norm = nn.BatchNorm2d(outputs)
        self.act = nn.ReLU()


class Existence(nn.Sequential):
    """Features [n, channels, h, w] to logits [n, slots]: `reduce`, `pool` by 3, `flatten`, `linear`."""

    def __init__(self, channels: int, slots: int, height: int, width: int) -> None:
        super().__init__()
        self.reduce = ConvNormAct(channels, _EXISTENCE_CHANNELS)
        self.pool = nn.AvgPool2d(_POOLED)
        self.flatten = nn.Flatten()
        self.linear = nn.Linear(_EXISTENCE_CHANNELS * (height // _POOLED) * (width // _POOLED), slots)


class SegmentationNet(nn.Module):
    """Images [n, 3, height, width] to the logits of `ptq_lane.families.segmentation`.

    `lanes` [n, 1 + slots, height / 2, width / 2], background first; `existence` [n, slots].
    """

    def __init__(self, slots: int = 4, height: int = 96, width: int = 192) -> None:
        """Args:
        height, width: of the images, multiples of 24.
        """
        super().__init__()
        self.backbone = Backbone()
        channels = self.backbone.out_channels
        height, width = height // STRIDE, width // STRIDE
        self.spread = nn.Sequential(
            ShiftSum(channels, 2, height // 2),
            ShiftSum(channels, 2, -(height // 4)),
            ShiftSum(channels, 3, width // 2),
            ShiftSum(channels, 3, -(width // 4)),
        )
        self.upsample = Upsample(channels, _UPSAMPLED)
        self.lanes = nn.Conv2d(_UPSAMPLED, 1 + slots, 3, padding=1)
        self.existence = Existence(channels, slots, height, width)

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        features = self.spread(self.backbone(images))
        return {"lanes": self.lanes(self.upsample(features)), "existence": self.existence(features)}
