"""Denoisers with a timestep as an input of an ONNX graph: two engines compute what the simulation does."""

import numpy as np
import pytest
import tiny_pipelines
import torch
from diffusers import DDIMPipeline, DDIMScheduler

import ptqcore
from ptqcore import ExportError, Recipe, timesteps_of
from ptqcore.engines import execute
from ptqcore.recipe import validate

onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")
pytest.importorskip("openvino")

STEPS = 3
FSC, EVERYWHERE = "finite-set-calibration", {"finite-set-calibration": {"scope": "all"}}
PIPELINES = {
    "unet": lambda: DDIMPipeline(tiny_pipelines.unet(), DDIMScheduler()),
    "dit": tiny_pipelines.class_to_image,
    "text": tiny_pipelines.text_to_image,
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    made = {}

    def folder(name):
        if name not in made:
            made[name] = tmp_path_factory.mktemp(name)
            PIPELINES[name]().save_pretrained(made[name])
        return made[name]

    return folder


def export(pipeline, out, steps, scope="dataflow", **task):
    small = {"steps": STEPS, "calibration_samples": 4, "calibration_keep": 2, "samples": 2, "batch": 8}
    data = {
        "name": "x",
        "task": {"kind": "denoising", "pipeline": str(pipeline), **small, **task},
        "quant": {
            "scope": scope,
            "weights": {"bits": 4, "symmetric": False, "granularity": "channel"},
            "activations": {"bits": 8, "symmetric": False},
        },
        "steps": list(steps),
        "export": ["onnx-qdq"],
    }
    return ptqcore.quantize(validate(Recipe, data), "diffusion", out).exports["onnx-qdq"]


def fallbacks(engine):
    return {name: reason for name, reason in engine.layers.items() if reason is not None}


CASES = [
    ("unet", "dataflow", [EVERYWHERE, "round"]),
    ("unet", "layers", [FSC, "round"]),
    ("unet", "dataflow", ["round"]),
    ("text", "dataflow", [EVERYWHERE, "round"]),
    ("dit", "dataflow", [FSC, {"tiar": {"mode": "cache"}}, "round"]),
]


@pytest.mark.parametrize(("pipeline", "scope", "steps"), CASES)
def test_engines_compute_the_denoiser_in_integers_at_every_timestep(
    pipeline, scope, steps, folders, tmp_path
):
    task = {"prompts": str(prompts(tmp_path))} if pipeline == "text" else {}
    record = export(folders(pipeline), tmp_path / "out", steps, scope, **task)
    assert record.largest_difference == 0
    for engine in record.engines:
        assert not engine.problem
        assert engine.samples >= STEPS
        assert engine.within_one_step > 0.95
        reasons = fallbacks(engine)
        if scope == "dataflow" and pipeline != "dit":
            assert not reasons
        assert all("MatMul" in name for name in reasons) or pipeline == "dit"
    if FSC in steps or EVERYWHERE in steps:
        assert f"compared at {STEPS} of the {STEPS} timesteps that it has rows for" in record.notes
    file = onnx.load(tmp_path / "out" / "exports" / "onnx-qdq" / "model.onnx").graph
    sizes = {
        value.name: [size.dim_param for size in value.type.tensor_type.shape.dim] for value in file.input
    }
    assert sizes["timestep"] == ["batch"]
    assert all(named[0] == "batch" for named in sizes.values())


def prompts(folder):
    path = folder / "prompts.txt"
    path.write_text("a\nb\n", encoding="utf-8")
    return path


def test_a_batch_may_be_of_several_timesteps_and_of_any_size(folders, tmp_path):
    export(folders("unet"), tmp_path / "out", [EVERYWHERE, "round"])
    model = ptqcore.load(tmp_path / "out")
    times = timesteps_of(model).values.long().repeat(3)
    x = torch.randn(9, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = torch.cat([model(x[i : i + 1], times[i : i + 1]).sample for i in range(9)]).numpy()
    path = tmp_path / "out" / "exports" / "onnx-qdq" / "model.onnx"
    for engine in ("onnxruntime", "openvino"):
        (found,) = execute(engine, path, [{"sample": x.numpy(), "timestep": times.numpy()}]).outputs
        apart = np.abs(found["output"] - expected) / (np.abs(expected).max() / 127)
        assert (apart <= 1.001).mean() > 0.95


def test_interpolated_ranges_are_refused_before_anything_is_computed(folders, tmp_path, monkeypatch):
    monkeypatch.setattr("ptqcore.quantization.Walk", lambda *_: pytest.fail("blocks are walked"))
    with pytest.raises(ExportError, match="unseen timesteps to nearest, not to interpolate"):
        export(folders("unet"), tmp_path / "out", [FSC, "round"], unseen="interpolate")
