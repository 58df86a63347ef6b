"""The recipe w4a8 of ptq-diffusion beside a re-creation of the published schedule: cost and quality.

    pip install --constraint constraints.txt --editable . --editable plugins/ptq-diffusion
    python tools/bench/diffusion.py [--scale 1] [--seed 0] [--samples 128]

Both quantize the embedded denoiser of digits on the same grids, each in a process of its own with one
thread, and one judge compares both with full precision on the same seeds. Cost is CPU-seconds, so that
a busy machine does not change it much; loading, judging and saving are left out. The re-creation, and
how it differs from what was released, is described in `published_schedule.py`: figures are those of a
re-creation on our own modules, not of TFMQ-DM's program.

At --scale 1 it is the published schedule in full, 256 images for each of 20 steps (5,120, as
published) and 20,000 iterations, against the recipe as it is shipped. At other scales iterations of both
are scaled, and so are the images of the published schedule, each image seen as often as published; the
recipe keeps all its calibration data. What the full size would cost is then also extrapolated, below the
table: stages that are scaled, over the scale.
"""

import argparse
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from published_schedule import ACTIVATIONS, BLOCKS, DATA, RANGES, TEMPORAL, Schedule, quantize_as_published
from rich.console import Console
from rich.table import Table
from stages import REST, Stages
from torch import nn

from ptq_diffusion.denoising import Denoising
from ptq_diffusion.finite_set import FiniteSetCalibration
from ptq_diffusion.tiar import TIAR, TIAROptions
from ptqcore import PtqError, load, quantize
from ptqcore.calibration import Calibration
from ptqcore.learned_rounding import BRECQ, ReconstructOptions
from ptqcore.plan import Plan, make_plan
from ptqcore.plugin import discover
from ptqcore.recipe import Recipe, read_recipe
from ptqcore.run import _Run

_STAGES = (DATA, RANGES, TEMPORAL, BLOCKS, ACTIVATIONS, REST)
_LEFT_OUT = "loading, judging, saving"
_JUDGED = ("temporal_error", "teacher_forced_error", "trajectory_error", "image_error")


@dataclass(frozen=True)
class Cost:
    """CPU-seconds of each stage; calls of the denoiser for calibration data, and the rows in them."""

    seconds: dict[str, float]
    calls: int
    rows: int

    @classmethod
    def of(cls, stages: Stages) -> "Cost":
        """What a clock says, without what is left out."""
        with stages(_LEFT_OUT):  # so that what has passed is noted
            pass
        seconds = {name: stages.seconds[name] for name in _STAGES}
        return cls(seconds, stages.calls[DATA], stages.rows[DATA])

    @property
    def total(self) -> float:
        """CPU-seconds of all stages."""
        return sum(self.seconds.values())

    def in_full(self, scale: float, scaled: tuple[str, ...]) -> float:
        """CPU-seconds of all stages, if those that were scaled had not been."""
        return sum(one / scale if name in scaled else one for name, one in self.seconds.items())


Result = tuple[Cost, dict[str, float]]
"""What quantizing cost, and the errors of what came out."""


def recipe_of(overrides: list[str]) -> Recipe:
    """The shipped recipe w4a8, nothing exported."""
    return read_recipe(discover().recipe_file("w4a8", "diffusion"), [*overrides, "export=[]"])


def scaled_iterations(scale: float) -> list[str]:
    """Overrides that scale the iterations of all steps of the recipe that have some."""
    plan = plan_of(recipe_of([]))
    found = []
    for index, (entry, (_, options)) in enumerate(zip(plan.recipe.steps, plan.step_classes, strict=True)):
        if isinstance(options, TIAROptions | ReconstructOptions):
            found.append(
                f"steps.{index}.{entry.name}.iterations={max(round(scale * options.iterations), 1)}"
            )
    return found


def plan_of(recipe: Recipe) -> Plan:
    """Its plan."""
    return make_plan(recipe, "diffusion", discover())


