"""The step `hqq`: ranges of weights without data, by half-quadratic splitting.

Badri and Shaji, Half-Quadratic Quantization of Large Machine Learning Models, 2023.
"""

from collections.abc import Sequence
from typing import ClassVar

import torch
from pydantic import Field
from torch import Tensor

from ptqcore import (
    Block,
    Calibration,
    Context,
    QuantSpec,
    RecipeError,
    Step,
    StepOptions,
    divided,
    grid,
    weight_rows,
)

Range = tuple[Tensor, Tensor]

_VALUES_AT_A_TIME = 2**17  # few enough to stay in the cache of a core


def half_quadratic(
    weight: Tensor,
    low: Tensor,
    high: Tensor,
    spec: QuantSpec,
    norm: float = 0.7,
    beta: float = 10.0,
    growth: float = 1.01,
    iterations: int = 20,
) -> Range:
    """A range for which Σ |W − Q(W)|^p is smaller, for every scale on its own; p < 1 forgives outliers.

    In turn the errors E that are better left are split off, E ← shrink(W − Q(W)) (eq. 4), with

        shrink(x) = sign(x) · max(|x| − |x|^(p−1) / β, 0),

    the grid is fitted to W − E (eq. 5), and β grows. Here x is counted in steps of the grid, so that β
    means the same for weights of any size. The best range met is returned, [low, high] among them, not
    the last. It is a local search: a weight that has a code for itself keeps it.

    The method keeps the step, and moves a zero point that need not be whole. Our records keep whole zero
    points, and rounding takes back what a zero point moved alone has gained. So step and zero point are
    fitted together, by least squares on the codes, and a range is judged with its zero point rounded.

    Args:
        weight: [rows, channels].
        low: range to start from, as `ptqcore.grid` lays it out.
        high: the same.
        spec: of an integer grid.
        norm: p.
        beta: β at first.
        growth: what β is multiplied by each time (κ).
        iterations: how often.
    """
    values = _by_scale(weight.detach().float(), spec)
    counted = _by_scale(torch.ones_like(weight, dtype=torch.float32), spec)
    row_spec = spec.model_copy(update={"granularity": "channel", "group_size": None})
    betas = [beta * growth**index for index in range(iterations)]
    rows = max(1, _VALUES_AT_A_TIME // values.shape[1])
    cut = (x.split(rows) for x in (values, counted, low.float().view(-1, 1), high.float().view(-1, 1)))
    found = [
        _fit(value, number, first, last, row_spec, norm, betas)
        for value, number, first, last in zip(*cut, strict=True)
    ]
    return (
        torch.cat([ends[0] for ends in found]).view_as(low),
        torch.cat([ends[1] for ends in found]).view_as(high),
    )


def _by_scale(x: Tensor, spec: QuantSpec) -> Tensor:
    """A matrix as [scales, values of one scale]; the last group of a row is filled up with zeros."""
    if spec.granularity == "tensor":
        return x.reshape(1, -1)
    groups = grid.split_groups(x, spec)
    return groups.flatten(0, -2) if spec.granularity == "group" else groups


def _fit(
    values: Tensor,
    counted: Tensor,
    low: Tensor,
    high: Tensor,
    spec: QuantSpec,
    norm: float,
    betas: Sequence[float],
) -> Range:
    """The best ranges [scales, 1] of values [scales, n]; counted: 1 where there is a value, else 0."""
    best, least = (low, high), torch.full_like(low, torch.inf)
    for beta in (*betas, None):
        scale, zero_point = grid.scale_and_zero_point(low, high, spec)
        codes = grid.quantize(values, scale, zero_point, spec)
        error = values - grid.dequantize(codes, scale, zero_point, spec)
        total = error.abs().pow(norm).sum(1, keepdim=True)
        better = total < least
        least = torch.where(better, total, least)
        best = torch.where(better, low, best[0]), torch.where(better, high, best[1])
        if beta is not None:
            kept = values - _shrink(error / scale, beta, norm) * scale
            low, high = _range_of(codes.float(), kept, counted, low, high, spec)
    return best


def _shrink(x: Tensor, beta: float, norm: float) -> Tensor:
    """The proximal operator of |x|^p / β, as the method approximates it."""
    size = x.abs()
    return x.sign() * (size - size.clamp(min=torch.finfo(x.dtype).tiny).pow(norm - 1) / beta).clamp_(min=0)


def _range_of(
    codes: Tensor, values: Tensor, counted: Tensor, low: Tensor, high: Tensor, spec: QuantSpec
) -> Range:
    """The range of the grid closest to some values at given codes; as before where all codes are one."""
    if spec.symmetric:
        codes = (codes - spec.middle) * counted
        code, value = torch.zeros_like(low), torch.zeros_like(low)
    else:
        number = counted.sum(1, keepdim=True)
        code = (codes * counted).sum(1, keepdim=True) / number
        value = (values * counted).sum(1, keepdim=True) / number
    centred = (codes - code) * counted
    spread = centred.square().sum(1, keepdim=True)
    scale = (centred * values).sum(1, keepdim=True) / spread
    first, last = (-spec.middle, spec.middle - 1) if spec.symmetric else (0, spec.levels)
    ends = torch.stack([value + (first - code) * scale, value + (last - code) * scale])
    fitted = (spread > 0) & (scale.sign() == 1 if not spec.signed_scale else scale != 0)
    new_low, new_high = ends.amin(0).clamp(max=0), ends.amax(0).clamp(min=0)
    return torch.where(fitted, new_low, low), torch.where(fitted, new_high, high)


class HQQOptions(StepOptions):
    """norm: exponent p of the errors. beta, growth: how much is split off, the less the larger.
    iterations: fits of a range."""

    norm: float = Field(default=0.7, gt=0, le=1)
    beta: float = Field(default=10.0, gt=0)
    growth: float = Field(default=1.01, ge=1)
    iterations: int = Field(default=20, ge=1)


class HQQ(Step):
    """Ranges of weights by `half_quadratic`, for the step that quantizes."""

    name = "hqq"
    shares_samples = True
    stage = "range"
    data_free = True
    Options: ClassVar[type[StepOptions]] = HQQOptions
    options: HQQOptions

    def __init__(self, options: HQQOptions, context: Context) -> None:
        super().__init__(options, context)
        if context.quant.weights.is_float:
            raise RecipeError(
                f"recipe key 'steps.hqq' fits integer grids, but quant.weights.dtype is "
                f"{context.quant.weights.dtype}: set it to int, or remove the step"
            )

    def block(self, block: Block, calibration: Calibration) -> None:
        options, layers = self.options.model_dump(), self.context.targets(block)

        def fit(path: str) -> tuple[Tensor, Tensor]:
            layer, spec = layers[path], self.context.grids.weights(path).spec
            weight, ends = weight_rows(layer).flatten(1), calibration.weight_range(path, layer)
            return half_quadratic(weight, *ends, spec, **options)

        found = divided(list(layers), fit, lambda path: weight_rows(layers[path]).numel())
        for path, ends in zip(layers, found, strict=True):
            calibration.set_weight_range(path, *ends)
