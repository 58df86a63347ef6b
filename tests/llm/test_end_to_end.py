"""Tiny models from a folder to artifact, export, metrics and report; and interrupted runs that go on."""

import json
import math
import os
import shutil
import subprocess
import sys
from functools import cache
from pathlib import Path
from types import SimpleNamespace

import pytest
import tiny_llama
import tiny_lm
import torch
import yaml
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, CompressedTensorsConfig

import ptqcore
from ptqcore import MSE, ArtifactError, MinMax, QuantLinear, artifact
from ptqcore.plugin import discover
from ptqcore.recipe import read_recipe
from ptqcore.rounding import Round

ROOT = Path(__file__).resolve().parents[2]
EXPORT = "exports/compressed-tensors"
# A symmetric grid in float32 leaves no room for differences: all of these were measured as 0.0.
TOLERANCE = 1e-4

RECIPES = {"w8a8": 8, "fp8": 8, "w4a16": 4, "w3a16": 3, "w2a16": 2}  # name → bits of a weight
ASYMMETRIC = ("quant.weights.symmetric=false", "quant.weights.signed_scale=false")


def recipe(name, model, texts, *overrides):
    """The grids of a shipped recipe for a tiny model, rounded to nearest: windows of 32 tokens, groups of
    32 weights."""
    small = [
        f"task.model={model}",
        f"task.text={texts / 'text.txt'}",
        f"task.calibration={texts / 'calibration.txt'}",
        "task.window=32",
        "task.max_windows=8",
        "task.calibration_window=32",
        "task.calibration_samples=4",
        "steps=[round]",
    ]
    small += ["quant.weights.group_size=32"] if "a16" in name else []
    return read_recipe(discover().recipe_file(name, "llm"), [*small, *overrides])


def quantized_in_memory(chosen, architecture="llama"):
    """The model rounded by a loop over its layers, without calibration."""
    quant = chosen.quant
    inputs = None if quant.activations is None else quant.activations.spec
    observe = {"minmax": MinMax, "mse": MSE}[quant.weights.observer.name]
    return tiny_llama.quantize(tiny_lm.build(architecture), quant.weights.spec, inputs, observe=observe)


def make_texts(folder):
    tiny_lm.write_text(folder / "text.txt", 600, seed=0)
    tiny_lm.write_text(folder / "calibration.txt", 400, seed=1)
    return folder


