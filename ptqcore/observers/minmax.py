"""Smallest and largest value seen."""

from typing import Self

import torch
from torch import Tensor

from ptqcore import grid
from ptqcore.observers.base import Observer
from ptqcore.spec import QuantSpec


class MinMax(Observer):
    """Covers everything that was seen."""

    name = "minmax"

    def __init__(self, spec: QuantSpec, **options: object) -> None:
        super().__init__(spec, **options)
        self._range: tuple[Tensor, Tensor] | None = None

    def update(self, x: Tensor) -> None:
        if not x.numel():
            return
        self._include(*grid.value_range(x, self.spec))

    def condensed(self, x: Tensor) -> Tensor:
        """Its smallest and largest value, where one range serves all of it."""
        if self.spec.granularity != "tensor" or not x.ndim or not x.numel():
            return x
        return torch.cat(grid.value_range(x, self.spec), dim=-1)

    def range(self) -> tuple[Tensor, Tensor]:
        if self._range is None:
            raise ValueError("the min-max observer has seen no tensor")
        return self._range

    def merge(self, other: Self) -> None:
        self._include(*other.range())

    def _include(self, low: Tensor, high: Tensor) -> None:
        if self._range is not None:
            low, high = torch.minimum(low, self._range[0]), torch.maximum(high, self._range[1])
        self._range = low, high
