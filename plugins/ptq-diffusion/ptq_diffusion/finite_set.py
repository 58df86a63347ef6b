"""The step `finite-set-calibration`: a range for each timestep (TFMQ-DM, Huang et al., CVPR 2024)."""

from collections.abc import Callable
from typing import ClassVar, Literal

from torch import nn

from ptq_diffusion.temporal_step import TemporalStep
from ptqcore import Dataflow, StepOptions, say


class FiniteSetOptions(StepOptions):
    """scope: `temporal`, the inputs of the temporal block's layers, which take one value for each timestep
    (what the paper says); `all`, every static activation (what its released code does)."""

    scope: Literal["temporal", "all"] = "temporal"


class FiniteSetCalibration(TemporalStep):
    """Static activations get one range for each timestep of the schedule, looked up by the value of the
    timestep, once a call of the denoiser.

    Inputs of the temporal block take one value at each timestep, and get the range of that; in other
    schedules too. For other activations the recipe's observer finds it.
    """

    name = "finite-set-calibration"
    Options: ClassVar[type[StepOptions]] = FiniteSetOptions
    options: FiniteSetOptions
    stage = "range"

    def prepare(self, model: nn.Module, flow: Dataflow, run: Callable[[], object]) -> None:
        temporal = self.find(model, flow, run)
        paths = list(temporal.block)
        if self.options.scope == "all":
            paths = [path for path, _ in model.named_modules()]
        elif not paths:
            say("finite-set-calibration: the denoiser has no layer that depends on the timestep alone")
        self.context.grids.range_for_each_timestep(paths, of_timestep=temporal.block)
