"""Mixtures of experts as checkpoints name them: exported, read back, and loaded by transformers."""

import json

import pytest
import tiny_llama
import tiny_lm
import torch
import zoo
from safetensors import safe_open
from transformers import AutoConfig, AutoModelForCausalLM, CompressedTensorsConfig

import ptqcore
from ptq_llm import models
from ptq_llm.checkpoint_names import stored_layers, stored_tensors
from ptq_llm.compressed_tensors import CompressedTensors
from ptq_llm.unify import unify
from ptqcore import ExportError, QuantLinear, QuantSpec

EXPORT = "exports/compressed-tensors"
MIXTURES = ("mixtral", "qwen3_moe", "deepseek_v3")
GROUP4 = {"weights": {"bits": 4, "granularity": "group", "group_size": 16}}
SCHEMES = {
    "int4-group": GROUP4,
    "int3-channel": {"weights": {"bits": 3, "granularity": "channel"}},
    "int8-channel": {"weights": {"bits": 8, "granularity": "channel"}},
    "fp8-channel": {"weights": {"dtype": "e4m3", "granularity": "channel"}},
    "fp8-tensor": {"weights": {"dtype": "e4m3", "granularity": "tensor"}},
}
PER_TOKEN = {"granularity": "token", "dynamic": True}


def run(name, quant, tmp_path, **model):
    folder = tiny_lm.save(tmp_path / "model", name, **model)
    chosen = tiny_lm.recipe(folder, tmp_path, quant, export=["compressed-tensors"])
    ptqcore.quantize(chosen, "llm", tmp_path / "out")
    return tmp_path / "out"


