"""One batch of images from a diffusion model."""

import copy
import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import wraps
from typing import Any

import torch
from torch import Tensor

from ptq_diffusion.pipelines import Loaded
from ptq_diffusion.scheduling import line_of
from ptqcore import DataError, ModelError

_REST = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
_KEYS = {
    "prompt": "prompts",
    "negative_prompt": "negative_prompts",
    "class_labels": "labels",
    "guidance_scale": "guidance",
    "num_frames": "frames",
}
"""Parameter of pipelines → key of `task`, where they have other names."""
OnStep = Callable[[Tensor], None]
"""Is given x [rows, …] after every step of the scheduler."""


@dataclass(frozen=True)
class SamplingOptions:
    """How images are made. Seed s takes prompt s modulo their number, and the negative prompt and the label
    likewise, so that a seed gives the same image whatever other seeds stand beside it.

    steps: number of inference steps, as the scheduler counts them.
    batch: images that are made at once.
    prompts: what to draw, for models that are told so in words.
    negative_prompts: what not to draw; guidance leads away from it. By default the pipeline's own.
    labels: classes to draw; by default all of the model in turn.
    guidance: scale of the guidance; by default the pipeline's own, and none for a denoiser alone.
    height, width: in pixels, both or neither; by default the model's own.
    frames: of a video; by default the pipeline's own.
    eta: share of fresh noise in every step of DDIM.
    """

    steps: int = 50
    batch: int = 16
    prompts: tuple[str, ...] = ()
    negative_prompts: tuple[str, ...] = ()
    labels: tuple[int, ...] = ()
    guidance: float | None = None
    height: int | None = None
    width: int | None = None
    frames: int | None = None
    eta: float = 0.0


@torch.no_grad()
def draw(loaded: Loaded, options: SamplingOptions, seeds: Sequence[int], on_step: OnStep) -> Tensor:
    """Images [n, channels, height, width] in [0, 1] of one batch of seeds; for the rest as `sample`.

    A denoiser with nothing but a scheduler around it is sampled from by a plain loop, which takes every
    scheduler (DDIMPipeline and DDPMPipeline only take their own); other pipelines sample themselves.
    """
    if (options.height is None) != (options.width is None):
        raise DataError("task.height and task.width must be set together: pipelines ignore one alone")
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    steps = 0

    def counted(x: Tensor) -> None:
        nonlocal steps
        steps += 1
        on_step(x)

    with _watched(loaded.scheduler, counted):
        try:
            draw_with = _draw_plainly if is_plain(loaded) else _draw_with_pipeline
            images = draw_with(loaded, options, seeds, generators)
        except (TypeError, ValueError) as error:
            both = f"{_name(loaded)} with {type(loaded.scheduler).__name__}"
            raise DataError(f"{both} cannot sample as asked: {line_of(error)}") from error
    if not steps:
        raise ModelError(f"{_name(loaded)} does not sample with the steps of its scheduler")
    return images


@contextmanager
def _watched(scheduler: Any, on_step: OnStep) -> Iterator[None]:
    """Tell what every step of a scheduler returns."""
    step = scheduler.step

    @wraps(step)
    def watched(*args: Any, **kwargs: Any) -> Any:
        result = step(*args, **kwargs)
        on_step(result[0])
        return result

    scheduler.step = watched
    try:
        yield
    finally:
        del scheduler.step


def _name(loaded: Loaded) -> str:
    return type(loaded.denoiser if loaded.pipeline is None else loaded.pipeline).__name__


def is_plain(loaded: Loaded) -> bool:
    """Whether there is nothing but a denoiser and a scheduler."""
    if loaded.pipeline is None:
        return True
    present = {name for name, part in loaded.pipeline.components.items() if part is not None}
    return present <= {loaded.component, "scheduler"}


def _draw_with_pipeline(
    loaded: Loaded, options: SamplingOptions, seeds: Sequence[int], generators: list[torch.Generator]
) -> Tensor:
    """Let a pipeline sample; safety checkers are left out, for they would blacken what is compared."""
    pipeline = copy.copy(loaded.pipeline)
    pipeline.set_progress_bar_config(disable=True)
    if getattr(pipeline, "safety_checker", None) is not None:
        pipeline.safety_checker = None
    result = pipeline(**_arguments(loaded, options, seeds, generators))
    made = getattr(result, "images", None)
    made = getattr(result, "frames", None) if made is None else made
    if made is None:
        raise ModelError(f"{_name(loaded)} makes neither images nor videos")
    images = torch.as_tensor(made).float()
    if images.ndim == 5:
        images = images.flatten(1, 2)
    return images.movedim(-1, 1).contiguous()


def _arguments(
    loaded: Loaded, options: SamplingOptions, seeds: Sequence[int], generators: list[torch.Generator]
) -> dict[str, Any]:
    """What a pipeline is called with.

    Raises:
        DataError: if it needs prompts that are not given, or cannot be given what is.
        ModelError: if it needs anything else.
    """
    name, parameters = _name(loaded), inspect.signature(loaded.pipeline.__call__).parameters
    given = {"num_inference_steps": options.steps, "generator": generators, "output_type": "np"}
    asked = {
        "prompt": options.prompts or None,
        "negative_prompt": options.negative_prompts or None,
        "class_labels": options.labels or None,
        "guidance_scale": options.guidance,
        "height": options.height,
        "width": options.width,
        "num_frames": options.frames,
        "eta": options.eta or None,
    }
    asked = {key: value for key, value in asked.items() if value is not None}
    for key in asked:
        if key not in parameters:
            raise DataError(f"{name} takes no {key}: leave task.{_KEYS.get(key, key)} out")
    given |= asked
    if "batch_size" in parameters:
        given["batch_size"] = len(seeds)
    if "class_labels" in parameters:
        given["class_labels"] = _labels(loaded, options, seeds)
    if "prompt" in parameters and not options.prompts:
        raise DataError(f"{name} draws what words say: set task.prompts to a file of prompts")
    for key, words in (("prompt", options.prompts), ("negative_prompt", options.negative_prompts)):
        if words:
            given[key] = [words[seed % len(words)] for seed in seeds]
    needed = [
        key for key, each in parameters.items() if each.default is each.empty and each.kind not in _REST
    ]
    for key in needed:
        if key not in given:
            raise ModelError(f"{name} needs {key!r}, which is more than prompts and class labels")
    for key in given:
        if key not in parameters:
            raise ModelError(f"{name} cannot be told {key!r}, so that it cannot be sampled from repeatably")
    return given


