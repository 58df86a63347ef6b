"""The step `adaround`: rounding learned layer by layer (Nagel et al., arXiv 2004.10568)."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.func import functional_call

from ptqcore.attachments import without_hooks
from ptqcore.blocks import Block
from ptqcore.calibration import Calibration
from ptqcore.dataflow import Op
from ptqcore.learned_rounding import Learning, LearningOptions
from ptqcore.modules import rows_to_weight, weight_rows
from ptqcore.placement import CLIPPING, LAYERS
from ptqcore.problem import Problem
from ptqcore.quantizers import LearnedRounding


class AdaRoundOptions(LearningOptions):
    """As of learning, of every layer on its own."""

    inputs: Literal["quantized", "full-precision"] = Field(default="quantized")


class AdaRound(Learning):
    """Minimises ‖f(Wx) − f(W̃x̂)‖² for one layer after the other (eq. 25): x from the full-precision
    model, x̂ from the quantized prefix, f the clipping activation function behind the layer, if any."""

    name = "adaround"
    Options: ClassVar[type[LearningOptions]] = AdaRoundOptions
    options: AdaRoundOptions

    def block(self, block: Block, calibration: Calibration) -> None:
        layers = self.context.targets(block)
        traced = [call.path for call in self._flow.calls if call.path in layers]
        called = dict.fromkeys([*traced, *layers])  # other samples may take another way
        outputs = calibration.record(called, exact=True, outputs=True)
        generator = self.generator(block)
        for path in called:
            found = calibration.record([path], exact=self.options.inputs == "full-precision")[path]
            layer = layers[path]
            inputs, targets = _pairs(layer, found, outputs.pop(path, []))
            rounding = LearnedRounding(weight_rows(layer), self.nearest(path, layer, calibration))
            problem = _problem(path, layer, rounding, inputs, targets, self._behind(path))
            problem.midway = next(calibration.midways)
            problem.at_once = self.at_once(Block(block.model, path), calibration)
            if inputs:
                self.learn(problem, self.options.schedule(), generator)
            calibration.losses += problem.history
            self.quantize_layer(block, calibration, path, rounding.hard())

    def _behind(self, path: str) -> Op | None:
        """The clipping function that alone reads what the layer at `path` returns."""
        ops = [op for op in self._flow.ops if op.site.owner == path and op.name in LAYERS]
        readers = self._flow.consumers().get(ops[0].outputs[0], []) if ops else []
        return readers[0] if len(readers) == 1 and readers[0].name in CLIPPING else None


@torch.no_grad()
def _pairs(
    layer: nn.Module, inputs: list[Tensor], outputs: list[Tensor]
) -> tuple[list[Tensor], list[Tensor]]:
    """Inputs of a layer and what it should return for them, call by call, where anything reaches it.

    An expert may be sent other tokens once the layers in front of it are quantized: then there are no
    outputs of full precision for these inputs, and its own are taken.
    """
    linear = isinstance(layer, nn.Linear)
    same = len(inputs) == len(outputs) and all(
        x.shape[:-1] == y.shape[:-1] for x, y in zip(inputs, outputs, strict=True) if linear
    )
    wanted = outputs if same else [layer(x) for x in inputs]
    reached = [index for index, x in enumerate(inputs) if x.numel()]
    return [inputs[index] for index in reached], [wanted[index] for index in reached]


def _problem(
    path: str,
    layer: nn.Module,
    rounding: LearnedRounding,
    inputs: list[Tensor],
    outputs: list[Tensor],
    behind: Op | None,
) -> Problem:
    after: Callable[[Tensor], Tensor] = partial(_clip, behind) if behind else lambda x: x
    plain = without_hooks(layer)

    def predict(samples: Sequence[int]) -> list[Tensor]:
        x = torch.cat([inputs[sample] for sample in samples])
        weight = {"weight": rows_to_weight(rounding.weight, layer)}
        return [after(functional_call(plain, weight, (x,)))]

    def target(samples: Sequence[int]) -> list[Tensor]:
        return [after(torch.cat([outputs[sample] for sample in samples]))]

    return Problem(path, range(len(inputs)), predict, target, [rounding], [])


def _clip(op: Op, x: Tensor) -> Tensor:
    if op.name == "relu":
        return x.relu()
    if op.name == "relu6":
        return x.clamp(0, 6)
    bounds = [n for n in op.arguments if isinstance(n, int | float) and not isinstance(n, bool)]
    return x.clamp(*bounds) if len(bounds) == 2 else x
