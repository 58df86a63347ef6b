"""Diffusion models from folders in diffusers' layout: what denoises, and by which schedule."""

import copy
import inspect
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ptq_diffusion import embedded
from ptq_diffusion.calls import TIMES
from ptq_diffusion.folder_check import check_component, check_index, check_pipeline
from ptq_diffusion.scheduling import check_scheduler, line_of, make_scheduler
from ptqcore import ModelError, PtqError, read_json

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import diffusers

_INDEX, _CONFIG, _SCHEDULE = "model_index.json", "config.json", "scheduler_config.json"
_PICKLED = ("*.bin", "*.ckpt", "*.pt", "*.pth", "*.pkl")
_WEIGHTS = re.compile(r"[^.]+(?:\.(?P<variant>\w+?))?(?:-\d+-of-\d+)?\.safetensors")


@dataclass(frozen=True)
class Loaded:
    """A diffusion model in single precision and evaluation mode.

    denoiser: the network that is called at every step: the one component that is told the time.
    component: its name in the pipeline, `denoiser` where there is none.
    scheduler: the schedule, of diffusers.
    pipeline: diffusers' pipeline around both; None if there is only a denoiser.
    """

    denoiser: Any
    component: str
    scheduler: Any
    pipeline: Any = None

    def with_denoiser(self, denoiser: nn.Module) -> "Loaded":
        """The same with another network in the denoiser's place; this one stays as it is."""
        return replace(self, denoiser=denoiser, pipeline=self._pipeline_with(self.component, denoiser))

    def with_scheduler(self, scheduler: Any) -> "Loaded":
        """The same with another scheduler of diffusers; this one stays as it is."""
        return replace(self, scheduler=scheduler, pipeline=self._pipeline_with("scheduler", scheduler))

    def _pipeline_with(self, name: str, component: Any) -> Any:
        if self.pipeline is None:
            return None
        pipeline = copy.copy(self.pipeline)
        setattr(pipeline, name, component)
        return pipeline


def load(source: str, scheduler: str | None = None, component: str | None = None) -> Loaded:
    """Load a diffusion model from local files only; weights in lower precision become float32.

    Args:
        source: an embedded model (`embedded.names()`), or a folder: a saved pipeline (`model_index.json`),
            or a denoiser (`config.json` and safetensors), alone or as a subfolder beside `scheduler/`.
        scheduler: a scheduler class of diffusers in the place of the folder's; a denoiser alone needs one.
        component: which component denoises, where several are told the time.

    Raises:
        ModelError: if there is no such folder, files are damaged, missing or pickled, no component or more
            than one is told the time, or the scheduler cannot set timesteps.
        RecipeError: if there is no such scheduler.
    """
    _quiet()
    folder = locate(source)
    if (folder / _INDEX).is_file():
        return _load_pipeline(folder, scheduler, component)
    return _load_denoiser(folder, scheduler, component)


def _quiet() -> None:
    speaking = [diffusers.utils.logging]
    if find_spec("transformers") is not None:
        speaking.append(import_module("transformers.utils.logging"))
    for logging in speaking:
        logging.set_verbosity_error()
        logging.disable_progress_bar()


def locate(source: str) -> Path:
    """The folder of a diffusion model, as `task.pipeline` names it.

    Raises:
        ModelError: if there is none.
    """
    if source in embedded.names():
        return embedded.path(source)
    folder = Path(source).expanduser()
    if folder.is_dir():
        return folder
    raise ModelError(
        f"task.pipeline {source!r} is not a folder: give one that save_pretrained of diffusers wrote, or "
        f"one of the embedded models: {', '.join(embedded.names())}"
    )


def _load_pipeline(folder: Path, scheduler: str | None, component: str | None) -> Loaded:
    try:
        check_index(folder)
    except (OSError, ValueError) as error:
        raise ModelError(f"task.pipeline {str(folder)!r} cannot be loaded: {line_of(error)}") from error
    parts = _parts(folder)
    classes = {name: _class_of(folder, name, *part) for name, part in parts.items()}
    name = _denoiser_among(folder, classes, component)
    if scheduler is None and classes.get("scheduler") is not None:
        check_scheduler(classes["scheduler"])
    for part in parts:
        _refuse_pickled(folder / part)
    denoiser = _load_weights(folder / name, classes[name])
    try:
        kind: Any = diffusers.DiffusionPipeline
        with check_pipeline(folder).limit(f"task.pipeline {str(folder)!r}"):
            pipeline = kind.from_pretrained(
                folder,
                dtype=torch.float32,
                local_files_only=True,
                use_safetensors=True,
                trust_remote_code=False,
                variant=_variant(folder / name),
                **dict.fromkeys(_left_out(folder)),
                **{name: denoiser},
            )
    except PtqError:
        raise
    except Exception as error:
        raise ModelError(f"task.pipeline {str(folder)!r} cannot be loaded: {line_of(error)}") from error
    setattr(pipeline, name, denoiser)  # diffusers loads components that may be left out itself
    schedule = getattr(pipeline, "scheduler", None)
    loaded = Loaded(denoiser, name, schedule, pipeline)
    if scheduler is not None:
        base = {} if schedule is None else schedule.config
        return loaded.with_scheduler(make_scheduler(scheduler, base, {}))
    if schedule is None:
        raise ModelError(f"task.pipeline {str(folder)!r} has no scheduler: set task.scheduler to one")
    return loaded


