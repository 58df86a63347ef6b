"""Small networks with every pattern that the ONNX exporter knows, and a task that quantizes them."""

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ptqcore import Plugin, Task, TaskOptions

CHANNELS, SIZE = 8, 8


def conv(inputs: int = CHANNELS, outputs: int = CHANNELS, kernel: int = 3, **options: Any) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, kernel, padding=kernel // 2, **options)


class Residual(nn.Module):
    """conv, ReLU, conv, sum, ReLU; in place where `inplace`."""

    def __init__(self, inplace: bool = False) -> None:
        super().__init__()
        self.stem, self.first, self.second = conv(3), conv(), conv()
        self.act = nn.ReLU(inplace)
        self.inplace = inplace

    def forward(self, image: Tensor) -> Tensor:
        x = self.act(self.stem(image))
        y = self.second(self.act(self.first(x)))
        if self.inplace:
            y += x
        else:
            y = y + x
        return self.act(y)


class Concat(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem, self.left, self.right, self.join = conv(3), conv(), conv(kernel=1), conv(2 * CHANNELS)

    def forward(self, image: Tensor) -> Tensor:
        x = F.relu(self.stem(image))
        return self.join(torch.cat([self.left(x), F.relu(self.right(x))], dim=1))


class Pooled(nn.Module):
    """Max pooling, depthwise convolution, global pooling and a linear head."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.depthwise = conv(3), conv(groups=CHANNELS)
        self.head = nn.Linear(CHANNELS, 5)

    def forward(self, image: Tensor) -> Tensor:
        x = F.max_pool2d(F.relu(self.stem(image)), 2)
        x = F.relu6(self.depthwise(x))
        return self.head(F.adaptive_avg_pool2d(x, 1).flatten(1))


class MeanHead(nn.Module):
    """The mean over height and width, without the dimensions that are left."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.head = conv(3), nn.Linear(CHANNELS, 5, bias=False)

    def forward(self, image: Tensor) -> Tensor:
        return self.head(F.relu(self.stem(image)).mean((2, 3)))


class UpSampled(nn.Module):
    def __init__(self, groups: int = 1) -> None:
        super().__init__()
        self.stem, self.last = conv(3), conv()
        self.up = nn.ConvTranspose2d(CHANNELS, CHANNELS, 2, stride=2, groups=groups)

    def forward(self, image: Tensor) -> Tensor:
        return self.last(F.relu(self.up(F.relu(self.stem(image)))))


class Nearest(nn.Module):
    """Nearest-neighbour resizing, slices, padding and average pooling over padding."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.middle, self.last = conv(3), conv(), conv()

    def forward(self, image: Tensor) -> Tensor:
        x = F.interpolate(self.stem(image), scale_factor=2.0)
        x = self.middle(F.pad(x[:, :, ::2, ::2], (1, 1, 1, 1)))
        left, right = F.avg_pool2d(x, 3, 2, 1).chunk(2, dim=1)
        return self.last(torch.cat([right, left], dim=1))


class Smooth(nn.Module):
    """SiLU, HardSwish and PReLU between convolutions, and a gate."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.first, self.second, self.third = conv(3), conv(), conv(), conv()
        self.gate, self.prelu = conv(kernel=1), nn.PReLU(CHANNELS)

    def forward(self, image: Tensor) -> Tensor:
        x = F.silu(self.stem(image))
        x = F.hardswish(self.first(x))
        x = x * torch.sigmoid(self.gate(F.adaptive_avg_pool2d(x, 1)))
        return self.third(self.prelu(self.second(x)))


class Tokens(nn.Module):
    """Linear layers on three dimensions; two inputs."""

    def __init__(self) -> None:
        super().__init__()
        self.wide, self.narrow = nn.Linear(CHANNELS, 2 * CHANNELS), nn.Linear(2 * CHANNELS, CHANNELS)
        self.mix, self.last = nn.Linear(CHANNELS, CHANNELS), nn.Linear(CHANNELS, CHANNELS, bias=False)

    def forward(self, tokens: Tensor, other: Tensor) -> tuple[Tensor, Tensor]:
        x = self.narrow(F.gelu(self.wide(tokens)))
        return self.last(F.relu(x + self.mix(other))), x


class Shared(nn.Module):
    """One layer called twice, on different scales."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.again = conv(3), conv()

    def forward(self, image: Tensor) -> Tensor:
        x = F.relu(self.again(F.relu(self.stem(image))))
        return self.again(4 * x)


class Chain(nn.Module):
    """Three convolutions with ReLU, to leave one of them alone."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.third = conv(3), conv(), conv()

    def forward(self, image: Tensor) -> Tensor:
        return self.third(F.relu(self.second(F.relu(self.first(image)))))


NETWORKS: dict[str, Callable[[], nn.Module]] = {
    "residual": Residual,
    "residual-inplace": lambda: Residual(inplace=True),
    "concat": Concat,
    "pooled": Pooled,
    "mean-head": MeanHead,
    "upsampled": UpSampled,
    "upsampled-groups": lambda: UpSampled(groups=2),
    "upsampled-depthwise": lambda: UpSampled(groups=CHANNELS),
    "nearest": Nearest,
    "smooth": Smooth,
    "tokens": Tokens,
    "shared": Shared,
    "chain": Chain,
}


class TinyOptions(TaskOptions):
    """network: one of `NETWORKS`; batch: images in a sample."""

    network: str
    batch: int = 1


class TinyTask(Task):
    """A seeded network on noise, judged by nothing."""

    name = "tiny"
    Options: ClassVar[type[TaskOptions]] = TinyOptions
    options: TinyOptions

    def load_model(self) -> nn.Module:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.seed)
            return NETWORKS[self.options.network]().eval()

    def samples(self, model: nn.Module) -> Sequence[Any]:
        generator = torch.Generator().manual_seed(self.seed)

        def noise(*shape: int) -> Tensor:
            return torch.randn(self.options.batch, *shape, generator=generator)

        if isinstance(model, Tokens):
            return [{"tokens": noise(5, CHANNELS), "other": noise(1, CHANNELS)} for _ in range(8)]
        return [noise(3, SIZE, SIZE) for _ in range(8)]

    def evaluate(self, model: nn.Module) -> dict[str, float]:
        return {"nothing": 0.0}

    def save_assets(self, folder: Path) -> None:
        (folder / "network.json").write_text(json.dumps(self.options.network), encoding="utf-8")

    @classmethod
    def build(cls, folder: Path) -> nn.Module:
        return NETWORKS[json.loads((folder / "network.json").read_text(encoding="utf-8"))]().eval()


PLUGIN = Plugin(name="tiny", tasks={"tiny": "tiny_networks:TinyTask"})
