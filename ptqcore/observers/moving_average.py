"""Exponential moving average of the range of each tensor."""

from typing import ClassVar, Self

import torch
from pydantic import Field
from torch import Tensor

from ptqcore import grid
from ptqcore.observers.base import Observer, ObserverOptions
from ptqcore.spec import QuantSpec


class MovingAverageOptions(ObserverOptions):
    """momentum: weight of the past at each update."""

    momentum: float = Field(default=0.9, ge=0.0, lt=1.0)


class MovingAverage(Observer):
    """Moving average of the smallest and largest value of each tensor (Jacob et al., 1712.05877).

    The first tensor starts the average. Merging weights the two averages by their number of
    tensors, which is not the average that one observer of all tensors would have found: a moving
    average depends on the order.
    """

    name = "moving-average"
    Options: ClassVar[type[ObserverOptions]] = MovingAverageOptions

    def __init__(self, spec: QuantSpec, **options: object) -> None:
        super().__init__(spec, **options)
        self._low: Tensor | None = None
        self._high: Tensor | None = None
        self._count = 0

    def update(self, x: Tensor) -> None:
        if not x.numel():
            return
        low, high = grid.value_range(x, self.spec)
        if self._low is not None and self._high is not None:
            momentum = self.options.momentum  # type: ignore[attr-defined]
            low, high = self._low.lerp(low, 1 - momentum), self._high.lerp(high, 1 - momentum)
        self._low, self._high = low, high
        self._count += 1

    def condensed(self, x: Tensor) -> Tensor:
        """Its smallest and largest value, where one range serves all of it."""
        if self.spec.granularity != "tensor" or not x.ndim or not x.numel():
            return x
        return torch.cat(grid.value_range(x, self.spec), dim=-1)

    def range(self) -> tuple[Tensor, Tensor]:
        if self._low is None or self._high is None:
            raise ValueError("the moving-average observer has seen no tensor")
        return self._low, self._high

    def merge(self, other: Self) -> None:
        low, high = other.range()
        if self._low is not None and self._high is not None:
            share = other._count / (self._count + other._count)
            low, high = self._low.lerp(low, share), self._high.lerp(high, share)
        self._low, self._high = low, high
        self._count += other._count
