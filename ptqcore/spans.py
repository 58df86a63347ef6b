"""Blocks in spans: how many blocks are quantized before the steps finish them together."""

import gc
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace

from torch import Tensor

from ptqcore.allocator import give_freed_memory_back
from ptqcore.audit import thinned
from ptqcore.blame import blaming
from ptqcore.edges import ActivationQuantizers
from ptqcore.journal import BlockResult, Journal
from ptqcore.midway import Midway
from ptqcore.on_disk import is_on_disk, load
from ptqcore.step import Chain, Step
from ptqcore.walk import BlockIO, Walk

Tensors = list[list[Tensor]]
QuantizeBlock = Callable[
    [BlockIO, list[Step], ActivationQuantizers, Tensors | None, Iterator[Midway]],
    tuple[BlockResult, Tensors],
]


class SpanWalk:
    """The results of all blocks, in order; what an earlier run finished is taken from the journal.

    A span is as many blocks as the steps reconstruct together: one, for most. It is walked once while
    its blocks are quantized, finished by the steps, walked again to find what then flows out of it, and
    saved as a whole.
    """

    def __init__(
        self,
        walk: Walk,
        steps: list[Step],
        journal: Journal,
        quantizers: ActivationQuantizers,
        quantize: QuantizeBlock,
    ) -> None:
        """Args:
        walk: over all blocks, at its beginning.
        steps: of the recipe.
        journal: where finished blocks are kept.
        quantizers: of the activations of the whole model.
        quantize: runs the steps on one block; its result, and what flows into the next.
        """
        self._walk, self._ios = walk, iter(walk)
        self._steps, self._journal = steps, journal
        self._quantizers, self._quantize = quantizers, quantize
        self._on_disk = is_on_disk(walk.blocks[0].model)
        self._size = max((step.span for step in steps), default=1)
        self._finishes = any(type(step).finish_span is not Step.finish_span for step in steps)

    def __len__(self) -> int:
        return len(self._walk.blocks)

    def __iter__(self) -> Iterator[BlockResult]:
        for start in range(0, len(self), self._size):
            indices = range(start, min(start + self._size, len(self)))
            if all(self._journal.has(index, self._walk.blocks[index]) for index in indices):
                yield from map(self._restored, indices)
            else:
                yield from self._quantized(indices)

    def _next(self) -> BlockIO:
        """The inputs of the next block, which is now in memory."""
        io = next(self._ios)
        load(io.block.module)
        return io

    def _keep(self, index: int) -> None:
        """Leave a finished block on disk where the others are."""
        if self._on_disk:
            self._journal.leave_on_disk(index, self._walk.blocks[index])
            gc.collect()  # cycles would keep the block's tensors for a while
            give_freed_memory_back()

    def _exact(self, io: BlockIO) -> Tensors | None:
        return io.run_tensors(exact=True) if self._walk.exact else None

    def _restored(self, index: int) -> BlockResult:
        io = self._next()
        exact = self._exact(io)
        result, ranges = self._journal.restore(index, io.block)
        self._quantizers.load_state_dict(ranges, strict=False)
        io.functions = self._quantizers.functions()
        self._walk.advance(io.run_tensors(), exact)
        self._keep(index)
        return result

    def _quantized(self, indices: Sequence[int]) -> list[BlockResult]:
        if self._finishes:
            self._walk.hold()
        results = []
        for index in indices:
            io = self._next()
            exact = self._exact(io)
            midways = self._journal.midways(index)
            result, outputs = self._quantize(io, self._steps, self._quantizers, exact, midways)
            self._walk.advance(outputs, exact)
            results.append(result)
        if self._finishes:
            losses = self._finish(indices, Chain(len(io), self._walk.chain, exact or []))
            last = results[-1].block
            last = replace(last, losses=thinned([*last.losses, *losses]))
            results[-1] = replace(results[-1], block=last)
        for index, result in zip(indices, results, strict=True):
            block = self._walk.blocks[index]
            self._journal.save(index, block, result, self._quantizers.inside(block.path))
            self._keep(index)
        return results

    def _finish(self, indices: Sequence[int], chain: Chain) -> list[float]:
        """Let the steps finish a span, and walk it again; the losses of what they learned."""
        blocks = [self._walk.blocks[index] for index in indices]
        losses: list[float] = []
        for step in self._steps:
            with blaming(step.origin, f"behind block {blocks[-1].path!r}"):
                losses += step.finish_span(blocks, chain)
        self._walk.rewind()
        for _ in indices:
            io = next(self._ios)
            io.functions = self._quantizers.functions()
            self._walk.advance(io.run_tensors())
        return losses
