"""The step `reassemble`: adaptive channel reassembly (QLLM, arXiv 2310.08041, section 4.1)."""

from collections.abc import Callable
from typing import ClassVar

import torch
from pydantic import Field
from torch import Tensor, nn

from ptq_llm.groups import Finder, Group
from ptq_llm.objective import Objective
from ptq_llm.os_plus import thresholds
from ptq_llm.reassembly import Reassemble, Reassembly, distances, parts, reassemble
from ptq_llm.scaling import ChannelStatistics
from ptq_llm.simulation import Simulation
from ptqcore import Block, Calibration, Dataflow, Step, StepOptions, attach


class ReassembleOptions(StepOptions):
    """ratio: channels that are added by taking others apart, at most, as a share of all (γ); thresholds:
    values of θ tried, from the largest magnitude down to a quarter of the median."""

    ratio: float = Field(default=0.2, gt=0, le=0.5)
    thresholds: int = Field(default=16, ge=2)


class ChannelReassembly(Step):
    """Searches θ for the inputs of all layers but those behind attention; leaving them is a candidate.

    The same split and merge is tried and applied. What makes the channels is not changed: norms get a
    gather behind them, other inputs one in front of the layers, at run time.
    """

    name = "reassemble"
    Options: ClassVar[type[StepOptions]] = ReassembleOptions
    options: ReassembleOptions
    stage = "transform"
    attaches = "channels gathered at run time"

    def prepare(self, model: nn.Module, flow: Dataflow, run: Callable[[], object]) -> None:
        self._finder = Finder(model, flow)

    def transform(self, block: Block, calibration: Calibration) -> None:
        order = self._finder.map.order
        layers = sorted((path for path in block.layers() if path in order), key=order.__getitem__)
        with Simulation(block, calibration, self.context) as simulation:
            for group in self._groups(block, calibration):
                before = [path for path in layers if order[path] < order[group.consumers[0]]]
                simulation.add(path for path in before if path not in group.consumers)
                calibration.changed()
                change = self._search(group, block, calibration)
                if change is not None and not change.is_identity:
                    with simulation.paused():
                        apply(block, group, change)
        calibration.changed()

    def _groups(self, block: Block, calibration: Calibration) -> list[Group]:
        """Layers that read the same channels, each once, but those behind attention."""
        candidates = self._finder.candidates(block, calibration.io)
        order = ("norm", "linear", "shared")
        taken: set[str] = set()
        chosen = []
        for group in sorted(candidates, key=lambda group: order.index(group.kind)):
            if taken.isdisjoint(group.consumers) and not group.behind_attention:
                chosen.append(group)
            taken.update(group.consumers)
        place = self._finder.map.order
        return sorted(chosen, key=lambda group: place[group.consumers[0]])

    def _search(self, group: Group, block: Block, calibration: Calibration) -> Reassembly | None:
        statistics = ChannelStatistics.of(group, block, calibration)
        objective = Objective(calibration, self.context, group, self._finder.map)
        if statistics is None or not objective.layers:
            return None
        grams = {id(gram): gram.matrix for path in group.consumers if (gram := calibration.gram(path))}
        weights = [block.model.get_submodule(path).get_parameter("weight").data for path in group.consumers]
        distance = distances(torch.stack(list(grams.values())).sum(0), torch.cat(weights))
        magnitude = torch.maximum(-statistics.low, statistics.high)
        candidates = [Reassembly.identity(len(magnitude))]
        candidates += self._candidates(magnitude, distance)
        return min(candidates, key=objective.loss)

    def _candidates(self, magnitude: Tensor, distance: Tensor) -> list[Reassembly]:
        """One for every number of added channels that the thresholds give."""
        found, tried = [], {0}
        for threshold in thresholds(magnitude, self.options.thresholds):
            extra = int((parts(magnitude, threshold) - 1).sum())
            if extra > self.options.ratio * len(magnitude):
                break
            if extra not in tried:
                tried.add(extra)
                candidate = reassemble(magnitude, threshold, distance)
                found += [] if candidate is None else [candidate]
        return found


@torch.no_grad()
def apply(block: Block, group: Group, change: Reassembly) -> None:
    """Give a group's layers the weights for new channels, and attach what makes these."""
    model = block.model
    for path in group.consumers:
        layer = model.get_submodule(path)
        weight = layer.get_parameter("weight")
        layer.register_parameter("weight", nn.Parameter(change.weight(weight), requires_grad=False))
    made = [Reassemble.of(change, weight.device)]
    if group.kind == "norm" and not group.others:
        attach(model.get_submodule(group.producer), made[0], "output")
        return
    for path in group.consumers:
        attach(model.get_submodule(path), Reassemble.of(change, weight.device))
