"""The walk: what flows between blocks, recorded once, then replayed block by block.

One full-precision pass per sample writes a tape: each block's call, and the functions that the model
computes between blocks. The walk replays it with what the blocks return once they are quantized, so
that any graph of blocks (chains, branches, long skips) is walked with one block at work at a time.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import count
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import TreeSpec, tree_flatten, tree_unflatten
from torch.utils.weak import WeakTensorKeyDictionary

from ptqcore import edges
from ptqcore.blocks import Block
from ptqcore.dataflow import Running, Site, tensors_in
from ptqcore.edges import TensorFunction
from ptqcore.errors import ModelError
from ptqcore.placement import Edge
from ptqcore.progress import track


@dataclass(frozen=True)
class _Reference:
    """Stands for a tensor that flows, in the leaves of a recorded call."""

    number: int


@dataclass
class _Node:
    """One entry of the tape: a block (`function` is None), or a function between blocks."""

    leaves: list[Any]
    structure: TreeSpec
    function: Callable[..., Any] | None = None
    site: Site | None = None
    outputs: tuple[int, ...] = ()


@dataclass
class _Tape:
    """What one sample does: its nodes, and the tensors that flow, by number, as they now are."""

    nodes: list[_Node] = field(default_factory=list)
    flowing: dict[int, Tensor] = field(default_factory=dict)
    exact: dict[int, Tensor] = field(default_factory=dict)

    def arguments(self, node: _Node, exact: bool = False, copy: bool = False) -> Any:
        """Args and kwargs of a node; `exact` takes the full-precision stream."""
        stream = self.exact if exact else self.flowing
        leaves = [stream[leaf.number] if isinstance(leaf, _Reference) else leaf for leaf in node.leaves]
        if copy:
            leaves = [
                new.clone() if isinstance(old, _Reference) else new
                for old, new in zip(node.leaves, leaves, strict=True)
            ]
        return tree_unflatten(leaves, node.structure)

    @cached_property
    def _last_read(self) -> dict[int, int]:
        return {
            leaf.number: position
            for position, node in enumerate(self.nodes)
            for leaf in node.leaves
            if isinstance(leaf, _Reference)
        }

    def forget(self, position: int) -> None:
        """Drop the tensors that no node from `position` on reads."""
        for stream in (self.flowing, self.exact):
            for number in [n for n in stream if self._last_read.get(n, -1) < position]:
                del stream[number]


@dataclass
class BlockIO:
    """The inputs of one block for every calibration sample.

    `functions` are applied to the tensors at the block's edges in every run: none at first, its
    quantizers once they have ranges. Each run hands the block fresh copies of what flows in, so that
    a block may work in place.
    """

    block: Block
    tapes: list[_Tape]
    nodes: list[_Node]
    functions: Mapping[Edge, TensorFunction] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.tapes)

    def run(self, exact: bool = False) -> Iterator[Any]:
        """Run the block as it now is on every sample, without gradients; yield its outputs.

        Args:
            exact: take the inputs from the full-precision model, not from the quantized prefix.
        """
        for tape, node in zip(self.tapes, self.nodes, strict=True):
            args, kwargs = tape.arguments(node, exact, copy=True)
            with torch.no_grad(), edges.applying(self.block.module, self.block.path, self.functions):
                yield self.block.module(*args, **kwargs)

    def run_tensors(self, exact: bool = False) -> list[list[Tensor]]:
        """Outputs of the block as it now is: the tensors of every sample's output."""
        return [tensors_in(output) for output in self.run(exact)]

    def can_join(self) -> bool:
        """Whether the samples have the same shapes, so that any of them fit in one batch."""
        flowing = [[tape.flowing[leaf.number].shape for leaf in node.leaves if isinstance(leaf, _Reference)]
                   for tape, node in zip(self.tapes, self.nodes, strict=True)]  # fmt: skip
        return all(shapes == flowing[0] for shapes in flowing)

    def batch(self, samples: Sequence[int], exact: bool = False) -> Any:
        """Args and kwargs for several samples at once, their flowing tensors joined along dimension 0.

        Tensors that do not flow (masks, tables) are joined too if each sample has its own with the
        same first dimension as what flows; the others are taken from the first sample.

        Raises:
            ValueError: if the samples' tensors cannot be joined.
        """
        leaves = []
        first = self.nodes[samples[0]]
        for place, leaf in enumerate(first.leaves):
            given = [self._leaf(sample, place, exact) for sample in samples]
            alone = len({id(value) for value in given}) == 1
            flows = isinstance(leaf, _Reference)
            if isinstance(leaf, Tensor | _Reference) and (flows or not alone):
                if any(value.shape[1:] != given[0].shape[1:] for value in given):
                    raise ValueError("samples of different shapes cannot be joined")
                leaves.append(torch.cat(given))
            else:
                leaves.append(given[0])
        return tree_unflatten(leaves, first.structure)

    def _leaf(self, sample: int, place: int, exact: bool) -> Any:
        leaf = self.nodes[sample].leaves[place]
        if not isinstance(leaf, _Reference):
            return leaf
        tape = self.tapes[sample]
        return (tape.exact if exact else tape.flowing)[leaf.number]


