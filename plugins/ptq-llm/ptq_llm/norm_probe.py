"""What a normalization does with its parameters, found by calling it."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.func import functional_call

from ptq_llm.rotation import random_rotation, rotation_that_keeps_ones
from ptqcore import relative_difference

_ROWS = 8
_SIZE_OF_INPUTS = 100.0  # beside which the constant in the denominator is nothing
_SAME = 1e-4


@dataclass(frozen=True)
class Norm:
    """x → n(x)·g + b, where n does not depend on the size of x, and commutes with rotations.

    gain, bias: names of its parameters, None where it has none. identity: what the gain's parameter is
    when g is 1. subtracts_mean: whether only rotations that keep the vector of ones commute with n.
    """

    gain: str | None
    bias: str | None
    identity: float
    subtracts_mean: bool

    def gains(self, module: nn.Module) -> Tensor | None:
        """g [channels] of the module, in double precision."""
        return None if self.gain is None else module.get_parameter(self.gain).double() + 1 - self.identity

    def offsets(self, module: nn.Module) -> Tensor | None:
        """b [channels], in double precision; None where there is none, or all are 0."""
        bias = None if self.bias is None else module.get_parameter(self.bias).double()
        return bias if bias is not None and bool(bias.any()) else None


def find_norm(module: nn.Module, size: int) -> Norm | None:
    """What a module of one tensor [..., size] does, if it is a norm of the channels; else None."""
    parameters = {name: p for name, p in module._parameters.items() if p is not None}
    if size < 2 or len(parameters) > 2 or any(p.shape != (size,) for p in parameters.values()):
        return None
    try:
        with torch.no_grad():
            return _Probe(module, list(parameters), size).norm()
    except (TypeError, ValueError, RuntimeError):  # it takes other inputs
        return None


class _Probe:
    def __init__(self, module: nn.Module, names: list[str], size: int) -> None:
        self.module, self.names, self.size = module, names, size
        self.generator = torch.Generator().manual_seed(0)
        self.x = self._random(_ROWS, size) * _SIZE_OF_INPUTS

    def norm(self) -> Norm | None:
        silent = self._call(self.x)
        vector = self._random(self.size)
        biases = [name for name in self.names if _same(self._call(self.x, name, vector) - silent, vector)]
        gains = [name for name in self.names if name not in biases]
        if len(biases) > 1 or len(gains) > 1:
            return None
        self.gain = gains[0] if gains else None
        identity = 0.0 if self.gain is None or bool(silent.any()) else 1.0
        self.unit = torch.full((self.size,), identity)
        plain = self._plain(self.x)
        if not (self._has_gain(plain, vector) and _same(self._plain(4 * self.x), plain)):
            return None
        for subtracts_mean, make in ((False, random_rotation), (True, rotation_that_keeps_ones)):
            rotate = make(self.size, self.generator)
            if _same(self._plain(rotate(self.x)), rotate(plain)):
                return Norm(self.gain, biases[0] if biases else None, identity, subtracts_mean)
        return None

    def _has_gain(self, plain: Tensor, vector: Tensor) -> bool:
        """Whether the gain's parameter, if there is one, multiplies the channels."""
        if self.gain is None:
            return bool(plain.any())
        return _same(self._call(self.x, self.gain, vector - 1 + self.unit), plain * vector)

    def _plain(self, x: Tensor) -> Tensor:
        """n(x)."""
        return self._call(x, self.gain, self.unit)

    def _call(self, x: Tensor, name: str | None = None, value: Tensor | None = None) -> Tensor:
        """The output for x [rows, size] with one parameter set, and the others 0."""
        device = next((p.device for p in self.module.parameters()), x.device)
        given = {one: torch.zeros(self.size, device=device) for one in self.names}
        if name is not None and value is not None:
            given[name] = value.to(device)
        output: Tensor = functional_call(self.module, given, (x.to(device)[None],))
        return output[0].to(x)

    def _random(self, *shape: int) -> Tensor:
        return torch.randn(*shape, generator=self.generator)


def _same(found: Tensor, expected: Tensor) -> bool:
    """Whether all rows are what is expected."""
    return (
        bool(found.isfinite().all()) and relative_difference([expected.expand_as(found)], [found]) < _SAME
    )
