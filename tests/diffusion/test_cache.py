"""Tables in the place of the temporal block: exact, as large as computed, chosen feature by feature."""

import subprocess
import sys
from collections import Counter
from types import SimpleNamespace

import pytest
import tiny_denoisers
import tiny_pipelines
import torch
from diffusers import DDIMPipeline, DDIMScheduler
from test_denoising import BLOCK, FSC, SCHEDULE, recipe
from test_diffusers_export import ORDERS, SAMPLE, images_of
from tiny_denoisers import STYLES, rand
from torch import nn

import ptq_diffusion
import ptqcore
from ptq_diffusion.caching import Caching, prove, with_one_value
from ptq_diffusion.calls import DenoiserCall
from ptq_diffusion.features_of_time import TimePath, temporal_features
from ptqcore import (
    Block,
    ModelError,
    QuantLinear,
    TensorQuant,
    Timesteps,
    TimestepTable,
    timesteps_of,
)
from ptqcore.recipe import Entry
from ptqcore.rounding import Round

FEATURES = {path for path in BLOCK if "proj" in path}
SHARED = BLOCK - FEATURES
CACHE = {"tiar": {"mode": "cache"}}


def denoiser():
    """A denoiser whose time embedding says something."""
    made = tiny_pipelines.unet()
    with torch.no_grad():
        for name, weight in made.named_parameters():
            if "time_emb" in name and weight.ndim > 1:
                weight.mul_(4)
    return made


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    place = tmp_path_factory.mktemp("pipeline")
    DDIMPipeline(denoiser(), DDIMScheduler()).save_pretrained(place)
    return place


@pytest.fixture(scope="module")
def finished(folder, tmp_path_factory):
    """Runs, each made once: `finished("round", layers="temporal", …)`."""
    done = {}

    def run(*steps, export=False, **options):
        key = repr((steps, export, options))
        if key not in done:
            out = tmp_path_factory.mktemp("run") / "out"
            chosen = recipe(folder, steps, **options)
            if export:
                chosen = chosen.model_copy(update={"export": [Entry(name="diffusers")]})
            record = ptqcore.quantize(chosen, "diffusion", out)
            done[key] = SimpleNamespace(record=record, folder=out, after=record.after)
        return done[key]

    return run


def kinds(folder):
    """The class of every layer of the temporal block, as it is kept."""
    model = ptqcore.load(folder)
    return {path: type(model.get_submodule(path)) for path in BLOCK}


def call(rows):
    return DenoiserCall.of(denoiser(), sample=rand(rows, 1, 8, 8), timestep=torch.tensor([166] * rows))


# The tables


def test_tables_hold_the_features_of_full_precision_to_the_last_bit(finished):
    run = finished(CACHE, "round")
    assert set(kinds(run.folder).values()) == {TimestepTable}
    model, exact = ptqcore.load(run.folder), denoiser()
    temporal = tiny_denoisers.find(exact, call(4))
    wanted = temporal_features(exact, call(4), temporal, SCHEDULE)  # as many rows as samples have
    found = temporal_features(model, call(4), temporal, SCHEDULE)
    for path in FEATURES:
        assert torch.equal(found[path], wanted[path])
        assert torch.equal(model.get_submodule(path).table, wanted[path])
    assert run.after["temporal_error"] <= 1e-6
    assert run.after["temporal_mismatch"] == 0
    assert timesteps_of(model).values.tolist() == SCHEDULE  # though no activation has ranges for each


def test_with_the_rest_in_full_precision_images_are_those_of_full_precision(finished):
    run = finished(CACHE, layers="temporal")
    assert run.after["image_error"] < 1e-10
    assert run.record.coverage == 1


def test_sizes_are_as_computed_and_no_weight_of_the_block_is_left(finished):
    run = finished(CACHE, "round")
    channels = 3 * 8 + 5 * 16
    assert run.record.size_bytes["tables"] == 4 * len(SCHEDULE) * channels
    replaced = 32 * (8 + 1) + 32 * (32 + 1) + channels * (32 + 1)
    assert run.record.size_bytes["float weights replaced by tables"] == 4 * replaced
    names = [name for name in ptqcore.load(run.folder).state_dict() if "time_emb" in name]
    assert sorted(names) == sorted(f"{path}.table" for path in BLOCK)
    records = {layer.path: layer.weights for layer in run.record.layers if layer.path in BLOCK}
    assert {records[path] for path in SHARED} == {"removed: only tables read it"}
    assert {records[path] for path in FEATURES} == {"table [6, 8]", "table [6, 16]"}


