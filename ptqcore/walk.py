"""The walk: what flows between blocks, recorded once, then replayed block by block.

One full-precision pass per sample writes a tape: each block's call, and the functions that the model
computes between blocks. The walk replays it with what the blocks return once they are quantized, so
that any graph of blocks (chains, branches, long skips) is walked with one block at work at a time.
"""

import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.func import functional_call
from torch.utils._pytree import tree_unflatten

from ptqcore import edges
from ptqcore.blocks import Block
from ptqcore.dataflow import Site, tensors_in
from ptqcore.distributed import Share
from ptqcore.edges import TensorFunction
from ptqcore.errors import ModelError
from ptqcore.placement import Edge
from ptqcore.recording import Calibrate, Recording
from ptqcore.store import Store
from ptqcore.tape import Node, Reference, Tape
from ptqcore.timesteps import Moment, at


@dataclass
class BlockIO:
    """The inputs of one block for every calibration sample.

    `functions` are applied to the tensors at the block's edges in every run: none at first, its
    quantizers once they have ranges. Each run hands the block fresh copies of what flows in, so that
    a block may work in place. `moments`: the timestep that each sample is of, None where there is none.
    `share`: which of all samples these are; they are counted from 0 here.
    """

    block: Block
    tapes: list[Tape]
    nodes: list[Node]
    store: Store
    moments: Sequence[Moment | None]
    share: Share
    functions: Mapping[Edge, TensorFunction] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.tapes)

    def moment(self, samples: Sequence[int]) -> Moment | None:
        """The timesteps that the rows of a batch of samples are of."""
        found = [moment for sample in samples if (moment := self.moments[sample]) is not None]
        if len(samples) == 1 or not found:
            return found[0] if found else None
        return Moment.join(found, [(self._size(sample) or (1,))[0] for sample in samples])

    def run(self, exact: bool = False) -> Iterator[Any]:
        """Run the block as it now is on every sample, without gradients; yield its outputs.

        Args:
            exact: take the inputs from the full-precision model, not from the quantized prefix.
        """
        for sample in range(len(self)):
            yield self.run_sample(sample, exact)

    @torch.no_grad()
    def run_sample(self, sample: int, exact: bool = False) -> Any:
        """The output of the block as it now is for one sample, without gradients."""
        args, kwargs = self.tapes[sample].arguments(self.nodes[sample], exact, copy=True)
        applying = edges.applying(self.block.module, self.block.path, self.functions)
        with at(self.moments[sample]), applying:
            return self.block.module(*args, **kwargs)

    def compute(self, sample: int, parameters: Mapping[str, Tensor], exact: bool = False) -> Any:
        """The output of the block for one sample with other parameters, by their paths in the model;
        differentiable in them."""
        args, kwargs = self.tapes[sample].arguments(self.nodes[sample], exact, copy=True)
        start = len(self.block.path) + 1 if self.block.path else 0
        named = {path[start:]: value for path, value in parameters.items()}
        applying = edges.applying(self.block.module, self.block.path, self.functions)
        with at(self.moments[sample]), applying:
            return functional_call(self.block.module, named, args, kwargs)

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
        flows = isinstance(self.nodes[samples[0]].leaves[place], Reference)
        if not isinstance(given[0], Tensor) or not (flows or any(value is not given[0] for value in given)):
            return False
        return all(
            self._size(sample) in (None, value.shape[:1])
            for sample, value in zip(samples, given, strict=True)
        )

    def _size(self, sample: int) -> torch.Size | None:
        """The first dimension of the first tensor that flows into the block, if one does."""
        numbers = (leaf.number for leaf in self.nodes[sample].leaves if isinstance(leaf, Reference))
        number = next(numbers, None)
        return None if number is None else self.tapes[sample].flowing[number].shape[:1]

    def _leaf(self, sample: int, place: int, exact: bool) -> Any:
        leaf = self.nodes[sample].leaves[place]
        if not isinstance(leaf, Reference):
            return leaf
        tape = self.tapes[sample]
        return (tape.exact if exact else tape.flowing)[leaf.number]


