"""Whole runs on a tiny random denoiser: what the steps do to the temporal block, and what is kept."""

import json
import warnings
from pathlib import Path
from types import SimpleNamespace

import pytest
import tiny_pipelines
import torch
from diffusers import DDIMPipeline, DDIMScheduler

import ptqcore
from ptqcore import ModelError, QuantModule, Recipe, RecipeError, timesteps_of
from ptqcore.plugin import discover
from ptqcore.recipe import Entry, read_recipe, validate

STEPS = 6
SCHEDULE = [0, 166, 332, 498, 664, 830]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A pipeline whose time embedding says something."""
    place = tmp_path_factory.mktemp("pipeline")
    denoiser = tiny_pipelines.unet()
    with torch.no_grad():
        for name, weight in denoiser.named_parameters():
            if "time_emb" in name and weight.ndim > 1:
                weight.mul_(4)
    DDIMPipeline(denoiser, DDIMScheduler()).save_pretrained(place)
    return place


@pytest.fixture(scope="module")
def finished(folder, tmp_path_factory):
    """Runs, each made once: `finished("round", bits=4, …)`."""
    done = {}

    def run(*steps, bits=4, activations=8, layers="all", **task):
        key = repr((steps, bits, activations, layers, task))
        if key not in done:
            out = tmp_path_factory.mktemp("run") / "out"
            record = ptqcore.quantize(
                recipe(folder, steps, bits, activations, layers, task), "diffusion", out
            )
            done[key] = SimpleNamespace(record=record, folder=out, after=record.after)
        return done[key]

    return run


def recipe(folder, steps, bits=4, activations=8, layers="all", task=None, **quant):
    small = {"steps": STEPS, "calibration_samples": 8, "calibration_keep": 4, "samples": 4, "batch": 8}
    weights = {"bits": bits, "symmetric": False, "granularity": "channel"}
    inputs = {"bits": activations, "symmetric": False}
    data = {
        "name": "x",
        "task": {"kind": "denoising", "pipeline": str(folder), "layers": layers, **small, **(task or {})},
        "quant": {"weights": weights, "activations": inputs, **quant},
        "steps": list(steps),
    }
    return validate(Recipe, data)


BLOCK = {
    "time_embedding.linear_1",
    "time_embedding.linear_2",
    "down_blocks.0.resnets.0.time_emb_proj",
    "down_blocks.1.resnets.0.time_emb_proj",
    "mid_block.resnets.0.time_emb_proj",
    "mid_block.resnets.1.time_emb_proj",
    "up_blocks.0.resnets.0.time_emb_proj",
    "up_blocks.0.resnets.1.time_emb_proj",
    "up_blocks.1.resnets.0.time_emb_proj",
    "up_blocks.1.resnets.1.time_emb_proj",
}
FSC, TIAR = "finite-set-calibration", {"tiar": {"iterations": 300}}


def test_the_full_precision_model_is_perfect_on_every_figure(finished):
    before = finished("round").record.before
    assert before["temporal_error"] == pytest.approx(0, abs=1e-12)
    assert before["temporal_mismatch"] == before["trajectory_error"] == before["image_error"] == 0
    assert before["image_ssim"] == pytest.approx(1)
    assert finished("round").after["image_error"] > 0


def test_the_temporal_block_alone_can_be_quantized(finished):
    record = finished("round", layers="temporal").record
    assert {layer.path for layer in record.layers} == BLOCK
    reasons = {path: why for path, why in record.skipped.items() if "temporal" in why}
    assert set(reasons.values()) == {"outside the temporal block (task.layers)"}


def test_the_report_says_how_often_the_denoiser_was_called_for_calibration_data(finished):
    run = finished("round")
    assert run.record.facts == {
        "steps of the schedule": STEPS,
        "calibration images": 8,
        "batches of calibration images": 1,
        "denoiser calls for calibration data": STEPS + 2,
        "denoiser calls to calibrate on": STEPS,
        "rows in them": 4 * STEPS,
    }
    assert json.loads((run.folder / "metrics.json").read_text())["facts"] == run.record.facts
    assert "denoiser calls for calibration data" in (run.folder / "report.html").read_text()


@pytest.mark.parametrize("bits", [3, 4])
def test_tiar_brings_the_temporal_features_back(finished, bits):
    nearest = finished("round", bits=bits, layers="temporal")
    learned = finished(TIAR, bits=bits, layers="temporal")
    assert learned.after["temporal_error"] < nearest.after["temporal_error"] / 2
    assert learned.after["image_error"] < nearest.after["image_error"] / 2
    losses = [block.losses for block in learned.record.blocks if block.losses]
    assert len(losses) == 1
    assert losses[0][-1] < losses[0][0]


def test_a_range_for_each_timestep_brings_them_back_at_four_bits(finished):
    one = finished("round", bits=8, activations=4, layers="temporal")
    each = finished(FSC, "round", bits=8, activations=4, layers="temporal")
    assert each.after["temporal_error"] < 0.9 * one.after["temporal_error"]


@pytest.mark.parametrize("scope", ["temporal", "all"])
def test_ranges_are_kept_for_the_timesteps_of_the_schedule_by_their_values(finished, scope):
    run = finished({FSC: {"scope": scope}}, TIAR, "round")
    model = ptqcore.load(run.folder)
    assert timesteps_of(model).values.tolist() == SCHEDULE
    layers = {path: layer for path, layer in model.named_modules() if isinstance(layer, QuantModule)}
    each = {path for path, layer in layers.items() if layer.input_quantizer.spec.granularity == "timestep"}
    assert each == (BLOCK if scope == "temporal" else set(layers))
    x = torch.randn(2, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        together = model(x, torch.tensor([166, 664])).sample
        apart = torch.cat([model(x[:1], 166).sample, model(x[1:], torch.tensor(664)).sample])
        assert (together - apart).square().sum() < 1e-3 * apart.square().sum()  # some roundings flip
        with pytest.warns(UserWarning, match="timestep 500 is not among"):
            near = model(x, 500).sample
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            assert not torch.equal(near, model(x, 332).sample)


def test_unseen_timesteps_are_refused_where_one_wants_that(folder, tmp_path):
    chosen = recipe(folder, [FSC, "round"], task={"unseen": "refuse"})
    ptqcore.quantize(chosen, "diffusion", tmp_path / "out")
    with pytest.raises(ModelError, match=r"timestep 7 is not among those .* \(0 … 830, 6 of them\)"):
        ptqcore.load(tmp_path / "out")(torch.zeros(1, 1, 8, 8), 7)


def test_the_same_recipe_gives_the_same_bytes(folder, tmp_path):
    chosen = recipe(folder, [FSC, TIAR, {"brecq": {"iterations": 3}}])
    for name in ("one", "other"):
        ptqcore.quantize(chosen, "diffusion", tmp_path / name)
    assert len({(tmp_path / name / "model.safetensors").read_bytes() for name in ("one", "other")}) == 1


def test_a_run_killed_while_the_temporal_block_learns_makes_no_update_again(folder, tmp_path, updates):
    """The second time, with rounded inputs."""
    chosen = recipe(folder, [{FSC: {"scope": "all"}}, {"tiar": {"iterations": 20}}, "round"])
    ptqcore.quantize(chosen, "diffusion", tmp_path / "whole")
    total, updates.count, updates.stop_at = updates.count, 0, 30
    with pytest.raises(updates.Stopped):
        ptqcore.quantize(chosen, "diffusion", tmp_path / "out")
    updates.stop_at = None
    ptqcore.quantize(chosen, "diffusion", tmp_path / "out", resume=True)
    assert updates.count <= total + 2  # one for each time that it learns
    assert total == 40
    assert len({(tmp_path / name / "model.safetensors").read_bytes() for name in ("whole", "out")}) == 1


def test_a_range_for_each_timestep_everywhere_is_closer_at_low_bits(finished):
    one = finished("round", bits=8, activations=4)
    each = finished({FSC: {"scope": "all"}}, "round", bits=8, activations=4)
    assert each.after["trajectory_error"] < one.after["trajectory_error"]


def test_the_rest_is_left_to_another_step(folder, tmp_path):
    with pytest.raises(ptqcore.PtqError, match="conv_in"):
        ptqcore.quantize(recipe(folder, [TIAR]), "diffusion", tmp_path)


def test_two_steps_that_quantize_everything_are_refused(folder, tmp_path):
    with pytest.raises(RecipeError, match="round and brecq both quantize the weights"):
        ptqcore.quantize(recipe(folder, [TIAR, "round", "brecq"]), "diffusion", tmp_path)


RECIPES = sorted(discover().plugin("diffusion").recipe_files)


@pytest.mark.parametrize("name", RECIPES)
def test_every_recipe_runs_and_stands_in_the_readme(name, folder, tmp_path):
    small = ["steps=3", "calibration_samples=4", "calibration_keep=2", "samples=2"]
    overrides = [f"task.pipeline={folder}", *(f"task.{each}" for each in small)]
    chosen = read_recipe(discover().recipe_file(name, "diffusion"), overrides)
    quick = {"brecq": {"iterations": 2}, "tiar": {"iterations": 2}}
    steps = [Entry(name=step.name, options=quick.get(step.name, {})) for step in chosen.steps]
    record = ptqcore.quantize(chosen.model_copy(update={"steps": steps}), "diffusion", tmp_path / "out")
    assert record.exports["diffusers"].largest_difference == 0
    readme = (Path(__file__).parents[2] / "plugins/ptq-diffusion/README.md").read_text(encoding="utf-8")
    assert f"| `{name}`" in readme
