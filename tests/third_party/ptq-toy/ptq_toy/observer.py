"""The observer `three-sigma`: mean ± k standard deviations of what was seen."""

from typing import ClassVar, Self

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from ptqcore import Observer, ObserverOptions, QuantSpec


class ThreeSigmaOptions(ObserverOptions):
    """k: standard deviations on either side of the mean."""

    k: float = Field(default=3.0, gt=0)


class ThreeSigma(Observer):
    """Covers mean ± k·std of every scale, extended to contain 0.

    Keeps the number, the sum and the sum of squares of the values in float64: they add up, so that
    merged observers give what one observer of everything would have given.
    """

    name = "three-sigma"
    Options: ClassVar[type[ObserverOptions]] = ThreeSigmaOptions
    options: ThreeSigmaOptions

    def __init__(self, spec: QuantSpec, **options: object) -> None:
        super().__init__(spec, **options)
        self._sums: tuple[Tensor, Tensor, Tensor] | None = None

    def update(self, x: Tensor) -> None:
        values = x.detach().double()
        self._add((self._sum(torch.ones_like(values)), self._sum(values), self._sum(values.square())))

    def range(self) -> tuple[Tensor, Tensor]:
        if self._sums is None:
            raise ValueError("the three-sigma observer has seen no tensor")
        count, total, squares = self._sums
        mean = total / count
        spread = self.options.k * (squares / count - mean.square()).clamp(min=0).sqrt()
        return (mean - spread).clamp(max=0).float(), (mean + spread).clamp(min=0).float()

    def merge(self, other: Self) -> None:
        if other._sums is not None:
            self._add(other._sums)

    def _add(self, sums: tuple[Tensor, Tensor, Tensor]) -> None:
        old = self._sums
        self._sums = sums if old is None else (old[0] + sums[0], old[1] + sums[1], old[2] + sums[2])

    def _sum(self, x: Tensor) -> Tensor:
        """Sums over the values that share a scale, in the layout that a range has."""
        if self.spec.granularity == "tensor":
            return x.sum().reshape((1,) * x.ndim)
        if self.spec.granularity == "channel":
            return x.flatten(1).sum(1).reshape((-1,) + (1,) * (x.ndim - 1))
        if self.spec.granularity == "token":
            return x.sum(-1, keepdim=True)
        size = self.spec.group_size or x.shape[-1]
        padded = F.pad(x, (0, -x.shape[-1] % size))
        return padded.unflatten(-1, (-1, size)).sum(-1)
