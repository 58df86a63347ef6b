"""The convolutional trunk that the small networks share; each family trains a copy of its own."""

from torch import Tensor, nn

STRIDE = 8
_DILATIONS = (1, 2, 4)


class ConvNormAct(nn.Sequential):
    """3x3 convolution without bias, batch norm, ReLU: `conv`, `norm`, `act`."""

    def __init__(self, inputs: int, outputs: int, stride: int = 1, dilation: int = 1) -> None:
        super().__init__()
        self.conv = nn.Conv2d(inputs, outputs, 3, stride, padding=dilation, dilation=dilation, bias=False)
        self.norm = nn.BatchNorm2d(outputs)
        self.act = nn.ReLU()


class ResidualBlock(nn.Module):
    """Two dilated 3x3 convolutions around a shortcut: act(norm(conv(first(x))) + x)."""

    def __init__(self, channels: int, dilation: int = 1) -> None:
        super().__init__()
        self.first = ConvNormAct(channels, channels, dilation=dilation)
        self.conv = nn.Conv2d(channels, channels, 3, padding=dilation, dilation=dilation, bias=False)
        self.norm = nn.BatchNorm2d(channels)
        self.act = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.norm(self.conv(self.first(x))) + x)


class Backbone(nn.Module):
    """Images [n, 3, h, w] to features [n, `out_channels`, h / 8, w / 8], not negative.

    Three convolutions of stride 2 with a residual block at stride 4, then residual blocks of growing
    dilation: a feature of the middle of the image sees 120 pixels to each side.
    """

    def __init__(self, channels: int = 32) -> None:
        """Args:
        channels: of the features, a multiple of 4; half as many at stride 2, three quarters at stride 4.
        """
        super().__init__()
        self.out_channels = channels
        half, three_quarters = channels // 2, channels * 3 // 4
        self.stem = ConvNormAct(3, half, stride=2)
        self.stage1 = nn.Sequential(
            ConvNormAct(half, three_quarters, stride=2), ResidualBlock(three_quarters)
        )
        self.stage2 = nn.Sequential(
            ConvNormAct(three_quarters, channels, stride=2),
            *[ResidualBlock(channels, dilation) for dilation in _DILATIONS],
        )

    def forward(self, images: Tensor) -> Tensor:
        return self.stage2(self.stage1(self.stem(images)))
