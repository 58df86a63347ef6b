"""Arithmetic of a quantization grid: pure functions, no state.

Scales and zero points have the *layout* of a tensor under a spec. For x of shape [..., n]:

    tensor    [1, …, 1]
    channel   [rows, 1, …, 1]        (rows = first dimension)
    group     [..., ceil(n / group_size)]
    token     [..., 1]
    timestep  as tensor, that of the timestep that is computed

Zero points are whole numbers stored in the dtype of the scale.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from ptqcore.spec import QuantSpec

_FLOAT_DTYPES = {"e4m3": torch.float8_e4m3fn, "e5m2": torch.float8_e5m2}


def float_dtype(spec: QuantSpec) -> torch.dtype:
    """The torch dtype of a float grid."""
    return _FLOAT_DTYPES[spec.dtype]


def float_max(spec: QuantSpec) -> float:
    """Largest finite value of a float grid (448 for e4m3, 57344 for e5m2)."""
    return float(torch.finfo(float_dtype(spec)).max)


def split_groups(x: Tensor, spec: QuantSpec) -> Tensor:
    """View x [..., n] as [..., groups, group_size] under a group spec; other specs leave it as is.

    A last ragged group is filled up with zeros: zero lies on every grid and inside every range, so
    the filling changes neither extremes nor errors.
    """
    if spec.granularity != "group":
        return x
    size = spec.group_size or x.shape[-1]
    missing = -x.shape[-1] % size
    padded = F.pad(x, (0, missing)) if missing else x
    return padded.reshape(*padded.shape[:-1], -1, size)


def merge_groups(x: Tensor, spec: QuantSpec, n: int) -> Tensor:
    """Inverse of `split_groups`: back to [..., n], the filling dropped."""
    return x.flatten(-2)[..., :n] if spec.granularity == "group" else x


def reduced_dims(x: Tensor, spec: QuantSpec) -> tuple[int, ...]:
    """Dimensions of `split_groups(x)` that share one scale."""
    if spec.granularity in ("tensor", "timestep"):
        return tuple(range(x.ndim))
    if spec.granularity == "channel":
        return tuple(range(1, x.ndim))
    return (-1,)


def layout_shape(shape: tuple[int, ...], spec: QuantSpec) -> tuple[int, ...]:
    """Shape of the scale of a tensor of that shape."""
    if spec.granularity in ("tensor", "timestep"):
        return (1,) * len(shape)
    if spec.granularity == "channel":
        return (shape[0],) + (1,) * (len(shape) - 1)
    if spec.granularity == "token":
        return (*shape[:-1], 1)
    return (*shape[:-1], -(-shape[-1] // (spec.group_size or shape[-1])))


def value_range(x: Tensor, spec: QuantSpec) -> tuple[Tensor, Tensor]:
    """Smallest and largest value of x for every scale of the layout, extended to contain 0."""
    groups = split_groups(x.detach(), spec)
    dims = reduced_dims(x, spec)
    if not dims:
        return groups.clamp(max=0), groups.clamp(min=0)
    keep = spec.granularity != "group"
    low, high = groups.amin(dims, keepdim=keep), groups.amax(dims, keepdim=keep)
    return low.clamp(max=0), high.clamp(min=0)


def scale_and_zero_point(low: Tensor, high: Tensor, spec: QuantSpec) -> tuple[Tensor, Tensor | None]:
    """Grid for the range [low, high]; an empty range gets scale 1, so that zeros are exact.

    With L = 2^bits − 1 and M = 2^(bits−1):

        asymmetric      scale = (high − low) / L, zero_point = round(−low / scale)
        symmetric       scale = max(−low / M, high / (M − 1)), the smallest whose grid holds both ends
        … dynamic       scale = 2·max|x| / L, what engines that read compressed-tensors compute at run
                        time; the two ends are clipped by half a step
        … signed_scale  scale = x / −M for the end x of larger magnitude; the other end is clipped by
                        half a step at most
        float           scale = max|x| / largest value of the format

    Both have the dtype of the range; half precision is computed in float32. A spec with a scale dtype
    has scales that dtype can hold.
    """
    dtype = low.dtype
    if dtype in (torch.float16, torch.bfloat16):
        low, high = low.float(), high.float()
    low, high = low.clamp(max=0), high.clamp(min=0)
    scale = _held(_scale(low, high, spec), spec)
    scale = torch.where(scale == 0, torch.ones_like(scale), scale).to(dtype)
    if spec.symmetric:
        return scale, None
    zero_point = torch.round(-spec.middle - low / scale) + spec.middle
    return scale, zero_point.clamp(0, spec.levels).to(dtype)


def _scale(low: Tensor, high: Tensor, spec: QuantSpec) -> Tensor:
    if not spec.symmetric:
        return (high - low) / spec.levels
    largest = torch.maximum(-low, high)
    if spec.is_float:
        return largest / float_max(spec)
    if spec.signed_scale:
        return torch.where(high > -low, -high, -low) / spec.middle
    if spec.dynamic:
        return largest / (spec.levels / 2)
    return torch.maximum(-low / spec.middle, high / (spec.middle - 1))


def _held(scale: Tensor, spec: QuantSpec) -> Tensor:
    """The scale as the spec's scale dtype holds it, finite where the scale is."""
    if spec.scale_dtype is None:
        return scale
    dtype = getattr(torch, spec.scale_dtype)
    largest = torch.finfo(dtype).max
    return scale.clamp(-largest, largest).to(dtype).to(scale.dtype)


def _last(x: Tensor) -> int:
    """The size of the last dimension; a bare number is a row of one."""
    return x.shape[-1] if x.ndim else 1


