"""The task `denoising`: a diffusion pipeline whose denoiser is quantized."""

from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import diffusers
import torch
from pydantic import Field
from torch import Tensor, nn

from ptq_diffusion import embedded, pipelines
from ptq_diffusion.adapters import refuse_adapters
from ptq_diffusion.calls import DenoiserCall
from ptq_diffusion.drawing import SamplingOptions
from ptq_diffusion.judge import Judge
from ptq_diffusion.pipelines import Loaded
from ptq_diffusion.prompts import read_prompts
from ptq_diffusion.sampling import calls_by_step
from ptq_diffusion.temporal import TemporalMap, find_temporal
from ptq_diffusion.trajectories import collect
from ptqcore import (
    ArtifactError,
    Curves,
    Pictures,
    PtqError,
    Task,
    TaskOptions,
    check_config,
    one_line,
    read_json,
    read_weights,
    say,
    trace,
    write_text,
)

_CONFIG = "denoiser.json"
Unseen = Literal["nearest", "interpolate", "refuse"]


class DenoisingOptions(TaskOptions):
    """Keys of `task`."""

    pipeline: str = Field(
        default=embedded.DEFAULT,
        description="folder of a diffusers pipeline, or of a denoiser, or the name of an embedded model",
    )
    scheduler: str | None = Field(
        default=None, description="scheduler class of diffusers; null: the pipeline's own"
    )
    component: str | None = Field(
        default=None, description="which component is quantized, where several are told the time"
    )
    layers: Literal["all", "temporal"] = Field(
        default="all", description="what is quantized: everything, or the temporal block alone"
    )
    steps: int = Field(default=20, ge=1, description="inference steps of the schedule")
    calibration_samples: int = Field(default=64, ge=1, description="images sampled to calibrate on")
    calibration_keep: int = Field(
        default=16, ge=1, description="of these, how many are kept at each timestep"
    )
    samples: int = Field(default=64, ge=2, description="images that are judged")
    seeds: int = Field(default=1_000_000, ge=0, description="seed of the first judged image")
    batch: int = Field(default=32, ge=1, description="images sampled at once")
    prompts: str | None = Field(default=None, description="UTF-8 file, one prompt a line")
    negative_prompts: str | None = Field(
        default=None, description="UTF-8 file, one a line, of what not to draw; null: the pipeline's own"
    )
    labels: tuple[int, ...] = Field(default=(), description="classes to draw; by default all in turn")
    guidance: float | None = Field(default=None, description="scale of the guidance; null: the pipeline's")
    height: int | None = Field(default=None, ge=1, description="of the images, in pixels")
    width: int | None = Field(default=None, ge=1, description="of the images, in pixels")
    frames: int | None = Field(
        default=None, ge=1, description="of the videos that a pipeline makes; null: the pipeline's own"
    )
    eta: float = Field(default=0.0, ge=0, le=1, description="share of fresh noise in each step of DDIM")
    unseen: Unseen = Field(
        default="nearest",
        description="what the quantized denoiser does with timesteps that it was not calibrated for",
    )


