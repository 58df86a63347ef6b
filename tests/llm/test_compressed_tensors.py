"""Exported checkpoints load in transformers and give the logits of the model they were made from."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from tiny_llama import (
    FP8_TOKEN,
    GROUP,
    INT4,
    INT8,
    Q_PROJ,
    TOKEN,
    WEIGHT_ONLY,
    WITH_INPUTS,
    difference,
    export,
    load,
    quantize,
    read_back,
    tiny_llama,
)
from torch import nn
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedModel

from ptqcore import QuantSpec

# float32 leaves no room for differences: all of these were measured as 0.0.
TOLERANCE = 1e-4


def assert_loads_equal(model: PreTrainedModel, folder: Path, **options: Any) -> PreTrainedModel:
    export(model, folder)
    assert read_back(model, folder) == 0.0
    loaded = load(folder, **options)
    assert difference(loaded, model) <= TOLERANCE
    return loaded


@pytest.mark.parametrize("scheme", WEIGHT_ONLY)
def test_a_weight_only_checkpoint_loads_with_equal_logits(scheme, tmp_path):
    assert_loads_equal(quantize(tiny_llama(), WEIGHT_ONLY[scheme]), tmp_path)


@pytest.mark.parametrize("scheme", WITH_INPUTS)
def test_a_checkpoint_with_quantized_inputs_loads_with_equal_logits(scheme, tmp_path):
    assert_loads_equal(quantize(tiny_llama(), *WITH_INPUTS[scheme]), tmp_path)


@pytest.mark.parametrize("scheme", [(INT4, None), WITH_INPUTS["w8a8-static-asymmetric"]])
def test_a_tied_output_layer_is_tied_again(scheme, tmp_path):
    loaded = assert_loads_equal(quantize(tiny_llama(tied=True), *scheme), tmp_path)
    assert loaded.lm_head.weight.data_ptr() == loaded.model.embed_tokens.weight.data_ptr()


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_only_the_quantized_layers_are_quantized_when_loaded(tied, tmp_path):
    loaded = assert_loads_equal(quantize(tiny_llama(tied), INT4, within="mlp"), tmp_path)
    quantized = {name for name, module in loaded.named_modules() if hasattr(module, "quantization_scheme")}
    assert quantized == {
        f"model.layers.{i}.mlp.{kind}_proj" for i in range(2) for kind in ("gate", "up", "down")
    }
    tied_now = loaded.lm_head.weight.data_ptr() == loaded.model.embed_tokens.weight.data_ptr()
    assert tied_now == tied


def test_an_output_layer_of_its_own_may_be_quantized(tmp_path):
    loaded = assert_loads_equal(quantize(tiny_llama(), INT4, within=""), tmp_path)
    assert hasattr(loaded.lm_head, "quantization_scheme")


def test_config_json_is_the_tasks_with_the_documented_key(tmp_path):
    model = quantize(tiny_llama(tied=True), INT4)
    export(model, tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    weights = {"num_bits": 4, "type": "int", "symmetric": True}
    weights |= {"strategy": "group", "group_size": 32, "dynamic": False}
    group = {"targets": ["Linear"], "weights": weights}
    group |= {"input_activations": None, "output_activations": None}
    assert config.pop("quantization_config") == {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "quantization_status": "compressed",
        "global_compression_ratio": None,
        "kv_cache_scheme": None,
        "ignore": ["lm_head"],
        "config_groups": {"group_0": group},
    }
    assert config == json.loads(model.config.to_json_string(use_diff=True))


I8, I32, I64, F32, F8 = torch.int8, torch.int32, torch.int64, torch.float32, torch.float8_e4m3fn
LAYOUTS = {
    "pack-quantized": (
        (QuantSpec(bits=3, symmetric=False, **GROUP), None),
        {
            "weight_packed": (I32, [64, 6]),
            "weight_scale": (F32, [64, 2]),
            "weight_shape": (I64, [2]),
            "weight_zero_point": (I32, [6, 2]),
        },
    ),
    "int-quantized": (
        (INT8, QuantSpec(symmetric=False)),
        {
            "weight": (I8, [64, 64]),
            "weight_scale": (F32, [64, 1]),
            "input_scale": (F32, [1]),
            "input_zero_point": (I8, [1]),
        },
    ),
    "int-quantized asymmetric weights of 4 bits": (
        (QuantSpec(bits=4, symmetric=False, **GROUP), QuantSpec(**TOKEN)),
        {"weight": (I8, [64, 64]), "weight_scale": (F32, [64, 2]), "weight_zero_point": (I8, [64, 2])},
    ),
    "pack-quantized with one zero point": (
        (QuantSpec(bits=4, symmetric=False), None),
        {
            "weight_packed": (I32, [64, 8]),
            "weight_scale": (F32, [1]),
            "weight_shape": (I64, [2]),
            "weight_zero_point": (I8, [1]),
        },
    ),
    "float-quantized": (
        (QuantSpec(dtype="e4m3"), FP8_TOKEN),
        {"weight": (F8, [64, 64]), "weight_scale": (F32, [1])},
    ),
}


@pytest.mark.parametrize("name", LAYOUTS)
def test_a_layers_tensors_have_the_documented_names_types_and_shapes(name, tmp_path):
    scheme, expected = LAYOUTS[name]
    export(quantize(tiny_llama(tied=True), *scheme), tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    prefix = f"{Q_PROJ}."
    found = {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}
    assert {name: (value.dtype, list(value.shape)) for name, value in found.items()} == expected
    assert "lm_head.weight" not in tensors
    with safe_open(tmp_path / "model.safetensors", framework="pt") as file:
        assert file.metadata() == {"format": "pt"}


def test_int8_numbers_of_narrower_grids_are_the_grids_own(tmp_path):
    """w = (number − zero point) · scale with numbers from −2^(bits−1) on, worked out here by hand."""
    model = quantize(tiny_llama(), QuantSpec(bits=4, symmetric=False, **GROUP), QuantSpec(**TOKEN))
    export(model, tmp_path)
    stored = load_file(tmp_path / "model.safetensors")
    number, scale, zero = (
        stored[f"{Q_PROJ}.{key}"] for key in ("weight", "weight_scale", "weight_zero_point")
    )
    assert (number.min(), number.max()) == (-8, 7)
    weight = [
        [(int(number[o, i]) - int(zero[o, i // 32])) * float(scale[o, i // 32]) for i in range(64)]
        for o in range(64)
    ]
    assert torch.equal(torch.tensor(weight), model.get_submodule(Q_PROJ).weight)


def test_biases_are_kept_under_their_own_name(tmp_path):
    config = LlamaConfig(
        hidden_size=64,
        num_hidden_layers=1,
        num_attention_heads=4,
        intermediate_size=96,
        vocab_size=128,
        attention_bias=True,
    )
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    nn.init.normal_(model.get_parameter(f"{Q_PROJ}.bias"))
    assert_loads_equal(quantize(model, INT4), tmp_path)
