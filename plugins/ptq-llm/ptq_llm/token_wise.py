"""The observer `token-wise`: ranges of activations without the tokens that stand out
(Outlier Suppression, Wei et al., arXiv 2209.13325, section 4.2, the coarse stage)."""

import math
from typing import ClassVar, Self

import torch
from pydantic import Field
from torch import Tensor

from ptqcore import MinMax, Observer, ObserverOptions, QuantSpec


class TokenWiseOptions(ObserverOptions):
    """quantile: share of the tokens that are clipped on each side. The papers search it by the loss of the
    quantized model, in steps of 0.005, which an observer does not see: 0.005 is what Outlier Suppression+
    found for BLOOM at 8 bits, 0.015 at 6."""

    quantile: float = Field(default=0.005, ge=0, lt=1)


class TokenWise(Observer):
    """The largest value of every token is noted, and the smallest: the range ends at the largest of these
    that is left when a share of the tokens is set aside.

    A token is a vector along the last dimension. Where a scale serves one vector or a part of it, there is
    nothing to set aside, and the range holds all values.
    """

    name = "token-wise"
    Options: ClassVar[type[ObserverOptions]] = TokenWiseOptions
    options: TokenWiseOptions

    def __init__(self, spec: QuantSpec, **options: object) -> None:
        super().__init__(spec, **options)
        self._all = MinMax(spec)
        self._lows: list[Tensor] = []
        self._highs: list[Tensor] = []

    def update(self, x: Tensor) -> None:
        if not x.numel():
            return
        self._all.update(x)
        if self.spec.granularity == "tensor":
            self._lows.append(x.detach().amin(-1).flatten())
            self._highs.append(x.detach().amax(-1).flatten())

    def range(self) -> tuple[Tensor, Tensor]:
        low, high = self._all.range()
        if self.spec.granularity != "tensor":
            return low, high
        lows, highs = torch.cat(self._lows), torch.cat(self._highs)
        clipped = math.floor(self.options.quantile * len(highs) + 1e-9)
        ends = lows.sort().values[clipped], highs.sort(descending=True).values[clipped]
        return ends[0].clamp(max=0).view_as(low), ends[1].clamp(min=0).view_as(high)

    def merge(self, other: Self) -> None:
        self._all.merge(other._all)
        self._lows += other._lows
        self._highs += other._highs
