"""The range that leaves out a given share of the values."""

from typing import ClassVar

import torch
from pydantic import Field
from torch import Tensor

from ptqcore.observers.base import ObserverOptions
from ptqcore.observers.samples import SampleObserver


class PercentileOptions(ObserverOptions):
    """percentile: share of the values, in percent, that the range must hold on each side."""

    percentile: float = Field(default=99.99, gt=50.0, le=100.0)


class Percentile(SampleObserver):
    """Covers [100 − p, p] percent of the values, linearly interpolated between neighbours.

    Of weighted values it is the smallest that has this share of all weights at or below it.
    """

    name = "percentile"
    Options: ClassVar[type[ObserverOptions]] = PercentileOptions

    def range(self) -> tuple[Tensor, Tensor]:
        ordered, order = self.values().sort(dim=1)  # NaN comes last
        exact_low, exact_high = self.exact_range()
        share: float = self.options.percentile / 100  # type: ignore[attr-defined]
        if share == 1:
            return exact_low, exact_high
        weights = self.weights()
        if weights is None:
            ends = [_quantile(ordered, 1 - share), _quantile(ordered, share)]
        else:
            reached = weights.gather(1, order).double().cumsum(dim=1)
            wanted = [reached[:, -1:] * part for part in (1 - share, share)]
            last = ordered.shape[1] - 1
            ends = [ordered.gather(1, torch.searchsorted(reached, x).clamp(max=last)) for x in wanted]
        low, high = (end.view_as(exact_low) for end in ends)
        return low.clamp(max=0), high.clamp(min=0)


def _quantile(ordered: Tensor, share: float) -> Tensor:
    """Quantile of the numbers of sorted rows [scales, n]; torch.quantile stops at 16 million values."""
    last = (~ordered.isnan()).sum(dim=1, keepdim=True) - 1
    position = share * last.double()
    below = position.long()
    above = torch.minimum(below + 1, last)
    low, high = ordered.gather(1, below), ordered.gather(1, above)
    return low.lerp(high, (position - below).to(low.dtype))
