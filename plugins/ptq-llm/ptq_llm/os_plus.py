"""The step `os-plus`: Outlier Suppression+ (Wei et al., arXiv 2304.09145)."""

from typing import ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from ptq_llm.groups import Group
from ptq_llm.line_search import coarse_to_fine
from ptq_llm.objective import Objective
from ptq_llm.rescale import Rescaling
from ptq_llm.scaling import ChannelStatistics, ScaleOptions, ScaleStep
from ptqcore import Block, StepOptions

_STRIDE = 4


class OSPlusOptions(ScaleOptions):
    """shift: whether channels are centred: `auto`, where norm and layers have biases to hold the offsets;
    `true` gives biases to all, and an offset behind norms that have none (RMSNorm); never where other
    parameters (the router of experts) read the channels. thresholds: values of the threshold from the
    largest magnitude, which scales nothing, down to a quarter of the median, evenly in its logarithm;
    every fourth is tried, then those around the best."""

    groups: Literal["norms", "all"] = "all"
    shift: Literal["auto"] | bool = "auto"
    thresholds: int = Field(default=45, ge=2)


class OSPlus(ScaleStep):
    """Every channel is centred, and channels beyond a threshold are scaled down to it: one number a group
    (eq. 5 and 8, algorithm 1)."""

    name = "os-plus"
    shares_samples = True
    Options: ClassVar[type[StepOptions]] = OSPlusOptions
    options: OSPlusOptions

    def search(self, group: Group, statistics: ChannelStatistics, objective: Objective) -> Rescaling:
        shift = torch.zeros_like(statistics.low)
        if self.shifts(group, objective.block):
            shift = centre(statistics.low, statistics.high)
        magnitude = torch.maximum(statistics.high - shift, shift - statistics.low)
        values = thresholds(magnitude, self.options.thresholds)
        line = [Rescaling(scale_for(magnitude, threshold), shift) for threshold in values]
        return coarse_to_fine(line, _STRIDE, objective.loss)

    def shifts(self, group: Group, block: Block) -> bool:
        return may_shift(group, block, self.options.shift)


def may_shift(group: Group, block: Block, wanted: Literal["auto"] | bool) -> bool:
    """Whether the offsets of a group can be moved, `wanted` as of `OSPlusOptions.shift`."""
    if wanted is False or group.kind == "linear" or group.others:
        return False
    modules = [block.model.get_submodule(path) for path in group.layers]
    return wanted is True or all(module._parameters.get("bias") is not None for module in modules)


def centre(low: Tensor, high: Tensor) -> Tensor:
    """z = (max + min) / 2 of every channel (eq. 5)."""
    return (high + low) / 2


def scale_for(magnitude: Tensor, threshold: float) -> Tensor:
    """s = max(1, max|x − z| / t) of every channel (eq. 8)."""
    return (magnitude / threshold).clamp(min=1)


def thresholds(magnitude: Tensor, count: int) -> list[float]:
    """Thresholds from the largest magnitude, which changes nothing, down to a quarter of the median, evenly
    in the logarithm."""
    positive = magnitude[magnitude > 0]
    if not len(positive):
        return [1.0]
    top, bottom = float(positive.max()), float(positive.median()) / 4
    return [top * (bottom / top) ** (index / (count - 1)) for index in range(count)]
