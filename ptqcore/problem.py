"""What is reconstructed: the outputs and their targets, what is learned, and for how long."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ptqcore.midway import Midway
from ptqcore.quantizers import LearnedBias, LearnedStep, LearnedWeight


class Objective:
    """What is minimised. Subclasses weigh outputs, change weights on the way, or judge what was learned."""

    def loss(self, predicted: list[Tensor], target: list[Tensor], samples: Sequence[int]) -> Tensor:
        """A number, by default Σ over output tensors of the mean of (predicted − target)².

        Args:
            predicted: the block's output tensors [samples, …] with the variables as they now are.
            target: what they should be.
            samples: their numbers.
        """
        errors = [torch.mean((p - t).square()) for p, t in zip(predicted, target, strict=True)]
        return torch.stack(errors).sum()

    def before(self, updates: int) -> None:
        """Called before every update, with the number of those that were made."""

    def state(self) -> dict[str, Any]:
        """What was found on the way and later updates depend on: whatever JSON can hold."""
        return {}

    def go_on(self, state: dict[str, Any]) -> None:
        """Take up a state, of another process that was killed."""

    def judges(self, updates: int) -> bool:
        """Whether the state after so many updates is to be judged. If any is, so is the last, and the best
        one is kept, the later of equals."""
        return False

    def judge(self) -> float:
        """How bad the block is, computed with every rounding decided, which it now is."""
        raise NotImplementedError


@dataclass(frozen=True)
class Schedule:
    """How long and how fast.

    iterations: updates; batch: samples in each. warmup: share of the iterations without the rounding
    regulariser; beta: its exponent at the end of the warm-up and at the end. The regulariser weighs
    `regularisation` (first, last) times what deciding every rounding would add to the loss, as it
    stands at the end of the warm-up, so that one recipe serves losses of any magnitude.
    """

    iterations: int
    batch: int
    weight_rate: float
    step_rate: float
    warmup: float = 0.2
    beta: tuple[float, float] = (20.0, 2.0)
    regularisation: tuple[float, float] = (1.0, 100.0)

    def progress(self, iteration: int) -> float:
        """Share of the way from the end of the warm-up to the end; negative during the warm-up."""
        first = self.warmup * self.iterations
        return (iteration - first) / max(self.iterations - first, 1)


@dataclass
class Problem:
    """What is reconstructed.

    samples: the numbers of those to learn from. predict: sample numbers → the block's output tensors
    with the variables as they now are. target: sample numbers → what they should be. weights, steps:
    what is learned. midway: where the state is written now and then, for a run that is killed.
    """

    name: str
    samples: Sequence[int]
    predict: Callable[[Sequence[int]], list[Tensor]]
    target: Callable[[Sequence[int]], list[Tensor]]
    weights: list[LearnedWeight]
    steps: list[LearnedStep | LearnedBias]
    objective: Objective = field(default_factory=Objective)
    at_once: int = 1
    midway: Midway | None = None
    history: list[float] = field(default_factory=list)

    @property
    def learned(self) -> list[LearnedWeight | LearnedStep | LearnedBias]:
        """All that is learned."""
        return [*self.weights, *self.steps]