def _draw_plainly(
    loaded: Loaded, options: SamplingOptions, seeds: Sequence[int], generators: list[torch.Generator]
) -> Tensor:
    """The loop of DDIM (Song et al., arXiv 2010.02502) with any scheduler of diffusers."""
    scheduler, predict = loaded.scheduler, _Predictor(loaded, options, seeds)
    shape = _shape(loaded, options)
    scheduler.set_timesteps(options.steps)
    noise = torch.cat([torch.randn(1, *shape, generator=generator) for generator in generators])
    x = noise * getattr(scheduler, "init_noise_sigma", 1.0)
    taken = inspect.signature(scheduler.step).parameters
    extras = {
        key: value for key, value in (("eta", options.eta), ("generator", generators)) if key in taken
    }
    for timestep in scheduler.timesteps:
        scaled = scheduler.scale_model_input(x, timestep) if hasattr(scheduler, "scale_model_input") else x
        x = scheduler.step(predict(scaled, timestep), timestep, x, return_dict=False, **extras)[0]
    return (x / 2 + 0.5).clamp(0, 1)


class _Predictor:
    """Calls a denoiser that has no pipeline, for one batch: without conditions, or with class labels.

    With guidance, class labels come first and the label for no class after them, as in DiT
    (Peebles & Xie, ICCV 2023, section 3.1; diffusers' DiTPipeline).
    """

    def __init__(self, loaded: Loaded, options: SamplingOptions, seeds: Sequence[int]) -> None:
        """Raises:
        ModelError: if the denoiser needs other conditions.
        DataError: if there are no such labels, or no guidance is possible.
        """
        self.denoiser, self.guidance = loaded.denoiser, options.guidance or 1.0
        parameters = list(inspect.signature(loaded.denoiser.forward).parameters)
        if "encoder_hidden_states" in parameters:
            raise ModelError(
                f"{_name(loaded)} is told by other networks what to draw: give the folder of the pipeline"
            )
        config = loaded.denoiser.config
        self.keeps_variance = loaded.scheduler.config.get("variance_type") in ("learned", "learned_range")
        self.conditions: dict[str, Tensor] = {}
        if "class_labels" in parameters and _classes(loaded):
            self.conditions["class_labels"] = torch.tensor(_labels(loaded, options, seeds))
        elif options.labels:
            raise DataError(f"{_name(loaded)} takes no class labels, but task.labels is {options.labels}")
        for key in ("prompts", "negative_prompts", "frames"):
            if getattr(options, key):
                raise DataError(f"{_name(loaded)} takes no {key.replace('_', ' ')}: leave task.{key} out")
        if self.guidance > 1:
            none = config.get("num_embeds_ada_norm")
            if none is None:
                raise DataError(f"{_name(loaded)} cannot be guided, but task.guidance is {self.guidance:g}")
            labels = self.conditions["class_labels"]
            self.conditions["class_labels"] = torch.cat([labels, torch.full_like(labels, none)])

    def __call__(self, x: Tensor, timestep: Tensor) -> Tensor:
        """What the scheduler is given for x [n, channels, height, width]."""
        guided = self.guidance > 1
        rows = torch.cat([x, x]) if guided else x
        output = self.denoiser(rows, timestep.expand(len(rows)), return_dict=False, **self.conditions)[0]
        if output.shape[1] == 2 * x.shape[1] and not self.keeps_variance:
            output = output[:, : x.shape[1]]
        if not guided:
            return output
        conditional, free = output.chunk(2)
        return free + self.guidance * (conditional - free)


def _shape(loaded: Loaded, options: SamplingOptions) -> tuple[int, int, int]:
    """Channels, height and width of what a denoiser alone is given."""
    config = loaded.denoiser.config
    size = config.get("sample_size")
    height, width = (size, size) if isinstance(size, int) or size is None else tuple(size)
    height, width = options.height or height, options.width or width
    if height is None or width is None:
        raise DataError(f"{_name(loaded)} does not say how large its images are: set task.height and width")
    return config["in_channels"], height, width


def _classes(loaded: Loaded) -> int:
    """How many classes a denoiser knows; 0 if it is not told any."""
    config = loaded.denoiser.config
    return config.get("num_class_embeds") or config.get("num_embeds_ada_norm") or 0


def _labels(loaded: Loaded, options: SamplingOptions, seeds: Sequence[int]) -> list[int]:
    """The class of every seed.

    Raises:
        DataError: if the denoiser does not know one of `options.labels`.
    """
    known = _classes(loaded)
    labels = options.labels or tuple(range(known))
    if not known:
        raise DataError(f"{_name(loaded)} needs class labels, but its denoiser knows no classes")
    unknown = [label for label in labels if not 0 <= label < known]
    if unknown:
        raise DataError(f"task.labels has {unknown[0]}, but {_name(loaded)} knows 0 to {known - 1}")
    return [labels[seed % len(labels)] for seed in seeds]
