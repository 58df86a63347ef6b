"""The walk: partition a model into blocks, capture what flows in, and run them one by one."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import TreeSpec, tree_flatten, tree_unflatten

from ptqcore.dataflow import Dataflow, tensors_in
from ptqcore.errors import ModelError, nearest
from ptqcore.modules import QuantModule, quantizable_layers, quantized_class
from ptqcore.packed import QuantizedTensor
from ptqcore.progress import track
from ptqcore.spec import QuantSpec


@dataclass(frozen=True)
class Block:
    """A part of the model that is quantized as one: `path` names it inside `model`."""

    model: nn.Module
    path: str

    @property
    def module(self) -> nn.Module:
        """The block itself, as it now is."""
        return self.model.get_submodule(self.path)

    def layers(self) -> dict[str, nn.Module]:
        """Its float layers that can be quantized, by their path in the model."""
        return quantizable_layers(self.module, self.path)

    def quantized_layers(self) -> dict[str, QuantModule]:
        """Its quantized layers, by their path in the model."""
        named = self.module.named_modules(prefix=self.path)
        return {name: module for name, module in named if isinstance(module, QuantModule)}

    def quantize_layer(
        self, path: str, weight: QuantizedTensor, input_spec: QuantSpec | None
    ) -> QuantModule:
        """Replace the float layer at `path` by its quantized kind and return that.

        A static input quantizer is left without a range; steps call `Step.quantize_layer`, which
        sets it.

        Raises:
            ModelError: if the layer has no quantized kind.
        """
        layer = self.model.get_submodule(path)
        kind = quantized_class(layer)
        if kind is None:
            raise ModelError(f"layer {path!r} ({type(layer).__name__}) has no quantized kind")
        quantized = kind(layer, weight.spec, input_spec)
        quantized.set_weight(weight)
        quantized.train(layer.training)
        if path == "":
            raise ModelError(
                "a model that is one bare layer cannot be changed in place: wrap it in a module"
            )
        self.model.set_submodule(path, quantized)
        return quantized


def find_blocks(
    model: nn.Module, flow: Dataflow, excluded: set[str], glob: str | None = None
) -> list[Block]:
    """Partition a model into blocks that follow one another.

    Without a glob: of all runs of sibling modules where each returns the very tensor that the next
    one takes (the layers of a transformer, the stages of a network), the longest that holds every
    quantizable weight. If none does, the model is one block: that needs more memory, but no layer is
    left out.

    Args:
        model: the model.
        flow: one traced forward pass of it.
        excluded: paths of layers that will not be quantized; they do not count.
        glob: paths of the blocks, instead.

    Raises:
        ModelError: if the glob matches nothing, or modules that do not follow one another.
    """
    if glob is not None:
        return [Block(model, path) for path in _matching(model, flow, glob)]
    layers = [path for path in quantizable_layers(model) if path not in excluded]
    chains = [chain for path, module in model.named_modules() for chain in _chains(path, module, flow)]
    whole = [
        chain for chain in chains if all(any(_contains(block, path) for block in chain) for path in layers)
    ]
    best = max(whole, key=lambda chain: (len(chain), chain[0].count(".")), default=[""])
    return [Block(model, path) for path in best]


def _contains(block: str, path: str) -> bool:
    return path == block or path.startswith(f"{block}.") or not block


def _chains(path: str, module: nn.Module, flow: Dataflow) -> list[list[str]]:
    """Runs of children of one module, in the order of their calls, that feed one another."""
    children = {f"{path}.{name}" if path else name for name, _ in module.named_children()}
    order = [call.path for call in flow.calls if call.path in children]
    chains: list[list[str]] = []
    for child in order:
        if order.count(child) > 1:
            continue
        if chains and flow.feeds(chains[-1][-1], child):
            chains[-1].append(child)
        else:
            chains.append([child])
    return chains


def _matching(model: nn.Module, flow: Dataflow, glob: str) -> list[str]:
    paths = [path for path, _ in model.named_modules() if path]
    parts = glob.count(".")
    matched = {path for path in paths if fnmatchcase(path, glob) and path.count(".") == parts}
    if not matched:
        raise ModelError(f"recipe key 'blocks' is {glob!r} and matches no module{nearest(glob, paths)}")
    order = [call.path for call in flow.calls if call.path in matched]
    if not order:
        raise ModelError(
            f"recipe key 'blocks' is {glob!r}, but none of the modules it matches is called: "
            "name the modules themselves, not the list that holds them"
        )
    for first, second in pairwise(order):
        if not flow.feeds(first, second):
            raise ModelError(
                f"recipe key 'blocks' is {glob!r}, but {second!r} does not take the output of {first!r}: "
                "blocks must follow one another"
            )
    return order


@dataclass(frozen=True)
class _FromPrevious:
    """Stands for a tensor of the previous block's output in a captured call."""

    index: int