class Denoising(Task):
    """Samples are calls of the denoiser, each of rows of one timestep, from the pipeline's own sampling.

    Their order is random: an observer that forgets must not know the last timesteps best.
    """

    name = "denoising"
    Options = DenoisingOptions
    options: DenoisingOptions
    _facts: Mapping[str, int] = {}

    def load_model(self) -> nn.Module:
        model: nn.Module = self.loaded.denoiser
        return model

    def samples(self, model: nn.Module) -> Sequence[Any]:
        options = self.options
        seeds = range(self.seed * 100_000, self.seed * 100_000 + options.calibration_samples)
        keep = min(options.calibration_keep, options.calibration_samples)
        recorded = collect(self.loaded, self._sampling, seeds, keep, self.seed)
        rows = sum(call.rows for call in recorded.calls)
        self._facts = {
            "steps of the schedule": options.steps,
            "calibration images": len(seeds),
            "batches of calibration images": -(-len(seeds) // options.batch),
            "denoiser calls for calibration data": recorded.denoiser_calls,
            "denoiser calls to calibrate on": len(recorded.calls),
            "rows in them": rows,
        }
        say(
            f"{recorded.denoiser_calls} denoiser calls for calibration data, {len(recorded.calls)} kept: "
            f"{rows} rows"
        )
        mixed = torch.randperm(len(recorded.calls), generator=torch.Generator().manual_seed(self.seed))
        return [dict(recorded.calls[number].values) for number in mixed.tolist()]

    def timestep(self, sample: Any) -> float | None:
        return float(self._call(sample).times.float().max())

    @property
    def timestep_argument(self) -> str:  # type: ignore[override]
        """The parameter of the denoiser that is the time."""
        return self._first_call.timestep

    @property
    def unseen_timesteps(self) -> Unseen:  # type: ignore[override]
        return self.options.unseen

    def excluded(self, model: nn.Module) -> dict[str, str]:
        if self.options.layers == "all":
            return {}
        block = set(self._temporal.block)
        return {
            path: "outside the temporal block (task.layers)"
            for path, _ in model.named_modules()
            if path not in block
        }

    def evaluate(self, model: nn.Module) -> dict[str, float]:
        """What `Judge` measures, of images of the same seeds."""
        return self._judge.measure(model, self.judged)

    def figures(self) -> Sequence[Curves | Pictures]:
        """What `Judge` shows of the denoisers that were measured."""
        return self._judge.figures()

    def facts(self) -> Mapping[str, int]:
        """How many calls of the denoiser the calibration data took: as many for every batch of images as
        the schedule has steps (more in schedulers of higher order), and two that show how it is called."""
        return self._facts

    def save_assets(self, folder: Path) -> None:
        write_text(folder / _CONFIG, self.loaded.denoiser.to_json_string())

    @classmethod
    def build(cls, folder: Path) -> nn.Module:
        try:
            config = read_json(folder / _CONFIG)
            check_config(config, read_weights(folder.parent).size)
            kind: Any = getattr(diffusers, config["_class_name"])
            if not issubclass(kind, diffusers.ModelMixin):
                raise ValueError(f"it names the class {config['_class_name']!r}, which is no model")
            model: nn.Module = kind.from_config(config)
        except PtqError:
            raise
        except Exception as error:  # diffusers' classes raise what they like
            raise ArtifactError(
                f"{folder / _CONFIG} does not describe a denoiser of diffusers: {one_line(error)}"
            ) from None
        refuse_adapters(model)
        return model.eval()

    @cached_property
    def loaded(self) -> Loaded:
        """The pipeline; its denoiser is the model of the run."""
        options = self.options
        return pipelines.load(options.pipeline, options.scheduler, options.component)

    @cached_property
    def _sampling(self) -> SamplingOptions:
        options = self.options
        return SamplingOptions(
            steps=options.steps,
            batch=options.batch,
            prompts=read_prompts(options.prompts, "task.prompts"),
            negative_prompts=read_prompts(options.negative_prompts, "task.negative_prompts"),
            labels=options.labels,
            guidance=options.guidance,
            height=options.height,
            width=options.width,
            frames=options.frames,
            eta=options.eta,
        )

    @cached_property
    def _first_call(self) -> DenoiserCall:
        """What the denoiser is called with first, while two images are sampled."""
        return calls_by_step(self.loaded, self._sampling, [0, 1], only_first=True)[0][0]

    @cached_property
    def _temporal(self) -> TemporalMap:
        """The map of the full-precision denoiser: ask before it is changed."""
        model, call = self.loaded.denoiser, self._first_call
        return find_temporal(model, trace(model, lambda: call.run(model)), call)

    @cached_property
    def _judge(self) -> Judge:
        options = self.options
        seeds = range(options.seeds, options.seeds + options.samples)
        return Judge(self.loaded, self._sampling, seeds, self._first_call, self._temporal)

    def _call(self, sample: dict[str, Tensor]) -> DenoiserCall:
        return DenoiserCall(sample, self._first_call.timestep, self._first_call.sample)
