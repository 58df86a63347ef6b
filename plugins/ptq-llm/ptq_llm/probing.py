"""Which output row of one linear layer each input channel of another is, if it is one.

The first layer's outputs are multiplied by a factor per row, all different, and the block is run: an
input channel of the second layer that is multiplied by one of these factors, for every token, is that
row, whatever the model does between them (heads shared by groups of queries, fused and interleaved
projections). Where other rows disturb the channels (the queries and keys of a fused projection, the
gates beside the values), the rows are probed in halves, and the first tokens are looked at alone: they
attend to nothing but themselves.
"""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from ptqcore import Block, BlockIO

_MOST_SAMPLES = 3
_SPREAD = 2.0  # the factors lie between 1/2 and 2


class Unreached(Exception):  # noqa: N818 - an answer, not an error
    """So few tokens reach a layer that probing it proves nothing."""


@contextmanager
def in_precision(block: Block, dtype: torch.dtype) -> Iterator[None]:
    """Compute a block in float32 or float64 if it is in a shorter type: ratios of its values then say more.

    Its parameters, buffers and floating inputs are copies while this lasts.
    """
    longest = torch.finfo(dtype).bits

    def widened(x: Tensor) -> Tensor:
        return x.to(dtype) if x.is_floating_point() and torch.finfo(x.dtype).bits < longest else x

    def widen(_: nn.Module, args: Any, kwargs: Any) -> Any:
        return tree_map_only(Tensor, widened, (args, kwargs))

    kept = [(tensor, tensor.data) for tensor in chain(block.module.parameters(), block.module.buffers())]
    handle = block.module.register_forward_pre_hook(widen, with_kwargs=True)
    try:
        for tensor, data in kept:
            tensor.data = widened(data)
        yield
    finally:
        handle.remove()
        for tensor, data in kept:
            tensor.data = data


def channel_map(io: BlockIO, producer: str, consumer: str) -> Tensor | None:
    """The row of the producer [channels] that each input channel of the consumer is; None if any is not.

    Args:
        io: the inputs of the block that holds both layers.
        producer: path of a linear layer.
        consumer: path of a linear layer that runs after it.

    Raises:
        Unreached: if fewer than two tokens reach the consumer.
    """
    first = io.block.model.get_submodule(producer)
    count = first.get_parameter("weight").shape[0]
    factors = _factors(count)
    plain = _inputs(io, producer, consumer, torch.ones(count))
    rows = torch.full((plain.all.shape[-1],), -1)
    for chosen in _subsets(count, fused=count > len(rows)):
        used = torch.where(chosen, factors, torch.ones(count))
        found = _match(plain, _inputs(io, producer, consumer, used), factors, chosen)
        rows = torch.where((rows < 0) & (found >= 0), found, rows)
        if bool((rows >= 0).all()):
            return rows
    return _filled(rows, plain)


class _Seen:
    """What a consumer reads: all tokens [tokens, channels], and the first of every sequence."""

    def __init__(self, tensors: list[Tensor]) -> None:
        self.all = torch.cat([x.flatten(0, -2) for x in tensors]).double()
        self.first = torch.cat(
            [x[..., 0, :].flatten(0, -2) if x.ndim > 2 else x[:1] for x in tensors]
        ).double()


def _factors(count: int) -> Tensor:
    """Factors in geometric steps from 1/2 to 2, in no order that a model could have."""
    steps = torch.linspace(-1, 1, count) if count > 1 else torch.ones(1)
    order = torch.randperm(count, generator=torch.Generator().manual_seed(0))
    return (_SPREAD**steps)[order]


def _subsets(count: int, fused: bool) -> Iterator[Tensor]:
    """All rows; then, if there are more than channels, for every bit of the rows' numbers those that have
    it and those that have not: any two rows are apart in one of these."""
    yield torch.ones(count, dtype=torch.bool)
    numbers = torch.arange(count)
    for bit in range(math.ceil(math.log2(count)) if fused else 0):
        has = (numbers >> bit) % 2 == 1
        yield has
        yield ~has


def _inputs(io: BlockIO, producer: str, consumer: str, factors: Tensor) -> _Seen:
    """What the consumer reads while the producer's outputs are multiplied."""
    model = io.block.model
    first, second = model.get_submodule(producer), model.get_submodule(consumer)
    calls: list[Tensor] = []

    def multiply(_: nn.Module, args: Any, output: Tensor) -> Tensor:
        return output * factors.to(output)

    def note(_: nn.Module, args: Any) -> None:
        calls.append(args[0].clone())

    def of_samples() -> Iterator[list[Tensor]]:
        """Call by call, for those of the first samples that this process has."""
        for sample, number in enumerate(io.share.numbers):
            if number < _MOST_SAMPLES:
                calls.clear()
                io.run_sample(sample)
                yield list(calls)

    handles = [first.register_forward_hook(multiply), second.register_forward_pre_hook(note)]
    try:
        seen = [x for calls in io.share.in_order(of_samples()) for x in calls]
    finally:
        for handle in handles:
            handle.remove()
    if sum(x.shape[:-1].numel() for x in seen) < 2:
        raise Unreached
    return _Seen(seen)


def _match(plain: _Seen, changed: _Seen, factors: Tensor, chosen: Tensor) -> Tensor:
    """The row of each channel [channels], −1 where none is found."""
    none = torch.full((plain.all.shape[-1],), -1)
    if changed.all.shape != plain.all.shape:
        return none
    found = _matching(plain.all, changed.all, factors, chosen)
    if len(plain.first) < 2:
        return found
    return torch.where(found < 0, _matching(plain.first, changed.first, factors, chosen), found)


def _matching(plain: Tensor, changed: Tensor, factors: Tensor, chosen: Tensor) -> Tensor:
    """The chosen row whose factor is the ratio of each channel of two [tokens, channels], the same for
    all tokens; −1 where there is none."""
    energy = plain.square().sum(0)
    ratio = (plain * changed).sum(0) / energy.clamp(min=1e-300)
    rest = (changed - plain * ratio).square().sum(0).sqrt() / energy.sqrt().clamp(min=1e-300)
    candidates = torch.where(chosen, factors, torch.full_like(factors, torch.inf)).double()
    ordered, order = candidates.log().sort()
    place = torch.searchsorted(ordered, ratio.clamp(min=1e-300).log()).clamp(0, len(ordered) - 1)
    near = torch.stack([place, (place - 1).clamp(min=0)])
    apart = (ordered[near] - ratio.clamp(min=1e-300).log()).abs()
    best = apart.argmin(0, keepdim=True)
    distance, row = apart.gather(0, best)[0], order[near.gather(0, best)[0]]
    step = 2 * math.log(_SPREAD) / max(len(factors) - 1, 1)
    good = (distance < min(1e-4, step / 4)) & (rest < 1e-3) & (energy > 0)
    return torch.where(good, row, torch.full_like(row, -1))


def _filled(rows: Tensor, plain: _Seen) -> Tensor | None:
    """The map with the channels that were 0 for all tokens, if the others follow one rule: row = channel
    + constant."""
    dead = plain.all.abs().amax(0) == 0
    if bool(((rows < 0) & ~dead).any()) or bool(dead.all()):
        return None
    channels = torch.arange(len(rows))
    offsets = (rows - channels)[~dead]
    return channels + offsets[0] if bool((offsets == offsets[0]).all()) else None
