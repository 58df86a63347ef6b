"""The timesteps that a denoiser will be given, known before anything is sampled."""

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from functools import wraps
from typing import Any

import torch
from torch import Tensor

from ptq_diffusion.calls import DenoiserCall
from ptq_diffusion.drawing import SamplingOptions, is_plain
from ptq_diffusion.pipelines import Loaded
from ptq_diffusion.sampling import calls_by_step
from ptq_diffusion.scheduling import make_scheduler


def set_scheduler(loaded: Loaded, name: str, **config: Any) -> Loaded:
    """The model with another scheduler of diffusers, which takes over the settings that both know.

    Args:
        loaded: the model; it stays as it is.
        name: the scheduler's class, for example `EulerDiscreteScheduler`.
        config: settings of its own, for example `use_karras_sigmas=True`.

    Raises:
        RecipeError: if there is no such class, or it has no such setting.
        ModelError: if it cannot be made, or cannot set timesteps.
    """
    return loaded.with_scheduler(make_scheduler(name, loaded.scheduler.config, config))


def timesteps_of(loaded: Loaded, options: SamplingOptions) -> Tensor:
    """The timestep that the denoiser is given at each step that calls it, in order, float32 [steps].

    Without a pipeline the scheduler alone says it. Pipelines shift timesteps by the size of the image and
    scale them as their denoiser is used to, so that one image is sampled; for that, the denoiser is
    computed in the first step only.

    Raises:
        DataError, ModelError: if the model cannot be sampled with these options.
    """
    if is_plain(loaded):
        scheduler = copy.deepcopy(loaded.scheduler)
        scheduler.set_timesteps(options.steps)
        return scheduler.timesteps.float()
    with _computed_once(loaded.denoiser):
        calls = calls_by_step(loaded, options, [0])
    return torch.stack([step[0].times.float().max() for step in calls])


@contextmanager
def _computed_once(denoiser: Any) -> Iterator[None]:
    """Compute a denoiser once for every number of rows, and give the same output again from then on."""
    forward, outputs = denoiser.forward, {}

    @wraps(forward)
    def once(*args: Any, **kwargs: Any) -> Any:
        rows = DenoiserCall.of(denoiser, *args, **kwargs).rows
        if rows not in outputs:
            outputs[rows] = forward(*args, **kwargs)
        return outputs[rows]

    denoiser.forward = once
    try:
        yield
    finally:
        del denoiser.forward
