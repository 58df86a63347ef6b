"""How far the updates are: settled, at their best, and on disk, so that a killed run can go on."""

import math

import torch
from torch import Tensor

from ptqcore import distributed
from ptqcore.problem import Problem, Schedule
from ptqcore.rounding_regulariser import Regulariser


class Settled:
    """Whether the smoothed loss has not fallen by 0.1 % over the last tenth of the budget."""

    def __init__(self, schedule: Schedule) -> None:
        self._window = max(schedule.iterations // 10, 10)
        self.smooth: list[float] = []

    def after(self, loss: float) -> bool:
        smooth = self.smooth[-1] + 0.1 * (loss - self.smooth[-1]) if self.smooth else loss
        self.smooth.append(smooth)
        if len(self.smooth) <= self._window:
            return False
        return smooth > 0.999 * self.smooth[-1 - self._window]


class Best:
    """The best state that was judged, of all variables."""

    def __init__(self, problem: Problem) -> None:
        self._problem = problem
        self.score = math.inf
        self.judged = -1  # after so many updates
        self.state: list[Tensor] = []

    def judge(self, updates: int) -> None:
        """Judge the state as it now is, if the objective wants that."""
        if self._problem.objective.judges(updates):
            self._judge()
            self.judged = updates

    def restore(self) -> None:
        """Go back to the best state, if any was judged."""
        if self.judged < 0:
            return
        if self.judged < len(self._problem.history):
            self._judge()
        with torch.no_grad():
            for variable, kept in zip(self.variables(), self.state, strict=True):
                variable.copy_(kept)

    @torch.no_grad()
    def _judge(self) -> None:
        for learned in self._problem.learned:
            learned.decide()
        score = self._problem.objective.judge()
        if score <= self.score or not self.state:
            self.score = score
            self.state = [variable.clone() for variable in self.variables()]

    def variables(self) -> list[Tensor]:
        return [learned.variable for learned in self._problem.learned]


class State:
    """Everything that updates change."""

    def __init__(
        self,
        problem: Problem,
        optimizer: torch.optim.Optimizer,
        generator: torch.Generator,
        regulariser: Regulariser,
        settled: Settled,
        best: Best,
    ) -> None:
        self._problem, self._optimizer, self._generator = problem, optimizer, generator
        self._regulariser, self._settled, self._best = regulariser, settled, best
        self._variables = best.variables()

    def keep(self) -> None:
        """Write it, if that is due."""
        midway = self._problem.midway
        if midway is None or not midway.due():
            return
        tensors = {f"variable {place}": each.detach() for place, each in enumerate(self._variables)}
        for place, variable in enumerate(self._variables):
            moments = self._optimizer.state.get(variable, {})
            tensors |= {f"adam {place} {key}": value for key, value in moments.items()}
        tensors |= {f"best {place}": kept for place, kept in enumerate(self._best.state)}
        tensors |= {"generator": self._generator.get_state(), "torch": torch.get_rng_state()}
        values = {
            "losses": self._problem.history,
            "smooth": self._settled.smooth,
            "unit": self._regulariser.unit,
            "score": self._best.score,
            "judged": self._best.judged,
            "objective": self._problem.objective.state(),
        }
        midway.write(tensors, values)

    @torch.no_grad()
    def go_on(self) -> int:
        """Take up what another process has written, if any; how many updates that had made."""
        found = None if self._problem.midway is None else self._problem.midway.read()
        if not all(distributed.everywhere(found is not None)) or found is None:
            return 0
        tensors, values = found
        for place, variable in enumerate(self._variables):
            variable.copy_(tensors[f"variable {place}"])
            start = f"adam {place} "
            moments = {name[len(start) :]: each for name, each in tensors.items() if name.startswith(start)}
            if moments:
                self._optimizer.state[variable] = moments
        best = [tensors.get(f"best {place}") for place in range(len(self._variables))]
        self._best.state = [kept for kept in best if kept is not None]
        self._best.score, self._best.judged = values["score"], values["judged"]
        self._settled.smooth, self._regulariser.unit = values["smooth"], values["unit"]
        self._problem.history[:] = values["losses"]
        self._problem.objective.go_on(values["objective"])
        self._generator.set_state(tensors["generator"])
        torch.set_rng_state(tensors["torch"])
        return len(self._problem.history)
