"""The walk: what flows between blocks, recorded once, then replayed block by block.

One full-precision pass per sample writes a tape: each block's call, and the functions that the model
computes between blocks. The walk replays it with what the blocks return once they are quantized, so
that any graph of blocks (chains, branches, long skips) is walked with one block at work at a time.
"""

import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property, partial
from itertools import count
from pathlib import Path
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
from ptqcore.store import Store


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
    store: Store
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
                output = self.block.module(*args, **kwargs)
            yield output

    def run_tensors(self, exact: bool = False) -> list[list[Tensor]]:
        """Outputs of the block as it now is: the tensors of every sample's output."""
        return [[self.store.keep(tensor) for tensor in tensors_in(output)] for output in self.run(exact)]

    def can_join(self) -> bool:
        """Whether any samples fit in one batch: they have the same shapes, and what is not joined is
        the same for all."""
        for place in range(len(self.nodes[0].leaves)):
            first, *others = (self._leaf(sample, place, exact=False) for sample in range(len(self)))
            if not isinstance(first, Tensor):
                continue
            if any(other.shape != first.shape for other in others):
                return False
            if not self._joins(place, range(len(self))) and any(not first.equal(other) for other in others):
                return False
        return True

    def batch(self, samples: Sequence[int], exact: bool = False) -> Any:
        """Args and kwargs for several samples at once, joined along dimension 0.

        Tensors that all samples share, and those that have not the batch's first dimension (masks and
        tables for any batch), are taken from the first sample.

        Raises:
            ValueError: if the samples' tensors cannot be joined.
        """
        leaves = []
        first = self.nodes[samples[0]]
        for place in range(len(first.leaves)):
            given = [self._leaf(sample, place, exact) for sample in samples]
            if self._joins(place, samples):
                if any(value.shape[1:] != given[0].shape[1:] for value in given):
                    raise ValueError("samples of different shapes cannot be joined")
                leaves.append(torch.cat(given))
            else:
                leaves.append(given[0])
        return tree_unflatten(leaves, first.structure)

    def _joins(self, place: int, samples: Sequence[int]) -> bool:
        """Whether a tensor of the call has the first dimension of the first one that flows."""
        given = [self._leaf(sample, place, exact=False) for sample in samples]
        flows = isinstance(self.nodes[samples[0]].leaves[place], _Reference)
        if not isinstance(given[0], Tensor) or not (flows or any(value is not given[0] for value in given)):
            return False
        return all(
            self._size(sample) in (None, value.shape[:1])
            for sample, value in zip(samples, given, strict=True)
        )

    def _size(self, sample: int) -> torch.Size | None:
        """The first dimension of the first tensor that flows into the block, if one does."""
        numbers = (leaf.number for leaf in self.nodes[sample].leaves if isinstance(leaf, _Reference))
        number = next(numbers, None)
        return None if number is None else self.tapes[sample].flowing[number].shape[:1]

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
        store: Store | None = None,
    ) -> None:
        """Record the tapes.

        Args:
            blocks: the blocks, each called once in a forward pass, in this order.
            samples: the calibration samples.
            forward: runs the model on one sample.
            between: for edges of functions between blocks: gets the tensors of all samples there and
                returns what is to be done to each of them.
            exact: whether to keep the stream of the full-precision model too.
            store: keeps what flows; by default memory does.
        """
        self.blocks = blocks
        self._store = store or Store(sys.maxsize, Path())
        self.exact = exact
        between = between or {}
        self._between: Mapping[Site, list[tuple[Edge, Calibrate]]] = edges.by_site(between)  # type: ignore[arg-type, assignment]
        self._tapes = self._capture_all(samples, forward, between)
        self._check()
        self._position = 0

    def __iter__(self) -> Iterator[BlockIO]:
        """The inputs of each block in turn; the caller must `advance` with the block's outputs."""
        for block in self.blocks:
            self._run_between()
            nodes = [tape.nodes[self._position] for tape in self._tapes]
            yield BlockIO(block, self._tapes, nodes, self._store)

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
            given = [tape.arguments(node) for tape, node in zip(self._tapes, nodes, strict=True)]
            with torch.no_grad():
                results = self._call(nodes, given)
            for tape, node, result in zip(self._tapes, nodes, results, strict=True):
                tape.flowing.update(zip(node.outputs, tensors_in(result), strict=True))
                if self.exact:
                    args, kwargs = tape.arguments(node, exact=True)
                    with torch.no_grad():
                        exact = node.function(*args, **kwargs)  # type: ignore[misc]
                    tape.exact.update(zip(node.outputs, tensors_in(exact), strict=True))
                tape.forget(self._position + 1)
            self._position += 1

    def _call(self, nodes: list[_Node], given: list[Any]) -> list[Any]:
        """What a function between blocks returns for every sample, its edges calibrated and applied."""
        actions = self._between.get(nodes[0].site, [])  # type: ignore[arg-type]
        inputs = [
            (edge, calibrate(edge, [tensors_in(each)[edge.index] for each in given]))
            for edge, calibrate in actions
            if edge.side == "input"
        ]
        results = [
            edges.call(node.function, each[0], each[1], inputs)  # type: ignore[arg-type]
            for node, each in zip(nodes, given, strict=True)
        ]
        for edge, calibrate in actions:
            if edge.side == "output":
                calls = list(zip(results, given, strict=True))
                made = [edges.output_tensors(*each)[edge.index] for each in calls]
                action = {edge.index: calibrate(edge, made)}
                results = [edges.change_outputs(*each, action) for each in calls]
        return results

    def _capture_all(
        self, samples: Sequence[Any], forward: Callable[[Any], object], between: Mapping[Edge, Calibrate]
    ) -> list[_Tape]:
        """The tapes of all samples; recorded again if there is an edge in front of the first block."""
        seen: dict[Edge, list[Tensor]] = {edge: [] for edge in between}
        early = {edge: partial(_note, tensors) for edge, tensors in seen.items()}
        tapes = [
            self._capture(sample, forward, early) for sample in track(samples, "capturing block inputs")
        ]
        rounding = {edge: between[edge](edge, tensors) for edge, tensors in seen.items() if tensors}
        if not rounding:
            return tapes
        rounded = [self._capture(sample, forward, rounding) for sample in samples]
        for tape, plain in zip(rounded, tapes, strict=True):
            tape.exact = plain.exact
        return rounded

    def _capture(
        self, sample: Any, forward: Callable[[Any], object], early: Mapping[Edge, TensorFunction]
    ) -> _Tape:
        recorder = _TapeRecorder(self.blocks, self.exact, self._store, early)
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


