"""A range for each timestep."""

from collections.abc import Callable
from typing import Self

import torch
from torch import Tensor

from ptqcore.observers.base import Observer
from ptqcore.spec import QuantSpec
from ptqcore.timesteps import current


class PerTimestep(Observer):
    """An observer for each timestep: tensors go to that of the timestep that is being computed.

    Ranges are [timesteps]. A timestep that no tensor was of gets that of the nearest row with one.
    """

    name = "per-timestep"

    def __init__(self, spec: QuantSpec, make: Callable[[QuantSpec], Observer]) -> None:
        """Args:
        spec: of granularity `timestep`.
        make: makes the observer of one timestep, for a spec with one range for the tensor.
        """
        super().__init__(spec)
        one = spec.model_copy(update={"granularity": "tensor", "timesteps": None})
        assert spec.timesteps is not None
        self._observers = [make(one) for _ in range(spec.timesteps)]
        self._seen: set[int] = set()

    def update(self, x: Tensor) -> None:
        """Take in a tensor whose rows are all of the current timestep."""
        row = int(current().lower)
        self._observers[row].update(x)
        self._seen.add(row)

    def condensed(self, x: Tensor) -> Tensor:
        """What is wanted of it by the observer of the current timestep."""
        return self._observers[int(current().lower)].condensed(x)

    def range(self) -> tuple[Tensor, Tensor]:
        if not self._seen:
            raise ValueError("the per-timestep observer has seen no tensor")
        nearest = [min(self._seen, key=lambda row: abs(row - at)) for at in range(len(self._observers))]
        lows, highs = zip(*(self._observers[row].range() for row in nearest), strict=True)
        return tuple(torch.cat([end.reshape(1) for end in ends]) for ends in (lows, highs))  # type: ignore[return-value]

    def merge(self, other: Self) -> None:
        for row in other._seen:
            if row in self._seen:
                self._observers[row].merge(other._observers[row])
            else:
                self._observers[row] = other._observers[row]
        self._seen |= other._seen
