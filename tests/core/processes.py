"""Runs of tiny models, alone or as one of the processes of `torchrun`: processes.py FOLDER CASE…"""

import json
import os
import signal
import sys
from pathlib import Path

import torch
from tiny_task import TinyTask, run
from torch import nn

from ptqcore import DataError, Objective, PtqError, QDrop, Step, distributed, midway, tensors_in

DATAFLOW = {
    "weights": {"bits": 4, "granularity": "channel", "observer": "mse"},
    "activations": {"bits": 8, "symmetric": False, "observer": "percentile"},
    "scope": "dataflow",
}
LAYERS = {
    "weights": {"bits": 4, "granularity": "channel"},
    "activations": {"bits": 8, "symmetric": False, "observer": "moving-average"},
}


class Pictures(nn.Module):
    """Convolutions, and linear layers of which one is wide enough for a Gram in panels."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.first = nn.Sequential(nn.Conv2d(3, 6, 3, padding=1), nn.ReLU())
        self.second = nn.Sequential(nn.Conv2d(6, 6, 3, padding=1), nn.ReLU())
        self.head = nn.Sequential(nn.Linear(6, 300), nn.ReLU(), nn.Linear(300, 4))

    def forward(self, x):
        return self.head(self.second(self.first(x)).mean((2, 3)))


class Body(nn.Module):
    """Tokens above a bound are sent to an expert."""

    def __init__(self):
        super().__init__()
        self.all, self.some = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x):
        x = self.all(x)
        chosen = x[:, 0] > 1
        return x.masked_scatter(chosen[:, None], self.some(x[chosen])) if bool(chosen.any()) else x


class Experts(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(1)
        self.body, self.last = Body(), nn.Linear(8, 2)

    def forward(self, x):
        return self.last(self.body(x))


class Scaled(Step):
    """A step of a stranger, who knows nothing of processes: it reads all samples."""

    name = "scaled"
    stage = "correct"

    def block(self, block, calibration):
        found = tensors_in(list(calibration.io.run()))
        total = float(torch.stack([x.mean() for x in found]).mean())
        for layer in block.quantized_layers().values():
            layer.ensure_bias().data += total


class Deadly(Objective):
    """Ends the first process without a word, the second block being learned."""

    def __init__(self, block):
        self._block = block

    def before(self, updates):
        if self._block == "second" and updates == 20 and "DIES" in os.environ and distributed.is_first():
            os.kill(os.getpid(), signal.SIGKILL)


class Dies(QDrop):
    name = "dies"

    def objective(self, learner, phase, calibration):
        return Deadly(calibration.block.path)


class Missing(TinyTask):
    """Data that the second process lacks."""

    name = "tiny"

    def samples(self, model):
        if not distributed.is_first():
            raise DataError("the disk of this machine holds no samples")
        return super().samples(model)


def pictures(count=7):
    generator = torch.Generator().manual_seed(2)
    return [torch.randn(2, 3, 6, 6, generator=generator) for _ in range(count)]


def tokens():
    generator = torch.Generator().manual_seed(3)
    return [torch.randn(9, 8, generator=generator) for _ in range(5)]


def learned(step, iterations):
    return {step: {"iterations": iterations, "batch": 4}}


def brings(*steps):
    return {step.name: f"{step.__module__}:{step.__qualname__}" for step in steps}


CASES = {
    "dataflow": lambda folder: run(folder, Pictures, pictures(), ["round", "bias-correction"], DATAFLOW),
    "layers": lambda folder: run(folder, Pictures, pictures(), ["equalize", "round"], LAYERS),
    "experts": lambda folder: run(folder, Experts, tokens(), "round", LAYERS),
    "stranger": lambda folder: run(
        folder, Pictures, pictures(), ["round", "scaled"], DATAFLOW, steps=brings(Scaled)
    ),
    "adaround": lambda folder: run(folder, Pictures, pictures(8), learned("adaround", 50), DATAFLOW),
    "brecq": lambda folder: run(folder, Pictures, pictures(8), learned("brecq", 50), DATAFLOW),
    "qdrop": lambda folder: run(folder, Pictures, pictures(8), learned("qdrop", 200), DATAFLOW),
    "killed": lambda folder: run(
        folder,
        Pictures,
        pictures(),
        learned("dies", 40),
        DATAFLOW,
        resume=(folder / ".work").exists(),
        steps=brings(Dies),
    ),
    "too few": lambda folder: run(folder, Pictures, pictures(1), "round", DATAFLOW),
    "missing": lambda folder: run(folder, Pictures, pictures(), "round", DATAFLOW, task=Missing),
}


def main(folder: Path, *cases: str) -> None:
    """Run the cases, each into a folder of its name, with the blocks' errors beside them."""
    for case in cases:
        try:
            record = CASES[case](folder / case)
        except PtqError as error:
            print(f"error: {distributed.name()}{error}", file=sys.stderr, flush=True)
            sys.exit(error.exit_code)
        if distributed.is_first():
            errors = [block.relative_error for block in record.blocks]
            (folder / f"{case}.json").write_text(json.dumps([errors, record.after]))


if __name__ == "__main__":
    midway.SECONDS = 0.0
    main(Path(sys.argv[1]), *sys.argv[2:])
    distributed.leave()
