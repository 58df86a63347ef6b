"""The step `learned-scale`: learnable equivalent transformation (OmniQuant, Shao et al., arXiv 2308.13137,
section 3.3)."""

from collections import defaultdict
from collections.abc import Sequence
from typing import ClassVar, Literal

from pydantic import Field

from ptq_llm.groups import Group
from ptq_llm.learned_rescaling import LearnedRescaling
from ptq_llm.os_plus import may_shift
from ptq_llm.rescale import rescale
from ptq_llm.rescaled_block import RescaledBlock
from ptq_llm.scaling import ChannelStatistics, RescalingStep, ScaleOptions
from ptq_llm.tuning import BlockOutput, TuneOptions, learning_rate, tune
from ptqcore import Block, Calibration, StepOptions


class LearnedScaleOptions(ScaleOptions, TuneOptions):
    """alpha: a group begins with the factors that SmoothQuant gives it for this power, where that lowers
    the error of the block, else with 1; null begins with 1 everywhere, that is, with what the steps before
    have done. shift: as of os-plus. rate: the learning rate of ln s; null is the paper's, 0.005, or where
    there are few updates as much as lets it move by 1 in all of them."""

    groups: Literal["norms", "all"] = "all"
    alpha: float | None = Field(default=0.5, ge=0, le=1)
    shift: Literal["auto"] | bool = "auto"
    rate: float | None = Field(default=None, gt=0)


class LearnedScale(RescalingStep):
    """Learns a factor (and an offset, where norm and layers can hold it) for every channel of all groups of
    a block together, so that the block with rounded weights and inputs returns what the full-precision
    block does; then moves them into weights, so that the function stays.

    The block is left as it is if nothing better is found. OmniQuant learns the ranges of weights together
    with the factors; here `learned-clip` does so afterwards, and a search may come between. On a small
    trained model the errors of blocks end 3 to 9 % lower so for as many epochs of each, and 10 to 15 %
    higher for half as many of each.
    """

    name = "learned-scale"
    Options: ClassVar[type[StepOptions]] = LearnedScaleOptions
    options: LearnedScaleOptions
    needs_exact = True

    def transform(self, block: Block, calibration: Calibration) -> None:
        options, learned = self.options, self._learnable(block, calibration)
        rescaled = RescaledBlock(block, calibration, self.context, learned)
        output = BlockOutput(calibration, options.inputs, rescaled.parameters, rescaled.inputs)
        if options.alpha is not None:
            _begin(learned, options.alpha, output)
        seed, epochs = self.context.seed, options.epochs
        rate = options.rate or learning_rate(5e-3, 1.0, output, epochs)
        variables = [(variable, rate) for one in learned for variable in one.variables]
        calibration.losses += tune(variables, output, block, epochs, seed, self.name)
        for one in learned:
            rescale(block, one.group, one.change())
        calibration.changed()

    def shifts(self, group: Group, block: Block) -> bool:
        return may_shift(group, block, self.options.shift)

    def _learnable(self, block: Block, calibration: Calibration) -> list[LearnedRescaling]:
        """The groups of a block that tokens reach, and that keep its function."""
        found = []
        for group in self.groups(block, calibration):
            statistics = ChannelStatistics.of(group, block, calibration)
            if statistics is not None and self.keeps_function(group, block, calibration):
                found.append(LearnedRescaling(group, statistics, self.shifts(group, block)))
        return found


def _begin(learned: Sequence[LearnedRescaling], alpha: float, output: BlockOutput) -> None:
    """Begin with SmoothQuant's factors every group, and experts alike together, where they lower the
    error."""
    alike: dict[tuple[str, ...], list[LearnedRescaling]] = defaultdict(list)
    for one in learned:
        first = one.group.consumers[0].split(".")
        alike[tuple("*" if part.isdecimal() else part for part in first)].append(one)
    least = output.total()
    for some in alike.values():
        for one in some:
            one.begin(one.smoothing(alpha))
        error = output.total()
        if error < least:
            least = error
            continue
        for one in some:
            one.begin(one.identity())
