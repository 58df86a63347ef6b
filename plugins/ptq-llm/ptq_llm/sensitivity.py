"""How much a block's output suffers when one of its layers is rounded to a width.

The Gram of a layer's inputs gives the error of its own output at every width, tr(ΔW G ΔWᵀ). What that does
to what the block returns (the residual stream of a transformer) is measured once for each layer, at one
width, by running the block again: the ratio of the two holds for the other widths too, as errors are small.
On a small trained model the errors so predicted follow the KL divergence that a layer alone brings at 2 to
4 bits with a rank correlation of 0.95; errors relative to a layer's own output follow it with 0.25, since
blocks differ by two orders of magnitude in what they add to the stream.
"""

import re
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map_only

from ptqcore import Gram

_NUMBER = re.compile(r"(?:^|(?<=\.))\d+(?=\.|$)")

Rounded = Callable[[str, Tensor, int], Tensor]
"""A layer's path, its weight and a width → the weight rounded to that width."""


@torch.no_grad()
def measure(
    model: nn.Module,
    layers: Sequence[str],
    run: Callable[[], object],
    widths: Sequence[int],
    probe: int,
    rounded: Rounded,
) -> dict[str, dict[int, float]]:
    """‖f̂ − f‖² / ‖f‖² of a layer's block with that layer alone rounded: path → width → error.

    Blocks are the members of the outermost lists of modules; layers in none are their own. Layers that
    differ only by a number inside a block (experts) are probed together. Those among them that no token
    reaches count like the mean of the others; where none is reached, by ‖ΔW‖² / ‖W‖².

    Args:
        model: in full precision.
        layers: paths of linear layers.
        run: one forward pass of the model. Blocks are run again inside of it, so that their inputs and
            the Grams of their layers are there for one block at a time.
        widths: to measure.
        probe: the one of them at which blocks are run again.
        rounded: how a weight is rounded.
    """
    blocks: dict[str, list[str]] = defaultdict(list)
    for path in layers:
        blocks[_block_of(path)].append(path)
    probes = [_Probe(model, path, paths, widths, probe, rounded) for path, paths in blocks.items()]
    handles = [handle for one in probes for handle in one.watch()]
    try:
        run()
    finally:
        for handle in handles:
            handle.remove()
    return {path: one.errors.get(path) or one.unreached(path) for one in probes for path in one.paths}


def _block_of(path: str) -> str:
    number = _NUMBER.search(path)
    return path if number is None else path[: number.end()]


@dataclass
class _Probe:
    """Measures the layers of one block when it is called."""

    model: nn.Module
    block: str
    paths: Sequence[str]
    widths: Sequence[int]
    probe: int
    rounded: Rounded
    errors: dict[str, dict[int, float]] = field(default_factory=dict)
    _grams: dict[str, Gram] = field(default_factory=dict)
    _given: Any = None
    _busy: bool = False

    def watch(self) -> list[Any]:
        """Hooks on the block and its layers."""
        module = self.model.get_submodule(self.block)
        handles = [
            module.register_forward_pre_hook(self._enter, with_kwargs=True, prepend=True),
            module.register_forward_hook(self._leave),
        ]
        for path in self.paths:
            layer = self.model.get_submodule(path)
            handles.append(layer.register_forward_pre_hook(self._read(path)))
        return handles

    def unreached(self, path: str) -> dict[int, float]:
        """‖ΔW‖² / ‖W‖² of a layer for every width."""
        weight = self.model.get_submodule(path).get_parameter("weight")
        white = Gram(weight.shape[1], weight.device)
        white.matrix.fill_diagonal_(1)
        return {
            width: white.relative_error(weight, self.rounded(path, weight, width)) for width in self.widths
        }

    def _enter(self, _: nn.Module, args: Any, kwargs: Any) -> None:
        if not self._busy:
            self._given = tree_map_only(Tensor, torch.clone, (args, kwargs))

    def _read(self, path: str) -> Callable[..., None]:
        def note(_: nn.Module, args: Any) -> None:
            if not self._busy:
                gram = self._grams.setdefault(path, Gram(args[0].shape[-1], args[0].device))
                gram.update(args[0])

        return note

    def _leave(self, module: nn.Module, _: Any, output: Any) -> None:
        if self._busy:
            return
        self._busy = True
        alike: dict[str, list[str]] = defaultdict(list)
        for path in self.paths:
            alike[_NUMBER.sub("*", path[len(self.block) :])].append(path)
        for paths in alike.values():
            self._measure(module, _first_tensor(output), paths)
        self._grams.clear()
        self._given = None
        self._busy = False

    def _measure(self, module: nn.Module, expected: Tensor, paths: Sequence[str]) -> None:
        """The errors of layers that are probed together."""
        reached = [path for path in paths if path in self._grams and self._grams[path].count]
        energies = {path: self._energies(path) for path in reached}
        at_probe = sum(energies[path][self.probe] for path in reached)
        if not reached or not at_probe:
            return
        gain = self._relative_change(module, expected, reached) / at_probe
        mean = {width: sum(one[width] for one in energies.values()) / len(reached) for width in self.widths}
        for path in paths:
            own = energies.get(path, mean)
            self.errors[path] = {width: gain * own[width] for width in self.widths}

    def _energies(self, path: str) -> dict[int, float]:
        """tr(ΔW G ΔWᵀ) of a layer at every width."""
        weight, gram = self.model.get_submodule(path).get_parameter("weight"), self._grams[path]
        return {width: gram.energy(self.rounded(path, weight, width) - weight) for width in self.widths}

    def _relative_change(self, module: nn.Module, expected: Tensor, paths: Sequence[str]) -> float:
        """‖f̂ − f‖² / ‖f‖² of the block's output with some layers rounded to the probed width."""
        weights = {path: self.model.get_submodule(path).get_parameter("weight") for path in paths}
        kept = {path: weight.data for path, weight in weights.items()}
        try:
            for path, weight in weights.items():
                weight.data = self.rounded(path, weight, self.probe)
            args, kwargs = tree_map_only(Tensor, torch.clone, self._given)
            found = _first_tensor(module(*args, **kwargs))
        finally:
            for path, weight in weights.items():
                weight.data = kept[path]
        energy = expected.double().square().sum()
        return float((found.double() - expected.double()).square().sum() / energy) if energy else 0.0


def _first_tensor(output: Any) -> Tensor:
    """The first tensor of what a block returns."""
    return next(leaf for leaf in tree_leaves(output) if isinstance(leaf, Tensor))
