"""LSTR's network (Liu et al., arXiv 2011.04233): a narrow ResNet-18, a transformer, and four heads."""

from torch import Tensor, nn

from ptq_lane.lstr.transformer import Transformer

WIDTHS = (16, 32, 64, 128)
DEPTHS = (1, 2, 2, 2)
CHANNELS = 32
HEADS = 2
FEEDFORWARD = 128
DEPTH = 2
QUERIES = 7


class BasicBlock(nn.Module):
    """act2(bn2(conv2(act1(bn1(conv1(x))))) + downsample(x))."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.act1 = nn.ReLU()
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.downsample = nn.Identity() if stride == 1 else _downsample(inputs, outputs, stride)
        self.act2 = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        y = self.bn2(self.conv2(self.act1(self.bn1(self.conv1(x)))))
        return self.act2(y + self.downsample(x))


class Backbone(nn.Module):
    """Images [n, 3, h, w] to features [n, 128, h / 32, w / 32], sides rounded up."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, WIDTHS[0], 7, stride=2, padding=3, bias=False)
        self.bn1 = nn.BatchNorm2d(WIDTHS[0])
        self.act = nn.ReLU()
        self.pool = nn.MaxPool2d(3, stride=2, padding=1)
        self.layer1 = _stage(WIDTHS[0], WIDTHS[0], DEPTHS[0])
        self.layer2 = _stage(WIDTHS[0], WIDTHS[1], DEPTHS[1])
        self.layer3 = _stage(WIDTHS[1], WIDTHS[2], DEPTHS[2])
        self.layer4 = _stage(WIDTHS[2], WIDTHS[3], DEPTHS[3])

    def forward(self, images: Tensor) -> Tensor:
        x = self.pool(self.act(self.bn1(self.conv1(images))))
        return self.layer4(self.layer3(self.layer2(self.layer1(x))))


class Hidden(nn.Sequential):
    """Two linear layers with ReLU behind each."""

    def __init__(self, channels: int) -> None:
        super().__init__(nn.Linear(channels, channels), nn.ReLU(), nn.Linear(channels, channels), nn.ReLU())


class LSTR(nn.Module):
    """Images [n, 3, h, w] to one candidate lane a query, in four groups.

    "class": logits [n, queries, classes]; class 1 is a lane.
    "bounds": where a lane begins and ends [n, queries, 2], in image heights.
    "shared": k'', f'', m'', n' [n, 1, 4] of all lanes of an image, the mean over queries.
    "specific": b'', b''' [n, queries, 2] of each lane.

    Lanes are x(y) = k'' / (y - f'')² + m'' / (y - f'') + n' + b'' y - b''' (equation 5), x in image widths
    and y in image heights. The padding mask of the published network is left out: images fill its input.
    """

    def __init__(self, classes: int) -> None:
        super().__init__()
        self.backbone = Backbone()
        self.input_proj = nn.Conv2d(WIDTHS[-1], CHANNELS, 1)
        self.query_embed = nn.Embedding(QUERIES, CHANNELS)
        self.transformer = Transformer(CHANNELS, HEADS, FEEDFORWARD, DEPTH)
        self.class_head = nn.Linear(CHANNELS, classes)
        self.own_hidden = Hidden(CHANNELS)
        self.bounds_head = nn.Linear(CHANNELS, 2)
        self.specific_head = nn.Linear(CHANNELS, 2)
        self.shared_hidden = Hidden(CHANNELS)
        self.shared_head = nn.Linear(CHANNELS, 4)

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        features = self.input_proj(self.backbone(images))
        x = self.transformer(features, self.query_embed.weight)
        own = self.own_hidden(x)
        return {
            "class": self.class_head(x),
            "bounds": self.bounds_head(own),
            "shared": self.shared_head(self.shared_hidden(x)).mean(dim=1, keepdim=True),
            "specific": self.specific_head(own),
        }


def _stage(inputs: int, outputs: int, depth: int) -> nn.Sequential:
    """Blocks; the first halves the resolution where it widens."""
    first = BasicBlock(inputs, outputs, stride=1 if inputs == outputs else 2)
    return nn.Sequential(first, *(BasicBlock(outputs, outputs, stride=1) for _ in range(depth - 1)))


def _downsample(inputs: int, outputs: int, stride: int) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs))
