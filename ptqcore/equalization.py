"""The step `equalize`: channels of neighbouring layers brought to equal ranges
(Nagel et al., arXiv 1906.04721, section 4.1)."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from pydantic import Field
from torch import Tensor, nn

from ptqcore.chains import Chain, clipping_bounds, find_chains
from ptqcore.dataflow import Dataflow, Op, tensors_in
from ptqcore.folding import TOLERANCE, relative_difference
from ptqcore.modules import rows_to_weight, weight_rows
from ptqcore.placement import CLIPPING
from ptqcore.progress import say
from ptqcore.step import Step, StepOptions

_SETTLED = 1e-4
_SAME_PLACES = {"clone", "contiguous", "detach", "dropout", "to"}
_KEEP_CHANNELS = {"max_pool2d", "pad", "interpolate"}


class EqualizeOptions(StepOptions):
    """sweeps: how often all pairs are equalized at most."""

    sweeps: int = Field(default=100, ge=1)


class Equalize(Step):
    """Scales the output channels of a layer down and the input channels of the next up.

    A function that commutes with positive scales (ReLU, or one that moves values) may stand between;
    one with an upper bound (ReLU6) does not, and parts them.
    With s = √(r₁ r₂) / r₂ for the ranges r of a channel's weights, both become √(r₁ r₂) (eq. 11); all
    pairs in turn, until nothing changes. The outputs must stay, or all of it is taken back.
    """

    name = "equalize"
    shares_samples = True
    stage = "transform"
    data_free = True
    Options: ClassVar[type[StepOptions]] = EqualizeOptions
    options: EqualizeOptions

    def prepare(self, model: nn.Module, flow: Dataflow, run: Callable[[], object]) -> None:
        pairs = find_pairs(model, flow)
        if not pairs:
            say("equalize: no two layers of this model can be equalized")
            return
        with torch.no_grad():
            before = tensors_in(run())
            layers = {
                path: model.get_submodule(path) for pair in pairs for path in (pair.first, pair.second)
            }
            kept = {path: dict(layer._parameters) for path, layer in layers.items()}
            equalize(layers, pairs, self.options.sweeps)
            difference = relative_difference(before, tensors_in(run()))
        if difference <= TOLERANCE:
            say(f"equalize: {len(pairs)} pairs of layers, the outputs differ by {difference:.2g}")
            return
        for path, parameters in kept.items():
            layers[path]._parameters.update(parameters)
        say(f"equalize: taken back, for it would change the outputs by {difference:.2g}")


@dataclass(frozen=True)
class Pair:
    """The paths of two layers to equalize; each output channel of the first is `width` input channels of
    the second."""

    first: str
    second: str
    width: int


def find_pairs(model: nn.Module, flow: Dataflow) -> list[Pair]:
    """The pairs of layers that can be equalized, with weights that nothing else reads."""
    consumers = flow.consumers()
    found = []
    for chain in find_chains(model, flow):
        width = _width(chain, model, flow)
        alone = all(len(consumers[op.inputs[1]]) == 1 for op in (chain.first, chain.second))
        if width is not None and alone and all(map(_commutes, chain.between)):
            found.append(Pair(chain.first.site.owner, chain.second.site.owner, width))
    return found


def _commutes(op: Op) -> bool:
    """Whether f(s·x) = s·f(x) for every scale s > 0."""
    if op.name not in CLIPPING:
        return True
    low, high = clipping_bounds(op) or (None, None)
    return low in (0.0, -math.inf) and high == math.inf


def _width(chain: Chain, model: nn.Module, flow: Dataflow) -> int | None:
    """How many input channels of the second layer come from one channel; None if they get mixed."""
    last = isinstance(model.get_submodule(chain.first.site.owner), nn.Linear)
    width = 1
    for op in chain.between:
        before, after = flow.shapes[op.inputs[0]], flow.shapes[op.outputs[0]]
        if op.name in CLIPPING | _SAME_PLACES and before == after:
            continue
        if not last and op.name in _KEEP_CHANNELS and before[:2] == after[:2]:
            continue
        flat = (before[0], math.prod(before[1:]))
        if last or after != flat:
            return None
        width, last = width * math.prod(before[2:]), True
    reads_last = isinstance(model.get_submodule(chain.second.site.owner), nn.Linear)
    return width if last == reads_last or len(flow.shapes[chain.second.inputs[0]]) == 2 else None


class _Weight:
    """A layer's weight in double precision [groups, out/groups, in/groups, taps]."""

    def __init__(self, layer: Any) -> None:
        rows = weight_rows(layer).detach().double()
        groups = getattr(layer, "groups", 1)
        self.values = rows.reshape(groups, rows.shape[0] // groups, rows.shape[1], -1).clone()

    def output_ranges(self) -> Tensor:
        """Largest magnitude per output channel [out]."""
        return self.values.abs().amax((2, 3)).flatten()

    def input_ranges(self, width: int) -> Tensor:
        """Largest magnitude per `width` input channels [in / width]."""
        return self.values.abs().amax((1, 3)).view(-1, width).amax(1)

    def scale_outputs(self, scale: Tensor) -> None:
        """Multiply the output channels by scale [out]."""
        self.values *= scale.view(self.values.shape[0], -1, 1, 1)

    def scale_inputs(self, scale: Tensor) -> None:
        """Multiply the input channels by scale [in]."""
        self.values *= scale.view(self.values.shape[0], 1, -1, 1)


def equalize(layers: dict[str, nn.Module], pairs: list[Pair], sweeps: int) -> None:
    """Equalize pairs of layers, given by path and changed in place, in at most so many sweeps."""
    weights = {path: _Weight(layer) for path, layer in layers.items()}
    scales = {pair.first: torch.ones_like(weights[pair.first].output_ranges()) for pair in pairs}
    for _ in range(sweeps):
        moved = 0.0
        for pair in pairs:
            first, second = weights[pair.first], weights[pair.second]
            scale = _scale(first.output_ranges(), second.input_ranges(pair.width))
            first.scale_outputs(1 / scale)
            second.scale_inputs(scale.repeat_interleave(pair.width))
            scales[pair.first] *= scale
            moved = max(moved, float(scale.log().abs().max()))
        if moved < _SETTLED:
            break
    for path, layer in layers.items():
        _put(layer, weights[path], scales.get(path))


def _scale(first: Tensor, second: Tensor) -> Tensor:
    """s [channels] = √(r₁ r₂) / r₂; 1 where a channel is not used."""
    used = (first > 0) & (second > 0)
    return torch.where(used, (first / second).sqrt(), torch.ones_like(first))


def _put(layer: Any, weight: _Weight, scale: Tensor | None) -> None:
    """Give a layer its new weight, and a bias that fits."""
    rows = weight_rows(layer)
    new = rows_to_weight(weight.values.reshape(rows.shape).to(rows.dtype), layer).contiguous()
    layer.register_parameter("weight", nn.Parameter(new, requires_grad=False))
    if scale is not None and layer.bias is not None:
        bias = (layer.bias.double() / scale).to(layer.bias.dtype)
        layer.register_parameter("bias", nn.Parameter(bias, requires_grad=False))
