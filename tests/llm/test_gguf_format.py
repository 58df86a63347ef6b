"""Exported GGUF files: what they hold, and that transformers loads them with the model's logits."""

import gguf
import numpy as np
import pytest
import tiny_lm
import torch
from tiny_gguf import (
    BLOCKS,
    FILE,
    Q4_0,
    Q4_0_SIGNED,
    Q4_1,
    Q8_0,
    export,
    load,
    logits,
    quantized,
    verify,
    with_exact_minima,
)
from tiny_llama import quantize
from transformers import AutoConfig

import ptqcore
from ptqcore import QuantSpec, Recipe

GRIDS = {"Q4_0": Q4_0, "Q4_0-signed": Q4_0_SIGNED, "Q4_1": Q4_1, "Q8_0": Q8_0}
TOLERANCE = 1e-5
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 32.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}


def assert_loads_equal(model, folder, **options):
    export(model, folder)
    verification = verify(model, folder)
    assert verification.largest_difference == 0.0
    loaded = load(folder, **options)
    assert (logits(loaded) - logits(model)).abs().max() <= TOLERANCE
    return loaded, verification


def fields(folder):
    return {key: field.contents() for key, field in gguf.GGUFReader(folder / FILE).fields.items()}


def tensors(folder):
    return {tensor.name: tensor for tensor in gguf.GGUFReader(folder / FILE).tensors}


@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize("architecture", ["llama", "mistral", "qwen2", "qwen3"])
def test_transformers_loads_a_file_with_the_logits_of_the_quantized_model(architecture, grid, tmp_path):
    model = quantized(architecture, GRIDS[grid])
    model = with_exact_minima(model) if grid == "Q4_1" else model
    loaded, _ = assert_loads_equal(model, tmp_path)
    assert loaded.config.tie_word_embeddings == model.config.tie_word_embeddings


@pytest.mark.parametrize("tied", [False, True])
def test_an_output_layer_is_written_only_if_it_is_not_the_embedding(tied, tmp_path):
    loaded, _ = assert_loads_equal(quantized(tie_word_embeddings=tied), tmp_path)
    assert ("output.weight" in tensors(tmp_path)) == (not tied)
    assert (loaded.lm_head.weight.data_ptr() == loaded.model.embed_tokens.weight.data_ptr()) == tied


def test_an_output_layer_may_be_quantized_and_no_longer_be_the_embedding(tmp_path):
    model = quantize(tiny_lm.build("llama", tie_word_embeddings=True), Q8_0, within="lm_head")
    assert_loads_equal(model, tmp_path)
    kinds = {name: tensor.tensor_type.name for name, tensor in tensors(tmp_path).items()}
    assert kinds["output.weight"] == "Q8_0"
    assert kinds["token_embd.weight"] == "F32"


@pytest.mark.parametrize("grouping", [{"group_size": 64}, {"granularity": "channel", "group_size": None}])
def test_larger_groups_repeat_their_scale(grouping, tmp_path):
    spec = QuantSpec.model_validate(BLOCKS | {"bits": 4} | grouping)
    assert_loads_equal(quantized(spec=spec), tmp_path)


def test_every_layer_is_written_by_its_own_grid(tmp_path):
    model = quantize(quantize(tiny_lm.build("llama"), Q8_0, within="self_attn"), Q4_0, within="mlp.up_proj")
    assert_loads_equal(model, tmp_path)
    kinds = {name: tensor.tensor_type.name for name, tensor in tensors(tmp_path).items()}
    assert kinds["blk.1.attn_v.weight"] == "Q8_0"
    assert kinds["blk.1.ffn_up.weight"] == "Q4_0"
    assert kinds["blk.1.ffn_down.weight"] == kinds["output.weight"] == "F32"


@pytest.mark.parametrize(("dtype", "kind"), [(torch.float16, "F16"), (torch.bfloat16, "BF16")])
def test_the_weights_of_a_model_in_half_precision_load_unchanged(dtype, kind, tmp_path):
    model = quantize(tiny_lm.build("llama").to(dtype), Q4_0)
    export(model, tmp_path)
    assert verify(model, tmp_path).largest_difference == 0.0
    for name, parameter in load(tmp_path, dtype=dtype).named_parameters():
        assert torch.equal(parameter, model.get_submodule(name.removesuffix(".weight")).weight)
    kinds = {name: tensor.tensor_type.name for name, tensor in tensors(tmp_path).items()}
    assert (kinds["token_embd.weight"], kinds["output_norm.weight"]) == (kind, "F32")


def test_the_rows_of_a_llamas_queries_and_keys_are_interleaved_halves(tmp_path):
    model = quantize(tiny_lm.build(), Q4_0, within="mlp")
    export(model, tmp_path)
    stored = tensors(tmp_path)
    attention = model.model.layers[1].self_attn
    # Two heads of 16 rows: 0, 8, 1, 9, … 7, 15, then 16, 24, …
    halves = [row for first in range(8) for row in (first, first + 8)]
    order = halves + [16 + row for row in halves]
    assert np.array_equal(
        stored["blk.1.attn_k.weight"].data, attention.k_proj.weight.detach().numpy()[order]
    )
    assert np.array_equal(stored["blk.1.attn_v.weight"].data, attention.v_proj.weight.detach().numpy())


def test_the_rows_of_a_qwen_stay_in_order(tmp_path):
    model = quantize(tiny_lm.build("qwen2"), Q4_0, within="mlp")
    export(model, tmp_path)
    key = model.model.layers[0].self_attn.k_proj
    assert np.array_equal(tensors(tmp_path)["blk.0.attn_k.weight"].data, key.weight.detach().numpy())
    assert np.array_equal(tensors(tmp_path)["blk.0.attn_k.bias"].data, key.bias.detach().numpy())


