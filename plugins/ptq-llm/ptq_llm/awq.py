"""The step `awq`: channels that matter are made larger before rounding (Lin et al., arXiv 2306.00978)."""

import math
from typing import ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from ptq_llm.groups import Group
from ptq_llm.line_search import coarse_to_fine
from ptq_llm.objective import Objective
from ptq_llm.rescale import Rescaling
from ptq_llm.scaling import ChannelStatistics, ScaleOptions, ScaleStep
from ptq_llm.simulation import rounded
from ptqcore import Context, StepOptions

_STRIDE = 4


class AWQOptions(ScaleOptions):
    """ratios: powers, from 0 (no change) in equal steps to below 1; every fourth is tried first, then those
    around the best. objective: `outputs` compares what the next layers read; `gram` compares the layers'
    own outputs through the Gram of their inputs, much faster but blind to rounded activations; `auto`
    takes the Gram where only weights are rounded."""

    groups: Literal["norms", "all"] = "all"
    ratios: int = Field(default=20, ge=1)
    objective: Literal["auto", "gram", "outputs"] = "auto"


class AWQ(ScaleStep):
    """s = mean|X|^ρ per channel, normalised to √(max s · min s) = 1; ρ by search (section 3.2)."""

    name = "awq"
    shares_samples = True
    Options: ClassVar[type[StepOptions]] = AWQOptions
    options: AWQOptions

    def search(self, group: Group, statistics: ChannelStatistics, objective: Objective) -> Rescaling:
        gram = self.options.objective == "gram"
        if self.options.objective == "auto":
            gram = all(self.context.grids.inputs(path) is None for path in objective.layers)
        count = self.options.ratios
        candidates = [powers(statistics.magnitude, index / count) for index in range(count)]
        loss = GramLoss(objective, self.context) if gram else objective.loss
        return coarse_to_fine(candidates, _STRIDE, loss, apart=gram)


class GramLoss:
    """Σ over layers of tr(ΔW G ΔWᵀ) / tr(W G Wᵀ), ΔW from rounding the rescaled weight."""

    def __init__(self, objective: Objective, context: Context) -> None:
        grams = {path: objective.calibration.gram(path) for path in objective.layers}
        self._grams = {path: gram for path, gram in grams.items() if gram is not None and gram.count}
        model = objective.block.model
        self._weights = {path: model.get_submodule(path).get_parameter("weight") for path in self._grams}
        self._energy = {path: gram.energy(self._weights[path]) for path, gram in self._grams.items()}
        self._specs = {path: context.grids.weights(path).spec for path in self._grams}

    def __call__(self, change: Rescaling, limit: float = math.inf) -> float:
        total = 0.0
        for path, gram in self._grams.items():
            weight = self._weights[path]
            scale = change.scale.to(weight)
            error = gram.energy(rounded(weight * scale, self._specs[path]) / scale - weight)
            total += error / (self._energy[path] or 1)
            if total > limit:
                break
        return total


def powers(magnitude: Tensor, ratio: float) -> Rescaling:
    """s = magnitude^ρ / √(max · min); 1 for channels that are always 0."""
    scale = magnitude.clamp(min=1e-4).pow(ratio)
    scale = scale / (scale.max() * scale.min()).sqrt()
    scale = torch.where(magnitude == 0, torch.ones_like(scale), scale)
    return Rescaling(scale, torch.zeros_like(scale))
