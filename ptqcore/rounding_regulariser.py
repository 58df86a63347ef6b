"""What drives roundings that are learned up or down."""

import torch
from torch import Tensor

from ptqcore.problem import Problem, Schedule
from ptqcore.quantizers import LearnedRounding


class Regulariser:
    """λ · Σ (1 − |2h − 1|^β), which drives every h(V) to 0 or 1 (AdaRound, eq. 24)."""

    def __init__(self, problem: Problem, schedule: Schedule) -> None:
        self._roundings = [one for one in problem.weights if isinstance(one, LearnedRounding)]
        self._schedule = schedule
        self._all = len(self._roundings) == len(problem.weights)
        self.unit: float | None = None  # λ for a weight of 1

    def begins(self, iteration: int) -> bool:
        """Whether this is the first iteration after the warm-up."""
        waiting = self.unit is None and bool(self._roundings)
        return waiting and self._schedule.progress(iteration) >= 0

    @torch.no_grad()
    def calibrate(self, loss: float, decided: float) -> None:
        """Fix the unit from the losses of one batch, with roundings as they are and once decided.

        The loss itself is no measure: while roundings are open it can be 0, and in deep networks most
        of it can be the error of the prefix, which no rounding undoes.
        """
        beta = self._schedule.beta[0]
        total = sum(float(self._openness(rounding, beta)) for rounding in self._roundings)
        self.unit = max(decided - loss, 0.01 * loss) / max(total, 1e-12)

    def add_gradients(self, iteration: int) -> None:
        """Add the gradients of this iteration."""
        if self.unit is None:
            return
        progress = self._schedule.progress(iteration)
        start, end = self._schedule.beta
        beta = start + (end - start) * progress
        total = torch.stack([self._openness(rounding, beta) for rounding in self._roundings]).sum()
        first, last = self._schedule.regularisation
        weight = first * (last / first) ** progress
        (total * (weight * self.unit)).backward()

    @staticmethod
    def _openness(rounding: LearnedRounding, beta: float) -> Tensor:
        return (1 - (2 * rounding.share_up() - 1).abs().pow(beta)).sum()

    @torch.no_grad()
    def decided(self, iteration: int) -> bool:
        """Whether all weights have roundings, of which 99.5 % have left (0.05, 0.95)."""
        if self._schedule.progress(iteration) < 0 or not self._all:
            return False
        open_ = sum(int(((s := r.share_up()) > 0.05).logical_and_(s < 0.95).sum()) for r in self._roundings)
        return open_ <= 0.005 * sum(r.variable.numel() for r in self._roundings)