class _Captured(Exception):  # noqa: N818 - a signal that ends a forward pass, not an error
    pass


Calibrate = Callable[[Edge, list[Tensor]], TensorFunction]


class Walk:
    """Replays a model block by block: `for io in walk: …; walk.advance(outputs)`.

    Memory holds the tape of constants (masks, position tables; shared where the model shares them),
    and of the flowing tensors only those that are still to be read.
    """

    def __init__(
        self,
        blocks: list[Block],
        samples: Sequence[Any],
        forward: Callable[[Any], object],
        between: Mapping[Edge, Calibrate] | None = None,
        exact: bool = False,
    ) -> None:
        """Record the tapes.

        Args:
            blocks: the blocks, each called once in a forward pass, in this order.
            samples: the calibration samples.
            forward: runs the model on one sample.
            between: for edges of functions between blocks: gets the tensors of all samples there and
                returns what is to be done to each of them.
            exact: whether to keep the stream of the full-precision model too.
        """
        self.blocks = blocks
        self.exact = exact
        self._between = edges.by_site(between or {})  # type: ignore[arg-type]
        self._tapes = [
            self._capture(sample, forward) for sample in track(samples, "capturing block inputs")
        ]
        self._check()
        self._position = 0

    def __iter__(self) -> Iterator[BlockIO]:
        """The inputs of each block in turn; the caller must `advance` with the block's outputs."""
        for block in self.blocks:
            self._run_between()
            yield BlockIO(block, self._tapes, [tape.nodes[self._position] for tape in self._tapes])

    def advance(self, outputs: list[list[Tensor]], exact: list[list[Tensor]] | None = None) -> None:
        """Set what the block just walked returns for every sample: quantized, and in full precision."""
        for index, tape in enumerate(self._tapes):
            numbers = tape.nodes[self._position].outputs
            tape.flowing.update(zip(numbers, outputs[index], strict=True))
            if exact is not None:
                tape.exact.update(zip(numbers, exact[index], strict=True))
            tape.forget(self._position + 1)
        self._position += 1

    def _run_between(self) -> None:
        """Compute everything up to the next block, for all samples."""
        while self._tapes and self._tapes[0].nodes[self._position].function is not None:
            nodes = [tape.nodes[self._position] for tape in self._tapes]
            results = [self._call(tape, node) for tape, node in zip(self._tapes, nodes, strict=True)]
            for edge, calibrate in self._between.get(nodes[0].site, ()):  # type: ignore[arg-type]
                function = calibrate(edge, [result[edge.index] for result in results])  # type: ignore[call-arg, arg-type]
                for result in results:
                    result[edge.index] = function(result[edge.index])  # type: ignore[operator]
            for tape, node, result in zip(self._tapes, nodes, results, strict=True):
                tape.flowing.update(zip(node.outputs, result, strict=True))
                if self.exact:
                    exact = self._call(tape, node, exact=True)
                    tape.exact.update(zip(node.outputs, exact, strict=True))
                tape.forget(self._position + 1)
            self._position += 1

    def _call(self, tape: _Tape, node: _Node, exact: bool = False) -> list[Tensor]:
        assert node.function is not None
        args, kwargs = tape.arguments(node, exact)
        with torch.no_grad():
            return tensors_in(node.function(*args, **kwargs))

    def _capture(self, sample: Any, forward: Callable[[Any], object]) -> _Tape:
        recorder = _TapeRecorder(self.blocks, self.exact)
        with torch.no_grad():
            recorder.record(lambda: forward(sample))
        return recorder.tape

    def _check(self) -> None:
        """Every sample must call each block once, and compute the same functions between them."""
        for index, tape in enumerate(self._tapes):
            if sum(node.function is None for node in tape.nodes) != len(self.blocks):
                raise ModelError(
                    f"the blocks were not called once each and in order for calibration sample "
                    f"{index + 1}: name them with the recipe key 'blocks'"
                )
            if [node.site for node in tape.nodes] != [node.site for node in self._tapes[0].nodes]:
                raise ModelError(
                    f"between the blocks, calibration sample {index + 1} takes another way through the "
                    "model than the first: name larger blocks with the recipe key 'blocks'"
                )


