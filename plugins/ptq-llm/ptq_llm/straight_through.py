"""Rounding with gradients for what is rounded and for the range of its grid.

Whole numbers pass gradients as if they had not been rounded (Bengio et al., arXiv 1308.3432), zero points
too; with y = s · (q − z) that leaves (y − x) / s for the scale where x is inside the grid (Esser et al.,
arXiv 1902.08153, eq. 3), and the ends of the range themselves where x is clipped.
"""

from typing import Any

import torch
from torch import Tensor

from ptqcore import QuantSpec, grid


def value_range(x: Tensor, spec: QuantSpec) -> tuple[Tensor, Tensor]:
    """As `grid.value_range`, differentiable: smallest and largest value for every scale of the layout."""
    groups, dims = grid.split_groups(x, spec), grid.reduced_dims(x, spec)
    keep = spec.granularity != "group"
    low, high = groups.amin(dims, keepdim=keep), groups.amax(dims, keepdim=keep)
    return low.clamp(max=0), high.clamp(min=0)


def round_in_range(
    x: Tensor, low: Tensor, high: Tensor, spec: QuantSpec, kept_in: torch.dtype = torch.float32
) -> Tensor:
    """x rounded to the nearest values of the grid that covers [low, high], float32.

    The values are those of `QuantizedTensor.from_range` and of `FakeQuant`, to the last bit.

    Args:
        x: float32.
        low, high: the range, in the layout of the grid, float32.
        spec: any grid.
        kept_in: the dtype that scales are kept in: that of the model, for weights.
    """
    scale, zero_point = grid.scale_and_zero_point(low, high, spec)
    scale = scale.to(kept_in).float()
    found: Tensor = _Round.apply(x, scale, low, zero_point, spec)
    return found


def round_dynamic(x: Tensor, spec: QuantSpec) -> Tensor:
    """Activations on a dynamic grid, in their dtype."""
    if not x.numel():  # experts are called on no tokens too
        return x
    values = x.float()
    return round_in_range(values, *value_range(values, spec), spec).to(x.dtype)


class _Round(torch.autograd.Function):
    """With y = s · (q − z): dy = (y − x)/s · ds where x is inside the grid, else y/s · ds − s · dz, and
    z = −low/s on an asymmetric grid."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, scale: Tensor, low: Tensor, zero_point: Tensor | None, spec: QuantSpec
    ) -> Tensor:
        y = grid.fake_quantize(x, scale, zero_point, spec)
        ctx.save_for_backward(x, y, scale, low, zero_point)
        ctx.spec = spec
        return y

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        (gradient,) = gradients
        x, y, scale, low, zero_point = ctx.saved_tensors
        spec: QuantSpec = ctx.spec
        passed = gradient * grid.inside(x, scale, zero_point, spec)
        if not ctx.needs_input_grad[1]:
            return passed, None, None, None, None
        for_scale = _per_scale(gradient * y - passed * x, spec) / scale
        for_low = None
        if zero_point is not None:
            for_low = _per_scale(gradient - passed, spec)
            for_scale = for_scale - for_low * low / scale
        return passed, for_scale, for_low, None, None


def _per_scale(x: Tensor, spec: QuantSpec) -> Tensor:
    """Sums over all values that share a scale, in the layout."""
    keep = spec.granularity != "group"
    return grid.split_groups(x, spec).sum(grid.reduced_dims(x, spec), keepdim=keep)
