"""Another schedule for a quantized denoiser: ranges for its timesteps, in seconds and without images."""

from collections.abc import Callable, Sequence
from inspect import signature
from typing import Any

from torch import nn

from ptq_diffusion import schedules
from ptq_diffusion.calls import DenoiserCall
from ptq_diffusion.drawing import SamplingOptions
from ptq_diffusion.features_of_time import TimePath
from ptq_diffusion.hub import describe_anew
from ptq_diffusion.pipelines import Loaded
from ptq_diffusion.sampling import calls_by_step
from ptq_diffusion.temporal import TemporalMap
from ptqcore import FakeQuant, ModelError, QuantModule, say, timesteps_of
from ptqcore import add_timesteps as add_to_tables


def set_schedule(
    pipeline: Any,
    steps: int,
    scheduler: str | None = None,
    *,
    height: int | None = None,
    width: int | None = None,
    **config: Any,
) -> list[float]:
    """Prepare a quantized pipeline for another schedule: its denoiser gets ranges for the timesteps.

    Inputs of the temporal block get the ranges of their values, as calibration would find them; other
    activations with a range for each timestep get ones between those of the calibrated timesteps. What the
    denoiser computes at the timesteps that it knew does not change.

    Args:
        pipeline: of diffusers, as `load_pipeline` has loaded it, in single precision on the CPU; changed in
            place, and can be saved.
        steps: inference steps.
        scheduler: class of diffusers that takes the place of the pipeline's scheduler; the pipeline must be
            able to sample with it (DDIMPipeline and DDPMPipeline are with their own alone).
        height, width: of the images in pixels, where timesteps depend on them.
        config: settings of the scheduler, for example `timestep_spacing="trailing"`.

    Returns:
        The timesteps that were added; none, if it knows all of them, or has the same ranges for all.

    Raises:
        ModelError: if the pipeline has no quantized denoiser, or one with tables in the place of layers.
        RecipeError: if there is no such scheduler or setting.
    """
    loaded = _loaded(pipeline)
    if scheduler is not None or config:
        loaded = schedules.set_scheduler(loaded, scheduler or type(loaded.scheduler).__name__, **config)
    added: list[float] = []
    known = timesteps_of(loaded.denoiser)
    if known is None:
        say("set_schedule: activations have the same range at all timesteps, there is nothing to prepare")
    else:
        words = ("",) if "prompt" in signature(pipeline.__call__).parameters else ()
        options = SamplingOptions(steps, 1, words, height=height, width=width)
        with known.accepting():
            timesteps = schedules.timesteps_of(loaded, options).tolist()
            call = calls_by_step(loaded, options, [0], only_first=True)[0][0]
        added = _add(loaded.denoiser, timesteps, call)
    pipeline.scheduler = loaded.scheduler
    return added


def add_timesteps(denoiser: nn.Module, timesteps: Sequence[float], **example: Any) -> list[float]:
    """Give a quantized denoiser ranges for further timesteps; for the rest as `set_schedule`.

    Args:
        denoiser: changed in place.
        timesteps: as the denoiser is given them.
        example: what it is called with, for any sample and at any timestep.

    Returns:
        The timesteps that were added.

    Raises:
        ModelError: if it has no ranges for each timestep, or tables in the place of layers.
    """
    return _add(denoiser, timesteps, DenoiserCall.of(denoiser, **example))


def _loaded(pipeline: Any) -> Loaded:
    """A pipeline and its quantized denoiser."""
    for name, part in getattr(pipeline, "components", {}).items():
        if isinstance(part, nn.Module) and any(isinstance(each, QuantModule) for each in part.modules()):
            return Loaded(part, name, pipeline.scheduler, pipeline)
    raise ModelError(
        f"{type(pipeline).__name__} has no denoiser that was quantized: give a pipeline that "
        "ptq_diffusion.load_pipeline has loaded"
    )


def _add(denoiser: nn.Module, timesteps: Sequence[float], call: DenoiserCall) -> list[float]:
    known = timesteps_of(denoiser)
    if known is None:
        raise ModelError("the denoiser has the same ranges at all timesteps: it can be given any of them")
    with known.accepting():
        added = add_to_tables(denoiser, timesteps, _temporal_part(denoiser, call))
    describe_anew(denoiser)
    return added


def _temporal_part(denoiser: nn.Module, call: DenoiserCall) -> Callable[[float], object]:
    """Computes, at a timestep, what depends on it alone: nothing else, where only layers round that."""
    layers = tuple(
        path.removesuffix(".input_quantizer")
        for path, each in denoiser.named_modules()
        if isinstance(each, FakeQuant) and each.spec.of_timestep
    )
    if not layers:
        return lambda _: None
    if not all(isinstance(denoiser.get_submodule(path), QuantModule) for path in layers):
        return lambda timestep: call.with_timestep(timestep).run(denoiser)
    block = TemporalMap(dict.fromkeys(layers, "timestep"), dict.fromkeys(layers, 0), layers, ())
    way = TimePath(denoiser, call, block)
    return lambda timestep: way([timestep])
