"""Channels taken apart and put together (QLLM, Liu et al., arXiv 2310.08041, section 4.1).

An outlier channel becomes several of 1/T each, with the same weights (disassembly, eq. 3); as many
pairs of other channels are merged into one, activations averaged and weights added (assembly, eq. 4),
so that the width stays.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ptqcore import Attachment


@dataclass(frozen=True)
class Reassembly:
    """New channel `target[e]` gets `share[e]` of channel `source[e]`, for all entries e; the weights of the
    channels are added up alike, whole.

    source, target: int64 [entries]; share: float32 [entries]. Every new channel has an entry.
    """

    source: Tensor
    target: Tensor
    share: Tensor

    @classmethod
    def identity(cls, channels: int) -> "Reassembly":
        """The one that changes nothing."""
        numbers = torch.arange(channels)
        return cls(numbers, numbers, torch.ones(channels))

    @property
    def is_identity(self) -> bool:
        """Whether nothing changes."""
        return bool((self.share == 1).all())

    @property
    def channels(self) -> int:
        """New channels."""
        return int(self.target.max()) + 1

    def inputs(self, x: Tensor) -> Tensor:
        """The new channels [..., channels] of x."""
        parts = x[..., self.source.to(x.device)] * self.share.to(x)
        result = x.new_zeros(*x.shape[:-1], self.channels)
        return result.index_add_(-1, self.target.to(x.device), parts)

    def weight(self, weight: Tensor) -> Tensor:
        """The weight [out, channels] that reads them."""
        result = weight.new_zeros(len(weight), self.channels)
        return result.index_add_(1, self.target.to(weight.device), weight[:, self.source.to(weight.device)])

    def bias(self, weight: Tensor, bias: Tensor | None) -> Tensor | None:
        """The bias, as it was."""
        return bias


def parts(magnitude: Tensor, threshold: float) -> Tensor:
    """T = ⌈max|x| / θ⌉ of every channel, at least 1 (section 4.1.1)."""
    return torch.ceil(magnitude / threshold).clamp(min=1).long()


def distances(gram: Tensor, weights: Tensor) -> Tensor:
    """D(i, j) = ¼ ‖x_i − x_j‖² ‖W_i − W_j‖² for all pairs of channels [channels, channels], double: the
    squared error of the outputs if the two are merged (eq. 5, in closed form).

    Args:
        gram: XᵀX [channels, channels].
        weights: of all layers that read the channels, [outputs, channels].
    """
    return 0.25 * _squared(gram.double()) * _squared(weights.double().T @ weights.double())


def _squared(products: Tensor) -> Tensor:
    """‖a_i − a_j‖² from all inner products."""
    own = products.diagonal()
    return (own[:, None] + own[None, :] - 2 * products).clamp(min=0)


def reassemble(magnitude: Tensor, threshold: float, distance: Tensor) -> Reassembly | None:
    """Split every channel beyond the threshold, then merge as many of the others; None if those do not
    suffice.

    Bipartite soft matching: of the channels that are whole, every other one is matched with the nearest
    of the rest, and the nearest pairs are merged; several may be merged with the same one.

    Args:
        magnitude: largest |x| of every channel [channels].
        threshold: θ.
        distance: between channels [channels, channels].
    """
    count = parts(magnitude, threshold)
    extra = int(count.sum()) - len(count)
    whole = (count == 1).nonzero().flatten()
    first, second = whole[::2], whole[1::2]
    if extra > len(first) or (extra and not len(second)):
        return None
    nearest, place = distance[first][:, second].min(1) if extra else (first.double(), first)
    chosen = nearest.argsort(stable=True)[:extra]
    into = torch.arange(len(count))
    into[first[chosen]] = second[place[chosen]] if extra else into[:0]
    source = torch.arange(len(count)).repeat_interleave(count)
    first_copy = torch.cat([source.new_ones(1), source.diff()]) != 0
    # A copy is a channel of its own; merged channels share the one of the channel they went into.
    own = (into[source] == source) | (count[source] > 1)
    number = torch.where(own, own.long().cumsum(0) - 1, -1)
    head = torch.full_like(into, -1)
    head[source[first_copy & own]] = number[first_copy & own]
    target = torch.where(own, number, head[into[source]])
    size = torch.bincount(target, minlength=int(target.max()) + 1)
    return Reassembly(source, target, 1 / (size[target] * count[source]).float())


class Reassemble(Attachment):
    """Takes channels apart and puts others together at run time, in front of layers or behind a norm."""

    name = "llm:reassemble"

    def __init__(self, channels: int, extras: int) -> None:
        """Args:
        channels: new channels.
        extras: entries beyond the first of each.
        """
        super().__init__()
        self.register_buffer("source", torch.zeros(channels, dtype=torch.int32))
        self.register_buffer("share", torch.zeros(channels))
        self.register_buffer("extra_source", torch.zeros(extras, dtype=torch.int32))
        self.register_buffer("extra_target", torch.zeros(extras, dtype=torch.int32))
        self.register_buffer("extra_share", torch.zeros(extras))

    @classmethod
    def of(cls, reassembly: Reassembly, device: torch.device) -> "Reassemble":
        """The attachment that does this."""
        order = reassembly.target.argsort(stable=True)
        target = reassembly.target[order]
        first = torch.cat([target.new_ones(1), target.diff()]) != 0
        made = cls(reassembly.channels, int((~first).sum()))
        made.source, made.share = reassembly.source[order][first].int(), reassembly.share[order][first]
        made.extra_source = reassembly.source[order][~first].int()
        made.extra_target, made.extra_share = target[~first].int(), reassembly.share[order][~first]
        return made.to(device)

    def settings(self) -> dict[str, Any]:
        return {
            "channels": len(self.get_buffer("source")),
            "extras": len(self.get_buffer("extra_source")),
        }

    def forward(self, x: Tensor) -> Tensor:
        result = x[..., self.get_buffer("source")] * self.get_buffer("share").to(x.dtype)
        extra = x[..., self.get_buffer("extra_source")] * self.get_buffer("extra_share").to(x.dtype)
        return result.index_add_(-1, self.get_buffer("extra_target"), extra)
