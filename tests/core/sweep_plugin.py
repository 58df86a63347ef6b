"""A plugin for sweeps: three small blocks, and a step that can be told to wait or to go wrong."""

import os
import time
from pathlib import Path

import torch
from torch import nn

from ptqcore import Plugin, Step, StepOptions, Task, TaskOptions


class NapOptions(StepOptions):
    """file: where the process that rounds the second block writes its number, to be killed while it waits;
    where the file is already, it does not wait. trace: a file for the name of every block that is begun.
    wrong: what goes wrong, if anything."""

    file: str | None = None
    trace: str | None = None
    wrong: str = ""


class Nap(Step):
    """Changes nothing."""

    name = "nap"
    Options = NapOptions

    def block(self, block, calibration):
        options = self.options
        if options.wrong:
            raise RuntimeError(options.wrong)
        if options.trace:
            with open(options.trace, "a", encoding="utf-8") as trace:
                trace.write(f"{block.path}\n")
        if options.file and block.path == "1" and not Path(options.file).exists():
            part = Path(f"{options.file}.part")
            part.write_text(str(os.getpid()))
            part.rename(options.file)
            time.sleep(120)


class SmallOptions(TaskOptions):
    width: int = 8


class Small(Task):
    """Residual blocks of the width that is wanted, with weights of the run's seed."""

    name = "small"
    Options = SmallOptions

    def load_model(self):
        torch.manual_seed(self.seed)
        return _network(self.options.width)

    def samples(self, model):
        generator = torch.Generator().manual_seed(self.seed)
        return [torch.randn(4, self.options.width, generator=generator) for _ in range(2)]

    def evaluate(self, model):
        with torch.no_grad():
            return {"sum": sum(float(model(sample).sum()) for sample in self.samples(model))}

    def save_assets(self, folder):
        (folder / "width.txt").write_text(str(self.options.width))

    @classmethod
    def build(cls, folder):
        return _network(int((folder / "width.txt").read_text()))


class Residual(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.inner, self.outer = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)

    def forward(self, x):
        return x + self.outer(torch.relu(self.inner(x)))


def _network(width):
    return nn.Sequential(*(Residual(width) for _ in range(3))).eval()


plugin = Plugin(
    name="small",
    tasks={"small": "sweep_plugin:Small"},
    steps={"nap": "sweep_plugin:Nap"},
)
