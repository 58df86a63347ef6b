"""Language models and texts that leave steps nothing to divide by: all that is stored is finite."""

import itertools
import math

import pytest
import tiny_lm
import torch
from safetensors.torch import load_file, save_file

import ptqcore
from ptq_llm.asymmetric_calibration import corrections
from ptqcore import ModelError, RecipeError

LAYER = "model.layers.0."
STEPS = {
    "gptq": ["gptq"],
    "clip": ["asymmetric-calibration", "clip", "gptq"],
    "awq": ["awq", "gptq"],
    "smoothquant": ["smoothquant", "round"],
    "os-plus": ["os-plus", "round"],
    "reassemble": [{"reassemble": {"thresholds": 4}}, "round"],
    "rotate": ["rotate", "round"],
    "low-rank": ["low-rank"],
    "outlier-suppression": ["outlier-suppression", "round"],
    "hqq": ["hqq", "round"],
    "learned-scale": ["learned-scale", "round"],
    "learned-clip": ["learned-clip", "round"],
}
QUANT = {
    "weights": {"bits": 4, "granularity": "channel", "symmetric": False},
    "activations": {"bits": 8, "symmetric": False, "granularity": "token", "dynamic": True},
}


def _dead_inputs(tensors):
    tensors[f"{LAYER}input_layernorm.weight"][:5] = 0
    tensors[f"{LAYER}mlp.up_proj.weight"][3] = 0


def _no_input(tensors):
    tensors[f"{LAYER}post_attention_layernorm.weight"].zero_()


def _no_weights(tensors):
    for name in ("self_attn.v_proj", "mlp.down_proj"):
        tensors[f"{LAYER}{name}.weight"].zero_()


def _constant(tensors):
    tensors[f"{LAYER}mlp.gate_proj.weight"][2] = 0.01
    tensors[f"{LAYER}self_attn.o_proj.weight"].fill_(0.01)


def _one_outlier(tensors):
    tensors[f"{LAYER}input_layernorm.weight"][1] = 1e4


MODELS = {
    "as it is": lambda tensors: None,
    "dead inputs": _dead_inputs,
    "a norm that makes zeros": _no_input,
    "layers of zeros": _no_weights,
    "constant layers": _constant,
    "one enormous channel": _one_outlier,
}
TEXTS = {
    "few tokens": ("abcdefgh", 4, 2),
    "one token over and over": ("a" * 400, 32, 2),
    "letters": ("".join(map(chr, itertools.islice(itertools.cycle(range(97, 123)), 400))), 32, 4),
}


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Folders of damaged models, by name."""
    made = {}

    def folder(name):
        if name not in made:
            path = tiny_lm.save(tmp_path_factory.mktemp("model") / "llama", "llama", num_hidden_layers=1)
            tensors = load_file(path / "model.safetensors")
            MODELS[name](tensors)
            save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})
            made[name] = path
        return made[name]

    return folder


def quantize(folder, model, steps, text="letters", min_tokens=1):
    content, window, count = TEXTS[text]
    (folder / "calibration.txt").write_text(content)
    options = {"calibration": str(folder / "calibration.txt"), "calibration_window": window}
    chosen = tiny_lm.recipe(
        model,
        folder,
        QUANT | {"min_tokens": min_tokens},
        STEPS[steps],
        calibration_samples=count,
        **options,
    )
    return ptqcore.quantize(chosen, "llm", folder / "out")


def check(folder, record):
    """Everything stored and measured is a number."""
    for name, tensor in load_file(folder / "out/model.safetensors").items():
        assert not tensor.is_floating_point() or tensor.isfinite().all(), name
    assert all(math.isfinite(value) for value in record.after.values())
    assert all(math.isfinite(block.relative_error) for block in record.blocks)


@pytest.mark.parametrize("steps", STEPS)
@pytest.mark.parametrize("model", MODELS)
def test_degenerate_models(models, tmp_path, model, steps):
    check(tmp_path, quantize(tmp_path, models(model), steps))


@pytest.mark.parametrize("steps", STEPS)
@pytest.mark.parametrize("text", ["few tokens", "one token over and over"])
def test_texts_whose_grams_are_singular(models, tmp_path, text, steps):
    check(tmp_path, quantize(tmp_path, models("as it is"), steps, text))


def test_too_few_tokens_are_refused(models, tmp_path):
    with pytest.raises(ModelError, match=r"'model\.layers\.0.*' saw 8 calibration tokens, fewer"):
        quantize(tmp_path, models("as it is"), "gptq", "few tokens", min_tokens=16)
    assert not (tmp_path / "out/manifest.json").exists()


@pytest.mark.parametrize("key", ["calibration_samples", "calibration_window"])
def test_no_calibration_is_refused(models, tmp_path, key):
    settings = [f"task.{key}=0", f"task.model={models('as it is')}"]
    with pytest.raises(RecipeError, match=f"task.{key}"):
        ptqcore.find_recipe("w4a16", "llm", settings)


def test_a_layer_whose_inputs_are_all_zero_is_not_moved():
    weights = [torch.randn(3, 4), torch.randn(2, 4)]
    found = corrections(weights, torch.zeros(4, 4), torch.zeros(4, 4), 0.1)
    assert [tuple(change.shape) for change in found] == [(3, 4), (2, 4)]
    assert not any(change.any() for change in found)
