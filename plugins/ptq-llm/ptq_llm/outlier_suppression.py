"""The step `outlier-suppression`: Gamma Migration (Outlier Suppression, Wei et al., arXiv 2209.13325,
section 4.1)."""

from typing import ClassVar, Literal

import torch
from torch import Tensor

from ptq_llm.groups import Group
from ptq_llm.norm_probe import find_norm
from ptq_llm.objective import Objective
from ptq_llm.rescale import Rescaling
from ptq_llm.scaling import ChannelStatistics, ScaleOptions, ScaleStep
from ptqcore import Block, StepOptions


class OutlierSuppressionOptions(ScaleOptions):
    """groups: only norms have gains."""

    groups: Literal["norms"] = "norms"


class OutlierSuppression(ScaleStep):
    """s is the gain of the norm: what it returns is not scaled any more before it is rounded, and layers
    have the gain in their weights. Nothing is searched.

    Where a residual reads the norm, too, the norm keeps its gain for it, and each layer divides by it.
    """

    name = "outlier-suppression"
    shares_samples = True
    Options: ClassVar[type[StepOptions]] = OutlierSuppressionOptions
    options: OutlierSuppressionOptions

    def search(self, group: Group, statistics: ChannelStatistics, objective: Objective) -> Rescaling:
        return gamma_migration(self._gains(group, objective.block, len(statistics.low)))

    def _gains(self, group: Group, block: Block, channels: int) -> Tensor:
        """The gains [channels] of the norm whose output a group reads; ones if it has none."""
        questions = self.finder.map
        source = questions.source(questions.input(group.consumers[0]))
        path = None if source is None else questions.norms.get(source)
        norm = None if path is None else block.model.get_submodule(path)
        found = None if norm is None else find_norm(norm, channels)
        gains = None if norm is None or found is None else found.gains(norm)
        return torch.ones(channels).double() if gains is None else gains


def gamma_migration(gains: Tensor) -> Rescaling:
    """The factors that make a norm with these gains [channels] one without; 1 for gains of 0."""
    scale = torch.where(gains == 0, torch.ones_like(gains), gains)
    return Rescaling(scale, torch.zeros_like(scale))