@dataclass
class _CapturedCall:
    leaves: list[Any]
    structure: TreeSpec


@dataclass
class BlockIO:
    """The inputs of one block for every calibration sample, from the quantized prefix.

    Each run hands the block fresh copies of the streamed tensors, so that a block may work in place.
    """

    block: Block
    calls: list[_CapturedCall]
    stream: list[list[Tensor]]

    def __len__(self) -> int:
        return len(self.calls)

    def run(self) -> Iterator[Any]:
        """Run the block as it now is on every sample, without gradients; yield its outputs."""
        for index, call in enumerate(self.calls):
            leaves = [self._leaf(leaf, index) for leaf in call.leaves]
            args, kwargs = tree_unflatten(leaves, call.structure)
            with torch.no_grad():
                yield self.block.module(*args, **kwargs)

    def _leaf(self, leaf: Any, sample: int) -> Any:
        return self.stream[sample][leaf.index].clone() if isinstance(leaf, _FromPrevious) else leaf

    def run_tensors(self) -> list[list[Tensor]]:
        """Outputs of the block as it now is: the tensors of every sample's output."""
        return [tensors_in(output) for output in self.run()]


class _Captured(Exception):  # noqa: N818 - a signal that ends a forward pass, not an error
    pass


class Walk:
    """Captures what every block is called with in one full-precision pass per sample.

    The hidden states that flow from block to block are kept for the first block only; later ones
    are recomputed by the walk, so that memory holds the inputs of one block. Everything else a block
    is called with (masks, position tables, keywords) is kept as it was, shared where blocks share it.
    """

    def __init__(
        self,
        blocks: list[Block],
        samples: Sequence[Any],
        forward: Callable[[Any], object],
    ) -> None:
        self.blocks = blocks
        self._calls: list[list[_CapturedCall]] = [[] for _ in blocks]
        self._stream: list[list[Tensor]] = []
        for sample in track(samples, "capturing block inputs"):
            self._capture(sample, forward)

    def __iter__(self) -> Iterator[BlockIO]:
        """The inputs of each block in turn; the caller must `advance` with the block's outputs."""
        for block, calls in zip(self.blocks, self._calls, strict=True):
            yield BlockIO(block, calls, self._stream)

    def advance(self, outputs: list[list[Tensor]]) -> None:
        """Set the tensors that flow into the next block, for every sample."""
        self._stream = outputs

    def _capture(self, sample: Any, forward: Callable[[Any], object]) -> None:
        previous: dict[int, int] = {}
        alive: list[Tensor] = []
        called: list[int] = []

        def before(index: int) -> Callable[..., None]:
            def hook(_: nn.Module, args: Any, kwargs: Any) -> None:
                called.append(index)
                leaves, structure = tree_flatten((args, kwargs))
                if index == 0:
                    self._stream.append([leaf.clone() for leaf in leaves if isinstance(leaf, Tensor)])
                    previous.update({id(leaf): i for i, leaf in enumerate(tensors_in(leaves))})
                kept = [
                    _FromPrevious(previous[id(leaf)]) if id(leaf) in previous else leaf for leaf in leaves
                ]
                self._calls[index].append(_CapturedCall(kept, structure))

            return hook

        def after(index: int) -> Callable[..., None]:
            def hook(_: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
                previous.clear()
                alive[:] = tensors_in(output)
                previous.update({id(leaf): i for i, leaf in enumerate(alive)})
                if index == len(self.blocks) - 1:
                    raise _Captured

            return hook

        handles = []
        for index, block in enumerate(self.blocks):
            handles.append(block.module.register_forward_pre_hook(before(index), with_kwargs=True))
            handles.append(block.module.register_forward_hook(after(index), with_kwargs=True))
        try:
            with torch.no_grad():
                forward(sample)
        except _Captured:
            pass
        finally:
            for handle in handles:
                handle.remove()
        if called != list(range(len(self.blocks))):
            raise ModelError(
                f"the blocks were not called once each and in order for calibration sample "
                f"{len(self._stream)}: name them with the recipe key 'blocks'"
            )
