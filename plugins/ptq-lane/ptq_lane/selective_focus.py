"""The step `selective-focus`: the whole network learned against the lanes that it finds."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import ClassVar, Literal

from pydantic import Field
from torch import nn

from ptq_lane.focus import Focus
from ptq_lane.lane_task import LaneTask
from ptq_lane.objective import LaneObjective
from ptq_lane.selection import Selection
from ptq_lane.warm_start import BlockErrors
from ptqcore import (
    Block,
    BlockLearner,
    Calibration,
    Curves,
    Dataflow,
    Objective,
    Phase,
    QDrop,
    QDropOptions,
    RecipeError,
    Step,
    find_blocks,
)


class SelectiveFocusOptions(QDropOptions):
    """As of QDrop; focus: how much positions count, selection: how much groups of outputs count.

    pixels: how much the mean squared distance of candidate lanes in pixels counts beside that, where the
    family's geometry is differentiable. warm_start: share of the updates, the first, in which every block
    is learned against its own output; null: as the family's adapter says. held_out: share of the
    calibration images that are not learned from, but choose the best of `judged` states; with 0 the last
    state is kept.
    """

    iterations: int = Field(default=800, ge=1)
    weights: Literal["adaround", "adaquant"] = "adaquant"
    learn_biases: bool = True
    focus: Focus = Focus()
    selection: Selection = Selection()
    pixels: float = Field(default=0.0, ge=0)
    warm_start: float | None = Field(default=None, ge=0, lt=1)
    held_out: float = Field(default=0.0, ge=0, lt=1)
    judged: int = Field(default=16, ge=1)


class SelectiveFocus(QDrop):
    """QDrop over the whole network, its weights free to go to any value of their grids, with the objective
    of Selective Focus (Fan et al., AAAI 2024; see the plugin's README for what is known of it and what is
    ours)."""

    name = "selective-focus"
    Options: ClassVar[type[SelectiveFocusOptions]] = SelectiveFocusOptions
    options: SelectiveFocusOptions

    def prepare(self, model: nn.Module, flow: Dataflow, run: Callable[[], object]) -> None:
        """Keep the map, for where the network's blocks are."""
        super().prepare(model, flow, run)
        self._map = flow

    def block(self, block: Block, calibration: Calibration) -> None:
        if block.path:
            raise RecipeError(
                f"the step selective-focus learns the whole network at once, but was given the block "
                f"{block.path!r}: set the recipe key 'blocks' to network-wise"
            )
        self._warming: BlockErrors | None = None
        try:
            super().block(block, calibration)
        finally:
            self._end_warm_start()
        task = lane_task(self)
        task.learning = [*_shares(self._objective), *_held_out(self._objective)]

    def samples(self, calibration: Calibration) -> Sequence[int]:
        """Those that are not held out."""
        held_out = set(self._held_out(calibration))
        return [sample for sample in range(len(calibration.io)) if sample not in held_out]

    def phases(self) -> Sequence[Phase]:
        """That of QDrop, its first share as a warm start."""
        (phase,) = super().phases()
        warm = self._warm_start
        return (replace(phase, share=warm), replace(phase, share=1 - warm)) if warm else (phase,)

    def objective(self, learner: BlockLearner, phase: Phase, calibration: Calibration) -> Objective:
        """Lanes; in a warm start, what every block returns."""
        options = self.options
        if self._warm_start and self._warming is None:
            network = calibration.block.module
            blocks = find_blocks(network, self._map, set(learner.weights))
            self._warming = BlockErrors(learner, network, [block.path for block in blocks])
            return self._warming
        self._end_warm_start()
        self._objective = LaneObjective(
            learner,
            lane_task(self).adapter,
            options.focus,
            options.selection,
            options.schedule(phase.share).iterations,
            self._held_out(calibration),
            options.pixels,
            options.judged,
        )
        return self._objective

    @property
    def _warm_start(self) -> float:
        chosen = self.options.warm_start
        return lane_task(self).adapter.warm_start if chosen is None else chosen

    def _end_warm_start(self) -> None:
        if self._warming is not None:
            self._warming.close()

    def _held_out(self, calibration: Calibration) -> list[int]:
        """Every so manieth sample."""
        total = len(calibration.io)
        count = min(round(total * self.options.held_out), total - 1)
        return [number * total // count for number in range(count)]


def lane_task(step: Step) -> LaneTask:
    """The task of a step's run.

    Raises:
        RecipeError: if it is not about lanes.
    """
    task = step.context.task
    if not isinstance(task, LaneTask):
        raise RecipeError(
            f"the step {step.name} is made for tasks of the kind lanes, this one is {task.name!r}: "
            "use qdrop instead"
        )
    return task


def _shares(objective: LaneObjective) -> list[Curves]:
    """The squared distortion of each group, as a share of all, over the run."""
    measured = objective.measured
    if not measured or len(measured[0][1]) < 2:
        return []
    totals = [sum(one.distortion for one in groups.values()) or 1.0 for _, groups in measured]
    series = {
        name: [groups[name].distortion / total for (_, groups), total in zip(measured, totals, strict=True)]
        for name in measured[0][1]
    }
    note = "Of the distortion of calibration images where one group alone is quantized."
    updates = [number for number, _ in measured]
    return [Curves("Sensitivity of the groups while learning", updates, series, "update", "share", note)]


def _held_out(objective: LaneObjective) -> list[Curves]:
    """The distortion of images that are held out, over the run."""
    if not objective.distortions:
        return []
    updates, scores = zip(*objective.distortions, strict=True)
    note = "Of calibration images that are not learned from; the best state is kept."
    return [
        Curves("Held-out Lane Distortion Score", updates, {"decided": scores}, "update", "pixels", note)
    ]
