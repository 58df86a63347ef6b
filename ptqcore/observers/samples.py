"""A bounded, deterministic sample of the values seen, for observers that need a distribution."""

from typing import Self

import torch
import torch.nn.functional as F
from torch import Tensor

from ptqcore.observers.base import Observer
from ptqcore.observers.minmax import MinMax
from ptqcore.spec import QuantSpec

_MOST_VALUES = 2**20


class SampleObserver(Observer):
    """Keeps the values [scales, n] of every scale of the layout.

    Where one scale serves a whole tensor, at most 1 Mi values are kept: all of them, else every
    2nd, 4th, … in the order seen. The smallest and largest value (of those of any weight) are always
    exact.
    """

    def __init__(self, spec: QuantSpec, **options: object) -> None:
        super().__init__(spec, **options)
        self._parts: list[Tensor] = []
        self._weights: list[Tensor] = []
        self._weighted = False
        self._stride = 1
        self._seen = 0
        self._exact = MinMax(spec)

    def update(self, x: Tensor) -> None:
        if not x.numel():
            return
        self._exact.update(x)
        rows = self._rows(x.detach().float())
        self._take(rows, torch.ones(1, 1).expand(1, rows.shape[1]))

    def update_weighted(self, x: Tensor, weight: Tensor) -> None:
        """As every observer's: each kept value keeps its weight."""
        counts = (weight > 0).expand_as(x)
        if not counts.any():
            return
        self._exact.update(x[counts])
        self._weighted = True
        weights = weight.expand_as(x)[counts]
        self._take(x[counts].detach().float().reshape(1, -1), weights.detach().float().reshape(1, -1))

    def merge(self, other: Self) -> None:
        theirs = other.values()
        self._exact.merge(other._exact)
        their_weights = torch.cat(other._weights, dim=1)
        stride = max(self._stride, other._stride)
        if self._parts:
            self._thin(stride // self._stride)
        self._stride = stride
        self._weighted |= other._weighted
        self._append(*(each[:, :: stride // other._stride] for each in (theirs, their_weights)))
        self._seen += other._seen

    def values(self) -> Tensor:
        """The kept values [scales, n], float32; NaN fills up the last group of a row.

        Raises:
            ValueError: if no tensor was seen.
        """
        if not self._parts:
            raise ValueError(f"the {self.name} observer has seen no tensor")
        if len(self._parts) > 1:
            self._parts = [torch.cat(self._parts, dim=1)]
        return self._parts[0]

    def weights(self) -> Tensor | None:
        """The weights [1, n] of the kept values; None if all count the same."""
        return torch.cat(self._weights, dim=1) if self._weighted else None

    def exact_range(self) -> tuple[Tensor, Tensor]:
        """Smallest and largest value seen, in the layout, extended to contain 0."""
        return self._exact.range()

    def _rows(self, x: Tensor) -> Tensor:
        if self.spec.granularity == "tensor":
            return x.reshape(1, -1)
        if self.spec.granularity == "channel":
            return x.flatten(1)
        size = self.spec.group_size or x.shape[-1]
        filled = F.pad(x, (0, -x.shape[-1] % size), value=torch.nan)
        return filled.reshape(-1, size)

    def _take(self, rows: Tensor, weights: Tensor) -> None:
        """Keep every so manieth of the values [scales, n] and their weights [1, n]."""
        first = -self._seen % self._stride
        self._append(rows[:, first :: self._stride], weights[:, first :: self._stride])
        self._seen += rows.shape[1]

    def _append(self, rows: Tensor, weights: Tensor) -> None:
        self._parts.append(rows.clone())
        self._weights.append(weights)
        while self.spec.granularity == "tensor" and sum(map(torch.numel, self._parts)) > _MOST_VALUES:
            self._stride *= 2
            self._thin(2)

    def _thin(self, stride: int) -> None:
        """Keep one of so many of the kept values."""
        self._parts = [self.values()[:, ::stride].clone()]
        self._weights = [torch.cat(self._weights, dim=1)[:, ::stride]]
