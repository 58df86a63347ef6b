"""Keys or values as packed integers: groups of neighbours, each with a minimum and a step of its own."""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ptqcore import QuantSpec, grid, pack_bits, unpack_bits


def state_spec(bits: int, group_size: int) -> QuantSpec:
    """The grid of keys or values: asymmetric, in groups along the last dimension."""
    return QuantSpec(bits=bits, symmetric=False, granularity="group", group_size=group_size)


@dataclass(frozen=True)
class PackedStates:
    """States [batch, heads, rows, ..., n] as integers, in groups along the last dimension.

    A group x is q = round((x − minimum) / scale) with scale = (max x − min x) / (2^bits − 1): equation 1
    of KIVI (arXiv 2402.02750). Its range need not contain zero: keys have channels far from it, which the
    zero point of a weight's grid would give coarser steps.

    words: int32 [batch, heads, rows, ..., words], as `pack_bits` packs the codes of a last dimension.
    scale, minimum: [batch, heads, rows, ..., groups], in the dtype of the states.
    length: n; the last group may be shorter.
    """

    words: Tensor
    scale: Tensor
    minimum: Tensor
    spec: QuantSpec
    length: int

    @classmethod
    def encode(cls, states: Tensor, spec: QuantSpec) -> "PackedStates":
        """Round states [batch, heads, rows, ..., n]; codes are found in float32 for the stored scale."""
        length = states.shape[-1]
        lowest, highest = _extremes(states, spec)
        span = highest.float() - lowest.float()
        scale, _ = grid.scale_and_zero_point(torch.zeros_like(span), span, spec)
        scale = scale.to(states.dtype)
        scale = torch.where(scale == 0, torch.ones_like(scale), scale)  # a span too small for float16
        above = states.float() - _spread(lowest.float(), spec, length)
        codes = grid.quantize(above, scale.float(), torch.zeros_like(span), spec)
        words = pack_bits(codes.flatten(0, -2), spec.bits)
        return cls(words.view(*states.shape[:-1], -1), scale, lowest, spec, length)

    def codes(self) -> Tensor:
        """The integers 0 … 2^bits − 1, uint8 [batch, heads, rows, ..., n]."""
        codes = unpack_bits(self.words.flatten(0, -2), self.spec.bits, self.length)
        return codes.view(*self.words.shape[:-1], self.length)

    def decode(self) -> Tensor:
        """The states that the integers stand for, computed in float32, in the dtype of the scale."""
        scale = self.scale.float()
        above = grid.dequantize(self.codes(), scale, torch.zeros_like(scale), self.spec)
        return (above + _spread(self.minimum.float(), self.spec, self.length)).to(self.scale.dtype)

    def extended(self, later: "PackedStates") -> "PackedStates":
        """These rows, then the later ones; no code changes."""
        pairs = zip(self.tensors(), later.tensors(), strict=True)
        return self._with(*(torch.cat(pair, dim=2) for pair in pairs))

    def without_first(self, rows: int) -> "PackedStates":
        """The rows but the first so many, in memory of their own."""
        return self._with(*(tensor[:, :, rows:].clone() for tensor in self.tensors()))

    def reordered(self, batch: Tensor) -> "PackedStates":
        """The sequences of a batch, picked by their indices."""
        return self._with(*(tensor.index_select(0, batch.to(tensor.device)) for tensor in self.tensors()))

    def tensors(self) -> tuple[Tensor, Tensor, Tensor]:
        """What is held in memory: words, scale and minimum."""
        return self.words, self.scale, self.minimum

    def _with(self, words: Tensor, scale: Tensor, minimum: Tensor) -> "PackedStates":
        return replace(self, words=words, scale=scale, minimum=minimum)


def _extremes(states: Tensor, spec: QuantSpec) -> tuple[Tensor, Tensor]:
    """Smallest and largest value of every group, [..., groups]."""
    groups = states.split(spec.group_size or states.shape[-1], dim=-1)
    return (
        torch.stack([group.amin(-1) for group in groups], dim=-1),
        torch.stack([group.amax(-1) for group in groups], dim=-1),
    )


def _spread(parameter: Tensor, spec: QuantSpec, length: int) -> Tensor:
    """One value a group [..., groups] to one an element [..., length]."""
    return parameter.repeat_interleave(spec.group_size or length, dim=-1)[..., :length]
