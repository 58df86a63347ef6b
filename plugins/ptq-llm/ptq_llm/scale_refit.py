"""Scales fitted again once the codes are known: with codes fixed, the output error is quadratic in them."""

from dataclasses import replace

import torch
from torch import Tensor

from ptqcore import QuantizedTensor, QuantSpec, grid


def refit_scales(
    weight: Tensor, quantized: QuantizedTensor, gram: Tensor, damping: float = 0.0
) -> QuantizedTensor:
    """The same codes with scales that lower tr(ΔW H ΔWᵀ), H = XᵀX + damping · 1.

    One group after the other: with c = code − zero point in the group, 0 elsewhere, and the error
    δ = w − q, the best step of its scale is (c H δᵀ) / (c H cᵀ). It is taken where the error falls with
    the new scale as the grid keeps it (`scale_dtype`, the weight's dtype), and where the scale keeps its
    sign.

    Args:
        weight: [rows, channels].
        quantized: of any spec.
        gram: XᵀX [channels, channels].
        damping: added to its diagonal.
    """
    spec, channels = quantized.spec, weight.shape[1]
    size = spec.group_size or channels
    ones = torch.ones_like(quantized.scale, dtype=torch.float32)
    points = None if quantized.zero_point is None else quantized.zero_point.float()
    steps = grid.dequantize(quantized.codes, ones, points, spec)
    error = weight.detach().float() - quantized.dequantize().float()
    scale = quantized.scale.float().clone()
    for group in range(scale.shape[-1]):
        part = slice(group * size, (group + 1) * size)
        own, old = steps[:, part], scale[:, group : group + 1]
        slope = own * (error @ gram[:, part]).add_(error[:, part], alpha=damping)
        curvature = own * (own @ gram[part, part]).add_(own, alpha=damping)
        gradient, square = _per_scale(slope, spec), _per_scale(curvature, spec)
        new = _kept(old + gradient / square, spec, quantized.scale.dtype)
        change = new - old
        better = (square * change - 2 * gradient) * change < 0
        change = torch.where(better & (new * old > 0), change, 0.0)
        scale[:, group : group + 1] += change
        error[:, part] -= change * own
    return replace(quantized, scale=scale.to(quantized.scale.dtype))


def _per_scale(products: Tensor, spec: QuantSpec) -> Tensor:
    """Sums over what shares one scale: a row, or all of them."""
    return products.sum(None if spec.granularity == "tensor" else 1, keepdim=True)


def _kept(scale: Tensor, spec: QuantSpec, dtype: torch.dtype) -> Tensor:
    """Scales as the grid and the layer keep them."""
    held = scale if spec.scale_dtype is None else scale.to(getattr(torch, spec.scale_dtype))
    return held.to(dtype).float()
