"""The export `diffusers`: the pipeline with its quantized denoiser, in diffusers' own layout."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import diffusers
import torch
from torch import Tensor, nn

from ptq_diffusion.denoising import Denoising
from ptq_diffusion.hub import PtqQuantizer, describe, load_denoiser
from ptqcore import Exporter, ExportError, QuantSection, Task, Verification, tensors_in


class DiffusersExport(Exporter):
    """`DiffusionPipeline.from_pretrained` loads it once `ptq_diffusion` was imported."""

    name = "diffusers"
    holds_attachments = True
    holds_timesteps = True

    def check(self, quant: QuantSection) -> None:
        """Every grid can be held."""

    def export(self, model: nn.Module, task: Task, samples: Sequence[Any], folder: Path) -> None:
        loaded = _denoising(task).loaded.with_denoiser(model)
        with _described(model):
            if loaded.pipeline is None:
                loaded.denoiser.save_pretrained(folder, safe_serialization=True)
                loaded.scheduler.save_pretrained(folder / "scheduler")
            else:
                loaded.pipeline.save_pretrained(folder, safe_serialization=True)

    def verify(self, model: nn.Module, task: Task, samples: Sequence[Any], folder: Path) -> Verification:
        loaded = _denoising(task).loaded
        place = folder if loaded.pipeline is None else folder / loaded.component
        read = load_denoiser(place, getattr(diffusers, type(loaded.denoiser).__name__))
        expected, found = model.state_dict(), read.state_dict()
        if expected.keys() != found.keys():
            odd = sorted(expected.keys() ^ found.keys())[0]
            raise ExportError(f"diffusers: {odd!r} is in one of the model and its files, not in both")
        largest = max((_difference(expected[name], found[name]) for name in expected), default=0.0)
        with torch.no_grad():
            outputs = [task.forward(each, samples[0]) for each in (model, read)]
        return Verification(max(largest, *_differences(*outputs)))


def _denoising(task: Task) -> Denoising:
    """Raises:
    ExportError: if the task is another one.
    """
    if isinstance(task, Denoising):
        return task
    raise ExportError(f"diffusers holds pipelines of the task denoising, not those of {task.name}")


@contextmanager
def _described(model: Any) -> Iterator[None]:
    """Let diffusers write what a quantized model is into its `config.json`, for a while."""
    config = model._internal_dict
    quantizer = getattr(model, "hf_quantizer", None)
    description = describe(model)
    model.register_to_config(quantization_config=description.to_dict())
    model.hf_quantizer = PtqQuantizer(description)
    try:
        yield
    finally:
        model._internal_dict = config
        model.hf_quantizer = quantizer


def _differences(one: Any, other: Any) -> list[float]:
    return [_difference(*pair) for pair in zip(tensors_in(one), tensors_in(other), strict=True)]


def _difference(one: Tensor, other: Tensor) -> float:
    if one.shape != other.shape or one.dtype != other.dtype:
        return float("inf")
    return 0.0 if torch.equal(one, other) else float((one.double() - other.double()).abs().max())
