"""Sums over a layer's input that many methods share."""

import math

import torch
from torch import Tensor

_PANEL = 256  # columns


class Gram:
    """Streaming XᵀX, mean of X and |X|, smallest and largest value per channel of a layer's input X
    [tokens, channels].

    For a weight change ΔW the error of the layer's output over all tokens is
    ‖X ΔWᵀ‖² = tr(ΔW XᵀX ΔWᵀ), so that XᵀX serves error reports, GPTQ, AWQ and clip search without
    the samples. Sums are kept in float32, extremes as exactly as they come; every product of one
    update is accumulated by one matmul.
    """

    def __init__(self, channels: int, device: torch.device | str = "cpu") -> None:
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
        _add_products(self.matrix, rows)
        self.sum += rows.sum(0, dtype=torch.float64)
        self.magnitude += rows.abs().sum(0, dtype=torch.float64)
        self.count += rows.shape[0]

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
        matrix = weight.detach().float()
        total = float(((matrix @ self.matrix) * matrix).sum(dtype=torch.float64))
        return max(total, 0.0)  # rounding can leave a tiny negative sum

    def relative_error(self, weight: Tensor, quantized: Tensor) -> float:
        """‖X(Ŵ − W)ᵀ‖² / ‖X Wᵀ‖²: the layer's output error from its weights alone.

        0 if there is no error, infinite if there is one but X Wᵀ is 0.
        """
        error, total = self.energy(quantized - weight), self.energy(weight)
        if not error:
            return 0.0
        return error / total if total else math.inf


def _add_products(matrix: Tensor, rows: Tensor) -> None:
    """matrix += XᵀX for rows X [tokens, channels]: panels from the diagonal down, then mirrored."""
    channels = len(matrix)
    for start in range(0, channels, _PANEL):
        end = min(start + _PANEL, channels)
        matrix[start:, start:end].addmm_(rows[:, start:].T, rows[:, start:end])
        matrix[start:end, end:] = matrix[end:, start:end].T
