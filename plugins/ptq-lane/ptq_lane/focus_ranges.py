"""The step `focus-ranges`: ranges of activations are found for what the network makes of lanes."""

from collections.abc import Callable
from typing import ClassVar

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F

from ptq_lane.focus import Focus, lane_map
from ptq_lane.selective_focus import lane_task
from ptqcore import Block, Calibration, Dataflow, Step, StepOptions


class FocusRangesOptions(StepOptions):
    """focus: of groups of outputs. floor: the weight of everything else that lies where no lane is."""

    focus: Focus = Focus()
    floor: float = Field(default=0.1, ge=0, le=1)


class FocusRanges(Step):
    """Weighs what observers of activations see: maps by where the full-precision model finds lanes, groups
    of outputs by its confidence. What has no place in the image counts the same everywhere."""

    name = "focus-ranges"
    stage = "transform"
    Options: ClassVar[type[FocusRangesOptions]] = FocusRangesOptions
    options: FocusRangesOptions

    @torch.no_grad()
    def prepare(self, model: nn.Module, flow: Dataflow, run: Callable[[], object]) -> None:
        """Find the lanes of the calibration images in full precision."""
        task = lane_task(self)
        adapter = task.adapter
        self._maps: list[Tensor] = []
        self._groups: list[dict[tuple[int, ...], Tensor]] = []
        for sample in task.samples(model):
            outputs = task.forward(model, sample)
            self._maps.append(lane_map(adapter.decode(outputs)[0], adapter.frame))
            heads, weights = adapter.heads(outputs), self.options.focus.weights(adapter, outputs)
            self._groups.append(
                {_sides(heads[name]): weight.expand_as(heads[name]) for name, weight in weights.items()}
            )

    def transform(self, block: Block, calibration: Calibration) -> None:
        """Have the observers of a block weigh what they see."""
        calibration.weigh(self._weight)

    def _weight(self, x: Tensor, sample: int) -> Tensor | None:
        group = self._groups[sample].get(_sides(x))
        if group is not None:
            return group.reshape(x.shape)
        if x.ndim != 4 or min(x.shape[2:]) < 2:
            return None
        near = F.adaptive_max_pool2d(self._maps[sample], x.shape[2:])
        return self.options.floor + (1 - self.options.floor) * near


def _sides(x: Tensor) -> tuple[int, ...]:
    """The lengths of a tensor's sides but for those of 1, which groups of outputs may have lost."""
    return tuple(length for length in x.shape if length > 1)