@pytest.fixture(scope="module")
def texts(tmp_path_factory):
    return make_texts(tmp_path_factory.mktemp("texts"))


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Architecture → its folder."""
    base = tmp_path_factory.mktemp("models")
    return cache(lambda architecture: tiny_lm.save(base / architecture, architecture))


@pytest.fixture(scope="module")
def finished(tmp_path_factory, models, texts):
    """Recipe, architecture, overrides → a finished run: record, recipe, and folder, which is only read."""

    @cache
    def run(name, architecture="llama", *overrides):
        folder = tmp_path_factory.mktemp("run") / "out"
        chosen = recipe(name, models(architecture), texts, *overrides)
        record = ptqcore.quantize(chosen, "llm", folder)
        return SimpleNamespace(record=record, folder=folder, recipe=chosen)

    return run


def logits(model):
    tokens = torch.randint(0, tiny_lm.VOCABULARY, (3, 40), generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        return model(input_ids=tokens, use_cache=False).logits


def load_export(folder, **options):
    model, report = AutoModelForCausalLM.from_pretrained(
        folder / EXPORT, output_loading_info=True, **options
    )
    assert not any(report[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    return model.eval()


def weights_of(folder):
    return (folder / "model.safetensors").read_bytes()


# What a run leaves behind


@pytest.mark.parametrize("name", RECIPES)
def test_the_metrics_file_has_the_promised_keys(finished, name):
    folder = finished(name).folder
    found = json.loads((folder / "metrics.json").read_text())
    assert found.keys() == {
        "plugin",
        "recipe",
        "before",
        "after",
        "size_bytes",
        "coverage",
        "seconds",
        "peak_memory_bytes",
        "exports",
    }
    assert (found["plugin"], found["recipe"]) == ("llm", name)
    assert found["before"].keys() == found["after"].keys()
    assert found["before"].keys() == {"perplexity", "kl_divergence", "top1_agreement"}
    assert all(math.isfinite(value) for part in ("before", "after") for value in found[part].values())
    assert found["before"]["kl_divergence"] == 0.0
    assert found["before"]["top1_agreement"] == 1.0
    assert found["after"]["kl_divergence"] > 0
    assert found["size_bytes"].keys() == {"before", "after"}
    assert found["seconds"] > 0
    assert found["peak_memory_bytes"] > 2**20
    export = found["exports"]["compressed-tensors"]
    assert export == {
        "path": str(folder / EXPORT),
        "verified": True,
        "largest_difference": 0.0,
        "engines": [],
        "notes": [],
    }


@pytest.mark.parametrize("name", RECIPES)
def test_sizes_are_those_of_the_full_precision_tensors_and_of_the_artifact(finished, models, name):
    found = finished(name).record.size_bytes
    model = tiny_lm.build()
    assert found["before"] == 4 * sum(parameter.numel() for parameter in model.parameters())
    assert found["after"] == (finished(name).folder / "model.safetensors").stat().st_size
    inside = sum(p.numel() for n, p in model.named_parameters() if ".layers." in n and p.ndim == 2)
    packed = found["before"] - 4 * inside + inside * RECIPES[name] // 8
    scales = 4 * inside // 32
    assert packed < found["after"] < packed + scales + 10_000


def test_an_output_holds_the_artifact_the_export_and_the_report_and_nothing_else(finished):
    folder = finished("w8a8").folder
    assert {entry.name for entry in folder.iterdir()} == {
        "assets",
        "exports",
        "manifest.json",
        "metrics.json",
        "model.safetensors",
        "recipe.yaml",
        "report.html",
    }
    assert (folder / "report.html").read_text().lstrip().lower().startswith("<!doctype html")


@pytest.mark.parametrize("name", RECIPES)
def test_every_linear_layer_of_the_decoder_is_quantized_and_the_rest_is_accounted_for(finished, name):
    record = finished(name).record
    expected = {
        f"model.layers.{i}.{part}"
        for i in range(3)
        for part in (
            *(f"self_attn.{kind}_proj" for kind in "qkvo"),
            *(f"mlp.{kind}_proj" for kind in ("gate", "up", "down")),
        )
    }
    assert {layer.path for layer in record.layers} == expected
    assert record.skipped == {
        "model.embed_tokens": "Embedding has no quantized kind",
        "lm_head": "output head",
    }


def test_each_lower_bit_width_diverges_more(finished):
    ladder = ["w8a8", "w4a16", "w3a16", "w2a16"]
    found = [finished(name).record.after["kl_divergence"] for name in ladder]
    assert found == sorted(found)
    assert len(set(found)) == len(found)


# The artifact


@pytest.mark.parametrize("name", RECIPES)
def test_a_loaded_artifact_gives_the_logits_of_the_model_quantized_in_memory(finished, name):
    loaded = ptqcore.load(finished(name).folder)
    expected = logits(quantized_in_memory(finished(name).recipe))
    assert torch.equal(logits(loaded), expected)
    assert not torch.equal(expected, logits(tiny_lm.build()))


@pytest.mark.parametrize("architecture", tiny_lm.ARCHITECTURES)
def test_two_loads_of_an_artifact_give_the_same_logits(finished, architecture):
    folder = finished("w4a16", architecture).folder
    first, second = ptqcore.load(folder), ptqcore.load(folder)
    assert torch.equal(logits(first), logits(second))
    assert not first.training
    assert not any(parameter.requires_grad for parameter in first.parameters())


def test_an_artifact_can_be_loaded_into_a_given_model(finished):
    folder = finished("w8a8").folder
    given = tiny_lm.build()
    assert ptqcore.load(folder, given) is given
    assert torch.equal(logits(given), logits(ptqcore.load(folder)))


def test_another_process_loads_the_same_model(finished, tmp_path):
    folder, file = finished("fp8").folder, tmp_path / "logits.pt"
    code = (
        "import sys, torch; sys.path[:0] = [sys.argv[1]]\n"
        "import ptqcore, test_end_to_end as t\n"
        "torch.save(t.logits(ptqcore.load(sys.argv[2])), sys.argv[3])"
    )
    here = str(Path(__file__).parent)
    subprocess.run([sys.executable, "-c", code, here, str(folder), str(file)], check=True)
    assert torch.equal(torch.load(file), logits(ptqcore.load(folder)))


def test_a_damaged_artifact_is_refused(finished, tmp_path):
    folder = shutil.copytree(finished("w8a8").folder, tmp_path / "copy")
    data = bytearray(weights_of(folder))
    data[-1] ^= 1
    (folder / "model.safetensors").write_bytes(data)
    with pytest.raises(ArtifactError, match="does not have the checksum"):
        ptqcore.load(folder)


def test_an_artifact_of_another_structure_is_refused(finished):
    with pytest.raises(ArtifactError, match=r"model\.layers\.2"):
        ptqcore.load(finished("w8a8").folder, tiny_lm.build(num_hidden_layers=2))


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_a_model_in_half_precision_stays_so(finished, dtype):
    folder = finished("w4a16", "llama", f"task.dtype={dtype}").folder
    loaded = ptqcore.load(folder)
    assert {tensor.dtype for tensor in loaded.parameters()} == {getattr(torch, dtype)}
    exported = load_export(folder)
    assert exported.dtype == getattr(torch, dtype)
    assert (logits(exported) - logits(loaded)).abs().max() <= TOLERANCE


# The export


@pytest.mark.parametrize("architecture", tiny_lm.ARCHITECTURES)
@pytest.mark.parametrize("name", ["w8a8", "w4a16"])
def test_the_export_loads_in_transformers_with_the_logits_of_the_artifact(finished, name, architecture):
    folder = finished(name, architecture).folder
    expected = logits(ptqcore.load(folder))
    assert (logits(load_export(folder)) - expected).abs().max() <= TOLERANCE
    assert expected.abs().max() > 2


@pytest.mark.parametrize("name", ["fp8", "w3a16", "w2a16"])
def test_the_export_of_the_other_recipes_loads_in_transformers_with_equal_logits(finished, name):
    folder = finished(name).folder
    assert (logits(load_export(folder)) - logits(ptqcore.load(folder))).abs().max() <= TOLERANCE


# Overrides

STATIC = "{granularity: tensor, dynamic: false, bits: 8, observer: {percentile: {percentile: 99.9}}}"


def test_static_inputs_get_the_range_of_their_observer(finished):
    run = finished("w8a8", "llama", f"quant.activations={STATIC}")
    assert 0 < run.record.after["kl_divergence"] < 0.1
    loaded = ptqcore.load(run.folder)
    scales = {
        path: layer.input_quantizer.scale
        for path, layer in loaded.named_modules()
        if isinstance(layer, QuantLinear)
    }
    assert all(scale.numel() == 1 and torch.isfinite(scale).all() for scale in scales.values())
    widest = {layer.path: max(map(abs, layer.input_range)) for layer in run.record.layers}
    ratios = [float(scales[path]) * 127.5 / widest[path] for path in scales]
    assert all(0.4 < ratio < 1 for ratio in ratios), ratios
    assert (logits(load_export(run.folder)) - logits(loaded)).abs().max() <= TOLERANCE


def test_static_ranges_come_from_the_calibration_text(finished, models, texts, tmp_path):
    other = tiny_lm.write_text(tmp_path / "other.txt", 400, seed=9)
    static = f"quant.activations={STATIC}"
    chosen = recipe("w8a8", models("llama"), texts, static, f"task.calibration={other}")
    ptqcore.quantize(chosen, "llm", tmp_path / "out")
    assert weights_of(tmp_path / "out") != weights_of(finished("w8a8", "llama", static).folder)
    chosen = recipe("w8a8", models("llama"), texts, f"task.calibration={other}")
    ptqcore.quantize(chosen, "llm", tmp_path / "out")
    assert weights_of(tmp_path / "out") == weights_of(finished("w8a8").folder)


def test_asymmetric_weights_diverge_less_and_load_dequantized(finished):
    run = finished("w4a16", "llama", *ASYMMETRIC)
    assert run.record.after["kl_divergence"] < finished("w4a16").record.after["kl_divergence"]
    loaded = ptqcore.load(run.folder)
    assert loaded.model.layers[0].mlp.up_proj.weight_zero_point is not None
    assert torch.equal(logits(loaded), logits(quantized_in_memory(run.recipe)))
    exported = load_export(run.folder, quantization_config=CompressedTensorsConfig(dequantize=True))
    assert (logits(exported) - logits(loaded)).abs().max() <= TOLERANCE


def test_the_mse_observer_clips_and_lowers_the_error_of_the_weights(finished):
    run = finished("w3a16", "llama", "quant.weights.observer=mse")
    plain = {layer.path: layer for layer in finished("w3a16").record.layers}
    assert all(layer.clipped > plain[layer.path].clipped for layer in run.record.layers)
    errors = [(layer.relative_error, plain[layer.path].relative_error) for layer in run.record.layers]
    assert sum(now for now, _ in errors) < sum(then for _, then in errors)
    assert (logits(load_export(run.folder)) - logits(ptqcore.load(run.folder))).abs().max() <= TOLERANCE


def test_ignored_layers_stay_as_they_were(finished):
    run = finished("w4a16", "llama", "quant.ignore=['*.down_proj', model.layers.1.*]")
    loaded, original = ptqcore.load(run.folder), tiny_lm.build()
    quantized = {path for path, layer in loaded.named_modules() if isinstance(layer, QuantLinear)}
    assert len(quantized) == 2 * 6
    assert not any("down_proj" in path or ".1." in path for path in quantized)
    kept = "model.layers.0.mlp.down_proj"
    assert torch.equal(loaded.get_submodule(kept).weight, original.get_submodule(kept).weight)
    assert run.record.skipped[kept] == "ignored by the recipe (*.down_proj)"
    assert (logits(load_export(run.folder)) - logits(loaded)).abs().max() <= TOLERANCE


def test_without_texts_the_model_writes_its_own(models, texts, finished, tmp_path):
    chosen = recipe("w8a8", models("llama"), texts, "task.text=self", "task.calibration=self")
    first = ptqcore.quantize(chosen, "llm", tmp_path / "first")
    second = ptqcore.quantize(chosen, "llm", tmp_path / "second")
    assert first.before == second.before
    assert first.after == second.after
    # Text of its own surprises a model less than another.
    assert first.before["perplexity"] < 0.5 * finished("w8a8").record.before["perplexity"]
    assert weights_of(tmp_path / "first") == weights_of(tmp_path / "second")


# Other architectures


@pytest.mark.parametrize("architecture", tiny_lm.ARCHITECTURES)
@pytest.mark.parametrize("name", ["w8a8", "w4a16"])
def test_the_blocks_of_every_architecture_are_its_decoder_layers(finished, name, architecture):
    run = finished(name, architecture)
    assert [block.path for block in run.record.blocks] == [f"model.layers.{i}" for i in range(3)]
    linear = {
        path
        for path, module in tiny_lm.build(architecture).named_modules()
        if isinstance(module, torch.nn.Linear) and path != "lm_head"
    }
    assert {layer.path for layer in run.record.layers} == linear
    assert run.record.skipped.keys() == {"model.embed_tokens", "lm_head"}


@pytest.mark.parametrize("architecture", tiny_lm.ARCHITECTURES)
@pytest.mark.parametrize("name", ["w8a8", "w4a16"])
def test_every_architecture_is_quantized_as_in_memory(finished, name, architecture):
    run = finished(name, architecture)
    expected = quantized_in_memory(run.recipe, architecture)
    assert torch.equal(logits(ptqcore.load(run.folder)), logits(expected))
    assert 0 < run.record.after["kl_divergence"] < 0.3


@pytest.mark.parametrize("architecture", ["llama", "gemma3_text"])
def test_the_error_of_a_block_is_that_of_its_output_in_the_whole_model(
    finished, models, texts, architecture
):
    """Masks, positions and what flows between blocks are those of the real forward pass."""
    run = finished("w4a16", architecture)
    quantized, half = ptqcore.load(run.folder), ptqcore.load(run.folder)
    original = tiny_lm.build(architecture)
    half.model.layers[2] = original.model.layers[2]  # the last block in full precision
    tokens = tiny_lm.tokenizer()((texts / "calibration.txt").read_text())["input_ids"]
    every = torch.tensor(tokens)[: len(tokens) // 32 * 32].view(-1, 32)
    chosen = every[torch.linspace(0, len(every) - 1, 4).round().long()]

    def output(model):
        seen = []
        handle = model.model.layers[2].register_forward_hook(lambda _, args, out: seen.append(out))
        with torch.no_grad():
            model(input_ids=chosen, use_cache=False)
        handle.remove()
        return seen[0] if isinstance(seen[0], torch.Tensor) else seen[0][0]

    target = output(half).double()
    error = (output(quantized).double() - target).square().sum() / target.square().sum()
    assert run.record.blocks[2].relative_error == pytest.approx(error.item(), rel=1e-4)


# The same again


def test_the_same_recipe_gives_the_same_bytes(finished, models, texts, tmp_path):
    ptqcore.quantize(recipe("w8a8", models("llama"), texts), "llm", tmp_path / "out")
    folder = finished("w8a8").folder
    for name in ("model.safetensors", "manifest.json", f"{EXPORT}/model.safetensors"):
        assert (tmp_path / "out" / name).read_bytes() == (folder / name).read_bytes()


def test_the_written_out_recipe_gives_the_same_bytes(finished, tmp_path):
    folder = finished("w3a16").folder
    written = yaml.safe_load((folder / "recipe.yaml").read_text())
    assert written["task"]["window"] == 32
    record = ptqcore.quantize(read_recipe(folder / "recipe.yaml"), "llm", tmp_path / "out")
    assert weights_of(tmp_path / "out") == weights_of(folder)
    assert record.after == finished("w3a16").record.after


def test_a_second_run_replaces_the_artifact(models, texts, finished, tmp_path):
    out = tmp_path / "out"
    ptqcore.quantize(recipe("w8a8", models("llama"), texts), "llm", out)
    ptqcore.quantize(recipe("w4a16", models("llama"), texts, "export=[]"), "llm", out)
    assert weights_of(out) == weights_of(finished("w4a16").folder)
    assert json.loads((out / "metrics.json").read_text())["recipe"] == "w4a16"
    assert torch.equal(logits(ptqcore.load(out)), logits(ptqcore.load(finished("w4a16").folder)))
    assert not (out / "exports").exists()  # the old one belongs to other weights


def test_the_command_line_in_a_process_of_its_own(models, texts, finished, tmp_path):
    chosen = recipe("w8a8", models("llama"), texts)
    sets = [f"--set=task.{key}={value}" for key, value in chosen.task.options.items()]
    command = [sys.executable, str(ROOT / "tools/quantize.py"), "--plugin", "llm", "--recipe", "w8a8"]
    command += [*sets, "--set=steps=[round]"]
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    out = tmp_path / "runs/llm-w8a8"
    assert weights_of(out) == weights_of(finished("w8a8").folder)
    assert "perplexity" in result.stdout
    assert "runs/llm-w8a8/report.html" in result.stdout
    assert "compressed-tensors" in result.stdout
    assert all(" done in " in line for line in result.stderr.splitlines()), result.stderr
    assert {entry.name for entry in tmp_path.iterdir()} == {"runs"}


# Interrupted runs


class InterruptionError(BaseException):
    pass


@pytest.fixture
def spy(monkeypatch):
    """Counts the blocks that `round` is given, and interrupts the run at one of them."""
    calls = SimpleNamespace(blocks=[], stop_at=None)
    original = Round.block

    def block(self, block, calibration):
        if block.path == calls.stop_at:
            raise InterruptionError
        calls.blocks.append(block.path)
        original(self, block, calibration)

    monkeypatch.setattr(Round, "block", block)
    return calls


@pytest.fixture
def interrupted(spy, models, texts, tmp_path):
    """The folder of a run that was interrupted in its second block."""
    spy.stop_at = "model.layers.1"
    out = tmp_path / "out"
    with pytest.raises(InterruptionError):
        ptqcore.quantize(recipe("w4a16", models("llama"), texts), "llm", out)
    assert spy.blocks == ["model.layers.0"]
    assert not (out / "manifest.json").exists()
    spy.stop_at = None
    spy.blocks.clear()
    return out


def same_figures(one, other):
    """Records but for times and memory."""
    assert (one.before, one.after) == (other.before, other.after)
    assert one.layers == other.layers
    assert [(b.path, b.relative_error) for b in one.blocks] == [
        (b.path, b.relative_error) for b in other.blocks
    ]
    assert one.skipped == other.skipped


def test_a_resumed_run_ends_as_an_uninterrupted_one(interrupted, spy, models, texts, finished):
    chosen = recipe("w4a16", models("llama"), texts)
    record = ptqcore.quantize(chosen, "llm", interrupted, resume=True)
    assert spy.blocks == ["model.layers.1", "model.layers.2"]
    assert weights_of(interrupted) == weights_of(finished("w4a16").folder)
    same_figures(record, finished("w4a16").record)
    assert not (interrupted / ".work").exists()


@pytest.mark.parametrize(
    ("name", "architecture", "overrides"),
    [
        ("w8a8", "gemma3_text", [f"quant.activations={STATIC}"]),
        ("fp8", "qwen3", ["seed=1"]),
        ("w4a16", "qwen2", ASYMMETRIC),
    ],
    ids=["static inputs", "fp8", "asymmetric"],
)
def test_other_kinds_of_runs_resume_too(
    spy, models, texts, finished, tmp_path, name, architecture, overrides
):
    run = finished(name, architecture, *overrides)
    chosen = recipe(name, models(architecture), texts, *overrides)
    spy.stop_at = "model.layers.2"
    with pytest.raises(InterruptionError):
        ptqcore.quantize(chosen, "llm", tmp_path / "out")
    spy.stop_at = None
    spy.blocks.clear()
    record = ptqcore.quantize(chosen, "llm", tmp_path / "out", resume=True)
    assert spy.blocks == ["model.layers.2"]
    assert weights_of(tmp_path / "out") == weights_of(run.folder)
    same_figures(record, run.record)


def test_a_run_interrupted_after_the_last_block_computes_no_block_again(
    spy, models, texts, finished, tmp_path, monkeypatch
):
    chosen = recipe("w4a16", models("llama"), texts)
    with monkeypatch.context() as patch:
        patch.setattr(artifact, "save", lambda *_: (_ for _ in ()).throw(InterruptionError))
        with pytest.raises(InterruptionError):
            ptqcore.quantize(chosen, "llm", tmp_path / "out")
    spy.blocks.clear()
    ptqcore.quantize(chosen, "llm", tmp_path / "out", resume=True)
    assert spy.blocks == []
    assert weights_of(tmp_path / "out") == weights_of(finished("w4a16").folder)


def test_a_run_interrupted_twice_resumes(interrupted, spy, models, texts, finished):
    chosen = recipe("w4a16", models("llama"), texts)
    spy.stop_at = "model.layers.2"
    with pytest.raises(InterruptionError):
        ptqcore.quantize(chosen, "llm", interrupted, resume=True)
    spy.stop_at = None
    ptqcore.quantize(chosen, "llm", interrupted, resume=True)
    assert spy.blocks == ["model.layers.1", "model.layers.2"]
    assert weights_of(interrupted) == weights_of(finished("w4a16").folder)


def test_without_resume_everything_is_computed_again(interrupted, spy, models, texts, finished):
    ptqcore.quantize(recipe("w4a16", models("llama"), texts), "llm", interrupted)
    assert spy.blocks == [f"model.layers.{i}" for i in range(3)]
    assert weights_of(interrupted) == weights_of(finished("w4a16").folder)


def test_resuming_where_nothing_was_begun_is_a_run_from_the_start(spy, models, texts, finished, tmp_path):
    chosen = recipe("w4a16", models("llama"), texts)
    ptqcore.quantize(chosen, "llm", tmp_path / "out", resume=True)
    assert len(spy.blocks) == 3
    assert weights_of(tmp_path / "out") == weights_of(finished("w4a16").folder)


@pytest.mark.parametrize("override", ["quant.weights.bits=3", "seed=1", "task.max_windows=7"])
def test_resuming_with_another_recipe_is_refused(interrupted, spy, models, texts, override):
    other = recipe("w4a16", models("llama"), texts, override)
    with pytest.raises(ArtifactError, match=r"--resume: .* had another recipe key '.*; restore that"):
        ptqcore.quantize(other, "llm", interrupted, resume=True)
    assert spy.blocks == []
    ptqcore.quantize(recipe("w4a16", models("llama"), texts), "llm", interrupted, resume=True)
    assert spy.blocks == ["model.layers.1", "model.layers.2"]


def test_resuming_with_another_model_or_text_in_the_same_place_is_refused(
    spy, models, tmp_path, monkeypatch
):
    folder = shutil.copytree(models("llama"), tmp_path / "model")
    own = tmp_path / "texts"
    own.mkdir()
    chosen = recipe("w4a16", folder, make_texts(own))
    spy.stop_at = "model.layers.1"
    with pytest.raises(InterruptionError):
        ptqcore.quantize(chosen, "llm", tmp_path / "out")
    tiny_lm.write_text(own / "calibration.txt", 400, seed=8)
    with pytest.raises(ArtifactError, match="had another calibration data; restore"):
        ptqcore.quantize(chosen, "llm", tmp_path / "out", resume=True)
    make_texts(own)
    changed = tiny_lm.build()
    with torch.no_grad():
        changed.model.layers[2].mlp.up_proj.weight[3, 5] += 0.5
    save_file(changed.state_dict(), folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ArtifactError, match="had another model; restore"):
        ptqcore.quantize(chosen, "llm", tmp_path / "out", resume=True)


def test_resuming_with_another_evaluation_text_in_the_same_place_is_refused_or_measured_anew(
    spy, models, tmp_path
):
    own = tmp_path / "texts"
    own.mkdir()
    chosen = recipe("w4a16", models("llama"), make_texts(own))
    spy.stop_at = "model.layers.1"
    with pytest.raises(InterruptionError):
        ptqcore.quantize(chosen, "llm", tmp_path / "out")
    spy.stop_at = None
    tiny_lm.write_text(own / "text.txt", 600, seed=8)
    whole = ptqcore.quantize(chosen, "llm", tmp_path / "whole")
    resumed = ptqcore.quantize(chosen, "llm", tmp_path / "out", resume=True)
    same_figures(resumed, whole)


def flip(file):
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)


DAMAGE = {
    "a flipped bit": lambda work: flip(work / "block-0000.safetensors"),
    "a cut file": lambda work: os.truncate(work / "block-0000.safetensors", 1000),
    "a missing file": lambda work: (work / "block-0000.safetensors").unlink(),
    "a cut description": lambda work: os.truncate(work / "block-0000.json", 30),
    "an empty description": lambda work: (work / "block-0000.json").write_text("{}"),
    "a description that is a list": lambda work: (work / "block-0000.json").write_text("[]"),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_block_of_the_journal_is_computed_again(
    interrupted, spy, models, texts, finished, damage
):
    DAMAGE[damage](interrupted / ".work")
    chosen = recipe("w4a16", models("llama"), texts)
    ptqcore.quantize(chosen, "llm", interrupted, resume=True)
    assert spy.blocks == [f"model.layers.{i}" for i in range(3)]
    assert weights_of(interrupted) == weights_of(finished("w4a16").folder)


@pytest.mark.parametrize("content", ["", "{", "[]", "\udcff"])
def test_a_damaged_journal_is_refused(interrupted, models, texts, content):
    (interrupted / ".work/journal.json").write_bytes(content.encode("utf-8", "surrogateescape"))
    with pytest.raises(ArtifactError, match="is damaged: run again without --resume"):
        ptqcore.quantize(recipe("w4a16", models("llama"), texts), "llm", interrupted, resume=True)


def test_the_text_that_another_model_wrote_is_not_used(spy, models, texts, tmp_path, monkeypatch):
    """A run that stopped before its first block leaves written text, but no journal to compare with."""
    own = ["task.text=self", "task.calibration=self", f"quant.activations={STATIC}"]
    out = tmp_path / "out"
    with monkeypatch.context() as patch:
        patch.setattr("ptqcore.preparation.trace", lambda *_: (_ for _ in ()).throw(InterruptionError))
        with pytest.raises(InterruptionError):
            ptqcore.quantize(recipe("w8a8", models("qwen3"), texts, *own), "llm", out)
    chosen = recipe("w8a8", models("llama"), texts, *own)
    resumed = ptqcore.quantize(chosen, "llm", out, resume=True)
    whole = ptqcore.quantize(chosen, "llm", tmp_path / "whole")
    assert resumed.before == whole.before
    assert weights_of(out) == weights_of(tmp_path / "whole")


def test_files_that_no_run_wrote_are_never_replaced(models, texts, tmp_path):
    (tmp_path / "assets").mkdir()
    (tmp_path / "assets" / "photo.jpg").write_bytes(b"mine")
    with pytest.raises(ArtifactError, match="holds 'assets' but no artifact"):
        ptqcore.quantize(recipe("w8a8", models("llama"), texts), "llm", tmp_path)
    assert (tmp_path / "assets" / "photo.jpg").read_bytes() == b"mine"
    assert [path.name for path in tmp_path.iterdir()] == ["assets"]