def test_other_steps_go_round_the_tables(finished):
    run = finished(FSC, CACHE, {"brecq": {"iterations": 3}}, "bias-correction")
    assert set(kinds(run.folder).values()) == {TimestepTable}
    assert run.after["temporal_error"] <= 1e-6


def test_rows_of_a_batch_have_timesteps_of_their_own(finished):
    model = ptqcore.load(finished(CACHE, "round", activations=8).folder)
    x = rand(2, 1, 8, 8)
    with torch.no_grad():
        together = model(x, torch.tensor([166, 664])).sample
        apart = torch.cat([model(x[:1], 166).sample, model(x[1:], torch.tensor(664)).sample])
    assert (together - apart).square().sum() < 1e-3 * apart.square().sum()  # some roundings flip


@pytest.mark.parametrize("unseen", ["nearest", "interpolate", "refuse"])
def test_unseen_timesteps_get_what_the_task_says(finished, unseen):
    model = ptqcore.load(finished(CACHE, layers="temporal", task={"unseen": unseen}).folder)
    layer, known = model.mid_block.resnets[0].time_emb_proj, timesteps_of(model)
    if unseen == "refuse":
        with pytest.raises(ModelError, match="timestep 200 is not among"):
            model(torch.zeros(1, 1, 8, 8), 200)
        return
    with pytest.warns(UserWarning, match="timestep 200 is not among"), known.during(200.0):
        (found,) = layer(torch.zeros(1, 32))
    share = (200 - 166) / (332 - 166) if unseen == "interpolate" else 0
    torch.testing.assert_close(found, layer.table[1] * (1 - share) + layer.table[2] * share)


def test_layers_that_the_recipe_ignores_stay_and_so_does_what_they_read(finished):
    own = "mid_block.resnets.0.time_emb_proj"
    found = kinds(finished({"tiar": {"mode": "cache", "iterations": 3}}, "round", ignore=[own]).folder)
    assert found[own] is nn.Linear
    assert {found[path] for path in SHARED} == {QuantLinear}
    assert {found[path] for path in FEATURES - {own}} == {TimestepTable}


# The choice


def auto(**options):
    return {"tiar": {"mode": "auto", "iterations": 3, **options}}


@pytest.mark.parametrize(("steps", "tables"), [(6, True), (9, True), (10, False)])
def test_a_table_is_chosen_where_it_takes_no_more_bytes_than_what_it_replaces(finished, steps, tables):
    """Features pack to 25 bytes a channel, one timestep takes 4: up to 6 timesteps each table is smaller
    than its own layer; up to 9 all are smaller than all layers, 104 · 25 + 416 + 800 bytes."""
    run = finished(auto(tolerance=1), layers="temporal", task={"steps": steps})
    assert set(kinds(run.folder).values()) == ({TimestepTable} if tables else {QuantLinear})
    assert run.record.size_bytes.get("tables", 0) == tables * 4 * steps * 104


@pytest.mark.parametrize(("tolerance", "kind"), [(0, TimestepTable), (1, QuantLinear)])
def test_a_table_is_chosen_where_reconstruction_is_not_exact_enough(finished, tolerance, kind):
    run = finished(auto(tolerance=tolerance), layers="temporal", task={"steps": 10})
    assert Counter(kinds(run.folder).values()) == {kind: len(BLOCK)}


def test_shared_layers_stay_for_the_features_that_are_reconstructed(finished, monkeypatch):
    worse = "mid_block.resnets.1.time_emb_proj"
    monkeypatch.setattr(
        "ptq_diffusion.tiar.temporal_errors",
        lambda found, wanted: {path: torch.full((10,), 2e-3 * (path == worse)) for path in wanted},
    )
    run = finished(auto(), layers="temporal", task={"steps": 10, "samples": 2})
    found = kinds(run.folder)
    assert [path for path in found if found[path] is TimestepTable] == [worse]
    assert run.after["temporal_error"] > 0


