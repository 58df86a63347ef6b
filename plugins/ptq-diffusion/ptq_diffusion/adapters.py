"""LoRA and other adapters on top of a quantized denoiser are refused: its layers hold integers."""

from functools import partial
from typing import Any, NoReturn

from ptqcore import ModelError

_METHODS = ("load_lora_weights", "load_lora_adapter", "load_attn_procs", "add_adapter", "fuse_lora")
"""What diffusers puts adapters in with, on pipelines and on denoisers."""


def refuse_adapters(owner: Any) -> None:
    """Let a quantized denoiser, or a pipeline with one, refuse adapters in one sentence, before anything is
    read or changed. Only this object is changed, not its class."""
    for method in _METHODS:
        if hasattr(owner, method):
            setattr(owner, method, partial(_refuse, method))


def _refuse(method: str, *_: Any, **__: Any) -> NoReturn:
    """Raises:
    ModelError: always.
    """
    raise ModelError(
        f"{method}: a quantized denoiser takes no adapters such as LoRA, because its weights are integers: "
        "load and fuse the LoRA in the full-precision pipeline (load_lora_weights, fuse_lora, "
        "unload_lora_weights), save that with save_pretrained, and quantize it"
    )