def test_the_metadata_is_that_of_the_configuration(tmp_path):
    export(quantized("llama", Q8_0, rms_norm_eps=3e-5, head_dim=32), tmp_path)
    found = fields(tmp_path)
    assert found["general.architecture"] == "llama"
    assert found["general.file_type"] == gguf.LlamaFileType.MOSTLY_Q8_0
    assert found["llama.attention.layer_norm_rms_epsilon"] == np.float32(3e-5)
    expected = {
        "context_length": tiny_lm.POSITIONS,
        "embedding_length": 64,
        "block_count": 3,
        "feed_forward_length": 128,
        "attention.head_count": 4,
        "attention.head_count_kv": 2,
        "attention.key_length": 32,
        "attention.value_length": 32,
        "rope.dimension_count": 32,
        "rope.freq_base": 10000.0,
        "vocab_size": tiny_lm.VOCABULARY,
    }
    assert {key: found[f"llama.{key}"] for key in expected} == expected


class TestWhatTransformersNeedsToBeTold:
    """It reads these settings from a file otherwise than llama.cpp; with the configuration it is right."""

    def test_scaled_rotary_frequencies_are_factors_beside_the_weights(self, tmp_path):
        model = quantized(rope_parameters=LLAMA3)
        _, verification = assert_loads_equal(model, tmp_path, config=model.config)
        wavelengths = [2 * np.pi * 500000.0 ** (i / 8) for i in range(8)]
        # Llama 3: waves shorter than 64/4 stay, those longer than 64/1 are 32 times longer.
        expected = [1.0 if wave < 16 else 32.0 for wave in wavelengths if wave < 16 or wave > 64]
        found = tensors(tmp_path)["rope_freqs.weight"].data
        clear = [not 16 <= wave <= 64 for wave in wavelengths]
        assert np.allclose(found[clear], expected)
        assert any("rope_parameters" in note and "config=" in note for note in verification.notes)

    def test_a_qwen3_with_heads_of_another_size_than_128(self, tmp_path):
        model = quantized("qwen3", head_dim=16)
        _, verification = assert_loads_equal(model, tmp_path, config=model.config)
        assert any("head_dim 128 where the model has 16" in note for note in verification.notes)

    def test_the_biases_of_a_llama_whose_order_is_that_of_the_rows(self, tmp_path):
        model = quantized(attention_bias=True, mlp_bias=True)
        _, verification = assert_loads_equal(model, tmp_path, config=model.config)
        assert any("biases" in note for note in verification.notes)

    def test_nothing_else(self, tmp_path):
        model = quantized()
        export(model, tmp_path)
        assert verify(model, tmp_path).notes == ()


def test_the_stated_context_ends_with_the_sliding_window(tmp_path):
    model = quantized("mistral")
    loaded, verification = assert_loads_equal(model, tmp_path)
    assert fields(tmp_path)["llama.context_length"] == model.config.sliding_window == 8
    assert any("context of 8" in note for note in verification.notes)
    beyond = (logits(loaded, length=9) - logits(model, length=9)).abs().amax(-1)
    assert beyond[:, :8].max() <= TOLERANCE < beyond[:, 8].min()


def test_minima_that_float16_cannot_hold_are_said_to_shift_weights(tmp_path):
    model = quantized(spec=Q4_1)
    export(model, tmp_path)
    verification = verify(model, tmp_path)
    assert verification.largest_difference == 0.0
    loaded, largest = load(tmp_path), 0.0
    for name, parameter in loaded.named_parameters():
        if "proj" in name:
            weight = model.get_submodule(name.removesuffix(".weight")).weight
            largest = max(largest, (parameter - weight).abs().max().item())
    assert any(f"by up to {largest:.2g}, " in note for note in verification.notes)


def test_the_same_model_gives_the_same_bytes(tmp_path):
    for name in ("one", "other"):
        (tmp_path / name).mkdir()
        export(quantized(), tmp_path / name)
    assert (tmp_path / "one" / FILE).read_bytes() == (tmp_path / "other" / FILE).read_bytes()
    assert [path.name for path in (tmp_path / "one").iterdir()] == [FILE]


def test_a_configuration_may_be_read_from_the_file_alone(tmp_path):
    export(quantized("qwen3"), tmp_path)
    read = AutoConfig.from_pretrained(tmp_path, gguf_file=FILE)
    assert (read.model_type, read.num_key_value_heads, read.tie_word_embeddings) == ("qwen3", 2, True)


def test_a_run_exports_a_file_with_the_logits_of_its_artifact(tmp_path):
    text = tiny_lm.write_text(tmp_path / "text.txt", 600)
    options = {"model": str(tiny_lm.save(tmp_path / "model")), "text": str(text), "calibration": str(text)}
    small = {"window": 32, "calibration_window": 32, "calibration_samples": 2}
    recipe = {
        "name": "tiny",
        "task": {"kind": "causal-lm"} | options | small,
        "quant": {"weights": Q4_0_SIGNED.model_dump()},
        "steps": ["round"],
        "export": ["gguf"],
    }
    record = ptqcore.quantize(Recipe.model_validate(recipe), "llm", tmp_path / "out")
    assert record.exports["gguf"].verified
    exported = load(tmp_path / "out" / "exports" / "gguf")
    assert (logits(exported) - logits(ptqcore.load(tmp_path / "out"))).abs().max() <= TOLERANCE
