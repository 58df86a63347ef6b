"""What transformers makes of compressed-tensors files beyond the plain case; defects of other tools."""

import copy
import json

import pytest
import tiny_lm
import torch
from compressed_tensors.compressors import BaseCompressor
from compressed_tensors.quantization import QuantizationScheme
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tiny_llama import (
    ASYMMETRIC,
    CHANNEL4,
    FP8,
    FP8_TOKEN,
    GROUP,
    INT4,
    INT8,
    Q_PROJ,
    TOKEN,
    WITH_INPUTS,
    difference,
    export,
    load,
    logits,
    quantize,
    read_back,
    tiny_llama,
)
from transformers import AutoModelForCausalLM, CompressedTensorsConfig

import ptqcore
from ptqcore import QuantLinear, QuantSpec

EXACT = 1e-4  # of the largest logit; in float32 all were measured as 0.0
TO_FLOAT = {"quantization_config": CompressedTensorsConfig(dequantize=True)}


def quantized_layers(model):
    return {name for name, module in model.named_modules() if isinstance(module, QuantLinear)}


def run(tmp_path, quant, steps=("round",), **model):
    """The artifact of a recipe with the export, and the folder of the latter."""
    folder = tiny_lm.save(tmp_path / "model", **model)
    recipe = tiny_lm.recipe(folder, tmp_path, quant, steps, ["compressed-tensors"])
    ptqcore.quantize(recipe, "llm", tmp_path / "out")
    return ptqcore.load(tmp_path / "out"), tmp_path / "out/exports/compressed-tensors"


# Defects of other tools, by the names that they have in our notes


@pytest.mark.parametrize("weights", ASYMMETRIC.values(), ids=ASYMMETRIC)
def test_f1_packed_zero_points_load_dequantized(weights, tmp_path):
    model = quantize(tiny_llama(), weights)
    export(model, tmp_path)
    assert read_back(model, tmp_path) == 0.0
    assert difference(load(tmp_path, **TO_FLOAT), model) <= EXACT


def test_f1_packed_zero_points_are_of_another_shape_than_the_compressed_mode_expects(tmp_path):
    """If this fails, a newer transformers loads them, and what the documentation says can go."""
    export(quantize(tiny_llama(), ASYMMETRIC["group"]), tmp_path)
    with pytest.raises(RuntimeError, match="ignore_mismatched_sizes"):
        load(tmp_path)
    _, report = AutoModelForCausalLM.from_pretrained(
        tmp_path, output_loading_info=True, ignore_mismatched_sizes=True
    )
    layers = quantized_layers(quantize(tiny_llama(), INT4))
    refused = {name for name, _, _ in report["mismatched_keys"]}
    assert refused == {f"{layer}.weight_zero_point" for layer in layers}


def test_d5_dynamic_fp8_per_channel_is_exported(tmp_path):
    weights = {"dtype": "e4m3", "granularity": "channel"}
    artifact, folder = run(tmp_path, {"weights": weights, "activations": TOKEN | {"dtype": "e4m3"}})
    assert difference(load(folder), artifact) <= EXACT
    group = json.loads((folder / "config.json").read_text())["quantization_config"]["config_groups"]
    said = group["group_0"]["weights"]["strategy"], group["group_0"]["input_activations"]["strategy"]
    assert said == ("channel", "token")


def test_d6_the_config_has_the_key_that_is_read_and_weights_have_their_shape(tmp_path):
    artifact, folder = run(tmp_path, {})
    config = json.loads((folder / "config.json").read_text())
    assert "quantization_config" in config
    assert "compression_config" not in config
    with safe_open(folder / "model.safetensors", "pt") as file:
        for layer in quantized_layers(artifact):
            shape = list(artifact.get_submodule(layer).weight.shape)
            assert file.get_tensor(f"{layer}.weight_shape").tolist() == shape
    assert difference(load(folder), artifact) <= EXACT


# Both ways to load


@pytest.mark.parametrize("scheme", WITH_INPUTS)
def test_dequantized_weights_are_the_artifacts_and_inputs_stay_as_they_are(scheme, tmp_path):
    model = quantize(tiny_llama(), *WITH_INPUTS[scheme])
    export(model, tmp_path)
    loaded, report = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True, **TO_FLOAT)
    assert not report["missing_keys"] | report["mismatched_keys"]
    assert all(key.rpartition(".")[2].startswith("input_") for key in report["unexpected_keys"])
    for name in quantized_layers(model):
        model.get_submodule(name).input_quantizer = None
    assert difference(loaded.eval(), model) <= EXACT


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("weights", [INT4, FP8])
def test_a_weight_only_checkpoint_in_half_precision_loads_with_equal_logits(weights, dtype, tmp_path):
    model = quantize(tiny_llama(dtype=dtype), weights)
    export(model, tmp_path)
    loaded = load(tmp_path)
    assert loaded.dtype == dtype
    assert difference(loaded, model) <= EXACT


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("scheme", [(INT8, QuantSpec(**TOKEN)), (FP8, FP8_TOKEN)])
def test_weights_beside_quantized_inputs_load_unchanged_in_half_precision(scheme, dtype, tmp_path):
    # Logits differ: compressed-tensors divides inputs by their scales in half precision, we in float32.
    model = quantize(tiny_llama(dtype=dtype), *scheme)
    export(model, tmp_path)
    assert read_back(model, tmp_path) == 0.0
    loaded = load(tmp_path)
    logits(loaded)  # weights are decompressed by the first forward pass
    for name in quantized_layers(model):
        assert torch.equal(loaded.get_submodule(name).weight, model.get_submodule(name).weight)


