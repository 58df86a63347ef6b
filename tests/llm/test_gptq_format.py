"""GPTQ files against words worked out by hand, a reader that goes number by number, and OpenVINO's."""

import json
import re
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from openvino.frontend.pytorch import gptq as openvino_gptq
from plain_loader import gptq_weight, load_plain, random_layer
from safetensors.torch import load_file
from tiny_llama import GROUP, Q_PROJ, export, quantize, read_back, tiny_llama, verify
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, GPTQConfig, LlamaConfig

from ptq_llm.gptq_format import GPTQ, GPTQv2
from ptqcore import QuantSpec, __version__

INT4 = QuantSpec(bits=4, scale_dtype="float16", **GROUP)
UINT4 = INT4.model_copy(update={"symmetric": False})
EXPORTER = {1: GPTQ, 2: GPTQv2}


def signed(words: list[int]) -> list[int]:
    return [word - 2**32 if word >= 2**31 else word for word in words]


def logits(model: nn.Module) -> Tensor:
    tokens = torch.randint(0, 128, (2, 17), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        return model(tokens).logits


ZERO_WORDS = {  # a symmetric grid has the zero point 2^(bits-1), which version 1 stores less one
    (2, 1): [0x55555555],
    (2, 2): [0xAAAAAAAA],
    (3, 1): [0xDB6DB6DB, 0xB6DB6DB6, 0x6DB6DB6D],
    (3, 2): [0x24924924, 0x49249249, 0x92492492],
    (4, 1): [0x77777777],
    (4, 2): [0x88888888],
    (8, 1): [0x7F7F7F7F],
    (8, 2): [0x80808080],
}


@pytest.mark.parametrize(("bits", "version"), ZERO_WORDS)
def test_zero_words_of_a_symmetric_grid(bits, version):
    words = signed(ZERO_WORDS[bits, version])
    layer = random_layer(QuantSpec(bits=bits, **GROUP), 32, 64)
    assert EXPORTER[version]().layer_tensors(layer)["qzeros"].tolist() == 2 * [bits // len(words) * words]


def test_a_word_holds_inputs_of_one_output_and_the_first_in_its_lowest_bits():
    layer = random_layer(INT4, 32, 32)
    layer.weight_codes[0, 0] = 0x76543210
    layer.weight_codes[1, 3] = signed([0xFEDCBA98])[0]
    assert layer.quantized_weight.codes[0, :8].tolist() == [0, 1, 2, 3, 4, 5, 6, 7]
    words = GPTQ().layer_tensors(layer)["qweight"]
    assert list(words.shape) == [4, 32]
    assert words[0, 0] == 0x76543210
    assert words[3, 1] == signed([0xFEDCBA98])[0]


@pytest.mark.parametrize(
    ("spec", "shapes"),
    [
        (INT4, {"qweight": [8, 32], "qzeros": [2, 4], "scales": [2, 32], "g_idx": [64]}),
        (
            QuantSpec(bits=3, granularity="channel"),
            {"qweight": [6, 32], "qzeros": [1, 3], "scales": [1, 32], "g_idx": [64]},
        ),
    ],
)
def test_a_layers_tensors_have_the_documented_names_types_and_shapes(spec, shapes):
    tensors = GPTQ().layer_tensors(random_layer(spec, 32, 64))
    assert {name: list(tensor.shape) for name, tensor in tensors.items()} == shapes
    assert {name for name, tensor in tensors.items() if tensor.dtype == torch.int32} == {
        "qweight",
        "qzeros",
        "g_idx",
    }
    assert tensors["scales"].dtype == torch.float16
    size = spec.group_size or 64
    assert tensors["g_idx"].tolist() == [column // size for column in range(64)]


@given(
    bits=st.sampled_from([2, 3, 4, 8]),
    version=st.sampled_from([1, 2]),
    symmetric=st.booleans(),
    group_size=st.sampled_from([None, 16, 32, 64]),
    blocks=st.tuples(st.integers(1, 2), st.integers(1, 2)),
    seed=st.integers(0, 99),
)
@settings(max_examples=40, deadline=None)
def test_a_reader_that_goes_number_by_number_finds_the_weight(
    bits, version, symmetric, group_size, blocks, seed
):
    granularity = "channel" if group_size is None else "group"
    spec = QuantSpec(bits=bits, symmetric=symmetric, granularity=granularity, group_size=group_size)
    layer = random_layer(spec, 32 * blocks[0], 64 * blocks[1], seed, least_zero=2 - version)
    tensors = EXPORTER[version]().layer_tensors(layer)
    named = {f"layer.{name}": tensor.contiguous() for name, tensor in tensors.items()}
    assert torch.equal(gptq_weight(named, "layer", bits, version), layer.weight.double())


FORMATS = {
    "int4": (GPTQ, INT4),
    "int4-signed-scale": (GPTQ, INT4.model_copy(update={"signed_scale": True})),
    "int2": (GPTQ, INT4.model_copy(update={"bits": 2})),
    "int3-channel": (GPTQ, QuantSpec(bits=3, granularity="channel", scale_dtype="float16")),
    "int8": (GPTQv2, INT4.model_copy(update={"bits": 8})),
    "int4-asymmetric": (GPTQ, UINT4),
    "int3-asymmetric": (GPTQv2, UINT4.model_copy(update={"bits": 3})),
}


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("scheme", FORMATS)
def test_files_read_back_give_the_logits_of_the_model(scheme, tied, tmp_path):
    exporter, spec = FORMATS[scheme]
    model = quantize(tiny_llama(tied), spec)
    export(model, tmp_path, exporter)
    assert read_back(model, tmp_path, exporter) == 0.0
    loaded = load_plain(tmp_path, lambda t, name: gptq_weight(t, name, spec.bits, exporter.version))
    assert torch.equal(logits(loaded), logits(model))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_files_of_a_model_in_half_precision_read_back_bit_for_bit(dtype, tmp_path):
    model = quantize(tiny_llama(dtype=dtype), QuantSpec(bits=4, symmetric=False, **GROUP))
    export(model, tmp_path, GPTQv2)
    assert read_back(model, tmp_path, GPTQv2) == 0.0
    loaded = load_plain(tmp_path, lambda tensors, name: gptq_weight(tensors, name, 4, 2))
    assert torch.equal(logits(loaded), logits(model))


def test_the_report_says_what_engines_in_float16_round(tmp_path):
    for dtype, notes in ((torch.float16, 0), (torch.bfloat16, 1), (torch.float32, 1)):
        model = quantize(tiny_llama(dtype=dtype), INT4)
        export(model, tmp_path, GPTQ)
        found = verify(model, tmp_path, GPTQ).notes
        assert len(found) == notes
        assert all(
            str(dtype).removeprefix("torch.") in note and "11 binary digits" in note for note in found
        )


@pytest.mark.parametrize("spec", [INT4, UINT4], ids=["symmetric", "asymmetric"])
def test_openvino_reads_version_1_as_we_do(spec):
    """OpenVINO patches layers of GPTQModel: it needs their tensors and a few attributes."""
    layer = random_layer(spec, 64, 96, least_zero=1)
    theirs = nn.Module()
    theirs.QUANT_TYPE, theirs.bits, theirs.group_size, theirs.bias = "exllama", 4, 32, None
    theirs.forward = None
    for name, tensor in GPTQ().layer_tensors(layer).items():
        theirs.register_buffer(name, tensor.contiguous())
    model = nn.ModuleDict({"layer": theirs})
    model.config = SimpleNamespace(quantization_config=SimpleNamespace(sym=spec.symmetric))
    openvino_gptq.patch_model(model)
    assert torch.equal(theirs.forward(torch.eye(96)).T, layer.weight)


def exported_config(model, folder, exporter=GPTQ):
    export(model, folder, exporter)
    assert read_back(model, folder, exporter) == 0.0
    return json.loads((folder / "config.json").read_text())


@pytest.mark.parametrize(("version", "name"), [(1, "gptq"), (2, "gptq_v2")])
def test_config_json_is_the_tasks_with_the_documented_key(version, name, tmp_path):
    model = quantize(tiny_llama(tied=True), INT4)
    config = exported_config(model, tmp_path, EXPORTER[version])
    quantization = config.pop("quantization_config")
    assert quantization == {
        "quant_method": "gptq",
        "bits": 4,
        "group_size": 32,
        "sym": True,
        "desc_act": False,
        "lm_head": False,
        "format": name,
        "checkpoint_format": name,
        "meta": {"quantizer": [f"ptqcore:{__version__}"]},
    }
    assert json.loads((tmp_path / "quantize_config.json").read_text()) == quantization
    assert config == json.loads(model.config.to_json_string(use_diff=True))


def test_transformers_reads_the_quantization_config(tmp_path):
    spec = QuantSpec(bits=2, granularity="channel", symmetric=False, scale_dtype="float16")
    config = exported_config(quantize(tiny_llama(), spec), tmp_path, GPTQv2)
    read = GPTQConfig.from_dict(config["quantization_config"])
    assert (read.bits, read.group_size, read.sym, read.desc_act) == (2, -1, False, False)
    assert read.format == "gptq_v2"


MLP, ATTENTION = "model.layers.1.mlp", "model.layers.0.self_attn"


def test_mixed_bits_become_overrides_from_the_scheme_of_most_layers(tmp_path):
    model = quantize(tiny_llama(), INT4.model_copy(update={"bits": 8}), within=f"{MLP}.down")
    model = quantize(model, UINT4.model_copy(update={"group_size": 16}), within=ATTENTION)
    config = exported_config(quantize(model, INT4), tmp_path, GPTQv2)["quantization_config"]
    assert (config["bits"], config["group_size"], config["sym"]) == (4, 32, True)
    assert list(config["dynamic"].items()) == [
        (r"+:model\.layers\.0\.self_attn\.[^.]+$", {"bits": 4, "group_size": 16, "sym": False}),
        (r"+:model\.layers\.1\.mlp\.down_proj$", {"bits": 8, "group_size": 32, "sym": True}),
    ]
    assert "modules_in_block_to_quantize" not in config


def test_layers_in_full_precision_are_said_to_be_so_in_both_ways_that_readers_know(tmp_path):
    model = quantize(tiny_llama(), INT4, within="self_attn")
    config = exported_config(quantize(model, INT4, within=f"{MLP}.up"), tmp_path)["quantization_config"]
    kept = ["0.mlp.gate", "0.mlp.up", "0.mlp.down", "1.mlp.gate", "1.mlp.down"]
    escaped = [f"model.layers.{name}_proj".replace(".", r"\.") for name in kept]
    assert config["dynamic"] == {f"-:{name}$": {} for name in escaped}
    attention = [f"model.layers.{i}.self_attn.{kind}_proj" for i in range(2) for kind in "qkvo"]
    assert config["modules_in_block_to_quantize"] == [[*attention, f"{MLP}.up_proj"]]


def test_layers_that_vllm_joins_are_found_under_their_joint_name(tmp_path):
    """vLLM asks for qkv_proj and gate_up_proj, of which no file says anything."""
    eight = INT4.model_copy(update={"bits": 8})
    model = tiny_llama()
    for kind in ("q_proj", "k_proj", "v_proj"):
        quantize(model, eight, within=f"0.self_attn.{kind}")
    for kind in ("gate_proj", "up_proj"):
        quantize(model, eight, within=f"1.mlp.{kind}")
    config = exported_config(quantize(model, INT4), tmp_path)["quantization_config"]
    assert bits_in_vllm(config, f"{ATTENTION}.qkv_proj") == 8
    assert bits_in_vllm(config, f"{ATTENTION}.o_proj") == 4
    assert bits_in_vllm(config, f"{MLP}.gate_up_proj") == 8
    assert bits_in_vllm(config, f"{MLP}.down_proj") == 4
    assert bits_in_vllm(config, "model.layers.1.self_attn.qkv_proj") == 4


def bits_in_vllm(config, name):
    """The first pattern that matches the start of the name counts."""
    for pattern, overrides in config["dynamic"].items():
        assert pattern.startswith("+:")
        if re.match(pattern[2:], name):
            return overrides["bits"]
    return config["bits"]


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
    quantize(model, INT4)
    export(model, tmp_path, GPTQ)
    assert read_back(model, tmp_path, GPTQ) == 0.0
    assert torch.equal(
        load_file(tmp_path / "model.safetensors")[f"{Q_PROJ}.bias"], model.get_parameter(f"{Q_PROJ}.bias")
    )
    loaded = load_plain(tmp_path, lambda tensors, name: gptq_weight(tensors, name, 4, 1))
    assert torch.equal(logits(loaded), logits(model))
