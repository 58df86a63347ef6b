"""What steps share that look for one factor per channel: SmoothQuant, AWQ, Outlier Suppression+."""

from abc import abstractmethod
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

from ptq_llm.group_step import GroupOptions, GroupStep
from ptq_llm.groups import Group
from ptq_llm.objective import Objective
from ptq_llm.rescale import Rescaling, rescale
from ptqcore import Block, Calibration, Dataflow, Gram, StepOptions

Groups = Literal["norms", "all"]


class ScaleOptions(GroupOptions):
    """groups: which channels get factors: those that norms make, or also those that are rows of a linear
    layer (v → o, up → down). online: whether channels of a norm that others read too (residuals behind
    the norm, as in BERT) get theirs in front of each layer, at run time. skip: globs of layers whose
    groups are left alone."""

    groups: Groups = "norms"
    online: bool = True


@dataclass(frozen=True)
class ChannelStatistics:
    """What the layers of a group read, per channel [channels], double; channels that are the same row of
    the producer share the largest.

    low, high: extremes; magnitude: mean |x|; weight: largest |W| over all outputs of all layers.
    """

    low: Tensor
    high: Tensor
    magnitude: Tensor
    weight: Tensor

    @classmethod
    def of(cls, group: Group, block: Block, calibration: Calibration) -> "ChannelStatistics | None":
        """The statistics of a group; None if no token reached it."""
        grams = [calibration.gram(path) for path in group.consumers]
        seen = [gram for gram in grams if gram is not None and gram.count]
        if not seen:
            return None
        layers = [block.model.get_submodule(path) for path in group.consumers]
        largest = [layer.get_parameter("weight").abs().amax(0).double() for layer in layers]
        found = cls(
            torch.stack([gram.low for gram in seen]).amin(0).double(),
            torch.stack([gram.high for gram in seen]).amax(0).double(),
            _mean_magnitude(seen),
            torch.stack(largest).amax(0),
        )
        return found if group.rows is None else found._per_row(group.rows)

    def _per_row(self, rows: Tensor) -> "ChannelStatistics":
        def spread(values: Tensor, reduce: str) -> Tensor:
            per_row = torch.zeros(int(rows.max()) + 1, dtype=values.dtype)
            return per_row.scatter_reduce(0, rows, values, reduce, include_self=False)[rows]

        return ChannelStatistics(
            spread(self.low, "amin"),
            spread(self.high, "amax"),
            spread(self.magnitude, "mean"),
            spread(self.weight, "amax"),
        )


def _mean_magnitude(grams: Iterable[Gram]) -> Tensor:
    distinct = list({id(gram): gram for gram in grams}.values())
    total = torch.stack([gram.magnitude for gram in distinct]).sum(0)
    return total / sum(gram.count for gram in distinct)


class RescalingStep(GroupStep):
    """Gives channels factors; the options say which."""

    Options: ClassVar[type[StepOptions]] = ScaleOptions
    options: ScaleOptions

    def prepare(self, model: nn.Module, flow: Dataflow, run: Callable[[], object]) -> None:
        super().prepare(model, flow, run)
        whole, added = Block(model, ""), set()
        for group in self.groups_of_model():
            if group.kind == "shared":
                added.add("factors in front of layers that read a norm beside a residual")
            bare = [
                path for path in group.layers if model.get_submodule(path)._parameters.get("bias") is None
            ]
            if bare and self.shifts(group, whole):
                added.add("biases of layers and norms that have none")
        self.attaches = ", ".join(sorted(added))

    def choose(self, candidates: list[Group]) -> list[Group]:
        kinds = ["norm", "linear"] if self.options.groups == "all" else ["norm"]
        chosen = [group for group in candidates if group.kind in kinds]
        if self.options.online:
            taken = {path for group in chosen for path in group.consumers}
            shared = [g for g in candidates if g.kind == "shared" and g.behind_norm]
            chosen += [group for group in shared if taken.isdisjoint(group.consumers)]
        return chosen


class ScaleStep(RescalingStep):
    """Searches the factors of every group, and moves them into weights.

    Groups are searched in the order in which they run, everything before them rounded as the recipe
    says.
    """

    @abstractmethod
    def search(self, group: Group, statistics: ChannelStatistics, objective: Objective) -> Rescaling:
        """The factors of one group."""

    def transform(self, block: Block, calibration: Calibration) -> None:
        def find(group: Group) -> Callable[[], None] | None:
            statistics = ChannelStatistics.of(group, block, calibration)
            objective = Objective(calibration, self.context, group, self.finder.map)
            if statistics is None or not objective.layers:
                return None
            return partial(rescale, block, group, self.search(group, statistics, objective))

        self.change_in_turn(block, calibration, find)