class _TapeRecorder(TorchFunctionMode):
    """Writes the tape of one sample."""

    def __init__(self, blocks: list[Block], exact: bool) -> None:
        super().__init__()
        self.tape = _Tape()
        self._blocks, self._keep_exact = blocks, exact
        self._running = Running()
        self._inside = False
        self._done = 0
        self._numbers = WeakTensorKeyDictionary()
        self._unused = count()

    def record(self, run: Callable[[], object]) -> None:
        model = self._blocks[0].model
        wanted = {block.module: index for index, block in enumerate(self._blocks)}
        handles = []
        for path, module in model.named_modules():
            handles.append(
                module.register_forward_pre_hook(
                    self._enter(path, wanted.get(module)), with_kwargs=True, prepend=True
                )
            )
            handles.append(
                module.register_forward_hook(
                    self._leave(wanted.get(module)), with_kwargs=True, always_call=True
                )
            )
        try:
            with self:
                run()
        except _Captured:
            pass
        finally:
            for handle in handles:
                handle.remove()

    def _number(self, tensor: Tensor) -> int:
        if tensor not in self._numbers:
            self._numbers[tensor] = next(self._unused)
        return int(self._numbers[tensor])

    def _enter(self, path: str, index: int | None) -> Callable[..., None]:
        def hook(_: nn.Module, args: Any, kwargs: Any) -> None:
            if index is not None:
                self._start_block(index, args, kwargs)
            self._running.enter(path)

        return hook

    def _leave(self, index: int | None) -> Callable[..., None]:
        def hook(_: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
            self._running.leave()
            if index is None or output is None:
                return
            node = self.tape.nodes[-1]
            node.outputs = tuple(self._number(tensor) for tensor in tensors_in(output))
            self._inside = False
            if index == len(self._blocks) - 1:
                raise _Captured

        return hook

    def _start_block(self, index: int, args: Any, kwargs: Any) -> None:
        if index != self._done:
            raise _Captured  # the tape stays short, which `Walk` reports
        self._done += 1
        self._inside = True
        leaves, structure = tree_flatten((args, kwargs))
        if index == 0:
            for leaf in tensors_in(leaves):
                self.tape.flowing[self._number(leaf)] = leaf.clone()
            if self._keep_exact:
                self.tape.exact = dict(self.tape.flowing)
        self.tape.nodes.append(_Node(self._referring(leaves), structure))

    def _referring(self, leaves: list[Any]) -> list[Any]:
        return [
            _Reference(self._number(leaf)) if isinstance(leaf, Tensor) and leaf in self._numbers else leaf
            for leaf in leaves
        ]

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        site = self._running.site(func)
        if self._inside or not self._done:
            return func(*args, **(kwargs or {}))
        leaves, structure = tree_flatten((args, kwargs or {}))
        referring = self._referring(leaves)
        output = func(*args, **(kwargs or {}))
        made = tensors_in(output)
        flows = any(isinstance(leaf, _Reference) for leaf in referring)
        if flows and (made or output is None):
            numbers = tuple(self._number(tensor) for tensor in made)
            self.tape.nodes.append(_Node(referring, structure, func, site, numbers))
        return output
