"""Quantized denoisers in diffusers' own folders, as a quantization method of diffusers.

diffusers knows its methods by two dictionaries and has no way to register others: this module adds to
them, so that `DiffusionPipeline.from_pretrained` restores a pipeline once `ptq_diffusion` was imported.
"""

from enum import StrEnum
from pathlib import Path
from typing import Any

import torch
from diffusers.quantizers import auto
from diffusers.quantizers.base import DiffusersQuantizer
from diffusers.quantizers.quantization_config import QuantizationConfigMixin
from torch import nn

from ptq_diffusion.adapters import refuse_adapters
from ptq_diffusion.folder_check import check_pipeline
from ptqcore import ModelError, PtqError, Structure, Weights


class Method(StrEnum):
    """The name of the method in a denoiser's `config.json`; diffusers asks it for its `value`."""

    PTQCORE = "ptqcore"


class PtqConfig(QuantizationConfigMixin):
    """`quantization_config` of a denoiser: the structure that its tensors have (`ptqcore.Structure`)."""

    def __init__(self, structure: dict[str, Any], **_: Any) -> None:
        self.quant_method = Method.PTQCORE
        self.structure = structure

    def to_dict(self) -> dict[str, Any]:
        """JSON values."""
        return {"quant_method": Method.PTQCORE.value, "structure": self.structure}

    def to_diff_dict(self) -> dict[str, Any]:
        """The same: there are no defaults to leave out."""
        return self.to_dict()


class PtqQuantizer(DiffusersQuantizer):
    """Gives a denoiser the structure that its `config.json` describes, before its tensors are loaded."""

    requires_calibration = True

    def _process_model_before_weight_loading(self, model: nn.Module, **_: Any) -> None:
        structure = Structure.model_validate(self.quantization_config.structure)
        own = [parameter.numel() for parameter in model.parameters()]
        with Weights(sum(own), len(own), 0).limit("the quantization_config of the denoiser"):
            structure.build(model)

    def _process_model_after_weight_loading(self, model: nn.Module, **_: Any) -> nn.Module:
        model.eval()
        refuse_adapters(model)
        return model

    @property
    def is_serializable(self) -> bool:
        """Whether a loaded model can be saved again."""
        return True

    @property
    def is_trainable(self) -> bool:
        """Whether it can be trained: integers have no gradients."""
        return False


def load_pipeline(folder: str | Path) -> Any:
    """The pipeline in a folder that the export `diffusers` has written, from local files only.

    Raises:
        ModelError: if there is no such pipeline, or it cannot be loaded.
    """
    import diffusers  # while it is being imported itself, this module is loaded

    kind: Any = diffusers.DiffusionPipeline
    try:
        found = check_pipeline(Path(folder))
        # A word of 32 bits holds up to 16 numbers.
        with Weights(16 * found.numbers, found.tensors, found.size).limit(repr(str(folder))):
            pipeline = kind.from_pretrained(
                str(folder), local_files_only=True, use_safetensors=True, trust_remote_code=False
            )
    except PtqError:
        raise
    except Exception as error:
        line = str(error).strip().splitlines()
        raise ModelError(
            f"{str(folder)!r} holds no pipeline that diffusers can load: {line[0] if line else error!r}"
        ) from error
    if any(_is_quantized(component) for component in pipeline.components.values()):
        refuse_adapters(pipeline)
    return pipeline


def load_denoiser(folder: str | Path, kind: Any) -> nn.Module:
    """A denoiser of a class of diffusers, from its own folder."""
    model: nn.Module = kind.from_pretrained(
        str(folder), local_files_only=True, use_safetensors=True, torch_dtype=torch.float32
    )
    return model.eval()


def describe(model: nn.Module) -> PtqConfig:
    """The configuration of a quantized denoiser."""
    return PtqConfig(Structure.of(model).model_dump(mode="json"))


def describe_anew(model: Any) -> None:
    """Let a denoiser that diffusers has loaded be saved with the structure that it now has."""
    if _is_quantized(model):
        model.hf_quantizer.quantization_config = describe(model)
        model.register_to_config(quantization_config=model.hf_quantizer.quantization_config)


def _is_quantized(component: Any) -> bool:
    return isinstance(getattr(component, "hf_quantizer", None), PtqQuantizer)


auto.AUTO_QUANTIZER_MAPPING[Method.PTQCORE.value] = PtqQuantizer
auto.AUTO_QUANTIZATION_CONFIG_MAPPING[Method.PTQCORE.value] = PtqConfig
