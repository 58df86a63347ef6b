"""The optimiser: weights, activation steps and biases that bring a block's output back to its target.

One loop serves three methods. AdaRound (arXiv 2004.10568) reconstructs single layers with activations
in full precision; BRECQ (arXiv 2102.05426) does so for whole blocks; QDrop (arXiv 2203.05740) rounds
each activation with a probability, and learns the activation steps at the same time.

Several processes compute a part of every batch each, and add up the gradients: all have the same variables
after every update, and as many updates of as many samples are made as by one.
"""

import math
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any
from zlib import crc32

import torch

from ptqcore import distributed
from ptqcore.fingerprint import digest_of
from ptqcore.learning_state import Best, Settled, State
from ptqcore.problem import Problem, Schedule
from ptqcore.quantizers import LearnedCodes, LearnedRounding, part_of_batch
from ptqcore.rounding_regulariser import Regulariser


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
    regulariser = Regulariser(problem, schedule)
    settled = Settled(schedule)
    best = Best(problem)
    state = State(problem, optimizer, generator, regulariser, settled, best)
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
