"""A family of lane detectors as a stranger would write it: one straight line a slot."""

import cv2
import numpy as np
import torch
from torch import nn

from ptq_lane import Adapter, Frame, Lanes

SLOTS = 3
FRAME = Frame(width=64, height=32)


class Toy(Adapter):
    """Outputs: a tensor [n, slots, 4] of one tensor that mixes meanings: score, x in tenths of the width,
    half-slope in pixels a row, and a number that nothing reads."""

    name = "toy"
    confidence_heads = frozenset({"score"})
    scale = 1.0  # of what is called x here

    def heads(self, outputs):
        names = ("score", "x", "slope", "ignored")
        return {name: outputs[..., place : place + 1] for place, name in enumerate(names)}

    def confidence(self, outputs):
        score = outputs[..., :1].sigmoid()
        return {"score": score, "x": score, "slope": score}

    def _x(self, outputs):
        rows = torch.from_numpy(self.frame.rows)
        x = outputs[..., 1:2].double() / self.scale * self.frame.width / 10
        return x + outputs[..., 2:3].double() * 2 * (rows - self.frame.height / 2)

    def decode(self, outputs):
        found = []
        for x, score in zip(self._x(outputs), outputs[..., 0], strict=True):
            kept = (score > 0).nonzero()[:, 0]
            found.append(Lanes(self.frame.rows, x[kept].numpy(), kept.numpy()))
        return found

    def geometry(self, outputs):
        return self._x(outputs).float(), outputs[..., :1].sigmoid().expand(-1, -1, len(self.frame.rows))


class ToyNet(nn.Module):
    """Images [n, 3, 32, 64] to outputs of `Toy`; every slot is a lane, or none of the third."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.one = nn.Conv2d(3, 8, 3, stride=4, padding=1)
        self.two = nn.Conv2d(8, 8, 3, stride=2, padding=1)
        self.head = nn.Linear(8 * 4 * 8, SLOTS * 4)
        with torch.no_grad():
            self.head.weight.mul_(3)
            self.head.bias.copy_(torch.tensor([[9.0, 2, 0, 0], [9, 5, 0, 0], [-9, 8, 0, 0]]).flatten())

    def forward(self, images):
        x = self.two(self.one(images).relu()).relu().flatten(1)
        return self.head(x).view(-1, SLOTS, 4)


def outputs(batch=4, seed=0):
    """Planted outputs: two lanes and no third."""
    random = np.random.default_rng(seed)
    found = torch.from_numpy(random.normal(0, 0.3, (batch, SLOTS, 4))).float()
    found[..., 0] += torch.tensor([6.0, 6.0, -6.0])
    found[..., 1] += torch.tensor([3.0, 6.0, 9.0])
    found[..., 2] *= 0.1
    return found


def write_pictures(folder, count):
    """Small pictures of soft colours."""
    random = np.random.default_rng(0)
    for number in range(count):
        picture = cv2.resize(random.integers(0, 256, (4, 8, 3), np.uint8), (FRAME.width, FRAME.height))
        cv2.imwrite(str(folder / f"{number:02}.png"), picture)
