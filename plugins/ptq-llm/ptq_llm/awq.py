"""The step `awq`: channels that matter are made larger before rounding (Lin et al., arXiv 2306.00978)."""

import math
from functools import partial
from typing import ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from ptq_llm.groups import Group
from ptq_llm.line_search import coarse_to_fine, least
from ptq_llm.objective import Objective
from ptq_llm.rescale import Rescaling
from ptq_llm.scaling import ChannelStatistics, ScaleOptions, ScaleStep
from ptq_llm.simulation import rounded
from ptqcore import StepOptions

_STRIDE = 4


class AWQOptions(ScaleOptions):
    """ratios: powers, from 0 (no change) in equal steps to below 1. objective: `outputs` compares what the
    next layers read, for every fourth power first and then around the best; `gram` compares the layers'
    own outputs through the Gram of their inputs for all powers, much faster but blind to rounded
    activations; `auto` takes the Gram where only weights are rounded."""

    groups: Literal["norms", "all"] = "all"
    ratios: int = Field(default=20, ge=1)
    objective: Literal["auto", "gram", "outputs"] = "auto"


class AWQ(ScaleStep):
    """s = mean|X|^ρ per channel, normalised to √(max s · min s) = 1; ρ by search (section 3.2)."""

    name = "awq"
    Options: ClassVar[type[StepOptions]] = AWQOptions
    options: AWQOptions

    def search(self, group: Group, statistics: ChannelStatistics, objective: Objective) -> Rescaling:
        gram = self.options.objective == "gram"
        if self.options.objective == "auto":
            gram = all(self.context.grids.inputs(path) is None for path in objective.layers)
        count = self.options.ratios
        candidates = [powers(statistics.magnitude, index / count) for index in range(count)]
        if gram:
            return least(candidates, partial(self._gram_loss, objective))
        return coarse_to_fine(candidates, _STRIDE, objective.loss)

    def _gram_loss(self, objective: Objective, change: Rescaling, limit: float = math.inf) -> float:
        """Σ over layers of tr(ΔW G ΔWᵀ) / tr(W G Wᵀ), ΔW from rounding the rescaled weight."""
        total = 0.0
        for path in objective.layers:
            gram = objective.calibration.gram(path)
            if gram is None or not gram.count:
                continue
            weight = objective.block.model.get_submodule(path).get_parameter("weight")
            scale, spec = change.scale.to(weight), self.context.grids.weights(path).spec
            total += gram.relative_error(weight, rounded(weight * scale, spec) / scale)
        return total


def powers(magnitude: Tensor, ratio: float) -> Rescaling:
    """s = magnitude^ρ / √(max · min); 1 for channels that are always 0."""
    scale = magnitude.clamp(min=1e-4).pow(ratio)
    scale = scale / (scale.max() * scale.min()).sqrt()
    scale = torch.where(magnitude == 0, torch.ones_like(scale), scale)
    return Rescaling(scale, torch.zeros_like(scale))
