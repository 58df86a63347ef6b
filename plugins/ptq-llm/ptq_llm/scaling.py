"""What steps share that look for one factor per channel: SmoothQuant, AWQ, Outlier Suppression+."""

from abc import abstractmethod
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

from ptq_llm.groups import Finder, Group
from ptq_llm.objective import Objective
from ptq_llm.rescale import Rescaling, check, rescale, tolerance
from ptq_llm.simulation import Simulation
from ptqcore import Block, Calibration, Dataflow, Gram, Step, StepOptions, say

Groups = Literal["norms", "all"]


class ScaleOptions(StepOptions):
    """groups: which channels get factors: those that norms make, or also those that are rows of a linear
    layer (v → o, up → down). online: whether channels of a norm that others read too (residuals behind
    the norm, as in BERT) get theirs in front of each layer, at run time."""

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


class ScaleStep(Step):
    """Finds the groups of every block, checks each, searches its factors, and moves them into weights.

    Groups are searched in the order in which they run, everything before them rounded as the recipe
    says. A group that does not keep the function under random factors is left alone, which is said.
    """

    Options: ClassVar[type[StepOptions]] = ScaleOptions
    options: ScaleOptions
    stage = "transform"

    @abstractmethod
    def search(self, group: Group, statistics: ChannelStatistics, objective: Objective) -> Rescaling:
        """The factors of one group."""

    def prepare(self, model: nn.Module, flow: Dataflow, run: Callable[[], object]) -> None:
        self._finder = Finder(model, flow)
        self._refused: set[str] = set()

    def transform(self, block: Block, calibration: Calibration) -> None:
        order = self._finder.map.order
        layers = sorted((path for path in block.layers() if path in order), key=order.__getitem__)
        with Simulation(block, calibration, self.context) as simulation:
            for group in self._groups(block, calibration):
                before = [path for path in layers if order[path] < order[group.consumers[0]]]
                with simulation.paused():
                    if not self._keeps_function(group, block, calibration):
                        continue
                simulation.add(path for path in before if path not in group.consumers)
                calibration.changed()
                statistics = ChannelStatistics.of(group, block, calibration)
                objective = Objective(calibration, self.context, group, self._finder.map)
                if statistics is None or not objective.layers:
                    continue
                change = self.search(group, statistics, objective)
                with simulation.paused():
                    rescale(block, group, change)
        calibration.changed()

    def shifts(self, group: Group, block: Block) -> bool:
        """Whether the step may move offsets of a group, too."""
        return False

    def _groups(self, block: Block, calibration: Calibration) -> list[Group]:
        """The groups that the options name; a layer is in one of them."""
        kinds = ["norm", "linear"] if self.options.groups == "all" else ["norm"]
        candidates = self._finder.candidates(block, calibration.io)
        chosen = [group for group in candidates if group.kind in kinds]
        if self.options.online:
            taken = {path for group in chosen for path in group.consumers}
            shared = [g for g in candidates if g.kind == "shared" and g.behind_norm]
            chosen += [group for group in shared if taken.isdisjoint(group.consumers)]
        order = self._finder.map.order
        return sorted(chosen, key=lambda group: order[group.consumers[0]])

    def _keeps_function(self, group: Group, block: Block, calibration: Calibration) -> bool:
        error = check(block, calibration.io, group, self.shifts(group, block))
        dtype = block.model.get_submodule(group.consumers[0]).get_parameter("weight").dtype
        if error <= tolerance(dtype):
            return True
        if group.name not in self._refused:
            self._refused.add(group.name)
            say(
                f"{self.name}: {group.name} is left alone, for rescaling it changes the output by {error:.2g}"
            )
        return False
