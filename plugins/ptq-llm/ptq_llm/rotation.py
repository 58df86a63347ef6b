"""Orthogonal maps of channels that spread every channel over all others, of any size, applied fast.

A map is a Kronecker product of small orthogonal matrices: x (F₁ ⊗ F₂ ⊗ …) costs Σ sizes(F) operations a
channel instead of their product, and each factor is one matrix product. For n = 2ᵏ·m they are a Hadamard
matrix of order m, 2m, 4m or 8m, and Sylvester's for the rest of the power of two; where none of
these orders is known, a random orthogonal matrix of order m takes its place.
"""

from collections.abc import Callable, Sequence
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor

from ptq_llm.hadamard import hadamard
from ptqcore import Attachment

Rotation = Callable[[Tensor], Tensor]
"""x [..., n] → x R, in the dtype of x."""

_MOST_DENSE = 128  # a larger power of two is split
_MOST_DOUBLINGS = 3
_MOST_CHANNELS = 2**17  # of an attachment


def random_rotation(size: int, generator: torch.Generator) -> Rotation:
    """x → (x·d) F, with random signs d: the randomised Hadamard transform of QuaRot (arXiv 2404.00456)."""
    return partial(_signed, signs=_signs(size, generator), factors=_factors(size, generator))


def rotation_that_keeps_ones(size: int, generator: torch.Generator) -> Rotation:
    """x → ((x F)·d) Fᵀ, with random signs d, the first of them 1.

    The first column of F is constant, so that the vector of ones is mapped to itself: what is left when
    the mean over the channels is subtracted is rotated like the rest.
    """
    signs, factors = _signs(size, generator), _factors(size, generator)
    signs[0] = 1
    return partial(_mirrored, signs=signs, factors=factors)


def _signed(x: Tensor, signs: Tensor, factors: Sequence[Tensor]) -> Tensor:
    return multiply(x * signs.to(x), factors)


def _mirrored(x: Tensor, signs: Tensor, factors: Sequence[Tensor]) -> Tensor:
    return multiply(multiply(x, factors) * signs.to(x), [factor.T for factor in factors])


def multiply(x: Tensor, factors: Sequence[Tensor]) -> Tensor:
    """x (F₁ ⊗ F₂ ⊗ …) for x [..., n]."""
    found = x.reshape(-1, *(len(factor) for factor in factors))
    for factor in factors:  # each product moves the channels of its factor to the end
        found = found.movedim(1, -1) @ factor.to(x)
    return found.reshape(x.shape)


@cache
def known_factors(size: int) -> tuple[Tensor, ...]:
    """Normalised Hadamard matrices (double), of orders whose product is size / unknown_order(size)."""
    orders = _orders(size // unknown_order(size))
    with torch.inference_mode(False):  # what is cached may serve a backward pass later
        return tuple(_known(order) / order**0.5 for order in orders if order > 1)


@cache
def unknown_order(size: int) -> int:
    """The odd part of a size of whose multiples by 1, 2, 4 and 8 that divide it no Hadamard matrix is
    known here; 1 if one is."""
    odd, powers = _split(size)
    known = any(hadamard(odd << j) is not None for j in range(min(powers, _MOST_DOUBLINGS) + 1))
    return 1 if known else odd


def _orders(size: int) -> list[int]:
    """Orders of known Hadamard matrices whose product is a size that has some."""
    if size <= _MOST_DENSE and hadamard(size) is not None:
        return [size]
    odd, powers = _split(size)
    first = next(odd << j for j in range(powers + 1) if hadamard(odd << j) is not None)
    left = powers - _split(first)[1]
    parts = -(-left // (_MOST_DENSE.bit_length() - 1))
    return [first, *(2 ** ((left + i) // parts) for i in range(parts))]


def _split(size: int) -> tuple[int, int]:
    """(odd, k) with size = odd · 2ᵏ."""
    powers = (size & -size).bit_length() - 1
    return size >> powers, powers


def _known(order: int) -> Tensor:
    found = hadamard(order)
    assert found is not None
    return found


def _factors(size: int, generator: torch.Generator) -> list[Tensor]:
    unknown = unknown_order(size)
    rest = [random_orthogonal(unknown, generator)] if unknown > 1 else []
    return [*rest, *known_factors(size)] or [torch.ones(1, 1, dtype=torch.double)]


def random_orthogonal(order: int, generator: torch.Generator) -> Tensor:
    """A random orthogonal matrix [order, order] (double) with a constant first column."""
    start = torch.randn(order, order, generator=generator, dtype=torch.double)
    start[:, 0] = 1
    q, r = torch.linalg.qr(start)
    return (q * r.diagonal().sign()).contiguous()  # as it is when stored and loaded, bit for bit


def _signs(size: int, generator: torch.Generator) -> Tensor:
    return torch.randint(2, (size,), generator=generator).double() * 2 - 1


class Hadamard(Attachment):
    """(x·d) F over groups of `width` channels: x [..., size · width] is rotated along its groups.

    width 1 mixes all channels (before a down projection); with the heads of attention as groups, the
    channels of the same place in all heads (before an output projection, arXiv 2404.00456, section 4.2).
    Its inverse belongs into the weight of the layer behind it. Computed in float32 at least.
    """

    name = "llm:hadamard"
    signs: Tensor
    rest: Tensor | None

    def __init__(self, size: int, width: int = 1) -> None:
        super().__init__()
        if not 1 <= size <= _MOST_CHANNELS:
            raise ValueError(f"it rotates 1 to {_MOST_CHANNELS} channels, not {size}")
        self.size, self.width = size, width
        self.register_buffer("signs", torch.ones(size, dtype=torch.int8))
        unknown = unknown_order(size)
        self.register_buffer("rest", torch.eye(unknown, dtype=torch.double) if unknown > 1 else None)

    @classmethod
    def random(cls, size: int, width: int, generator: torch.Generator) -> "Hadamard":
        """One with random signs, and a random orthogonal matrix where no Hadamard matrix is known."""
        made = cls(size, width)
        made.signs = _signs(size, generator).to(torch.int8)
        if made.rest is not None:
            made.rest = random_orthogonal(len(made.rest), generator)
        return made

    def settings(self) -> dict[str, Any]:
        return {"size": self.size, "width": self.width}

    def forward(self, x: Tensor) -> Tensor:
        precise = x if x.dtype == torch.double else x.float()
        groups = precise.unflatten(-1, (self.size, self.width)).transpose(-1, -2)
        rest = [] if self.rest is None else [self.rest]
        rotated = _signed(groups, self.signs, [*rest, *known_factors(self.size)])
        return rotated.transpose(-1, -2).flatten(-2).to(x.dtype)
