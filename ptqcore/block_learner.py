"""One block while its rounding is learned: what it computes with the variables as they now are."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils._pytree import tree_flatten, tree_unflatten

from ptqcore import edges
from ptqcore.dataflow import tensors_in
from ptqcore.edges import TensorFunction
from ptqcore.modules import rows_to_weight
from ptqcore.placement import Edge
from ptqcore.quantizers import FakeQuant, LearnedBias, LearnedStep, LearnedWeight, random_mask
from ptqcore.timesteps import at
from ptqcore.walk import BlockIO


@dataclass(frozen=True)
class Phase:
    """One run of the optimiser.

    weights, steps: what is learned. keep: probability that an activation inside the block is
    rounded; inputs: probability that an element of the block's input comes from the quantized prefix,
    not from the full-precision model. share: of the iterations.
    """

    weights: bool
    steps: bool
    keep: float
    inputs: float
    share: float = 1.0


_TENSOR = object()
_DECIDED = Phase(weights=True, steps=True, keep=1.0, inputs=1.0)


class BlockLearner:
    """Computes a block with learned weights and activation steps, for a `Problem`."""

    def __init__(
        self,
        io: BlockIO,
        exact: list[list[Tensor]],
        weights: dict[str, LearnedWeight],
        quantizers: dict[Edge, FakeQuant],
        precision: torch.dtype,
        biases: bool = False,
    ) -> None:
        """Args:
        io: the block's inputs, in both streams.
        exact: what the full-precision model has at the block's output, for every sample.
        weights: what is learned of them, by path of the layer.
        quantizers: of the activations inside the block.
        precision: of the computation.
        biases: whether the layers' biases are learned too.
        """
        self.io, self.exact = io, exact
        self.weights, self.quantizers = weights, quantizers
        self.learned = {
            id(quantizer): LearnedStep(quantizer)
            for quantizer in quantizers.values()
            if not quantizer.spec.dynamic and not quantizer.spec.is_float
        }
        self.biases = self._learned_biases() if biases else {}
        self._precision = precision
        self._decided: dict[str, Tensor] = {}

    def decide(self) -> None:
        """Compute with decided weights from now on."""
        layers = self.io.block.layers()
        self._decided = {
            path: rows_to_weight(learned.hard().dequantize(), layers[path])
            for path, learned in self.weights.items()
        }

    def predict(self, phase: Phase, generator: torch.Generator, samples: Sequence[int]) -> list[Tensor]:
        """The block's output tensors for a batch of samples."""
        args, kwargs = self._inputs(phase.inputs, generator, samples)
        block = self.io.block
        functions = {
            edge: self._rounding(quantizer, phase, generator) for edge, quantizer in self.quantizers.items()
        }
        with (
            at(self.io.moment(samples)),
            torch.autocast("cpu", self._precision, enabled=self._precision != torch.float32),
            edges.applying(block.module, block.path, functions if phase.keep else {}),
        ):
            output = functional_call(block.module, self._parameters(phase), args, kwargs)
        leaves, self._structure = tree_flatten(output)
        self._constants = [_TENSOR if isinstance(leaf, Tensor) else leaf for leaf in leaves]
        return [tensor.float() for tensor in tensors_in(output)]

    @torch.no_grad()
    def rounded(self, samples: Sequence[int]) -> Any:
        """What the block returns for a batch of samples with every rounding decided."""
        for learned in self.weights.values():
            learned.decide()
        return self.structured(self.predict(_DECIDED, torch.Generator(), samples))

    def structured(self, tensors: Sequence[Tensor]) -> Any:
        """Output tensors in the form in which the block returns them; it must have been computed once."""
        given = iter(tensors)
        leaves = [next(given) if leaf is _TENSOR else leaf for leaf in self._constants]
        return tree_unflatten(leaves, self._structure)

    def target(self, samples: Sequence[int]) -> list[Tensor]:
        """What the full-precision model has there."""
        return [torch.cat(parts) for parts in zip(*(self.exact[s] for s in samples), strict=True)]

    def _parameters(self, phase: Phase) -> dict[str, Tensor]:
        block = self.io.block
        layers: dict[str, nn.Module] = block.layers()
        start = len(block.path) + 1 if block.path else 0
        found = {}
        for path, learned in self.weights.items():
            name = f"{path[start:]}.weight".lstrip(".")
            weight = self._decided.get(path)
            found[name] = rows_to_weight(learned.weight, layers[path]) if weight is None else weight
        for path, bias in self.biases.items():
            found[f"{path[start:]}.bias".lstrip(".")] = bias.value
        return found

    def _learned_biases(self) -> dict[str, LearnedBias]:
        """Of the layers that have one; the unit is the spread of their outputs for the first sample."""
        layers = {path: self.io.block.layers()[path] for path in self.weights}
        units: dict[str, float] = {}
        handles = [
            layer.register_forward_hook(partial(_note_spread, units, path))
            for path, layer in layers.items()
            if layer.bias is not None
        ]
        try:
            self.io.run_sample(0, exact=True)
        finally:
            for handle in handles:
                handle.remove()
        return {path: LearnedBias(layers[path].bias, unit) for path, unit in units.items()}  # type: ignore[arg-type]

    def _rounding(self, quantizer: FakeQuant, phase: Phase, generator: torch.Generator) -> TensorFunction:
        return partial(self._round, quantizer, phase, generator)

    def _round(self, quantizer: FakeQuant, phase: Phase, generator: torch.Generator, x: Tensor) -> Tensor:
        """x on its grid, each element with the probability of the phase."""
        keep = random_mask(x, phase.keep, generator) if phase.keep < 1 else None
        learned = self.learned.get(id(quantizer))
        if learned is not None:
            return learned(x.float(), keep).to(x.dtype)
        rounded = quantizer(x)
        return rounded if keep is None else torch.where(keep, rounded, x)

    def _inputs(self, share: float, generator: torch.Generator, samples: Sequence[int]) -> Any:
        """Args and kwargs, their elements from the two streams at random."""
        leaves, structure = tree_flatten(self.io.batch(samples, exact=share == 0))
        if 0 < share < 1:
            exact = tree_flatten(self.io.batch(samples, exact=True))[0]
            leaves = [
                one if one is other else _mix(one, other, share, generator)
                for one, other in zip(leaves, exact, strict=True)
            ]
        return tree_unflatten([_channels_last(leaf) for leaf in leaves], structure)


def _note_spread(units: dict[str, float], path: str, layer: nn.Module, args: Any, output: Tensor) -> None:
    units[path] = float(output.float().std(correction=0))


def _channels_last(leaf: Any) -> Any:
    """Images with their channels last in memory: convolutions on CPUs run up to twice as fast so."""
    if isinstance(leaf, Tensor) and leaf.ndim == 4:
        return leaf.contiguous(memory_format=torch.channels_last)
    return leaf


def _mix(one: Any, other: Any, share: float, generator: torch.Generator) -> Any:
    if not isinstance(one, Tensor) or not one.is_floating_point():
        return one
    return other.lerp(one, random_mask(one, share, generator).to(one.dtype))