def _spread(parameter: Tensor, spec: QuantSpec) -> Tensor:
    return parameter.unsqueeze(-1) if spec.granularity == "group" else parameter


def _offset(zero_point: Tensor | None, spec: QuantSpec) -> Tensor | int:
    return spec.middle if zero_point is None else _spread(zero_point, spec)


def _codes(x: Tensor, scale: Tensor, zero_point: Tensor | None, spec: QuantSpec) -> Tensor:
    """Unpacked codes of grouped x as floats (integer grids) or as values of the float format."""
    scaled = x / _spread(scale, spec)
    if spec.is_float:
        limit = float_max(spec)
        return scaled.clamp(-limit, limit).to(float_dtype(spec))
    return _unclipped(scaled, zero_point, spec).clamp_(0, spec.levels)


def _unclipped(scaled: Tensor, zero_point: Tensor | None, spec: QuantSpec) -> Tensor:
    """Integer codes of x / scale before they are clipped, in its place.

    Ties fall as in the engines: ONNX adds the zero point of a static grid to what is rounded; readers
    of compressed-tensors add that of a dynamic one before, counted from the middle of the grid.
    """
    if zero_point is not None and not spec.dynamic:
        return scaled.round_().add_(_spread(zero_point, spec))
    if zero_point is not None:
        scaled.add_(_spread(zero_point, spec) - spec.middle)
    return scaled.round_().add_(spec.middle)


def _values(codes: Tensor, scale: Tensor, zero_point: Tensor | None, spec: QuantSpec) -> Tensor:
    if spec.is_float:
        return codes.to(scale.dtype) * _spread(scale, spec)
    return (codes - _offset(zero_point, spec)) * _spread(scale, spec)


def _raw(codes: Tensor, spec: QuantSpec) -> Tensor:
    return codes.view(torch.uint8) if spec.is_float else codes.to(torch.uint8)


def position(x: Tensor, scale: Tensor, zero_point: Tensor | None, spec: QuantSpec) -> Tensor:
    """Where x lies on an integer grid: its code before rounding and clipping, same shape as x."""
    scaled = split_groups(x, spec) / _spread(scale, spec)
    return merge_groups(scaled + _offset(zero_point, spec), spec, _last(x))


def values(position: Tensor, scale: Tensor, zero_point: Tensor | None, spec: QuantSpec) -> Tensor:
    """Inverse of `position`, for codes that may lie between whole ones; differentiable."""
    groups = split_groups(position, spec)
    return merge_groups(_values(groups, scale, zero_point, spec), spec, _last(position))


def quantize(x: Tensor, scale: Tensor, zero_point: Tensor | None, spec: QuantSpec) -> Tensor:
    """Codes of x as uint8, same shape as x: integers 0 … 2^bits − 1, or the bytes of an FP8 format."""
    codes = _codes(split_groups(x, spec), scale, zero_point, spec)
    return merge_groups(_raw(codes, spec), spec, _last(x))


def nearest(x: Tensor, scale: Tensor, zero_point: Tensor | None, spec: QuantSpec) -> tuple[Tensor, Tensor]:
    """Codes of x, as of `quantize`, and their values, as of `dequantize`."""
    codes = _codes(split_groups(x, spec), scale, zero_point, spec)
    values = _values(codes, scale, zero_point, spec)
    return merge_groups(_raw(codes, spec), spec, _last(x)), merge_groups(values, spec, _last(x))


def dequantize(codes: Tensor, scale: Tensor, zero_point: Tensor | None, spec: QuantSpec) -> Tensor:
    """Values of uint8 codes, in the dtype of the scale."""
    groups = split_groups(codes, spec)
    if spec.is_float:
        numbers = groups.view(float_dtype(spec)).to(scale.dtype)
    else:
        numbers = groups.to(scale.dtype).sub_(_offset(zero_point, spec))
    numbers.mul_(_spread(scale, spec))  # in place: a third of the memory
    return merge_groups(numbers, spec, _last(codes))


def inside(x: Tensor, scale: Tensor, zero_point: Tensor | None, spec: QuantSpec) -> Tensor:
    """Where x lies in the range of the grid, that is, where rounding does not clip it (bool)."""
    scaled = split_groups(x, spec) / _spread(scale, spec)
    if spec.is_float:
        kept = scaled.abs() <= float_max(spec)
    else:
        code = _unclipped(scaled, zero_point, spec)
        kept = (code >= 0) & (code <= spec.levels)
    return merge_groups(kept, spec, _last(x))


class _RoundStraightThrough(torch.autograd.Function):
    """Quantize-dequantize forward; gradient 1 inside the range of the grid and 0 outside."""

    @staticmethod
    def forward(ctx, x, scale, zero_point, spec):  # type: ignore[no-untyped-def]
        if ctx.needs_input_grad[0]:
            ctx.save_for_backward(inside(x, scale, zero_point, spec))
        codes = _codes(split_groups(x, spec), scale, zero_point, spec)
        return merge_groups(_values(codes, scale, zero_point, spec), spec, _last(x))

    @staticmethod
    def backward(ctx, gradient):  # type: ignore[no-untyped-def]
        (kept,) = ctx.saved_tensors
        return gradient * kept, None, None, None


def fake_quantize(x: Tensor, scale: Tensor, zero_point: Tensor | None, spec: QuantSpec) -> Tensor:
    """x rounded to its grid, same shape and dtype.

    The gradient passes straight through inside the range of the grid and is zero where x was
    clipped (Bengio et al., arXiv 1308.3432); scale and zero point get none.
    """
    return _RoundStraightThrough.apply(x, scale, zero_point, spec)  # type: ignore[no-untyped-call]
