"""The task `toy-regression`: a seeded residual network on seeded images, judged against itself."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import ClassVar

import torch
from pydantic import Field
from torch import Tensor, nn

from ptqcore import DataError, Task, TaskOptions

IMAGE = (3, 6, 6)


class ToyOptions(TaskOptions):
    """width: features of the residual blocks; depth: their number; samples: calibration batches."""

    width: int = Field(default=24, ge=4, le=512)
    depth: int = Field(default=2, ge=1, le=16)
    samples: int = Field(default=6, ge=1)


class Residual(nn.Module):
    """x + W₂ relu(W₁ x)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.expand = nn.Linear(width, 2 * width)
        self.contract = nn.Linear(2 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.contract(torch.relu(self.expand(x)))


class Stem(nn.Module):
    """Images [n, 3, 6, 6] to features [n, width]: a strided convolution, averaged over its places."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(IMAGE[0], width, kernel_size=3, stride=2, padding=1)

    def forward(self, image: Tensor) -> Tensor:
        return torch.relu(self.conv(image)).mean((-2, -1))


def network(width: int, depth: int) -> nn.Sequential:
    """The structure: stem, residual blocks, head."""
    return nn.Sequential(Stem(width), *(Residual(width) for _ in range(depth)), nn.Linear(width, 5)).eval()


class ToyRegression(Task):
    """How far the outputs of the quantized network are from those of the full-precision one."""

    name = "toy-regression"
    Options: ClassVar[type[TaskOptions]] = ToyOptions
    options: ToyOptions

    def load_model(self) -> nn.Module:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.seed)
            return network(self.options.width, self.options.depth)

    def samples(self, model: nn.Module) -> Sequence[Tensor]:
        return list(self._images(self.seed + 1, self.options.samples))

    def evaluate(self, model: nn.Module) -> dict[str, float]:
        with torch.no_grad():
            outputs = model(self._images(self.seed + 2, 4).flatten(0, 1))
        if not hasattr(self, "_reference"):
            self._reference = outputs
        error = outputs - self._reference
        return {"mse": float(error.square().mean()), "max_error": float(error.abs().max())}

    def save_assets(self, folder: Path) -> None:
        structure = {"width": self.options.width, "depth": self.options.depth}
        (folder / "network.json").write_text(json.dumps(structure), encoding="utf-8")

    @classmethod
    def build(cls, folder: Path) -> nn.Module:
        try:
            return network(**json.loads((folder / "network.json").read_text(encoding="utf-8")))
        except (OSError, ValueError, TypeError) as error:
            raise DataError(f"{folder}/network.json does not describe a toy network: {error}") from None

    def _images(self, seed: int, batches: int) -> Tensor:
        """Seeded noise [batches, 8, 3, 6, 6]."""
        return torch.randn(batches, 8, *IMAGE, generator=torch.Generator().manual_seed(seed))
