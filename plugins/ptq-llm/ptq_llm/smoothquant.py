"""The step `smoothquant`: difficulty moved from activations to weights by a power
(Xiao et al., arXiv 2211.10438)."""

from typing import ClassVar

import torch
from pydantic import Field
from torch import Tensor

from ptq_llm.groups import Group
from ptq_llm.line_search import coarse_to_fine, least
from ptq_llm.objective import Objective
from ptq_llm.rescale import Rescaling
from ptq_llm.scaling import ChannelStatistics, ScaleOptions, ScaleStep
from ptqcore import StepOptions

_ALPHAS = [0.3 + 0.05 * index for index in range(13)]
_STRIDE = 4


class SmoothQuantOptions(ScaleOptions):
    """alpha: the power; null searches it for every group: 0.3, 0.5, 0.7, 0.9, then down to 0.05 around the
    best; and compares leaving the group as it is."""

    alpha: float | None = Field(default=None, ge=0, le=1)


class SmoothQuant(ScaleStep):
    """s = max|X|^α / max|W|^(1−α) per channel (eq. 4)."""

    name = "smoothquant"
    shares_samples = True
    Options: ClassVar[type[StepOptions]] = SmoothQuantOptions
    options: SmoothQuantOptions

    def search(self, group: Group, statistics: ChannelStatistics, objective: Objective) -> Rescaling:
        if self.options.alpha is not None:
            return smoothing(statistics, self.options.alpha)
        line = [smoothing(statistics, alpha) for alpha in _ALPHAS]
        found = coarse_to_fine(line, _STRIDE, objective.loss)
        return least([Rescaling.identity(len(statistics.low)), found], objective.loss)


def smoothing(statistics: ChannelStatistics, alpha: float) -> Rescaling:
    """The factors for a power; 1 for channels that are always 0 or never read."""
    largest = torch.maximum(-statistics.low, statistics.high)
    scale: Tensor = largest.pow(alpha) / statistics.weight.clamp(min=1e-5).pow(1 - alpha)
    dead = (largest == 0) | (statistics.weight == 0)
    scale = torch.where(dead, torch.ones_like(scale), scale.clamp(min=1e-5))
    return Rescaling(scale, torch.zeros_like(scale))
