"""Quantizers: modules that round activations to their grid inside a forward pass."""

import torch
from torch import Tensor, nn

from ptqcore import grid
from ptqcore.spec import QuantSpec


class FakeQuant(nn.Module):
    """Rounds an activation to the grid of its spec and back.

    A dynamic spec takes the range of the tensor (or of each token or group) it is given; a static
    one uses the range set by `set_range`, kept as the buffers `scale` [1] and `zero_point` [1].
    """

    scale: Tensor | None
    zero_point: Tensor | None

    def __init__(self, spec: QuantSpec) -> None:
        super().__init__()
        self.spec = spec
        static_asymmetric = not spec.dynamic and not spec.symmetric
        self.register_buffer("scale", None if spec.dynamic else torch.full((1,), torch.nan))
        self.register_buffer("zero_point", torch.zeros(1) if static_asymmetric else None)

    def set_range(self, low: Tensor, high: Tensor) -> None:
        """Fix the grid of a static quantizer to cover [low, high], each of one element."""
        self.scale, self.zero_point = grid.scale_and_zero_point(low.reshape(1), high.reshape(1), self.spec)

    def forward(self, x: Tensor) -> Tensor:
        """x [..., channels] rounded to the grid; NaN where a static quantizer was given no range."""
        if not x.numel():
            return x
        values = x.float()
        if self.spec.dynamic:
            scale, zero_point = grid.scale_and_zero_point(*grid.value_range(values, self.spec), self.spec)
        else:
            assert self.scale is not None
            scale, zero_point = self.scale, self.zero_point
        return grid.fake_quantize(values, scale, zero_point, self.spec).to(x.dtype)

    def extra_repr(self) -> str:
        return str(self.spec)