# Several grids in one model

W3, A4 = QuantSpec(bits=3, granularity="channel"), QuantSpec(bits=4, **TOKEN)
MIXED = {
    "bits": ((W3, None), "pack-quantized"),
    "formats": ((INT8, QuantSpec(**TOKEN)), "mixed-precision"),
    "asymmetric-inputs": ((W3, QuantSpec(symmetric=False, **TOKEN)), "mixed-precision"),
}


@pytest.mark.parametrize(("attention", "format_name"), MIXED.values(), ids=MIXED)
def test_several_schemes_become_groups_that_name_their_layers(attention, format_name, tmp_path):
    model = quantize(quantize(tiny_llama(), INT4, within="mlp"), *attention, within="self_attn")
    export(model, tmp_path)
    assert read_back(model, tmp_path) == 0.0
    assert difference(load(tmp_path), model) <= EXACT
    config = json.loads((tmp_path / "config.json").read_text())["quantization_config"]
    targets = [target for group in config["config_groups"].values() for target in group["targets"]]
    assert config["format"] == format_name
    assert len(config["config_groups"]) == 2
    assert sorted(targets) == sorted(quantized_layers(model))


@pytest.mark.parametrize("activations", [None, A4], ids=["packed", "int8"])
def test_every_layer_may_have_its_own_width(activations, tmp_path):
    model = tiny_llama()
    for bits, layer in zip(
        (2, 3, 4, 5, 6, 7, 8), ("q_", "k_", "v_", "o_", "gate", "up", "down"), strict=True
    ):
        quantize(model, QuantSpec(bits=bits, **GROUP), activations, within=layer)
    export(model, tmp_path)
    assert read_back(model, tmp_path) == 0.0
    assert difference(load(tmp_path), model) <= EXACT


def test_first_and_last_layers_may_have_other_widths(tmp_path):
    quant = {"first_last_bits": 8, "weights": {"bits": 3, "granularity": "channel"}}
    artifact, folder = run(tmp_path, quant)
    bits = {artifact.get_submodule(name).weight_spec.bits for name in quantized_layers(artifact)}
    assert bits == {3, 8}
    assert difference(load(folder), artifact) <= EXACT


# Transforms


def test_transformers_passes_over_transforms_of_inputs(tmp_path):
    """Why online rotations are refused. If this fails, a newer transformers applies them: hold them."""
    rotation, _ = torch.linalg.qr(torch.randn(96, 96, generator=torch.Generator().manual_seed(0)).double())
    model = tiny_llama()
    with torch.no_grad():
        for layer in model.model.layers:
            layer.mlp.down_proj.weight.copy_(layer.mlp.down_proj.weight.double() @ rotation)
    model = quantize(model, CHANNEL4)
    export(model, tmp_path)
    wanted = copy.deepcopy(model)
    for layer in wanted.model.layers:
        layer.mlp.down_proj.register_forward_pre_hook(lambda _, args: args[0] @ rotation.float())

    apply = [{"targets": ["re:.*down_proj$"], "location": "input"}]
    scheme = {"type": "random-matrix", "apply": apply}
    config = json.loads((tmp_path / "config.json").read_text())
    config["quantization_config"]["transform_config"] = {"config_groups": {"R4": scheme}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    tensors = load_file(tmp_path / "model.safetensors")
    matrices = {f"model.layers.{i}.mlp.down_proj.R4_input.weight": rotation.float() for i in range(2)}
    stored = {name: matrix.contiguous().clone() for name, matrix in matrices.items()}
    save_file(tensors | stored, tmp_path / "model.safetensors", metadata={"format": "pt"})

    loaded, report = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert report["unexpected_keys"] == set(matrices)
    assert difference(loaded.eval(), wanted) > 0.1
    assert difference(loaded, model) <= EXACT


def test_tensors_are_those_that_the_library_itself_compresses_to(tmp_path):
    """Its compressor, given the dequantized weight and the grid, makes the same codes and zero points."""
    schemes = {name: (spec, None) for name, spec in ASYMMETRIC.items()} | WITH_INPUTS
    for name, (weights, inputs) in schemes.items():
        folder = tmp_path / name
        folder.mkdir()
        model = quantize(tiny_llama(), weights, inputs)
        export(model, folder)
        config = json.loads((folder / "config.json").read_text())["quantization_config"]
        tensors = load_file(folder / "model.safetensors")
        ours = {key.removeprefix(f"{Q_PROJ}."): t for key, t in tensors.items() if key.startswith(Q_PROJ)}
        layer = model.get_submodule(Q_PROJ)
        state = {"weight": layer.weight, "weight_scale": ours["weight_scale"]}
        if not weights.symmetric:
            zero_point = (layer.quantized_weight.zero_point - weights.middle).to(torch.int8)
            state["weight_zero_point"] = (
                zero_point.flatten() if weights.granularity == "tensor" else zero_point
            )
        compressor = BaseCompressor.get_value_from_registry(config["format"])
        theirs = compressor.compress(state, QuantizationScheme(**config["config_groups"]["group_0"]))
        for key, tensor in theirs.items():
            assert torch.equal(tensor.float(), ours[key].float()), (name, key)
