"""The contract of an observer: see tensors, then say which range a grid should cover."""

from abc import ABC, abstractmethod
from typing import Any, ClassVar, Self

from pydantic import BaseModel, ConfigDict
from torch import Tensor

from ptqcore.spec import QuantSpec


class ObserverOptions(BaseModel):
    """Options of an observer; subclasses add fields, unknown keys are refused."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class Observer(ABC):
    """Finds the range [low, high] that the grid of `spec` should cover.

    Ranges have the layout that `ptqcore.grid` describes and contain 0. Subclasses set `name` (used
    in recipes) and may replace `Options`.
    """

    name: ClassVar[str]
    Options: ClassVar[type[ObserverOptions]] = ObserverOptions

    def __init__(self, spec: QuantSpec, **options: Any) -> None:
        self.spec = spec
        self.options = self.Options(**options)

    @abstractmethod
    def update(self, x: Tensor) -> None:
        """Take in one tensor: a weight matrix [rows, columns], or activations [..., channels]."""

    def condensed(self, x: Tensor) -> Tensor:
        """A tensor, the smaller the better, that `update` takes in with the same result as x.

        Processes that share calibration samples send it to each other; each takes in those of all samples,
        in their order, so that an observer needs to know nothing of processes. By default x itself.
        """
        return x

    def update_weighted(self, x: Tensor, weight: Tensor) -> None:
        """Take in activations of which some count more than others, for a grid with one range.

        By default those of weight 0 are left out, and all others count the same.

        Args:
            x: activations [..., channels].
            weight: of each, 0 or more; broadcasts to x.
        """
        self.update(x[(weight > 0).expand_as(x)])

    @abstractmethod
    def range(self) -> tuple[Tensor, Tensor]:
        """The range (low, high) for all tensors seen so far.

        Raises:
            ValueError: if no tensor was seen.
        """

    @abstractmethod
    def merge(self, other: Self) -> None:
        """Take in what another observer of the same kind has seen (data-parallel calibration)."""
