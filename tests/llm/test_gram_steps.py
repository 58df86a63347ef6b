"""Steps on Grams in whole runs: a tiny Llama from a folder to artifact and export."""

import math
from types import SimpleNamespace

import pytest
import tiny_lm
import torch

import ptqcore
from ptq_llm.gptq import GPTQ
from ptqcore import Recipe
from ptqcore.recipe import validate


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A model and its texts."""
    base = tmp_path_factory.mktemp("model")
    tiny_lm.save(base / "llama", "llama", num_hidden_layers=2)
    tiny_lm.write_text(base / "text.txt", 600, seed=0)
    tiny_lm.write_text(base / "calibration.txt", 1000, seed=1)
    return base


def recipe(folder, steps, weights=None, **others):
    weights = {"bits": 3, "granularity": "group", "group_size": 32, "symmetric": False} | (weights or {})
    task = {
        "kind": "causal-lm",
        "model": str(folder / "llama"),
        "text": str(folder / "text.txt"),
        "calibration": str(folder / "calibration.txt"),
        "window": 32,
        "max_windows": 8,
        "calibration_window": 64,
        "calibration_samples": 12,
    }
    data = {"name": "x", "task": task, "quant": {"weights": weights}, "steps": steps} | others
    return validate(Recipe, data)


@pytest.fixture(scope="module")
def finished(folder, tmp_path_factory):
    done = {}

    def run(*steps, **options):
        key = repr((steps, options))
        if key not in done:
            out = tmp_path_factory.mktemp("run") / "out"
            record = ptqcore.quantize(recipe(folder, list(steps), **options), "llm", out)
            done[key] = SimpleNamespace(record=record, folder=out)
        return done[key]

    return run


def bytes_of(run):
    return (run.folder / "model.safetensors").read_bytes()


def block_errors(run):
    return [block.relative_error for block in run.record.blocks]


SEQUENTIAL = {"gptq": {"true_sequential": True}}
MIXED = {"mixed-bits": {"average": 4.25}}  # 3 bits, and 32 + 8 for each 32 weights


@pytest.mark.parametrize("bits", [2, 3])
def test_each_step_of_the_chain_lowers_the_error_of_every_block(finished, bits):
    weights = {"bits": bits}
    runs = [finished(*steps, weights=weights) for steps in (["round"], ["clip", "round"], ["clip", "gptq"])]
    errors = [block_errors(run) for run in runs]
    assert all(a > b > c for a, b, c in zip(*errors, strict=True))
    kls = [run.record.after["kl_divergence"] for run in runs]
    assert kls[0] > kls[1] > kls[2]


def test_clip_and_gptq_beat_gptq_alone(finished):
    alone, both = finished("gptq"), finished("clip", "gptq")
    assert all(b < a for a, b in zip(block_errors(alone), block_errors(both), strict=True))


def test_every_layer_is_quantized_and_the_export_is_read_back(finished):
    run = finished("clip", "gptq", export=["compressed-tensors"])
    assert len(run.record.layers) == 14
    assert all(math.isfinite(layer.relative_error) for layer in run.record.layers)
    assert run.record.exports["compressed-tensors"].verified
    assert run.record.exports["compressed-tensors"].largest_difference == 0


def test_mixed_bits_in_the_same_size_have_less_error_than_three_everywhere(finished):
    uniform, mixed = finished("clip", "gptq"), finished(MIXED, "clip", "gptq")
    assert mixed.record.size_bytes["after"] <= uniform.record.size_bytes["after"] * 1.001
    assert sum(block_errors(mixed)) < sum(block_errors(uniform))
    assert len({layer.weights for layer in mixed.record.layers}) > 1


def test_mixed_widths_are_exported(finished):
    symmetric = {"symmetric": True}  # readers of packed zero points take one width for all layers
    run = finished(MIXED, "clip", "gptq", weights=symmetric, export=["compressed-tensors"])
    assert len({layer.weights for layer in run.record.layers}) > 1
    assert run.record.exports["compressed-tensors"].largest_difference == 0


def test_mixed_bits_with_one_width_is_the_run_without_it(finished):
    only = {"mixed-bits": {"average": 8, "bits": [3]}}
    assert bytes_of(finished(only, "clip", "gptq")) == bytes_of(finished("clip", "gptq"))


@pytest.mark.parametrize("steps", [("clip", SEQUENTIAL), (MIXED, "clip", "gptq"), ("hqq", "round")])
def test_the_same_recipe_gives_the_same_bytes(finished, folder, tmp_path, steps):
    again = tmp_path / "out"
    ptqcore.quantize(recipe(folder, list(steps)), "llm", again)
    assert (again / "model.safetensors").read_bytes() == bytes_of(finished(*steps))


def test_an_interrupted_run_of_mixed_bits_resumes_with_the_same_widths(
    finished, folder, tmp_path, monkeypatch
):
    chosen = recipe(folder, [MIXED, "clip", "gptq"])
    original = GPTQ.block

    def stop_at_the_second(step, block, calibration):
        if block.path.endswith(".1"):
            raise KeyboardInterrupt
        original(step, block, calibration)

    with monkeypatch.context() as patch:
        patch.setattr(GPTQ, "block", stop_at_the_second)
        with pytest.raises(KeyboardInterrupt):
            ptqcore.quantize(chosen, "llm", tmp_path / "out")
    ptqcore.quantize(chosen, "llm", tmp_path / "out", resume=True)
    assert (tmp_path / "out/model.safetensors").read_bytes() == bytes_of(finished(MIXED, "clip", "gptq"))


@pytest.mark.parametrize(
    "weights",
    [
        {"bits": 4, "symmetric": True, "signed_scale": True},
        {"bits": 4, "scale_dtype": "float16"},
        {"bits": 4, "group_size": 48},
        {"bits": 4, "granularity": "channel", "group_size": None},
        {"bits": 6, "granularity": "tensor", "group_size": None},
        {"dtype": "e4m3", "bits": 8, "symmetric": True, "granularity": "channel", "group_size": None},
    ],
    ids=["signed", "half scales", "ragged", "channel", "tensor", "e4m3"],
)
def test_every_grid_runs_and_beats_rounding(finished, weights):
    chain, rounding = finished("clip", "gptq", weights=weights), finished("round", weights=weights)
    assert sum(block_errors(chain)) < sum(block_errors(rounding))


def test_experts_have_grams_of_their_own(folder, tmp_path):
    """Each of the experts is quantized on the tokens that the router sends to it."""
    tiny_lm.save(tmp_path / "llama", "mixtral", num_hidden_layers=1)
    for text in ("text.txt", "calibration.txt"):
        (tmp_path / text).symlink_to(folder / text)
    errors = {}
    for steps in (["round"], ["clip", "gptq"]):
        record = ptqcore.quantize(recipe(tmp_path, steps), "llm", tmp_path / steps[-1])
        errors[steps[-1]] = {layer.path: layer.relative_error for layer in record.layers}
    experts = [path for path in errors["gptq"] if "experts" in path]
    assert len(experts) == 8
    assert all(errors["gptq"][path] < errors["round"][path] for path in experts)


def test_weights_in_half_precision_stay_so(folder, tmp_path):
    chosen = recipe(folder, ["clip", "gptq"])
    task = chosen.task.model_copy(update={"dtype": "bfloat16"})
    ptqcore.quantize(chosen.model_copy(update={"task": task}), "llm", tmp_path / "out")
    model = ptqcore.load(tmp_path / "out")
    assert model.model.layers[0].mlp.up_proj.weight.dtype == torch.bfloat16
