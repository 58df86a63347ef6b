"""A random two-layer Llama, ways to quantize it, its export, and transformers that loads it: what the
exporter's tests share."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedModel

from ptq_llm.compressed_tensors import CompressedTensors
from ptqcore import Exporter, QuantizedTensor, QuantLinear, QuantSpec, Verification
from ptqcore.observers import MinMax, Observer

Q_PROJ = "model.layers.0.self_attn.q_proj"
GROUP, TOKEN = {"granularity": "group", "group_size": 32}, {"granularity": "token", "dynamic": True}
INT4 = QuantSpec(bits=4, **GROUP)
CHANNEL4 = QuantSpec(bits=4, granularity="channel")
INT8 = QuantSpec(granularity="channel")
FP8 = QuantSpec(dtype="e4m3", granularity="channel")
FP8_TOKEN = QuantSpec(dtype="e4m3", **TOKEN)

WEIGHT_ONLY = {
    "int4-group": INT4,
    "int3-group": QuantSpec(bits=3, **GROUP),
    "int2-group": QuantSpec(bits=2, **GROUP),
    "int8-group": QuantSpec(bits=8, **GROUP),
    "int4-channel": CHANNEL4,
    "int5-channel": QuantSpec(bits=5, granularity="channel"),
    "int4-tensor": QuantSpec(bits=4),
    "int4-tensor-asymmetric": QuantSpec(bits=4, symmetric=False),
    "fp8-channel": FP8,
    "fp8-tensor": QuantSpec(dtype="e4m3"),
    "fp8-group": QuantSpec(dtype="e4m3", **GROUP),
}
WITH_INPUTS = {
    "w8a8-token": (INT8, QuantSpec(**TOKEN)),
    "w8a8-token-asymmetric": (INT8, QuantSpec(symmetric=False, **TOKEN)),
    "w8a8-tensor-weights": (QuantSpec(), QuantSpec(**TOKEN)),
    "w8a8-static": (INT8, QuantSpec()),
    "w8a8-static-asymmetric": (INT8, QuantSpec(symmetric=False)),
    "w8a8-dynamic-tensor": (INT8, QuantSpec(dynamic=True)),
    "w8a8-group": (INT8, QuantSpec(dynamic=True, **GROUP)),
    "w4a8": (CHANNEL4, QuantSpec(**TOKEN)),
    "w4a8-group-weights": (INT4, QuantSpec(**TOKEN)),
    "w4a4": (CHANNEL4, QuantSpec(bits=4, **TOKEN)),
    "w4a4-groups": (INT4, QuantSpec(bits=4, dynamic=True, **GROUP)),
    "w4a4-groups-asymmetric": (
        QuantSpec(bits=4, symmetric=False, **GROUP),
        QuantSpec(bits=4, symmetric=False, dynamic=True, **GROUP),
    ),
    "w6a6-asymmetric": (
        QuantSpec(bits=6, symmetric=False, granularity="channel"),
        QuantSpec(bits=6, symmetric=False, **TOKEN),
    ),
    "w6a6-static-asymmetric": (QuantSpec(bits=6, symmetric=False), QuantSpec(bits=6, symmetric=False)),
    "w5a3-dynamic-tensor": (
        QuantSpec(bits=5, symmetric=False, **GROUP),
        QuantSpec(bits=3, symmetric=False, dynamic=True),
    ),
    "w2a7-signed-scale": (QuantSpec(bits=2, signed_scale=True, **GROUP), QuantSpec(bits=7)),
    "fp8-token": (FP8, FP8_TOKEN),
    "fp8-static": (QuantSpec(dtype="e4m3"), QuantSpec(dtype="e4m3")),
    "fp8-groups": (QuantSpec(dtype="e4m3", **GROUP), QuantSpec(dtype="e4m3", dynamic=True, **GROUP)),
    "w4-fp8-token": (INT4, FP8_TOKEN),
    "fp8-weights-int8-token": (FP8, QuantSpec(**TOKEN)),
}
ASYMMETRIC = {
    "group": QuantSpec(bits=4, symmetric=False, **GROUP),
    "channel": QuantSpec(bits=3, symmetric=False, granularity="channel"),
}


def tiny_llama(
    tied: bool = False, dtype: torch.dtype = torch.float32, intermediate: int = 96
) -> PreTrainedModel:
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        intermediate_size=intermediate,
        vocab_size=128,
        tie_word_embeddings=tied,
    )
    model = AutoModelForCausalLM.from_config(config, dtype=dtype).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" not in name:
                parameter.mul_(8)  # logits of a few units, so that 1e-4 means something
    return model


def quantize(
    model: PreTrainedModel,
    weights: QuantSpec,
    inputs: QuantSpec | None = None,
    within: str = "layers",
    observe: type[Observer] = MinMax,
) -> PreTrainedModel:
    """Round the linear layers whose path contains `within`; static inputs get the range [-3, 4]."""
    for name, layer in list(model.named_modules()):
        if type(layer) is not nn.Linear or within not in name:
            continue
        observer = observe(weights)
        observer.update(layer.weight.detach())
        quantized = QuantLinear(layer, weights, inputs)
        quantized.set_weight(QuantizedTensor.from_range(layer.weight, *observer.range(), weights))
        if inputs is not None and not inputs.dynamic:
            low, high = torch.tensor([-3.0, 4.0], dtype=layer.weight.dtype)
            quantized.input_quantizer.set_range(low, high)
        model.set_submodule(name, quantized)
    return model


def export(model: PreTrainedModel, folder: Path, exporter: type[Exporter] = CompressedTensors) -> None:
    exporter().export(model, _task(model), [], folder)


def verify(
    model: PreTrainedModel, folder: Path, exporter: type[Exporter] = CompressedTensors
) -> Verification:
    return exporter().verify(model, _task(model), [], folder)


def read_back(model: PreTrainedModel, folder: Path, exporter: type[Exporter] = CompressedTensors) -> float:
    """The largest difference between the weights in the files and the model's."""
    return verify(model, folder, exporter).largest_difference


def logits(model: nn.Module) -> Tensor:
    tokens = torch.randint(0, 128, (2, 17), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        return model(tokens).logits.float()


def difference(one: nn.Module, other: nn.Module) -> float:
    """The largest difference of two models' logits, as a share of the largest logit."""
    expected = logits(other)
    return float((logits(one) - expected).abs().max() / expected.abs().max())


def load(folder: Path, **options: Any) -> PreTrainedModel:
    """The model that transformers makes of an export, which it must take for complete."""
    model, report = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True, **options)
    assert not any(report[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    return model.eval()


def _task(model: PreTrainedModel) -> SimpleNamespace:
    return SimpleNamespace(save_assets=lambda at: model.config.to_json_file(at / "config.json"))
