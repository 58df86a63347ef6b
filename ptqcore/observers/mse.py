"""The range with the least quantization error."""

from typing import ClassVar

import torch
from pydantic import Field
from torch import Tensor

from ptqcore import grid
from ptqcore.observers.base import ObserverOptions
from ptqcore.observers.samples import SampleObserver

_VALUES_AT_A_TIME = 2**17  # few enough to stay in the cache of a core through all candidates


class MSEOptions(ObserverOptions):
    """norm: exponent p of the error; candidates, shrink: ranges tried, from 1 down to 1 − shrink."""

    norm: float = Field(default=2.4, gt=0.0)
    candidates: int = Field(default=80, ge=1)
    shrink: float = Field(default=0.8, gt=0.0, lt=1.0)


class MSE(SampleObserver):
    """Minimises the (weighted) mean of |x − q(x)|^p over ranges shrunk in equal steps, for each scale.

    Both ends shrink together, as in BRECQ's released search (80 steps of 1 %, p = 2.4). The full
    range is always a candidate, so the result is never worse than min-max on the values kept.
    """

    name = "mse"
    Options: ClassVar[type[ObserverOptions]] = MSEOptions

    def range(self) -> tuple[Tensor, Tensor]:
        values = self.values().nan_to_num(nan=0.0)
        exact_low, exact_high = self.exact_range()
        low, high = exact_low.float().reshape(-1, 1), exact_high.float().reshape(-1, 1)
        rows = max(1, _VALUES_AT_A_TIME // values.shape[1])
        parts = zip(*(torch.split(x, rows) for x in (values, low, high)), strict=True)
        ratio = torch.cat([self._best_ratio(*part) for part in parts]).view_as(exact_low)
        return exact_low * ratio, exact_high * ratio

    def _best_ratio(self, values: Tensor, low: Tensor, high: Tensor) -> Tensor:
        """Share [scales, 1] of the ranges [scales, 1] with the least error on values [scales, n]."""
        options: MSEOptions = self.options  # type: ignore[assignment]
        row_spec = self.spec.model_copy(
            update={"granularity": "channel", "group_size": None, "dynamic": False}
        )
        weights = self.weights()
        best_error = torch.full_like(low, torch.inf)
        best_ratio = torch.ones_like(low)
        for step in range(options.candidates):
            ratio = 1 - options.shrink * step / options.candidates
            scale, zero_point = grid.scale_and_zero_point(low * ratio, high * ratio, row_spec)
            error = values - grid.fake_quantize(values, scale, zero_point, row_spec)
            cost = error.abs_().pow_(options.norm)
            total = (cost if weights is None else cost.mul_(weights)).sum(dim=1, keepdim=True)
            better = total < best_error
            best_error = torch.where(better, total, best_error)
            best_ratio = torch.where(better, ratio, best_ratio)
        return best_ratio
