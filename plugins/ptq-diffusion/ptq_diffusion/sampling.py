"""Images from a diffusion model, one for each seed, and how they came about."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor

from ptq_diffusion.calls import DenoiserCall
from ptq_diffusion.drawing import SamplingOptions, draw
from ptq_diffusion.pipelines import Loaded
from ptqcore import ModelError, track

T = TypeVar("T")


@dataclass(frozen=True)
class Samples:
    """Images [n, channels, height, width] in [0, 1]; the frames of a video stand below each other.

    states: x [steps, n, …] after every step of the scheduler, of which there can be more than
    `SamplingOptions.steps`: Heun's second half of a step counts too.
    """

    images: Tensor
    states: Tensor


def sample(
    loaded: Loaded, options: SamplingOptions, seeds: Sequence[int], label: str = "sampling"
) -> Samples:
    """An image for each seed; the same seeds give the same bits.

    Every seed has a generator of its own, so that its noise does not depend on the others.

    Raises:
        DataError: if the model cannot be sampled with these options.
        ModelError: if it is sampled from in a way that is not known.
    """
    images: list[Tensor] = []
    states: list[Tensor] = []
    batches = split(seeds, options.batch)
    with Progress(loaded, len(batches), label) as progress:
        for batch in batches:
            now: list[Tensor] = []

            def after(x: Tensor, now: list[Tensor] = now, count: int = len(batch)) -> None:
                now.append(x[:count].detach().float().clone())
                progress.step()

            images.append(draw(loaded, options, batch, after))
            states.append(torch.stack(now))
    return Samples(torch.cat(images), torch.cat(states, dim=1))


def split(items: Sequence[T], size: int) -> list[Sequence[T]]:
    """Items in groups of a size; the last may be smaller."""
    return [items[start : start + size] for start in range(0, len(items), size)]


def calls_by_step(
    loaded: Loaded, options: SamplingOptions, seeds: Sequence[int], only_first: bool = False
) -> list[list[DenoiserCall]]:
    """The calls of the denoiser in every step of one batch in which there are any, or in the first such.

    Nothing is computed after the last step.

    Raises:
        ModelError: if there are none; for the rest as `sample`.
    """
    steps: list[list[DenoiserCall]] = [[]]

    def next_step(_: Tensor) -> None:
        if len(steps) == len(loaded.scheduler.timesteps) or (only_first and steps[-1]):
            raise _EnoughError
        steps.append([])

    with before_calls(loaded, lambda call: steps[-1].append(call)), suppress(_EnoughError):
        draw(loaded, options, seeds, next_step)
    found = [step for step in steps if step]
    if not found:
        raise ModelError(f"the pipeline does not call its component {loaded.component!r} when it samples")
    return found


class _EnoughError(Exception):
    """No further step is needed."""


@contextmanager
def before_calls(loaded: Loaded, act: Callable[[DenoiserCall], None]) -> Iterator[None]:
    """Do something with every call of the denoiser before it is computed."""

    def hook(denoiser: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        act(DenoiserCall.of(denoiser, *args, **kwargs))

    handle = loaded.denoiser.register_forward_pre_hook(hook, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()


class Progress:
    """Shows every step of every batch. How many there are is known once timesteps are set."""

    def __init__(self, loaded: Loaded, batches: int, label: str) -> None:
        self._scheduler, self._batches, self._label = loaded.scheduler, batches, label
        self._steps: Iterator[int] | None = None

    def step(self) -> None:
        """A step of a batch is done."""
        if self._steps is None:
            total = self._batches * len(self._scheduler.timesteps)
            self._steps = track(range(total), self._label)
            next(self._steps, None)
        next(self._steps, None)

    def __enter__(self) -> "Progress":
        return self

    def __exit__(self, error: object, *_: object) -> None:
        for _step in self._steps or () if error is None else ():
            pass