def load_export(folder, **options):
    model, report = AutoModelForCausalLM.from_pretrained(
        folder / EXPORT, output_loading_info=True, **options
    )
    assert not any(report[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    return model.eval()


def names_in(folder):
    with safe_open(folder / EXPORT / "model.safetensors", "pt") as file:
        return set(file.keys())


# Names and pieces


@pytest.mark.parametrize("name", MIXTURES)
def test_the_pieces_of_the_quantized_experts_are_those_of_the_float_checkpoint(name, tmp_path):
    """Dequantized piece by piece they are what transformers itself saves of the dequantized model."""
    model = zoo.build(name)
    unify(model)
    tiny_llama.quantize(model, QuantSpec(bits=4, granularity="group", group_size=16))
    layers = {path: layer for path, layer in model.named_modules() if isinstance(layer, QuantLinear)}
    dequantized = zoo.build(name)
    with torch.no_grad():
        for path, layer in layers.items():
            *parents, last = path.split(".")
            if last.isdigit():
                dequantized.get_parameter(".".join(parents))[int(last)] = layer.weight
            else:
                dequantized.get_parameter(f"{path}.weight").copy_(layer.weight)
    dequantized.save_pretrained(tmp_path)
    with safe_open(tmp_path / "model.safetensors", "pt") as file:
        saved = {key: file.get_tensor(key) for key in list(file.keys())}
    parts = stored_layers(model, layers)
    assert len(parts) > len(layers)  # gate and up are two pieces of one layer
    plain = ("embed_tokens.weight", "lm_head.weight", "norm.weight", ".gate.weight", "_bias")
    assert {f"{part}.weight" for part in parts} == {key for key in saved if not key.endswith(plain)}
    assert all(torch.equal(layer.weight, saved[f"{part}.weight"]) for part, layer in parts.items())


def test_layers_of_experts_come_first():
    model = zoo.build("deepseek_v3")
    unify(model)
    tiny_llama.quantize(model, QuantSpec(bits=8, granularity="channel"))
    layers = {path: layer for path, layer in model.named_modules() if isinstance(layer, QuantLinear)}
    parts = list(stored_layers(model, layers))
    assert [".experts." in part for part in parts] == [True] * (2 * 8 * 3) + [False] * (
        len(parts) - 2 * 8 * 3
    )


@pytest.mark.parametrize("name", ["llama", "gemma2", "falcon_new", "bert"])
def test_a_model_without_experts_keeps_its_names(name):
    model = zoo.build(name)
    unify(model)
    state = model.state_dict()
    assert stored_tensors(model, dict(state)).keys() == state.keys()


def test_mixtral_has_the_names_of_its_first_checkpoints(tmp_path):
    names = names_in(run("mixtral", GROUP4, tmp_path))
    experts = "model.layers.2.block_sparse_moe.experts.3"
    for projection in ("w1", "w2", "w3"):
        kinds = {f"{experts}.{projection}.weight_{kind}" for kind in ("packed", "scale", "shape")}
        assert kinds <= names
    assert "model.layers.0.block_sparse_moe.gate.weight" in names
    assert not any("gate_up_proj" in name for name in names)


@pytest.mark.parametrize("name", ["qwen3_moe", "deepseek_v3"])
def test_experts_have_a_gate_an_up_and_a_down_projection(name, tmp_path):
    names = names_in(run(name, GROUP4, tmp_path))
    for projection in ("gate_proj", "up_proj", "down_proj"):
        assert f"model.layers.1.mlp.experts.7.{projection}.weight_packed" in names
    assert not any("gate_up_proj" in name for name in names)


def test_the_router_is_named_among_what_is_left_alone(tmp_path):
    folder = run("mixtral", GROUP4, tmp_path)
    config = json.loads((folder / EXPORT / "config.json").read_text())["quantization_config"]
    assert {"lm_head", "model.layers.0.mlp.gate", "model.layers.0.block_sparse_moe.gate"} <= set(
        config["ignore"]
    )
    assert config["config_groups"]["group_0"]["targets"] == ["Linear"]


# Loaded by transformers


@pytest.mark.parametrize("dequantize", [False, True])
@pytest.mark.parametrize("scheme", SCHEMES)
def test_transformers_loads_the_export_with_the_logits_of_the_artifact(scheme, dequantize, tmp_path):
    folder = run("qwen3_moe", SCHEMES[scheme], tmp_path)
    options = {"quantization_config": CompressedTensorsConfig(dequantize=True)} if dequantize else {}
    exported, artifact = load_export(folder, **options), ptqcore.load(folder)
    assert (zoo.logits(exported) - zoo.logits(artifact)).abs().max() <= 1e-4
    assert (zoo.logits(exported) - zoo.logits(zoo.build("qwen3_moe"))).abs().max() > 1e-2


@pytest.mark.parametrize("name", ["mixtral", "deepseek_v3"])
def test_other_mixtures_load_too(name, tmp_path):
    folder = run(name, GROUP4, tmp_path)
    assert (zoo.logits(load_export(folder)) - zoo.logits(ptqcore.load(folder))).abs().max() <= 1e-4


def test_experts_without_a_gate(tmp_path):
    sizes = {"n_routed_experts": 4, "moe_intermediate_size": 32, "moe_shared_expert_intermediate_size": 32}
    sizes |= {"mamba_num_heads": 4, "mamba_head_dim": 16, "ssm_state_size": 16, "n_groups": 1}
    config = AutoConfig.for_model("nemotron_h", **(zoo._SHAPE | zoo._GROUPED | sizes))
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    model.save_pretrained(tmp_path / "model")
    tiny_lm.tokenizer().save_pretrained(tmp_path / "model")
    chosen = tiny_lm.recipe(tmp_path / "model", tmp_path, GROUP4, export=["compressed-tensors"])
    ptqcore.quantize(chosen, "llm", tmp_path / "out")
    found, expected = zoo.logits(load_export(tmp_path / "out")), zoo.logits(ptqcore.load(tmp_path / "out"))
    assert (found - expected).abs().max() <= 1e-4


def test_inputs_of_fp8_experts_may_be_quantized_by_token(tmp_path):
    """transformers leaves them in floating point: the weights alone are compared, by the run itself."""
    activations = {"activations": PER_TOKEN | {"dtype": "e4m3"}}
    folder = run("qwen3_moe", SCHEMES["fp8-channel"] | activations, tmp_path)
    exported, artifact = load_export(folder), ptqcore.load(folder)
    whole = exported.model.layers[0].mlp.experts.down_proj
    bank = artifact.model.layers[0].mlp.experts.down_proj
    assert all(torch.equal(one, layer.weight) for one, layer in zip(whole, bank, strict=True))


# What is refused


@pytest.mark.parametrize(
    ("quant", "sentence"),
    [
        (
            {"weights": GROUP4["weights"] | {"symmetric": False}},
            "with quant.weights.symmetric false: experts are read without zero points, set it to true",
        ),
        (
            SCHEMES["int8-channel"] | {"activations": PER_TOKEN},
            "with .*quant.activations.*experts are read packed, without quantized inputs",
        ),
        (
            SCHEMES["fp8-channel"] | {"activations": {"dtype": "e4m3", "granularity": "tensor"}},
            "with quant.activations.dynamic false: experts are read without the scale of their input",
        ),
    ],
)
def test_grids_that_no_reader_takes_for_experts(quant, sentence, tmp_path):
    with pytest.raises(ExportError, match=rf"expert model\.layers\.0\.mlp\.experts\.\w+\.0 {sentence}"):
        run("mixtral", quant, tmp_path)


def test_experts_left_in_full_precision(tmp_path):
    quant = GROUP4 | {"ignore": ["*.experts.down_proj.2"]}
    with pytest.raises(ExportError, match=r"experts\.down_proj\.2 in full precision: readers quantize all"):
        run("mixtral", quant, tmp_path)


def test_experts_on_different_grids():
    model = zoo.build("mixtral")
    unify(model)
    for within, bits in ((".down_proj.0", 4), ("layers", 8)):
        tiny_llama.quantize(model, QuantSpec(bits=bits, granularity="channel"), within=within)
    layers = {path: layer for path, layer in model.named_modules() if isinstance(layer, QuantLinear)}
    with pytest.raises(ExportError, match="on different grids: readers take one for all experts"):
        CompressedTensors().refuse(model, layers)


def test_experts_that_the_checkpoint_keeps_in_one_tensor(tmp_path):
    kinds = ["full_attention"] * 3
    shape = zoo._SHAPE | zoo._GROUPED | {"num_local_experts": 4, "num_experts_per_tok": 2}
    config = AutoConfig.for_model("gpt_oss", **shape, layer_types=kinds)
    AutoModelForCausalLM.from_config(config, dtype=torch.float32).save_pretrained(tmp_path / "model")
    tiny_lm.tokenizer().save_pretrained(tmp_path / "model")
    chosen = tiny_lm.recipe(tmp_path / "model", tmp_path, GROUP4, export=["compressed-tensors"])
    with pytest.raises(ExportError, match=r"keep model\.layers\.0\.mlp\.experts\.\w+ in one tensor"):
        ptqcore.quantize(chosen, "llm", tmp_path / "out")


@pytest.mark.parametrize("export", ["gptq", "awq"])
def test_other_formats_hold_no_experts(export, tmp_path):
    folder = tiny_lm.save(tmp_path / "model", "mixtral", hidden_size=128, intermediate_size=128)
    weights = {"bits": 4, "granularity": "group", "group_size": 64, "scale_dtype": "float16"}
    weights |= {"symmetric": export == "gptq"}
    chosen = tiny_lm.recipe(folder, tmp_path, {"weights": weights}, export=[export])
    with pytest.raises(ExportError, match=f"export {export} holds no experts, and model.layers.0"):
        ptqcore.quantize(chosen, "llm", tmp_path / "out")


@pytest.mark.parametrize("export", ["compressed-tensors", "gptq"])
def test_layers_that_readers_keep_as_conv1d(export, tmp_path):
    folder = tiny_lm.save(tmp_path / "model", "gpt2", hidden_size=128)
    weights = {"bits": 4, "granularity": "group", "group_size": 64, "scale_dtype": "float16"}
    chosen = tiny_lm.recipe(folder, tmp_path, {"weights": weights}, export=[export])
    with pytest.raises(ExportError, match=r"h\.0\.attn\.c_attn: readers have a Conv1D in its place"):
        ptqcore.quantize(chosen, "llm", tmp_path / "out")


@pytest.mark.parametrize("name", ["falcon_old", "falcon_new"])
def test_a_subclass_that_was_replaced_loads_dequantized(name, tmp_path):
    """Compressed it does not: transformers 5.23 asks Falcon's layers for the weight they have not yet."""
    folder = run(name, GROUP4, tmp_path)
    exported = load_export(folder, quantization_config=CompressedTensorsConfig(dequantize=True))
    assert (zoo.logits(exported) - zoo.logits(ptqcore.load(folder))).abs().max() <= 1e-4


def test_a_folder_of_old_names_loads_as_well(tmp_path):
    """What `save_pretrained` writes has the checkpoint's names: the same model comes back from them."""
    folder = tiny_lm.save(tmp_path, "mixtral")
    loaded = models.load(str(folder), torch.float32).model
    expected = zoo.build("mixtral")
    unify(expected)
    assert torch.equal(zoo.logits(loaded), zoo.logits(expected))
