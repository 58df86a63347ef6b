"""Hadamard matrices: entries ±1, H Hᵀ = n I.

Orders 2ᵏ by doubling (Sylvester); q + 1 and 2 (q + 1) for prime powers q ≡ 3 and q ≡ 1 modulo 4 (Paley,
J. Math. Phys. 12, 1933, constructions I and II); and 4w of four symmetric circulant matrices of order w
(Williamson, Duke Math. J. 11, 1944) for some w that Paley's do not reach.
"""

from functools import cache
from itertools import product

import torch
from torch import Tensor

# w → of four sequences 1, a₁ … a_h, a_h … a₁ with h = (w − 1) / 2: bit i of the number tells that
# aᵢ₊₁ is −1. Found by search; that they are right shows in H Hᵀ = n I.
_WILLIAMSON = {
    23: (344, 1380, 1521, 1586),
    29: (2803, 6755, 3908, 8235),
    39: (248183, 88569, 512838, 179255),
    43: (1189991, 1993998, 1709460, 634626),
}
_HIGHEST_POWER = 3  # prime powers up to a cube: polynomials of these degrees without root are irreducible


@cache
def hadamard(order: int) -> Tensor | None:
    """A Hadamard matrix [order, order] (double) with a first column of ones; None if none is known here.

    The matrix is shared: do not change it.
    """
    if order == 1:
        return torch.ones(1, 1, dtype=torch.double)
    if order != 2 and order % 4:
        return None
    half = hadamard(order // 2)
    found = _doubled(half) if half is not None else _paley(order)
    if found is None and order % 8 == 4 and order // 4 in _WILLIAMSON:
        found = _williamson(order // 4)
    return None if found is None else found * found[:, :1]


def _doubled(half: Tensor) -> Tensor:
    return torch.kron(torch.tensor([[1.0, 1.0], [1.0, -1.0]], dtype=half.dtype), half)


def _paley(order: int) -> Tensor | None:
    """Paley's matrix of construction I or II, from Q[i, j] = χ(aᵢ − aⱼ) over a finite field."""
    differences = _characters(order - 1) if order % 4 == 0 else None
    if differences is not None:  # q ≡ 3: [[0, 1], [−1, Q]] is skew
        return torch.eye(order, dtype=torch.double) + _bordered(differences, -1.0)
    half = order // 2
    differences = _characters(half - 1) if half % 4 == 2 else None
    if differences is None:
        return None
    symmetric = _bordered(differences, 1.0)
    plus, minus = torch.tensor([[[1.0, 1], [1, -1]], [[1, -1], [-1, -1]]], dtype=torch.double)
    return torch.kron(symmetric, plus) + torch.kron(torch.eye(half, dtype=torch.double), minus)


def _bordered(inner: Tensor, left: float) -> Tensor:
    order = len(inner) + 1
    outer = torch.zeros(order, order, dtype=inner.dtype)
    outer[0, 1:], outer[1:, 0], outer[1:, 1:] = 1, left, inner
    return outer


def _characters(q: int) -> Tensor | None:
    """χ(aᵢ − aⱼ) [q, q] for the elements a of the field of order q: 1 for squares, −1 for others, 0 for 0;
    None if there is no such field, or none that is built here."""
    power = _prime_power(q)
    if power is None:
        return None
    p, k = power
    elements = list(product(range(p), repeat=k))
    modulus = _irreducible(p, k)
    squares = {_square(x, modulus, p) for x in elements}
    character = torch.tensor([1.0 if x in squares else -1.0 for x in elements], dtype=torch.double)
    character[0] = 0
    digits = torch.tensor(elements)
    places = torch.tensor([p**i for i in reversed(range(k))])
    numbers = torch.zeros(q, q, dtype=torch.long)
    for digit, place in zip(digits.T, places, strict=True):
        numbers += (digit[:, None] - digit) % p * place
    return character[numbers]


def _prime_power(q: int) -> tuple[int, int] | None:
    """(p, k) of an odd q = pᵏ with k ≤ 3."""
    p = next((d for d in range(3, q + 1, 2) if q % d == 0), q) if q % 2 else 0
    return next(((p, k) for k in range(1, _HIGHEST_POWER + 1) if p > 1 and p**k == q), None)


def _irreducible(p: int, k: int) -> tuple[int, ...]:
    """Coefficients c₀ … of a polynomial xᵏ + … + c₀ that is irreducible modulo p."""

    def has_root(lower: tuple[int, ...]) -> bool:
        return any((x**k + sum(c * x**i for i, c in enumerate(lower))) % p == 0 for x in range(p))

    return next(lower for lower in product(range(p), repeat=k) if k == 1 or not has_root(lower))


def _square(x: tuple[int, ...], modulus: tuple[int, ...], p: int) -> tuple[int, ...]:
    """x² modulo a polynomial and p; x and the result are coefficients of 1, X, X², …"""
    k = len(x)
    found = [0] * (2 * k - 1)
    for i, a in enumerate(x):
        for j, b in enumerate(x):
            found[i + j] += a * b
    for degree in reversed(range(k, len(found))):
        for i, c in enumerate(modulus):
            found[degree - k + i] -= found[degree] * c
    return tuple(value % p for value in found[:k])


def _williamson(w: int) -> Tensor:
    half = torch.arange(w // 2)
    shift = (torch.arange(w)[None] - torch.arange(w)[:, None]) % w
    blocks = []
    for number in _WILLIAMSON[w]:
        signs = 1.0 - 2.0 * ((number >> half) & 1)
        blocks.append(torch.cat([torch.ones(1), signs, signs.flip(0)]).double()[shift])
    a, b, c, d = blocks
    rows = [[a, b, c, d], [-b, a, -d, c], [-c, d, a, -b], [-d, -c, b, a]]
    return torch.cat([torch.cat(row, 1) for row in rows])