def by_ptqcore(seed: int, scale: float, samples: int) -> Result:
    """Run the recipe, in this process.

    What a run does is charged to stages from outside. Activation ranges are found in the same pass over a
    block as its full-precision outputs, which is charged to them; the learning of activation steps is
    charged to the blocks.
    """
    torch.set_num_threads(1)
    stages = Stages()
    for owner, method, name in (
        (Denoising, "samples", DATA),
        (Calibration, "weight_range", RANGES),
        (TIAR, "prepare", TEMPORAL),
        (FiniteSetCalibration, "prepare", TEMPORAL),
        (BRECQ, "block", BLOCKS),
        (Calibration, "_collect", ACTIVATIONS),
        (Denoising, "load_model", _LEFT_OUT),
        (Denoising, "evaluate", _LEFT_OUT),
        (_Run, "finish", _LEFT_OUT),
    ):
        stages.charge(owner, method, name)
    recipe = recipe_of([f"seed={seed}", "task.samples=2", *scaled_iterations(scale)])
    charged = Denoising.samples

    def counted(task: Denoising, model: nn.Module) -> Sequence[Any]:
        with stages.counting(model):
            return charged(task, model)

    Denoising.samples = counted  # type: ignore[assignment, method-assign]
    with TemporaryDirectory(prefix="ptq-bench-") as folder:
        quantize(recipe, "diffusion", Path(folder) / "run")
        cost = Cost.of(stages)
        return cost, quality(load(Path(folder) / "run"), samples)


def by_published_schedule(seed: int, scale: float, samples: int) -> Result:
    """Quantize as published, in this process."""
    torch.set_num_threads(1)
    stages = Stages()
    with TemporaryDirectory(prefix="ptq-bench-") as folder:
        plan = plan_of(recipe_of([f"seed={seed}"]))
        model = quantize_as_published(plan, Schedule().scaled(scale), stages, Path(folder))
    cost = Cost.of(stages)
    return cost, quality(model, samples)


PROFILES = {"ours": by_ptqcore, "published": by_published_schedule}


def quality(model: nn.Module, samples: int) -> dict[str, float]:
    """Errors of a quantized denoiser, of so many images."""
    with TemporaryDirectory(prefix="ptq-bench-") as workspace:
        task = plan_of(recipe_of([f"task.samples={samples}"])).task(Path(workspace))
        assert isinstance(task, Denoising)
        task.evaluate(task.load_model().eval())
        task.judged = "quantized"
        metrics = task.evaluate(model)
        return {key.replace("_", " "): metrics[key] for key in _JUDGED}


def cost_table(costs: dict[str, Cost], scale: float) -> Table:
    """CPU-seconds by stage, and calls."""
    ours, published = costs["ours"], costs["published"]
    table = Table(title=f"CPU-seconds of one thread, scale {scale:g}")
    for column in ("stage", "ours", "published schedule", "ratio"):
        table.add_column(column, justify="left" if column == "stage" else "right")
    for name in _STAGES:
        one, other = ours.seconds[name], published.seconds[name]
        table.add_row(name, f"{one:.1f}", f"{other:.1f}", f"{other / one:.1f}" if one >= 0.05 else "")
    table.add_section()
    ratio = f"{published.total / ours.total:.1f}"
    table.add_row("all", f"{ours.total:.1f}", f"{published.total:.1f}", ratio, style="bold")
    table.add_section()
    for label, key in (("denoiser calls for calibration data", "calls"), ("rows in them", "rows")):
        one, other = getattr(ours, key), getattr(published, key)
        table.add_row(label, f"{one:,}", f"{other:,}", f"{other / one:.1f}")
    if scale != 1:
        full = (
            ours.in_full(scale, (TEMPORAL, BLOCKS)),
            published.in_full(scale, (DATA, TEMPORAL, BLOCKS, ACTIVATIONS)),
        )
        table.caption = (
            f"extrapolated, not measured, to scale 1: {full[0]:.0f} and {full[1]:.0f} CPU-seconds, "
            f"{full[1] / full[0]:.1f}"
        )
    return table


def quality_table(found: dict[str, dict[str, float]], samples: int) -> Table:
    """Errors of both."""
    table = Table(title=f"error against full precision, {samples} images of the same seeds")
    for column in ("", "ours", "published schedule", "ratio"):
        table.add_column(column, justify="left" if column == "" else "right")
    for name, one in found["ours"].items():
        other = found["published"][name]
        table.add_row(name, f"{one:.3g}", f"{other:.3g}", f"{other / one:.2f}")
    return table


def main() -> None:
    """Run both profiles, judge them, and print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--scale", type=float, default=0.25)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--samples", type=int, default=128, help="images that are judged")
    options = parser.parse_args()
    with get_context("spawn").Pool(1, maxtasksperchild=1) as pool:
        request = (options.seed, options.scale, options.samples)
        results = {name: pool.apply(run, request) for name, run in PROFILES.items()}
    console = Console(width=100)
    console.print(cost_table({name: cost for name, (cost, _) in results.items()}, options.scale))
    console.print(quality_table({name: found for name, (_, found) in results.items()}, options.samples))


if __name__ == "__main__":
    try:
        main()
    except PtqError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