@dataclass
class _Held:
    """Where a walk is held: its place, and copies of what flows there, for every sample."""

    position: int
    done: int
    streams: list[dict[int, Tensor]]


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
        moments: Sequence[Moment | None] | None = None,
        share: Share | None = None,
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
            moments: the timestep that each sample is of, where models have such.
        share: which of all samples these are; by default they are all.
        """
        self.blocks = blocks
        self._store = store or Store(sys.maxsize, Path())
        self.exact = exact
        self._moments = moments or [None] * len(samples)
        self._share = share or Share(len(samples))
        between = between or {}
        self._between: Mapping[Site, list[tuple[Edge, Calibrate]]] = edges.by_site(between)  # type: ignore[arg-type, assignment]
        self._tapes = Recording(blocks, samples, forward, self._moments, self._store, exact).tapes(between)
        self._check()
        self._position = self._done = self._furthest = 0
        self._held: _Held | None = None

    def __iter__(self) -> Iterator[BlockIO]:
        """The inputs of each block in turn; the caller must `advance` with the block's outputs."""
        while self._done < len(self.blocks):
            self._run_between()
            nodes = [tape.nodes[self._position] for tape in self._tapes]
            block = self.blocks[self._done]
            yield BlockIO(block, self._tapes, nodes, self._store, self._moments, self._share)

    def hold(self) -> None:
        """Keep what flows from here on, so that the walk can come back: `chain` and `rewind`."""
        streams = [
            {number: self._store.keep(tensor.clone()) for number, tensor in tape.flowing.items()}
            for tape in self._tapes
        ]
        self._held = _Held(self._position, self._done, streams)

    def rewind(self) -> None:
        """Go back to where the walk was held, and hold no longer: the blocks are walked again, in the
        quantized stream alone."""
        assert self._held is not None
        for tape, stream in zip(self._tapes, self._held.streams, strict=True):
            tape.flowing = stream
        self._position, self._done, self._held = self._held.position, self._held.done, None

    def chain(self, sample: int) -> list[Tensor]:
        """What flows out of the last block walked, computed from where the walk is held with the blocks
        as they now are, with gradients where they are enabled; nothing is rounded at edges."""
        assert self._held is not None
        tape = self._tapes[sample]
        stream = {number: tensor.clone() for number, tensor in self._held.streams[sample].items()}
        outputs: list[Tensor] = []
        for node in tape.nodes[self._held.position : self._position]:
            args, kwargs = tape.arguments(node, copy=node.function is None, stream=stream)
            function = node.function or self.blocks[self._block_at(tape, node)].module
            with at(self._moments[sample]):
                outputs = tensors_in(function(*args, **kwargs))
            stream.update(zip(node.outputs, outputs, strict=True))
        return outputs

    def _block_at(self, tape: Tape, node: Node) -> int:
        """Which block a node of a tape calls."""
        called = [other for other in tape.nodes if other.function is None]
        return next(index for index, other in enumerate(called) if other is node)

    def advance(self, outputs: list[list[Tensor]], exact: list[list[Tensor]] | None = None) -> None:
        """Set what the block just walked returns for every sample: quantized, and in full precision."""
        for index, tape in enumerate(self._tapes):
            numbers = tape.nodes[self._position].outputs
            tape.flowing.update(zip(numbers, outputs[index], strict=True))
            if exact is not None:
                tape.exact.update(zip(numbers, exact[index], strict=True))
        self._done += 1
        self._go_on()

    def _go_on(self) -> None:
        """Go to the next node, and drop what is not read any more from there on."""
        self._position += 1
        self._furthest = max(self._furthest, self._position)
        for tape in self._tapes:
            tape.forget(self._position)

    def _run_between(self) -> None:
        """Compute everything up to the next block, for all samples."""
        while self._tapes and self._tapes[0].nodes[self._position].function is not None:
            nodes = [tape.nodes[self._position] for tape in self._tapes]
            given = [tape.arguments(node) for tape, node in zip(self._tapes, nodes, strict=True)]
            with torch.no_grad():
                results = self._call(nodes, given)
            for tape, node, result in zip(self._tapes, nodes, results, strict=True):
                tape.flowing.update(zip(node.outputs, tensors_in(result), strict=True))
                if self.exact and self._position == self._furthest:  # not again after `rewind`
                    args, kwargs = tape.arguments(node, exact=True)
                    with torch.no_grad():
                        exact = node.function(*args, **kwargs)  # type: ignore[misc]
                    tape.exact.update(zip(node.outputs, tensors_in(exact), strict=True))
            self._go_on()

    def _call(self, nodes: list[Node], given: list[Any]) -> list[Any]:
        """What a function between blocks returns for every sample, its edges calibrated and applied."""
        actions = self._between.get(nodes[0].site, [])  # type: ignore[arg-type]
        inputs = [
            (edge, calibrate(edge, [tensors_in(each)[edge.index] for each in given]))
            for edge, calibrate in actions
            if edge.side == "input"
        ]
        results = []
        for node, each, moment in zip(nodes, given, self._moments, strict=True):
            with at(moment):
                results.append(edges.call(node.function, each[0], each[1], inputs))  # type: ignore[arg-type]
        for edge, calibrate in actions:
            if edge.side == "output":
                calls = list(zip(results, given, strict=True))
                made = [edges.output_tensors(*each)[edge.index] for each in calls]
                action = {edge.index: calibrate(edge, made)}
                for sample, (each, moment) in enumerate(zip(calls, self._moments, strict=True)):
                    with at(moment):
                        results[sample] = edges.change_outputs(*each, action)
        return results

    def _check(self) -> None:
        """Every sample must call each block once, and compute the same functions between them."""
        sites = [[str(node.site) for node in tape.nodes] for tape in self._tapes]
        first = self._share.everywhere(sites[:1])[0]
        for index, tape, own in zip(self._share.numbers, self._tapes, sites, strict=True):
            if sum(node.function is None for node in tape.nodes) != len(self.blocks):
                raise ModelError(
                    f"the blocks were not called once each and in order for calibration sample "
                    f"{index + 1}: name them with the recipe key 'blocks'"
                )
            if own != first[0]:
                raise ModelError(
                    f"between the blocks, calibration sample {index + 1} takes another way through the "
                    "model than the first: name larger blocks with the recipe key 'blocks'"
                )
