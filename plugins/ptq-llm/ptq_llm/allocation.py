"""Which width every layer gets so that the sum of their errors is small and they fit into a budget."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Choice:
    """What one layer may get. bits: of all its weights and scales together, by width. error: by width."""

    bits: Mapping[int, int]
    error: Mapping[int, float]


def allocate(choices: Sequence[Choice], budget: int) -> list[int]:
    """A width for every layer, of all together at most `budget` bits.

    All start at their lowest width; then the move to a higher one that takes away the most error for each
    bit it costs is made, as long as one fits. That is the optimum of the Lagrangian wherever the last move
    fills the budget. If all layers at the same width fit with less error, they get that.

    Args:
        choices: of each layer; the lowest widths must fit.
        budget: in bits.

    Raises:
        ValueError: if the lowest widths do not fit.
    """
    widths = [min(one.bits) for one in choices]
    left = budget - cost(choices, widths)
    if left < 0:
        raise ValueError(f"the lowest widths take {-left} bits more than there are")
    for _, index, low, high in _moves(choices):
        extra = choices[index].bits[high] - choices[index].bits[low]
        if widths[index] == low and extra <= left:
            widths[index] = high
            left -= extra
    candidates = [widths, *_uniform(choices, budget)]
    return min(candidates, key=lambda one: error(choices, one))


def cost(choices: Sequence[Choice], widths: Sequence[int]) -> int:
    """Bits of all layers at these widths."""
    return sum(one.bits[width] for one, width in zip(choices, widths, strict=True))


def error(choices: Sequence[Choice], widths: Sequence[int]) -> float:
    """Sum of the layers' errors at these widths."""
    return sum(one.error[width] for one, width in zip(choices, widths, strict=True))


def _moves(choices: Sequence[Choice]) -> list[tuple[float, int, int, int]]:
    """All moves that take away error: −error per bit, the layer's index, from which width, to which; the
    best first."""
    moves = []
    for index, one in enumerate(choices):
        for low in one.bits:
            for high in one.bits:
                gain = one.error[low] - one.error[high]
                if high > low and gain > 0:
                    moves.append((-gain / (one.bits[high] - one.bits[low]), index, low, high))
    return sorted(moves)


def _uniform(choices: Sequence[Choice], budget: int) -> list[list[int]]:
    """One width for all layers that have a choice, for every width that fits."""
    widths = sorted({width for one in choices for width in one.bits})
    each = [[width if width in one.bits else min(one.bits) for one in choices] for width in widths]
    return [one for one in each if cost(choices, one) <= budget]
