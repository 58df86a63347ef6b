"""Quantizers: activations rounded inside a forward pass; and weights, steps and biases that are learned."""

from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor, nn

from ptqcore import grid
from ptqcore.packed import QuantizedTensor
from ptqcore.spec import QuantSpec
from ptqcore.timesteps import Moment, along, current

_CENTRED = 1 / 64  # how far, in steps, the ends of a centred range may differ in magnitude


class FakeQuant(nn.Module):
    """Rounds an activation to the grid of its spec and back.

    A dynamic spec takes the range of the tensor (or of each token or group) it is given; a static
    one uses the range set by `set_range`, kept as the buffers `scale` and `zero_point`: [1], or
    [timesteps] where there is one for each.
    """

    scale: Tensor | None
    zero_point: Tensor | None

    def __init__(self, spec: QuantSpec) -> None:
        super().__init__()
        self.spec = spec
        static_asymmetric = not spec.dynamic and not spec.symmetric
        count = spec.timesteps or 1
        self.register_buffer("scale", None if spec.dynamic else torch.full((count,), torch.nan))
        self.register_buffer("zero_point", torch.zeros(count) if static_asymmetric else None)

    def set_range(self, low: Tensor, high: Tensor) -> None:
        """Fix the grid of a static quantizer to cover [low, high], each of one element, or of one for
        each timestep.

        A range that is centred (by Outlier Suppression+) gets the steps of a symmetric grid: in those of an
        asymmetric one both its ends lie half way between two codes, where the last digit would decide.
        """
        count = self.spec.timesteps or 1
        self.scale, self.zero_point = _parameters(low.reshape(count), high.reshape(count), self.spec)

    def add_timesteps(
        self, moment: Moment, new: Tensor, ranges: tuple[Tensor, Tensor] | None = None
    ) -> None:
        """Have ranges for more timesteps.

        Args:
            moment: of all timesteps, old and new, in rising order: which rows new ones are between.
            new: which are new.
            ranges: low and high of the new ones, where they are known better.
        """
        scale, zero_point = self._kept(moment)
        if ranges is not None:
            own = _parameters(*ranges, self.spec)
            scale[new] = own[0].to(scale.dtype)
            if zero_point is not None and own[1] is not None:
                zero_point[new] = own[1].to(zero_point.dtype)
        self.scale, self.zero_point = scale, zero_point
        self.spec = self.spec.model_copy(update={"timesteps": len(scale)})

    def parameters_for(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        """Scale and zero point of a static quantizer for x, those of the current timestep where there is
        one for each.

        Raises:
            ModelError: if there is one for each, and no timestep is known.
        """
        if self.spec.timesteps is None:
            assert self.scale is not None
            return self.scale, self.zero_point
        moment = current()
        scale, zero_point = self._kept(moment)
        if self.spec.of_timestep and moment.seen is not None:
            own = _parameters(*_range_of_rows(x, moment.seen), self.spec)
            scale = torch.where(moment.seen, scale, own[0])
            if zero_point is not None and own[1] is not None:
                zero_point = torch.where(moment.seen, zero_point, own[1])
        return along(scale, x), None if zero_point is None else along(zero_point, x)

    def _kept(self, moment: Moment) -> tuple[Tensor, Tensor | None]:
        """Scale and zero point that the tables have for a moment."""
        scales, zero_points = self.scale, self.zero_point
        assert scales is not None
        scale = moment.of(scales)
        if zero_points is None or moment.share is None:
            return scale, None if zero_points is None else moment.of(zero_points)
        low = moment.of((self.spec.middle - zero_points) * scales)  # of the grid's middle
        return scale, torch.round(self.spec.middle - low / scale)

    def forward(self, x: Tensor) -> Tensor:
        """x [..., channels] rounded to the grid; NaN where a static quantizer was given no range."""
        if not x.numel():
            return x
        values = x.float()
        if self.spec.dynamic:
            scale, zero_point = grid.scale_and_zero_point(*grid.value_range(values, self.spec), self.spec)
        else:
            scale, zero_point = self.parameters_for(x)
        return grid.fake_quantize(values, scale, zero_point, self.spec).to(x.dtype)

    def extra_repr(self) -> str:
        return str(self.spec)


def _parameters(low: Tensor, high: Tensor, spec: QuantSpec) -> tuple[Tensor, Tensor | None]:
    """Scales and zero points for ranges of a static grid; centred ones get symmetric steps."""
    scale, zero_point = grid.scale_and_zero_point(low, high, spec)
    if zero_point is None:
        return scale, None
    centred = (low + high).abs() <= _CENTRED * scale
    symmetric, _ = grid.scale_and_zero_point(low, high, spec.model_copy(update={"symmetric": True}))
    return torch.where(centred, symmetric, scale), torch.where(centred, spec.middle, zero_point)


def _range_of_rows(x: Tensor, like: Tensor) -> tuple[Tensor, Tensor]:
    """Smallest and largest value of x, or of as many parts of its rows as there are timesteps."""
    low, high = x.detach().float().reshape(like.numel(), -1).aminmax(dim=1)
    return low.reshape(like.shape), high.reshape(like.shape)


class LearnedWeight(ABC):
    """A quantized weight that is learned: the grid of `start` stays, a `variable` moves its codes."""

    variable: Tensor

    def __init__(self, weight: Tensor, start: QuantizedTensor) -> None:
        """Args:
        weight: the float weight [rows, …].
        start: the same, rounded to nearest: its grid is kept.
        """
        self.start = start
        self._scale = start.scale.float()
        self._zero_point = None if start.zero_point is None else start.zero_point.float()
        values = weight.detach().flatten(1).float()
        self._position = grid.position(values, self._scale, self._zero_point, start.spec)

    @abstractmethod
    def codes(self) -> Tensor:
        """Where on the grid the weight is now computed with [rows, columns], differentiable."""

    @abstractmethod
    def decided_codes(self) -> Tensor:
        """The whole numbers that it would be decided to be now."""

    def soft(self) -> Tensor:
        """The weight as it now is [rows, …]."""
        values = grid.values(self.codes(), self._scale, self._zero_point, self.start.spec)
        return values.view(self.start.shape)

    def begin(self) -> None:
        """Begin an update: `weight` is the weight to compute with, any number of times."""
        self._soft = self.soft()
        self.weight = self._soft.detach().requires_grad_(True)

    def end(self) -> None:
        """End an update: hand the gradients that `weight` has gathered on to the variable."""
        if self.weight.grad is not None:
            self._soft.backward(self.weight.grad)  # type: ignore[no-untyped-call]

    def decide(self) -> None:
        """Let `weight` be the one with every code decided, until the next update."""
        self.weight = self.hard().dequantize().float()

    @torch.no_grad()
    def hard(self) -> QuantizedTensor:
        """The weight with every code decided."""
        start, codes = self.start, self.decided_codes().to(torch.uint8)
        return QuantizedTensor(codes, start.scale, start.zero_point, start.spec, start.shape)


class LearnedRounding(LearnedWeight):
    """Whether each weight goes up or down, as a variable (AdaRound, Nagel et al., arXiv 2004.10568).

    The weight is s · (clip(⌊W/s⌋ + h(V), 0, levels) − z) with the rectified sigmoid
    h(V) = clip(1.2 · sigmoid(V) − 0.1, 0, 1) (eq. 21–23). V starts where h(V) is the fraction that
    rounding cuts off, that is, at the full-precision weight; the scale does not change.
    """

    stretch_low, stretch_high = -0.1, 1.1

    def __init__(self, weight: Tensor, start: QuantizedTensor) -> None:
        super().__init__(weight, start)
        self._floor = self._position.floor()
        fraction = self._position - self._floor
        span = self.stretch_high - self.stretch_low
        share = (fraction - self.stretch_low) / span
        variable = torch.log(share) - torch.log1p(-share)
        up = start.codes.float() > self._floor  # ties fall as in rounding to nearest
        edge = 1e-4
        variable = torch.where(up, variable.clamp(min=edge), variable.clamp(max=-edge))
        self.variable = variable.requires_grad_(True)

    def share_up(self) -> Tensor:
        """h(V) [rows, columns]: how far each weight goes up, 0 … 1."""
        stretched = torch.sigmoid(self.variable) * (self.stretch_high - self.stretch_low)
        return (stretched + self.stretch_low).clamp(0, 1)

    def codes(self) -> Tensor:
        """Between the two neighbours."""
        return (self._floor + self.share_up()).clamp(0, self.start.spec.levels)

    def decided_codes(self) -> Tensor:
        """Up where h(V) is at least one half."""
        return (self._floor + (self.variable >= 0)).clamp(0, self.start.spec.levels)


class LearnedCodes(LearnedWeight):
    """How far each weight moves from where it was, in steps of its grid, before it is rounded to nearest
    (AdaQuant, Hubara et al., arXiv 2006.10518, eq. 2).

    Rounding passes gradients on as if it were not there, inside the grid. Weights can so answer to errors
    that no choice between two neighbours makes good, such as those of coarse activations.
    """

    def __init__(self, weight: Tensor, start: QuantizedTensor) -> None:
        super().__init__(weight, start)
        codes = start.codes.float()
        below = 0.5 - 1e-4  # ties fall as in rounding to nearest
        nearest = codes + (self._position - codes).clamp(-below, below)
        inside = (self._position >= 0) & (self._position <= start.spec.levels)
        self._position = torch.where(inside, nearest, self._position)
        self.variable = torch.zeros_like(self._position, requires_grad=True)

    def codes(self) -> Tensor:
        """Whole numbers, with the gradients of what was rounded."""
        position = (self._position + self.variable).clamp(0, self.start.spec.levels)
        return position + (position.round() - position).detach()

    def decided_codes(self) -> Tensor:
        """The same."""
        return (self._position + self.variable).clamp(0, self.start.spec.levels).round()


class LearnedStep:
    """A static activation quantizer whose step size is learned (LSQ, Esser et al., arXiv 1902.08153).

    The variable is the logarithm of the step relative to where it starts, so that one learning rate
    serves activations of any magnitude; the zero point stays.
    """

    def __init__(self, quantizer: FakeQuant) -> None:
        assert quantizer.scale is not None
        self.quantizer = quantizer
        self._start = quantizer.scale.clone()
        self.variable = torch.zeros(1, requires_grad=True)

    def __call__(self, x: Tensor, keep: Tensor | None = None) -> Tensor:
        """x on the grid; where the mask `keep` is False, x as it is."""
        scale, zero_point = self.quantizer.parameters_for(x)
        offset = self.quantizer.spec.middle if zero_point is None else zero_point
        rounded: Tensor = _QuantizeStep.apply(  # type: ignore[no-untyped-call]
            x, self.variable, scale, offset, self.quantizer.spec.levels, keep
        )
        return rounded

    @torch.no_grad()
    def decide(self) -> None:
        """Let the step be at most the one that it started with.

        A range never grows beyond what was observed: engines drop an activation function before a
        quantizer only if the quantizer's range lies inside the function's.
        """
        self.variable.clamp_(max=0.0)

    @torch.no_grad()
    def finish(self) -> None:
        """Give the quantizer the learned step, decided."""
        self.decide()
        self.quantizer.scale = self._start * self.variable.exp()


class LearnedBias:
    """The bias of a layer, as it was plus a variable [channels] times a unit.

    The unit is how far the layer's outputs spread, so that one learning rate serves layers of any
    magnitude.
    """

    def __init__(self, bias: Tensor, unit: float) -> None:
        self._bias, self._unit = bias, unit
        self.variable = torch.zeros_like(bias, requires_grad=True)

    @property
    def value(self) -> Tensor:
        """The bias as it now is."""
        return self._bias.detach() + self._unit * self.variable

    def decide(self) -> None:
        """Nothing is to be decided."""

    @torch.no_grad()
    def finish(self) -> None:
        """Give the layer the learned bias."""
        self._bias.copy_(self.value)


class _QuantizeStep(torch.autograd.Function):
    """Quantize-dequantize with gradients for x and for the logarithm v of the step (LSQ, eq. 3 and 5).

    With s = s₀ · exp(v) and y = s · (q − z), dy/dv is y − x where x is inside the grid and y where it is
    clipped.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, variable: Tensor, start: Tensor, zero_point: Any, levels: int, keep: Any
    ) -> Tensor:
        scale = start * variable.exp()
        codes = (x / scale).add_(zero_point).round_()
        inside = codes.ge(0).logical_and_(codes.le(levels))
        values = codes.clamp_(0, levels).sub_(zero_point).mul_(scale)
        if keep is not None:
            values = values.sub_(x).mul_(keep).add_(x)
            inside.logical_or_(~keep)
        ctx.save_for_backward(x, values, inside)
        return values

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        (gradient,) = gradients
        x, values, inside = ctx.saved_tensors
        passed = gradient * inside
        step = None
        if ctx.needs_input_grad[1]:
            step = (_dot(gradient, values) - _dot(passed, x)).view(1)
        return passed, step, None, None, None, None


def _dot(one: Tensor, other: Tensor) -> Tensor:
    """Σ one · other, without a copy of images that lie in memory channels last."""
    if one.ndim == 4 and one.is_contiguous(memory_format=torch.channels_last):
        one, other = one.permute(0, 2, 3, 1), other.permute(0, 2, 3, 1)
    return torch.dot(one.reshape(-1), other.reshape(-1))


_part: ContextVar[tuple[int, int, int]] = ContextVar("part", default=(0, 1, 1))


@contextmanager
def part_of_batch(first: int, last: int, size: int) -> Iterator[None]:
    """Compute the samples from `first` to before `last` of a batch of so many: random masks are then those
    that they would have among all of it."""
    token = _part.set((first, last, size))
    try:
        yield
    finally:
        _part.reset(token)


def random_mask(x: Tensor, probability: float, generator: torch.Generator) -> Tensor:
    """A boolean tensor like x, each element True with a probability given to 1/256.

    One 64-bit random number serves eight elements: ten times as fast as a uniform number each.
    """
    first, last, size = _part.get()
    alone, left = divmod(x.numel(), last - first)
    start, count = (0, x.numel()) if left else (first * alone, size * alone)  # or it has no samples
    words = torch.empty(-(-count // 8), dtype=torch.int64)
    words.random_(-(2**63), None, generator=generator)
    numbers, below = words.view(torch.uint8)[start : start + x.numel()], round(probability * 256)
    chosen = numbers < below if below < 256 else torch.ones_like(numbers, dtype=torch.bool)
    return chosen.as_strided(x.shape, torch.empty_like(x, device="meta").stride())
