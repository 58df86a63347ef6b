"""ResNet-20 to ResNet-110 for CIFAR images (He et al., arXiv 1512.03385, section 4.2)."""

import re

from torch import Tensor, nn

_WIDTHS = (16, 32, 64)
DEPTHS = (20, 32, 44, 56, 110)


class Shortcut(nn.Module):
    """Shortcut without parameters (option A): every second row and column, zeros as new channels."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.stride = stride
        new = outputs - inputs
        self.pad = nn.ConstantPad3d((0, 0, 0, 0, new // 2, new - new // 2), 0.0)

    def forward(self, x: Tensor) -> Tensor:
        return self.pad(x[:, :, :: self.stride, :: self.stride])


class BasicBlock(nn.Module):
    """Two 3x3 convolutions and the shortcut: act2(norm2(conv2(act1(norm1(conv1(x))))) + shortcut(x))."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=False)
        self.norm1 = nn.BatchNorm2d(outputs)
        self.act1 = nn.ReLU()
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1, bias=False)
        self.norm2 = nn.BatchNorm2d(outputs)
        same = stride == 1 and inputs == outputs
        self.shortcut = nn.Identity() if same else Shortcut(inputs, outputs, stride)
        self.act2 = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm2(self.conv2(self.act1(self.norm1(self.conv1(x)))))
        return self.act2(y + self.shortcut(x))


class Stem(nn.Sequential):
    """`conv`, `norm`, `act`."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, _WIDTHS[0], 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(_WIDTHS[0])
        self.act = nn.ReLU()


class CifarResNet(nn.Module):
    """Images [n, 3, 32, 32] to logits [n, classes]: `stem`, `stages.0` to `stages.2`, `classifier`."""

    def __init__(self, depth: int, classes: int = 10) -> None:
        """Args:
        depth: 6k + 2 layers with weights.
        classes: 10 for CIFAR-10.
        """
        super().__init__()
        self.stem = Stem()
        stages = []
        channels = _WIDTHS[0]
        for width in _WIDTHS:
            blocks = [BasicBlock(channels, width, stride=1 if width == channels else 2)]
            blocks += [BasicBlock(width, width, stride=1) for _ in range((depth - 2) // 6 - 1)]
            stages.append(nn.Sequential(*blocks))
            channels = width
        self.stages = nn.Sequential(*stages)
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.flatten = nn.Flatten()
        self.classifier = nn.Linear(channels, classes)

    def forward(self, image: Tensor) -> Tensor:
        return self.classifier(self.flatten(self.pool(self.stages(self.stem(image)))))


def renamed(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The state with the usual public names (`conv1`, `layer1.0.bn1`, `linear`) turned into ours."""
    return {_our_name(name): tensor for name, tensor in state.items()}


def _our_name(name: str) -> str:
    name = re.sub(r"^conv1\.", "stem.conv.", name)
    name = re.sub(r"^bn1\.", "stem.norm.", name)
    name = re.sub(r"^linear\.", "classifier.", name)
    name = re.sub(r"^layer([1-3])\.", lambda found: f"stages.{int(found[1]) - 1}.", name)
    return re.sub(r"\.bn([12])\.", r".norm\1.", name)
