"""The steps `brecq` and `qdrop`: rounding learned by reconstructing each block's output."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Literal
from zlib import crc32

import torch
from pydantic import Field
from torch import nn

from ptqcore.allocator import keep_freed_memory
from ptqcore.block_learner import BlockLearner, Phase
from ptqcore.blocks import Block
from ptqcore.calibration import Calibration
from ptqcore.dataflow import Dataflow, inside
from ptqcore.errors import ModelError
from ptqcore.modules import quantizable_layers, weight_rows
from ptqcore.packed import QuantizedTensor
from ptqcore.placement import LAYERS, Edge
from ptqcore.problem import Objective, Problem, Schedule
from ptqcore.quantizers import (
    FakeQuant,
    LearnedBias,
    LearnedCodes,
    LearnedRounding,
    LearnedStep,
    LearnedWeight,
)
from ptqcore.reconstruction import reconstruct
from ptqcore.step import Step, StepOptions

_CACHE_BYTES = 2**23
_CODES_RATE = 2e-2  # steps of a weight's grid an update
_INPUTS = {"quantized": 1.0, "full-precision": 0.0}


class LearningOptions(StepOptions):
    """iterations, batch: updates per block or layer, and samples in each. rate: learning rate of the
    weights' variables; null chooses it so that this many iterations can move a variable across its range.
    precision: of the computation. inputs: what flows in meanwhile."""

    iterations: int = Field(default=400, ge=1)
    batch: int = Field(default=16, ge=1)
    rate: float | None = Field(default=None, gt=0)
    precision: Literal["float32", "bfloat16"] = "float32"
    inputs: Literal["quantized", "full-precision", "mixed"] = "quantized"

    def schedule(self, share: float = 1.0) -> Schedule:
        """The schedule of one block or layer, or of a share of its iterations."""
        iterations = max(round(self.iterations * share), 1)
        rate = self.rate or max(1e-3, 6.0 / iterations)
        return Schedule(iterations, self.batch, rate, min(1e-2, 3.0 / iterations))


class ReconstructOptions(LearningOptions):
    """As of learning; weights: how those are learned, `adaround`: up or down from where they are, or
    `adaquant`: to any value of their grids. learn_steps: whether the steps of activations are learned
    too, step_rate: how fast, relative to the step; learn_biases: whether those of the layers that have
    one are."""

    weights: Literal["adaround", "adaquant"] = "adaround"
    step_rate: float | None = Field(default=None, gt=0)
    learn_steps: bool = True
    learn_biases: bool = False

    def schedule(self, share: float = 1.0) -> Schedule:
        """The schedule of one block, or of a share of its iterations."""
        usual = super().schedule(share)
        rate = usual.weight_rate
        if self.weights == "adaquant" and self.rate is None:
            rate = min(_CODES_RATE, rate)
        return replace(usual, weight_rate=rate, step_rate=self.step_rate or usual.step_rate)


class Learning(Step):
    """What steps share that learn quantized weights from what the full-precision model computes."""

    options: LearningOptions
    needs_exact = True
    stage = "quantize"

    def prepare(self, model: nn.Module, flow: Dataflow, run: Callable[[], object]) -> None:
        """Keep the map: where layers read their inputs, and how large tensors are."""
        keep_freed_memory()
        self._flow = flow
        for path, layer in quantizable_layers(model).items():
            dtype = weight_rows(layer).dtype
            if dtype != torch.float32 and self.context.reason_to_skip(path) is None:
                raise ModelError(
                    f"layer {path!r} has weights of {dtype}, and the step {self.name} learns in float32: "
                    "give it the model in float32"
                )

    def nearest(self, path: str, layer: nn.Module, calibration: Calibration) -> QuantizedTensor:
        """The weight rounded to nearest: its grid is kept, and learning starts there."""
        spec = self.context.grids.weights(path).spec
        return QuantizedTensor.from_range(weight_rows(layer), *calibration.weight_range(path, layer), spec)

    def learn(self, problem: Problem, schedule: Schedule, generator: torch.Generator) -> None:
        """Solve a problem.

        Raises:
            ModelError: if its loss is not finite.
        """
        try:
            reconstruct(problem, schedule, generator)
        except FloatingPointError as error:
            raise ModelError(f"{error}: lower the step's rate, or use precision float32") from None

    def generator(self, block: Block) -> torch.Generator:
        """Random numbers of one block: the same whatever ran before it."""
        return torch.Generator().manual_seed(self.context.seed * 2**31 + crc32(block.path.encode()))

    def at_once(self, block: Block, calibration: Calibration) -> int:
        """How many samples are computed at once: their largest tensor fits the processor's cache."""
        if not calibration.io.can_join():
            return 1
        numbers = [n for op in self._flow.ops if inside(op.site.owner, block.path) for n in op.outputs]
        largest = max([1, *(torch.Size(self._flow.shapes[n]).numel() for n in numbers)]) * 4
        return max(2, _CACHE_BYTES // largest)


class Reconstruct(Learning):
    """Learns the weights of a block, and the steps of its activations.

    Subclasses may minimise something else: `objective`.
    """

    Options = ReconstructOptions
    options: ReconstructOptions

    def phases(self) -> Sequence[Phase]:
        """What is learned, in order."""
        return ()

    def objective(self, learner: BlockLearner, phase: Phase, calibration: Calibration) -> Objective:
        """What is minimised in a phase; by default the mean squared error of the block's outputs.

        Args:
            learner: computes the block.
            phase: what is learned.
            calibration: the block's inputs, and what the full-precision model has at its output.
        """
        return Objective()

    def samples(self, calibration: Calibration) -> Sequence[int]:
        """The numbers of the calibration samples to learn from; by default all."""
        return range(len(calibration.io))

    def block(self, block: Block, calibration: Calibration) -> None:
        kind = LearnedRounding if self.options.weights == "adaround" else LearnedCodes
        weights: dict[str, LearnedWeight] = {
            path: kind(weight_rows(layer), self.nearest(path, layer, calibration))
            for path, layer in self.context.targets(block).items()
        }
        quantizers = calibration.quantizers | self._input_quantizers(weights, calibration)
        precision = getattr(torch, self.options.precision)
        learner = BlockLearner(
            calibration.io,
            calibration.exact,
            weights,
            quantizers,
            precision,
            self.options.learn_biases,
        )
        generator = self.generator(block)
        for phase in self.phases():
            if not phase.weights:
                learner.decide()
            problem = Problem(
                block.path,
                self.samples(calibration),
                partial(learner.predict, phase, generator),
                learner.target,
                list(weights.values()) if phase.weights else [],
                self._beside(learner, phase),
                self.objective(learner, phase, calibration),
                self.at_once(block, calibration),
                next(calibration.midways),
            )
            self.learn(problem, self.options.schedule(phase.share), generator)
            calibration.losses += problem.history
        beside: list[LearnedStep | LearnedBias] = [*learner.learned.values(), *learner.biases.values()]
        for learned in beside:
            learned.finish()
        self._finish(block, calibration, weights, quantizers)

    @staticmethod
    def _beside(learner: BlockLearner, phase: Phase) -> list[LearnedStep | LearnedBias]:
        """What is learned in a phase beside weights."""
        steps = learner.learned.values() if phase.steps and phase.keep else ()
        return [*steps, *learner.biases.values()]

    def _finish(
        self,
        block: Block,
        calibration: Calibration,
        weights: dict[str, LearnedWeight],
        quantizers: dict[Edge, FakeQuant],
    ) -> None:
        """Put the quantized layers in, their inputs with the learned steps."""
        for path, learned in weights.items():
            layer = self.quantize_layer(block, calibration, path, learned.hard())
            if layer.input_quantizer is not None and layer.input_quantizer.scale is not None:
                layer.input_quantizer.scale = quantizers[self._inputs_of(path)[0]].scale

    def _input_quantizers(
        self, weights: dict[str, LearnedWeight], calibration: Calibration
    ) -> dict[Edge, FakeQuant]:
        """In the scope `layers`: a quantizer for the input of each layer, shared by its calls."""
        found: dict[Edge, FakeQuant] = {}
        for path in weights:
            quant, observer = self.context.grids.inputs(path), calibration.observer(path)
            if quant is None:
                continue
            quantizer = FakeQuant(quant.spec)
            if observer is not None:
                quantizer.set_range(*observer.range())
            found.update(dict.fromkeys(self._inputs_of(path), quantizer))
        return found

    def _inputs_of(self, path: str) -> list[Edge]:
        """Where the layer at `path` reads its input, once per call of it."""
        ops = [op for op in self._flow.ops if op.site.owner == path and op.name in LAYERS]
        return [Edge(op.site, "input") for op in ops]


class BRECQ(Reconstruct):
    """Rounding learned with activations in full precision, the activation steps afterwards
    (Li et al., arXiv 2102.05426)."""

    name = "brecq"

    def phases(self) -> Sequence[Phase]:
        inputs = _INPUTS.get(self.options.inputs, 0.5)
        first = Phase(weights=True, steps=False, keep=0.0, inputs=inputs)
        then = Phase(weights=False, steps=True, keep=1.0, inputs=inputs, share=0.25)
        return (first, then) if self.options.learn_steps else (first,)


class QDropOptions(ReconstructOptions):
    """As of reconstruction; keep: probability that an activation is rounded in an update, element by
    element. With inputs `mixed` so is the block's input, else the full-precision model's is taken."""

    keep: float = Field(default=0.5, ge=0, le=1)
    inputs: Literal["quantized", "full-precision", "mixed"] = "mixed"


class QDrop(Reconstruct):
    """Rounding and activation steps learned together, each activation rounded at random
    (Wei et al., arXiv 2203.05740)."""

    name = "qdrop"
    Options = QDropOptions
    options: QDropOptions

    def phases(self) -> Sequence[Phase]:
        keep = self.options.keep
        return (Phase(True, self.options.learn_steps, keep, _INPUTS.get(self.options.inputs, keep)),)
