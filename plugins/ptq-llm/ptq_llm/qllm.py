"""The step `reassemble`: adaptive channel reassembly (QLLM, arXiv 2310.08041, section 4.1)."""

from collections.abc import Callable
from functools import partial
from typing import ClassVar

import torch
from pydantic import Field
from torch import Tensor, nn

from ptq_llm.group_step import GroupOptions, GroupStep
from ptq_llm.groups import Group
from ptq_llm.line_search import least
from ptq_llm.objective import Objective
from ptq_llm.os_plus import thresholds
from ptq_llm.reassembly import Reassemble, Reassembly, distances, parts, reassemble
from ptq_llm.rescale import set_parameter
from ptq_llm.scaling import ChannelStatistics
from ptqcore import Block, Calibration, Dataflow, StepOptions, attach


class ReassembleOptions(GroupOptions):
    """ratio: channels that are added by taking others apart, at most, as a share of all (γ); thresholds:
    values of θ tried, from the largest magnitude down to a quarter of the median. skip: globs of layers
    whose inputs are left alone."""

    ratio: float = Field(default=0.2, gt=0, le=0.5)
    thresholds: int = Field(default=16, ge=2)


class ChannelReassembly(GroupStep):
    """Searches θ for the inputs of all layers but those behind attention; leaving them is a candidate.

    The same split and merge is tried and applied. Where a linear layer makes the channels and nothing
    computes with them on the way, its rows are split and merged. Norms get a gather behind them, other
    inputs one in front of the layers, at run time.
    """

    name = "reassemble"
    shares_samples = True
    Options: ClassVar[type[StepOptions]] = ReassembleOptions
    options: ReassembleOptions

    def prepare(self, model: nn.Module, flow: Dataflow, run: Callable[[], object]) -> None:
        super().prepare(model, flow, run)
        if any(not group.direct for group in self.groups_of_model()):
            self.attaches = "channels gathered at run time"

    def choose(self, candidates: list[Group]) -> list[Group]:
        found = (group for group in candidates if group.kind != "linear" or group.direct)
        return [group for group in found if not group.behind_attention]

    def transform(self, block: Block, calibration: Calibration) -> None:
        def find(group: Group) -> Callable[[], None] | None:
            change = self._search(group, block, calibration)
            return None if change is None or change.is_identity else partial(apply, block, group, change)

        self.change_in_turn(block, calibration, find)

    def _search(self, group: Group, block: Block, calibration: Calibration) -> Reassembly | None:
        statistics = ChannelStatistics.of(group, block, calibration)
        objective = Objective(calibration, self.context, group, self.finder.map)
        if statistics is None or not objective.layers:
            return None
        grams = {id(gram): gram.matrix for path in group.consumers if (gram := calibration.gram(path))}
        weights = [block.model.get_submodule(path).get_parameter("weight").data for path in group.consumers]
        distance = distances(torch.stack(list(grams.values())).sum(0), torch.cat(weights))
        magnitude = torch.maximum(-statistics.low, statistics.high)
        candidates = [Reassembly.identity(len(magnitude))]
        candidates += self._candidates(magnitude, distance)
        return least(candidates, objective.loss)

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
    """Give a group's layers the weights for new channels, and make what flows into them: in the rows of a
    linear layer, or in what is attached behind a norm or in front of the layers."""
    model = block.model
    for path in group.consumers:
        layer = model.get_submodule(path)
        set_parameter(layer, "weight", change.weight(layer.get_parameter("weight")))
    device = layer.get_parameter("weight").device
    if group.direct:
        producer = model.get_submodule(group.producer)
        weight, bias = producer.get_parameter("weight"), producer._parameters.get("bias")
        set_parameter(producer, "weight", change.inputs(weight.double().T).T.to(weight.dtype))
        if bias is not None:
            set_parameter(producer, "bias", change.inputs(bias.double()).to(bias.dtype))
    elif group.kind == "norm" and not group.others:
        attach(model.get_submodule(group.producer), Reassemble.of(change, device), "output")
    else:
        for path in group.consumers:
            attach(model.get_submodule(path), Reassemble.of(change, device))