def _note(seen: list[Tensor], x: Tensor) -> Tensor:
    seen.append(x.clone())
    return x


class _TapeRecorder(TorchFunctionMode):
    """Writes the tape of one sample; `early` is done to the tensors in front of the first block."""

    def __init__(
        self, blocks: list[Block], exact: bool, store: Store, early: Mapping[Edge, TensorFunction]
    ) -> None:
        super().__init__()
        self.tape = _Tape()
        self._early = edges.by_site(early)
        self._blocks, self._keep_exact, self._store = blocks, exact, store
        self._running = Running()
        self._inside = False
        self._done = 0
        self._numbers = WeakTensorKeyDictionary()
        self._unused = count()

    def record(self, run: Callable[[], object]) -> None:
        model = self._blocks[0].model
        self._constants = {id(tensor) for tensor in (*model.parameters(), *model.buffers())}
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
                if id(leaf) in self._constants:
                    continue
                self.tape.flowing[self._number(leaf)] = self._store.keep(leaf.clone())
            if self._keep_exact:
                self.tape.exact = {n: self._store.keep(x.clone()) for n, x in self.tape.flowing.items()}
        self.tape.nodes.append(_Node(self._referring(leaves), structure))

    def _referring(self, leaves: list[Any]) -> list[Any]:
        return [
            _Reference(self._number(leaf)) if isinstance(leaf, Tensor) and leaf in self._numbers else leaf
            for leaf in leaves
        ]

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        site = self._running.site(func)
        if not self._done:
            early = [] if self._running.idle else self._early.get(site, [])
            return edges.call(func, args, kwargs or {}, early)
        if self._inside:
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
