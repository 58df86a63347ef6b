"""ptq-llm: post-training quantization of language models."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from ptqcore import Plugin

if TYPE_CHECKING:
    from ptq_llm.kv_cache import KVCacheOptions as KVCacheOptions
    from ptq_llm.kv_cache import QuantizedKVCache as QuantizedKVCache
    from ptq_llm.kv_cache import new_cache as new_cache

_HOME = dict.fromkeys(("KVCacheOptions", "QuantizedKVCache", "new_cache"), "kv_cache")

__all__ = [*_HOME, "plugin"]

plugin = Plugin(
    name="llm",
    tasks={
        "causal-lm": "ptq_llm.causal_lm:CausalLM",
        "text-encoder": "ptq_llm.text_encoder:TextEncoder",
    },
    steps={
        "asymmetric-calibration": "ptq_llm.asymmetric_calibration:AsymmetricCalibration",
        "awq": "ptq_llm.awq:AWQ",
        "clip": "ptq_llm.clip:Clip",
        "gptq": "ptq_llm.gptq:GPTQ",
        "hqq": "ptq_llm.hqq:HQQ",
        "learned-clip": "ptq_llm.learned_clip:LearnedClip",
        "learned-scale": "ptq_llm.learned_scale:LearnedScale",
        "low-rank": "ptq_llm.low_rank:LowRank",
        "outlier-suppression": "ptq_llm.outlier_suppression:OutlierSuppression",
        "mixed-bits": "ptq_llm.mixed_bits:MixedBits",
        "reassemble": "ptq_llm.qllm:ChannelReassembly",
        "rotate": "ptq_llm.rotate:Rotate",
        "os-plus": "ptq_llm.os_plus:OSPlus",
        "smoothquant": "ptq_llm.smoothquant:SmoothQuant",
    },
    observers={"token-wise": "ptq_llm.token_wise:TokenWise"},
    attachments={
        "affine": "ptq_llm.rescale:Affine",
        "hadamard": "ptq_llm.rotation:Hadamard",
        "reassemble": "ptq_llm.reassembly:Reassemble",
    },
    exporters={
        "awq": "ptq_llm.awq_format:AWQ",
        "compressed-tensors": "ptq_llm.compressed_tensors:CompressedTensors",
        "gguf": "ptq_llm.gguf_export:GGUF",
        "gptq": "ptq_llm.gptq_format:GPTQ",
        "gptq-v2": "ptq_llm.gptq_format:GPTQv2",
        "onnx-matmulnbits": "ptq_llm.onnx_matmulnbits:OnnxMatMulNBits",
    },
    recipes="ptq_llm/recipes",
    default_recipe="w4a16",
    commands="ptq_llm.commands:app",
)


def __getattr__(name: str) -> Any:
    """Import a public name at its first use: plugins are discovered without transformers."""
    if name not in _HOME:
        raise AttributeError(f"module 'ptq_llm' has no attribute {name!r}")
    return getattr(import_module(f"ptq_llm.{_HOME[name]}"), name)
