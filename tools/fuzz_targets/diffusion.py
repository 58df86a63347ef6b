"""Pipelines, denoisers and prompts of ptq-diffusion."""

import json
from pathlib import Path
from typing import Any

import torch
from diffusers import DDIMPipeline, DDIMScheduler, UNet2DModel

from fuzz_targets.core import mend_artifact, quantize_layer
from fuzz_targets.target import Target
from ptq_diffusion import hub, pipelines
from ptq_diffusion.classifier import Classifier, load_classifier
from ptqcore import QuantSpec, artifact, load, write_tensors


def _unet() -> Any:
    torch.manual_seed(0)
    sizes = {"sample_size": 8, "in_channels": 1, "out_channels": 1, "layers_per_block": 1}
    blocks = {"down_block_types": ("DownBlock2D",), "up_block_types": ("UpBlock2D",)}
    return UNet2DModel(**sizes, **blocks, block_out_channels=(8,), norm_num_groups=4).eval()


def write_pipeline(folder: Path) -> None:
    DDIMPipeline(_unet(), DDIMScheduler()).save_pretrained(folder)


def read_pipeline(folder: Path) -> None:
    pipelines.load(str(folder))


def write_denoiser(folder: Path) -> None:
    _unet().save_pretrained(folder / "unet")
    DDIMScheduler().save_pretrained(folder / "scheduler")


def write_assets(folder: Path) -> None:
    (folder / "assets").mkdir()
    (folder / "assets/denoiser.json").write_text(_unet().to_json_string())
    artifact.save(_unet(), folder, "diffusion", "denoising", "0")


def write_quantized(folder: Path) -> None:
    """A pipeline whose denoiser has a quantized layer."""
    model = _unet()
    grid = QuantSpec(bits=4, granularity="channel")
    quantize_layer(model, "conv_out", model.conv_out, grid, QuantSpec(symmetric=False))
    model.register_to_config(quantization_config=hub.describe(model).to_dict())
    model.save_pretrained(folder / "unet")
    DDIMScheduler().save_pretrained(folder / "scheduler")
    index = {"unet": ["diffusers", "UNet2DModel"], "scheduler": ["diffusers", "DDIMScheduler"]}
    (folder / "model_index.json").write_text(json.dumps({"_class_name": "DDIMPipeline", **index}))


def read_quantized(folder: Path) -> None:
    hub.load_pipeline(folder)


def write_classifier(folder: Path) -> None:
    write_tensors(folder / "model.safetensors", Classifier().state_dict())


TARGETS = (
    Target("diffusers-pipeline", write_pipeline, read_pipeline),
    Target("diffusers-denoiser", write_denoiser, read_pipeline),
    Target("denoiser-artifact", write_assets, load, mend_artifact),
    Target("quantized-pipeline", write_quantized, read_quantized),
    Target("classifier", write_classifier, load_classifier),
)