def test_what_was_chosen_is_said(folder, tmp_path, capsys):
    ptqcore.quantize(recipe(folder, [auto()], layers="temporal"), "diffusion", tmp_path / "out")
    said = capsys.readouterr().err
    assert "tiar: 8 temporal features get tables for their size, 0 more for an error above 0.001" in said
    assert "tables of 6 timesteps for 8 of 8 temporal features, 2.5 kB," in said
    assert "in the place of weights of 3.8 kB packed; 2 layers that only they read are left out" in said


@pytest.mark.parametrize("style", STYLES)
def test_tables_leave_the_outputs_of_nine_denoisers_as_they_were(style):
    model = tiny_denoisers.build(style)
    call = tiny_denoisers.call_of(style, model)
    flow = tiny_denoisers.traced(model, call)
    temporal = tiny_denoisers.find_temporal(model, flow, call)
    layers = {path: layer for path, layer in Block(model, "").layers().items() if path in temporal.block}
    known = Timesteps.of(call.times.tolist(), call.timestep)
    with torch.no_grad():
        features = TimePath(model, call, temporal)(known.values)
    grid = TensorQuant(bits=4, granularity="channel")
    single = with_one_value(layers, lambda: call.copied().run(model))
    caching = Caching(flow, temporal, single, lambda _: grid, features)
    tables = caching.tables(caching.features)
    shared = {path for path in layers if path not in temporal.features}
    assert layers.keys() == shared | set(temporal.features)
    assert {path: len(table) for path, table in tables.items()} == {
        path: 0 if path in shared else len(known.values) for path in layers
    }
    with known.during(call.times):
        prove(model, tables, lambda: call.copied().run(model))
        wrong = {path: table * 2 for path, table in tables.items()}
        with pytest.raises(ModelError, match="change what the denoiser returns by"):
            prove(model, wrong, lambda: call.copied().run(model))


# What is kept


def test_the_same_recipe_gives_the_same_bytes_resumed_or_not(folder, tmp_path, monkeypatch):
    steps = [FSC, {"tiar": {"mode": "cache", "correction": True}}, "round"]
    ptqcore.quantize(recipe(folder, steps), "diffusion", tmp_path / "whole")
    rounded, blocks = Round.block, []

    def stops(self, block, calibration):
        blocks.append(block.path)
        if len(blocks) == 9:
            raise KeyboardInterrupt
        rounded(self, block, calibration)

    monkeypatch.setattr(Round, "block", stops)
    with pytest.raises(KeyboardInterrupt):
        ptqcore.quantize(recipe(folder, steps), "diffusion", tmp_path / "resumed")
    ptqcore.quantize(recipe(folder, steps), "diffusion", tmp_path / "resumed", resume=True)
    assert Counter(blocks).most_common(1) == [(blocks[8], 2)]
    for name in ("model.safetensors", "manifest.json"):
        assert (tmp_path / "whole" / name).read_bytes() == (tmp_path / "resumed" / name).read_bytes()


def test_another_process_loads_the_tables_and_makes_the_same_images(finished, tmp_path):
    run = finished(CACHE, "round", export=True)
    assert run.record.exports["diffusers"].largest_difference == 0
    script = SAMPLE.format(imports=ORDERS["ours first"])
    place = run.folder / "exports/diffusers"
    command = [sys.executable, "-c", script, str(place), str(tmp_path / "images.pt")]
    subprocess.run(command, check=True, capture_output=True, text=True)
    pipeline = DDIMPipeline(tiny_pipelines.unet(), DDIMScheduler())
    pipeline.unet = ptqcore.load(run.folder)
    expected = images_of(pipeline)
    assert torch.equal(torch.load(tmp_path / "images.pt", weights_only=True), expected)
    first = ptq_diffusion.load_pipeline(place)
    first.save_pretrained(tmp_path / "again")
    assert torch.equal(images_of(ptq_diffusion.load_pipeline(tmp_path / "again")), expected)
