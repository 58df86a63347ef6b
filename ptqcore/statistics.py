"""Sums over a layer's input that many methods share."""

import math

import torch
from torch import Tensor

from ptqcore.distributed import Share

_PANEL = 256  # columns
_AT_ONCE = 2**20  # numbers


class Gram:
    """Streaming XᵀX, mean of X and |X|, smallest and largest value per channel of a layer's input X
    [tokens, channels].

    For a weight change ΔW the error of the layer's output over all tokens is
    ‖X ΔWᵀ‖² = tr(ΔW XᵀX ΔWᵀ), so that XᵀX serves error reports, GPTQ, AWQ and clip search without
    the samples. Sums are kept in float32, extremes as exactly as they come; every product of one
    update is accumulated by one matmul.
    """

    def __init__(
        self, channels: int, device: torch.device | str = "cpu", share: Share | None = None, turn: int = 0
    ) -> None:
        """Args:
        channels: of the input.
        device: where the sums lie.
        share: of processes that are all given every token: each adds up a part of XᵀX, until `complete`.
        turn: which part that is goes round with it.
        """
        self._share, self._turn = share or Share(0), turn
        self.matrix = torch.zeros(channels, channels, device=device)
        self.sum = torch.zeros(channels, dtype=torch.float64, device=device)
        self.magnitude = torch.zeros(channels, dtype=torch.float64, device=device)
        self.low = torch.full((channels,), torch.inf, device=device)
        self.high = torch.full((channels,), -torch.inf, device=device)
        self.count = 0

    @property
    def mean(self) -> Tensor:
        """Mean input [channels] over all tokens seen, float64."""
        return self.sum / max(self.count, 1)

    @property
    def mean_magnitude(self) -> Tensor:
        """Mean |input| [channels] over all tokens seen, float64."""
        return self.magnitude / max(self.count, 1)

    def update(self, x: Tensor) -> None:
        """Add the tokens of x [..., channels]."""
        values = x.detach().flatten(0, -2)
        if not values.shape[0]:
            return
        self.low = torch.minimum(self.low, values.amin(0))
        self.high = torch.maximum(self.high, values.amax(0))
        rows = values.float()
        for start, end in self._panels(self._share.rank):
            _add_products(self.matrix, rows, start, end)
        self.sum += rows.sum(0, dtype=torch.float64)
        self.magnitude += rows.abs().sum(0, dtype=torch.float64)
        self.count += rows.shape[0]

    def complete(self) -> None:
        """Take the parts of XᵀX that other processes have added up: to be called by all of them, once no
        more tokens come."""
        if self._share.ranks == 1:
            return
        own = [self.matrix[start:, start:end] for start, end in self._panels(self._share.rank)]
        for rank, parts in enumerate(self._share.everywhere(own)):
            for (start, end), part in zip(self._panels(rank), parts, strict=True):
                if rank != self._share.rank:
                    self.matrix[start:, start:end] = part
                    _mirror(self.matrix, start, end)
        self._share = Share(0)

    def _panels(self, rank: int) -> list[tuple[int, int]]:
        """The columns of XᵀX that a process adds up below the diagonal: as much work for each process."""
        channels, ranks = len(self.matrix), self._share.ranks
        panels = [(start, min(start + _PANEL, channels)) for start in range(0, channels, _PANEL)]
        there_and_back = [*range(ranks), *reversed(range(ranks))]
        turn = (rank + self._turn) % ranks
        return [
            panel
            for place, panel in enumerate(panels)
            if there_and_back[place % len(there_and_back)] == turn
        ]

    def merge(self, other: "Gram") -> None:
        """Add the tokens that another Gram of the same channels has seen."""
        self.matrix += other.matrix
        self.sum += other.sum
        self.magnitude += other.magnitude
        self.low = torch.minimum(self.low, other.low)
        self.high = torch.maximum(self.high, other.high)
        self.count += other.count

    def energy(self, weight: Tensor) -> float:
        """‖X Wᵀ‖² summed over tokens and outputs, for a weight [outputs, channels]."""
        rows = max(1, _AT_ONCE // max(1, weight.shape[1]))
        total = sum(map(self._energy, torch.split(weight.detach(), rows)))
        return max(total, 0.0)  # rounding can leave a tiny negative sum

    def _energy(self, rows: Tensor) -> float:
        rows = rows.float()
        return float((rows @ self.matrix).mul_(rows).sum(dtype=torch.float64))

    def relative_error(self, weight: Tensor, quantized: Tensor) -> float:
        """‖X(Ŵ − W)ᵀ‖² / ‖X Wᵀ‖²: the layer's output error from its weights alone.

        0 if there is no error, infinite if there is one but X Wᵀ is 0.
        """
        error, total = self.energy(quantized - weight), self.energy(weight)
        if not error:
            return 0.0
        return error / total if total else math.inf


def _add_products(matrix: Tensor, rows: Tensor, start: int, end: int) -> None:
    """matrix += XᵀX for rows X [tokens, channels], in some columns from the diagonal down, and mirrored."""
    matrix[start:, start:end].addmm_(rows[:, start:].T, rows[:, start:end])
    _mirror(matrix, start, end)


def _mirror(matrix: Tensor, start: int, end: int) -> None:
    """Have below the diagonal what is right of it, for some columns."""
    matrix[start:end, end:] = matrix[end:, start:end].T
