"""The least of the losses along a line of candidates, without measuring all of them."""

import math
from collections.abc import Sequence
from typing import Protocol, TypeVar

from ptqcore import divided

C = TypeVar("C")
_C = TypeVar("_C", contravariant=True)


class Loss(Protocol[_C]):
    """What is made small."""

    def __call__(self, candidate: _C, limit: float = math.inf, /) -> float:
        """The loss, or any number above `limit` where it is above: measuring may stop there."""


def least(candidates: Sequence[C], loss: Loss[C]) -> C:
    """The first of the candidates with the least loss."""
    return coarse_to_fine(candidates, 1, loss)


def coarse_to_fine(line: Sequence[C], stride: int, loss: Loss[C], apart: bool = False) -> C:
    """The candidate with the least loss of those that are tried: every `stride`-th and the last, then the
    neighbours of the best at half the stride, and so on. Of equal ones that of the lowest index, which is
    meant to be the one that changes least.

    Args:
        line: candidates in an order in which losses fall and rise again.
        stride: a power of two; 1 tries all.
        loss: is told the least loss so far.
        apart: whether several processes may measure different candidates: the loss exchanges nothing.
    """
    best, smallest, limit = 0, math.inf, math.inf

    def measured(index: int) -> float:
        nonlocal limit
        found = loss(line[index], limit)
        limit = min(limit, found)
        return found

    coarse = sorted({*range(0, len(line), stride), len(line) - 1})
    tried = set(coarse)
    while True:
        losses = divided(coarse, measured) if apart else map(measured, coarse)
        for index, found in zip(coarse, losses, strict=True):
            if found < smallest or (found == smallest and index < best):
                best, smallest = index, found
        if stride == 1:
            return line[best]
        stride //= 2
        beside = (best - stride, best + stride)
        coarse = [index for index in beside if 0 <= index < len(line) and index not in tried]
        tried.update(coarse)
