"""The blocks of a tiny model and what is calibrated on them, as in a run: what tests of steps share."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import zoo
from torch import Tensor, nn
from transformers import PreTrainedModel

from ptq_llm.causal_lm import CausalLM
from ptq_llm.unify import unify
from ptqcore import Block, BlockIO, Calibration, Context, Dataflow, MinMax, QuantSection, Step, tensors_in
from ptqcore.blocks import find_blocks
from ptqcore.dataflow import trace
from ptqcore.grids import Grids
from ptqcore.modules import quantizable_layers
from ptqcore.walk import Walk

PER_CHANNEL = {"granularity": "channel", "symmetric": False}
PER_TOKEN = {"granularity": "token", "dynamic": True, "symmetric": False}


def quantization(bits: int = 4, activations: int | None = 4, static: bool = False) -> dict[str, Any]:
    """The `quant` section: weights per channel, activations per token, or per tensor if `static`."""
    inputs = {"symmetric": False} if static else PER_TOKEN
    found: dict[str, Any] = {"weights": PER_CHANNEL | {"bits": bits}}
    return found if activations is None else found | {"activations": inputs | {"bits": activations}}


def unified(name: str, dtype: torch.dtype = torch.float32, **changes: Any) -> Any:
    """A model of the zoo, its weight matrices linear layers, its experts told apart."""
    model = zoo.build(name, **changes).to(dtype)
    unify(model)
    return model


def texts(model: Any, lengths: Sequence[int] = (24, 9, 17), seed: int = 0) -> list[dict[str, Any]]:
    """Calibration samples of a language model."""
    return [
        {"input_ids": zoo.tokens(model, 1, length, seed + place), "use_cache": False}
        for place, length in enumerate(lengths)
    ]


def logits(model: Any) -> Tensor:
    """What a language model predicts on tokens that no sample has."""
    with torch.no_grad():
        return model(input_ids=zoo.tokens(model, 4, 40, seed=99), use_cache=False).logits


def difference(found: Tensor, expected: Tensor) -> float:
    """max|y′ − y| / max|y|."""
    return float((found - expected).abs().max() / expected.abs().max())


@dataclass
class Setup:
    """A model with what a run knows of it."""

    model: nn.Module
    samples: Sequence[Any]
    forward: Callable[[Any], Any]
    flow: Dataflow
    blocks: list[Block]
    context: Context
    masks: Sequence[Tensor | None] | None = None

    def walk(self, exact: bool = False) -> Walk:
        """Over the blocks."""
        return Walk(self.blocks, self.samples, self.forward, exact=exact)

    def ios(self) -> Iterator[BlockIO]:
        """The inputs of all blocks, whatever is done to each before the next is asked for."""
        walk = self.walk()
        for io in walk:
            yield io
            walk.advance(io.run_tensors())

    def calibration(self, io: BlockIO, exact: list[list[Tensor]] | None = None) -> Calibration:
        """Of one block."""
        grids, observer = self.context.grids, self.context.observer
        return Calibration(io.block, io, grids, observer, exact, self.masks)

    def prepare(self, step: Step) -> Step:
        """Let a step see the model."""
        step.prepare(self.model, self.flow, lambda: self.forward(self.samples[0]))
        return step

    def transform(self, *steps: Step) -> None:
        """Prepare steps, and let them transform all blocks."""
        for step in steps:
            self.prepare(step)
        for io in self.ios():
            calibration = self.calibration(io)
            for step in steps:
                step.transform(io.block, calibration)

    def quantize(self, *steps: Step) -> None:
        """Prepare steps, and hand them all blocks, as a run does; spans of one block."""
        for step in steps:
            self.prepare(step)
        exact = any(step.needs_exact for step in steps)
        walk = self.walk(exact)
        for io in walk:
            wanted = io.run_tensors(exact=True) if exact else None
            calibration = self.calibration(io, wanted)
            _ = calibration.targets
            for step in steps:
                step.transform(io.block, calibration)
            for step in steps:
                step.block(io.block, calibration)
            walk.advance(io.run_tensors(), wanted)

    def outputs(self) -> list[Tensor]:
        """What the model returns for every sample, the first tensor."""
        with torch.no_grad():
            return [tensors_in(self.forward(sample))[0].clone() for sample in self.samples]


def setup(
    model: Any,
    quant: dict[str, Any] | None = None,
    samples: Sequence[Any] | None = None,
    forward: Callable[[Any], Any] | None = None,
    blocks: str | None = None,
    masks: Sequence[Tensor | None] | None = None,
) -> Setup:
    """What a run would know of a model; a language model if no samples are given."""
    excluded: dict[str, str] = {}
    model.eval().requires_grad_(False)
    if samples is None:
        samples = texts(model)
    if isinstance(model, PreTrainedModel):
        task = CausalLM.__new__(CausalLM)
        task._model = model
        excluded = task.excluded(model)
    if forward is None:

        def forward(sample: Any) -> Any:
            return model(**sample) if isinstance(sample, dict) else model(sample)

    run = forward
    flow = trace(model, lambda: run(samples[0]))
    targets = quantizable_layers(model).keys() - excluded.keys()
    section = QuantSection.model_validate(quant or quantization())
    context = Context(section, lambda each: MinMax(each.spec), excluded, 0, Grids(section), None)
    return Setup(model, samples, forward, flow, find_blocks(model, flow, targets, blocks), context, masks)
