"""Calibration data: what a denoiser is called with while its own pipeline samples.

Each seed is carried through all steps once, T calls for T steps; the generator of TFMQ-DM (Huang et al.,
CVPR 2024, released code) starts anew for every step, which takes T (T - 1) / 2.
"""

from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ptq_diffusion.calls import DenoiserCall
from ptq_diffusion.drawing import SamplingOptions, draw
from ptq_diffusion.pipelines import Loaded
from ptq_diffusion.rows import CallLayout
from ptq_diffusion.sampling import Progress, before_calls, calls_by_step, split
from ptqcore import DataError, ModelError

TOGETHER = 16
"""Most images in one recorded call."""


@dataclass(frozen=True)
class Recorded:
    """Calls of a denoiser, largest timesteps first, and how many calls it took to record them.

    The rows of a call are of one timestep, and the timestep is a tensor [rows].
    """

    calls: list[DenoiserCall]
    denoiser_calls: int


def collect(
    loaded: Loaded, options: SamplingOptions, seeds: Sequence[int], keep: int, seed: int = 0
) -> Recorded:
    """Sample once, and keep what the denoiser is called with for equally many images at every timestep.

    Which images are kept at which timestep is random (`assign`), so that rows are independent: an image
    is used at few timesteps, where there are enough seeds (`keep` times the timesteps) at one alone. Where
    a schedule visits a timestep again (Heun, PNDM), the images are shared among the visits. An image comes
    with both halves of guidance, in one call or in two as the pipeline makes them.

    Images of a timestep are put together in calls of at most `TOGETHER`, all of the same number, the
    largest divisor of `keep`: a block-by-block walk runs one call at a time, and one row at a time would
    cost more in calls than in arithmetic, while rows of several timesteps would mix the ranges that are to
    be kept apart. Only prompts of other lengths are not put together. Memory holds what is kept, and one
    call.

    Args:
        loaded: the model.
        options: how it is sampled from.
        seeds: one for each image.
        keep: images at every timestep; a multiple of `TOGETHER`, or less than it, is best.
        seed: of the choice.

    Raises:
        DataError: if there are fewer seeds than `keep`, or the model cannot be sampled with these options.
        ModelError: if calls cannot be split into images.
    """
    if not 1 <= keep <= len(seeds):
        raise DataError(
            f"{keep} images are to be kept at every timestep, and {len(seeds)} are sampled: keep one or "
            "more, and sample at least as many"
        )
    recorder = _Recorder(loaded, options, seeds, keep, seed)
    batches = split(range(len(seeds)), options.batch)
    with Progress(loaded, len(batches), "recording the denoiser's inputs") as progress:
        for batch in batches:

            def after(_: Tensor) -> None:
                recorder.next_step()
                progress.step()

            recorder.start(batch)
            with before_calls(loaded, recorder.record):
                draw(loaded, options, [seeds[image] for image in batch], after)
            recorder.finish()
    return Recorded(recorder.calls(), recorder.denoiser_calls)


def timesteps(calls: Iterable[DenoiserCall]) -> Tensor:
    """The distinct timesteps of calls as the denoiser is given them, rising, in float32 [timesteps]."""
    return torch.unique(torch.cat([call.times.flatten().float() for call in calls]))


def assign(schedule: Sequence[float], images: int, keep: int, seed: int) -> list[list[int]]:
    """Which of so many images are kept at every step of a schedule.

    Every distinct timestep gets `keep` different images, shared evenly among the steps that visit it, and
    all images are kept at equally many timesteps, or one more.

    Args:
        schedule: the timestep of each step.
        images: how many there are, at least `keep`.
        keep: how many at every distinct timestep.
        seed: of the choice.
    """
    generator = torch.Generator().manual_seed(seed)
    visits: dict[float, list[int]] = defaultdict(list)
    for step, timestep in enumerate(schedule):
        visits[timestep].append(step)
    dealt = torch.randperm(images, generator=generator).tolist()
    order = torch.randperm(len(visits), generator=generator).tolist()
    chosen: list[list[int]] = [[] for _ in schedule]
    for turn, steps in zip(order, visits.values(), strict=True):
        for number in range(keep):
            chosen[steps[number % len(steps)]].append(dealt[(turn * keep + number) % images])
    return chosen


class _Recorder:
    """Keeps the chosen images' parts of calls while batches are sampled."""

    def __init__(
        self, loaded: Loaded, options: SamplingOptions, seeds: Sequence[int], keep: int, seed: int
    ) -> None:
        one, two = (calls_by_step(loaded, options, [seeds[0]] * images, True)[0] for images in (1, 2))
        self._layouts = [CallLayout.of(*pair) for pair in zip(one, two, strict=True)]
        self.denoiser_calls = len(one) + len(two)
        self._scheduler = loaded.scheduler
        self._assign = partial(assign, images=len(seeds), keep=keep, seed=seed)
        self._together = max(size for size in range(1, min(keep, TOGETHER) + 1) if keep % size == 0)
        self._chosen: list[list[int]] = []
        self._parts: dict[Any, list[DenoiserCall]] = defaultdict(list)

    def start(self, batch: Sequence[int]) -> None:
        """A batch of images begins."""
        self._batch, self._step, self._in_step = batch, 0, 0

    def record(self, call: DenoiserCall) -> None:
        """The denoiser is called for the batch."""
        self.denoiser_calls += 1
        self._chosen = self._chosen or self._assign(self._scheduler.timesteps.tolist())
        if self._in_step >= len(self._layouts):
            raise ModelError("the pipeline calls its denoiser more often in some steps than in the first")
        wanted = [image - self._batch[0] for image in self._chosen[self._step] if image in self._batch]
        layout = self._layouts[self._in_step]
        for values in layout.take(call, wanted, len(self._batch)):
            key = (float(call.times.max()), self._in_step, layout.shapes(values))
            self._parts[key].append(replace(call, values=values))
        self._in_step += 1

    def next_step(self) -> None:
        """The scheduler made a step."""
        self._step, self._in_step = self._step + 1, 0

    def finish(self) -> None:
        """A batch is done.

        Raises:
            ModelError: if it was not carried through the whole schedule.
        """
        if self._step != len(self._scheduler.timesteps):
            raise ModelError(
                f"the pipeline made {self._step} steps, but the schedule of "
                f"{type(self._scheduler).__name__} has {len(self._scheduler.timesteps)}"
            )

    def calls(self) -> list[DenoiserCall]:
        """The images put together in calls, largest timesteps first."""
        return [
            _together(group, self._layouts[key[1]])
            for key in sorted(self._parts, key=lambda key: (-key[0], key[1]))
            for group in split(self._parts[key], self._together)
        ]


def _together(parts: Sequence[DenoiserCall], layout: CallLayout) -> DenoiserCall:
    """One call for several images, with a timestep for every row."""
    call = replace(parts[0], values=layout.join([dict(part.values) for part in parts]))
    times = call.times
    if times.numel() == 1:
        times = times.reshape(1).expand(call.rows).clone()
    return replace(call, values={**call.values, call.timestep: times})