def _load_denoiser(folder: Path, scheduler: str | None, component: str | None) -> Loaded:
    if (folder / _CONFIG).is_file():
        found = {"denoiser": folder}
    else:
        found = {path.parent.name: path.parent for path in sorted(folder.glob(f"*/{_CONFIG}"))}
    if not found:
        raise ModelError(
            f"task.pipeline {str(folder)!r} holds neither a pipeline ({_INDEX}) nor a denoiser ({_CONFIG})"
        )
    classes = {name: _class_named(folder, name, _read(path / _CONFIG)) for name, path in found.items()}
    name = _denoiser_among(folder, classes, component)
    schedule = _schedule(folder, scheduler)
    return Loaded(_load_weights(found[name], classes[name]), "denoiser", schedule)


def _schedule(folder: Path, name: str | None) -> Any:
    """The scheduler in the subfolder of a denoiser's folder, or one by name with its settings."""
    file = folder / "scheduler" / _SCHEDULE
    base = _read(file) if file.is_file() else {}
    try:
        check_component(file.parent)
    except (OSError, ValueError) as error:
        raise ModelError(f"task.pipeline {str(folder)!r} cannot be loaded: {line_of(error)}") from error
    chosen = name or base.get("_class_name")
    if not isinstance(chosen, str):
        raise ModelError(
            f"task.pipeline {str(folder)!r} is a denoiser without a scheduler: set task.scheduler to a "
            "class of diffusers, for example DDIMScheduler"
        )
    return make_scheduler(chosen, base, {})


def _denoiser_among(folder: Path, classes: Mapping[str, Any], chosen: str | None) -> str:
    """The name of the component whose `forward` is told the time."""
    timed = [name for name, kind in classes.items() if kind is not None and _is_timed(kind)]
    label = f"task.pipeline {str(folder)!r}"
    if not timed:
        raise ModelError(
            f"{label} has no component with a timestep among {', '.join(classes) or 'its files'}: only "
            "denoisers that are told the time can be quantized"
        )
    if chosen is not None and chosen not in timed:
        reason = "it is not told the time" if chosen in classes else "there is no such component"
        raise ModelError(
            f"task.component {chosen!r} cannot be quantized: {reason}; {label} has {' and '.join(timed)}"
        )
    if chosen is None and len(timed) > 1:
        raise ModelError(
            f"{label} has several components with a timestep, {' and '.join(timed)}: set task.component to "
            "one of them"
        )
    return chosen or timed[0]


def _is_timed(kind: Any) -> bool:
    if not (inspect.isclass(kind) and issubclass(kind, nn.Module)):
        return False
    return any(name in TIMES for name in inspect.signature(kind.forward).parameters)


def _parts(folder: Path) -> dict[str, tuple[str, str]]:
    """Component → library and class, of a pipeline's index."""
    index = _read(folder / _INDEX)
    return {
        name: (value[0], value[1])
        for name, value in index.items()
        if isinstance(value, list) and len(value) == 2 and all(isinstance(each, str) for each in value)
    }


def _left_out(folder: Path) -> list[str]:
    """The components that a pipeline was saved without: some must be named for it to be loaded so."""
    return [name for name, value in _read(folder / _INDEX).items() if value == [None, None]]


def _class_of(folder: Path, component: str, library: str, name: str) -> Any:
    """The class of a component, where it is diffusers' own; None for other libraries."""
    if library == "diffusers":
        return _class_named(folder, component, {"_class_name": name})
    return getattr(getattr(diffusers.pipelines, library, None), name, None)


def _class_named(folder: Path, component: str, config: Mapping[str, Any]) -> Any:
    name = config.get("_class_name")
    kind = getattr(diffusers, name, None) if isinstance(name, str) else None
    if kind is None and isinstance(name, str):
        raise ModelError(
            f"task.pipeline {str(folder)!r}: {component} is a {name}, which diffusers "
            f"{diffusers.__version__} does not have"
        )
    return kind


def _read(file: Path) -> dict[str, Any]:
    try:
        content = read_json(file)
    except (OSError, ValueError) as error:
        raise ModelError(
            f"task.pipeline: {str(file)!r} cannot be read as JSON: {line_of(error)}"
        ) from error
    if not isinstance(content, dict):
        raise ModelError(f"task.pipeline: {str(file)!r} does not hold a JSON object")
    return content


def _refuse_pickled(folder: Path) -> None:
    """Weights are never unpickled.

    Raises:
        ModelError: if a folder has weights in no other form.
    """
    pickled = sorted(path.name for pattern in _PICKLED for path in folder.glob(pattern))
    if pickled and not any(folder.glob("*.safetensors")):
        raise ModelError(
            f"task.pipeline: the weights {str(folder / pickled[0])!r} are pickled, and loading them could "
            "run foreign code: save the pipeline with safe_serialization=True where you trust it"
        )


def _variant(folder: Path) -> str | None:
    """`fp16` and the like, where weights have no other files."""
    found = [match["variant"] for path in folder.iterdir() if (match := _WEIGHTS.fullmatch(path.name))]
    return None if None in found or not found else min(found)


def _load_weights(folder: Path, kind: Any) -> nn.Module:
    """A denoiser from its configuration and safetensors; no tensor of it may be missing."""
    label = f"task.pipeline: the denoiser {str(folder)!r}"
    _refuse_pickled(folder)
    if _read(folder / _CONFIG).get("quantization_config"):
        raise ModelError(f"{label} is quantized already: give the full-precision model")
    try:
        with check_component(folder).limit(label):
            model, report = kind.from_pretrained(
                folder,
                dtype=torch.float32,
                local_files_only=True,
                use_safetensors=True,
                variant=_variant(folder),
                output_loading_info=True,
            )
    except PtqError:
        raise
    except Exception as error:
        raise ModelError(f"{label} cannot be loaded: {line_of(error)}") from error
    missing = sorted(report["missing_keys"])
    if missing:
        raise ModelError(f"{label} lacks {len(missing)} tensors, the first is {missing[0]}")
    return model.eval()
