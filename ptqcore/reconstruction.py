"""The optimiser: weights, activation steps and biases that bring a block's output back to its target.

One loop serves three methods. AdaRound (arXiv 2004.10568) reconstructs single layers with activations
in full precision; BRECQ (arXiv 2102.05426) does so for whole blocks; QDrop (arXiv 2203.05740) rounds
each activation with a probability, and learns the activation steps at the same time.

Several processes compute a part of every batch each, and add up the gradients: all have the same variables
after every update, and as many updates of as many samples are made as by one.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any
from zlib import crc32

import torch
from torch import Tensor

from ptqcore import distributed
from ptqcore.fingerprint import digest_of
from ptqcore.midway import Midway
from ptqcore.quantizers import (
    LearnedBias,
    LearnedCodes,
    LearnedRounding,
    LearnedStep,
    LearnedWeight,
    part_of_batch,
)


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


def reconstruct(problem: Problem, schedule: Schedule, generator: torch.Generator) -> None:
    """Minimise a problem's loss over its variables; `history` gets the loss of each update.

    Each update takes a random batch and computes it `at_once` samples at a time, which keeps tensors
    in the processor's cache and gives the same gradient. Stops early when every rounding is decided
    and the loss has settled.

    Raises:
        FloatingPointError: if the loss is not finite.
        DistributedError: if processes have come to different variables.
    """
    optimizer = _optimizer(problem, schedule)
    if optimizer is None:
        return
    regulariser = _Regulariser(problem, schedule)
    settled = _Settled(schedule)
    best = _Best(problem)
    state = _State(problem, optimizer, generator, regulariser, settled, best)
    begun = state.go_on()
    if not begun:
        best.judge(0)
    for iteration in range(begun, schedule.iterations):
        problem.objective.before(iteration)
        optimizer.zero_grad()
        for weight in problem.weights:
            weight.begin()
        drawn = generator.get_state()
        loss = _accumulate(problem, schedule.batch, generator)
        for weight in problem.weights:
            weight.end()
        _add_gradients(problem)
        if regulariser.begins(iteration):
            generator.set_state(drawn)
            regulariser.calibrate(loss, _decided_loss(problem, schedule.batch, generator))
        regulariser.add_gradients(iteration)
        for group in optimizer.param_groups:
            group["lr"] = group["first"] * (
                _cosine(iteration / schedule.iterations) if group["cosine"] else 1
            )
        optimizer.step()
        problem.history.append(loss)
        best.judge(iteration + 1)
        if settled.after(loss) and regulariser.decided(iteration):
            break
        if iteration + 1 < schedule.iterations:
            state.keep()
    best.restore()
    what = f"variables, learned for {problem.name!r}"
    distributed.check_same(what, lambda: digest_of(best.variables()))


def _optimizer(problem: Problem, schedule: Schedule) -> torch.optim.Optimizer | None:
    """Adam; the rate of all but roundings falls to 0 as half a cosine, theirs stays."""
    groups: list[dict[str, Any]] = []
    for kind in (LearnedRounding, LearnedCodes):
        variables = [weight.variable for weight in problem.weights if isinstance(weight, kind)]
        if variables:
            cosine = kind is LearnedCodes
            groups.append({"params": variables, "first": schedule.weight_rate, "cosine": cosine})
    if problem.steps:
        variables = [step.variable for step in problem.steps]
        groups.append({"params": variables, "first": schedule.step_rate, "cosine": True})
    return torch.optim.Adam(groups) if groups and schedule.iterations else None


def _cosine(share: float) -> float:
    return 0.5 * (1 + math.cos(math.pi * share))


def _accumulate(problem: Problem, batch: int, generator: torch.Generator) -> float:
    """Gradients of the loss of one random batch, as far as this process computes them; the loss."""
    order = torch.randperm(len(problem.samples), generator=generator)[:batch].tolist()
    apart = problem.at_once < distributed.size()  # what is computed at once cannot be shared out
    total = 0.0
    with _own_numbers(generator) if apart else nullcontext():
        for turn, start in enumerate(range(0, len(order), problem.at_once)):
            places = order[start : start + problem.at_once]
            first, last = _part(len(places), turn if apart else 0)
            chosen = [problem.samples[place] for place in places[first:last]]
            if not chosen:
                continue
            with part_of_batch(first, last, len(places)):
                loss = problem.objective.loss(problem.predict(chosen), problem.target(chosen), chosen)
            loss = loss * (len(chosen) / len(order))
            if torch.is_grad_enabled():
                loss.backward()  # type: ignore[no-untyped-call]
            total += float(loss.detach())
    if distributed.size() > 1:
        found = distributed.everywhere((total, generator.get_state()))
        total = sum(loss for loss, _ in found)
        generator.set_state(found[0][1])
    if not math.isfinite(total):
        raise FloatingPointError(f"the reconstruction loss of block {problem.name!r} is {total}")
    return total


def _part(samples: int, turn: int) -> tuple[int, int]:
    """The first sample that this process computes of so many, and the first behind them."""
    size = distributed.size()
    place = (distributed.rank() + turn) % size
    return -(-samples * place // size), -(-samples * (place + 1) // size)


@contextmanager
def _own_numbers(generator: torch.Generator) -> Iterator[None]:
    """Draw other numbers in every process; afterwards the generator is the same in all of them again."""
    if distributed.size() == 1:
        yield
        return
    state = generator.get_state()
    generator.manual_seed(crc32(state.numpy().tobytes()) + distributed.rank())
    yield
    generator.set_state(state)


def _add_gradients(problem: Problem) -> None:
    """Add up the gradients of all processes."""
    if distributed.size() == 1:
        return
    gradients = []
    for variable in (learned.variable for learned in problem.learned):
        if variable.grad is None:
            variable.grad = torch.zeros_like(variable)
        gradients.append(variable.grad)
    distributed.add_up(gradients)


@torch.no_grad()
def _decided_loss(problem: Problem, batch: int, generator: torch.Generator) -> float:
    """The loss of one random batch with every rounding as it would be decided now."""
    for weight in problem.weights:
        weight.decide()
    return _accumulate(problem, batch, generator)


class _Best:
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


class _State:
    """Everything that updates change."""

    def __init__(
        self,
        problem: Problem,
        optimizer: torch.optim.Optimizer,
        generator: torch.Generator,
        regulariser: "_Regulariser",
        settled: "_Settled",
        best: _Best,
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


class _Regulariser:
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


class _Settled:
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
