"""Denoisers with a timestep as an input of an ONNX graph: two engines compute what the simulation does."""

import numpy as np
import pytest
import tiny_pipelines
import torch
from diffusers import DDIMPipeline, DDIMScheduler, UNet2DConditionModel, UNet2DModel

import ptqcore
from ptqcore import ExportError, Recipe, timesteps_of
from ptqcore.engines import execute
from ptqcore.recipe import validate

onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")
pytest.importorskip("openvino")

STEPS = 3
FSC, EVERYWHERE = "finite-set-calibration", {"finite-set-calibration": {"scope": "all"}}


SMALL = {
    "sample_size": 8,
    "layers_per_block": 1,
    "block_out_channels": (8,),
    "attention_head_dim": 4,
    "norm_num_groups": 4,
}


def unet():
    """With convolutions of both sizes, attention, and skip connections."""
    torch.manual_seed(0)
    blocks = {"down_block_types": ("DownBlock2D",), "up_block_types": ("UpBlock2D",)}
    denoiser = UNet2DModel(in_channels=1, out_channels=1, **blocks, **SMALL)
    return DDIMPipeline(denoiser.eval(), DDIMScheduler())


def text():
    pipeline = tiny_pipelines.text_to_image()
    torch.manual_seed(0)
    blocks = {"down_block_types": ("CrossAttnDownBlock2D",), "up_block_types": ("UpBlock2D",)}
    width = tiny_pipelines.WIDTH
    denoiser = UNet2DConditionModel(
        in_channels=4, out_channels=4, cross_attention_dim=width, **blocks, **SMALL
    )
    pipeline.register_modules(unet=denoiser.eval())
    return pipeline


PIPELINES = {"unet": unet, "dit": tiny_pipelines.class_to_image, "text": text}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    made = {}

    def folder(name):
        if name not in made:
            made[name] = tmp_path_factory.mktemp(name)
            PIPELINES[name]().save_pretrained(made[name])
            (made[name] / "prompts.txt").write_text("a\nb\n", encoding="utf-8")
        return made[name]

    return folder


@pytest.fixture(scope="module")
def finished(folders, tmp_path_factory):
    """The folder of a run and what it says of its export, each made once."""
    done = {}

    def run(name, scope, steps):
        key = repr((name, scope, steps))
        if key not in done:
            out = tmp_path_factory.mktemp("run") / "out"
            prompts = {"prompts": str(folders(name) / "prompts.txt")} if name == "text" else {}
            done[key] = out, export(folders(name), out, steps, scope, **prompts)
        return done[key]

    return run


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


def model_file(out):
    return out / "exports" / "onnx-qdq" / "model.onnx"


CASES = [
    ("unet", "dataflow", [EVERYWHERE, "round"]),
    ("unet", "layers", [FSC, "round"]),
    ("unet", "dataflow", ["round"]),
    ("text", "dataflow", [EVERYWHERE, "round"]),
    ("dit", "layers", [FSC, {"tiar": {"mode": "cache"}}, "round"]),
]


@pytest.mark.parametrize(("name", "scope", "steps"), CASES)
def test_engines_compute_the_denoiser_in_integers_at_every_timestep(name, scope, steps, finished):
    out, record = finished(name, scope, steps)
    assert record.largest_difference == 0
    for engine in record.engines:
        assert not engine.problem
        assert engine.samples >= STEPS
        assert engine.within_one_step > min(0.95, engine.control - 0.1)
        floats = {product for product, reason in engine.layers.items() if reason is not None}
        attention = {product for product in engine.layers if "/MatMul" in product}
        assert attention
        assert floats == (attention if scope == "layers" else set())
    if steps != ["round"]:
        assert f"compared at {STEPS} of the {STEPS} timesteps that it has rows for" in record.notes
    inputs = onnx.load(model_file(out)).graph.input
    sizes = {one.name: [size.dim_param for size in one.type.tensor_type.shape.dim] for one in inputs}
    assert sizes["timestep"] == ["batch"]
    assert {named[0] for named in sizes.values()} == {"batch"}


def test_a_batch_may_be_of_several_timesteps_and_of_any_size(finished):
    out, _ = finished(*CASES[0])
    model = ptqcore.load(out)
    times = timesteps_of(model).values.long().repeat(4)
    x = torch.randn(12, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = torch.cat([model(x[i : i + 1], times[i : i + 1]).sample for i in range(12)]).numpy()
    for engine in ("onnxruntime", "openvino"):
        (found,) = execute(
            engine, model_file(out), [{"sample": x.numpy(), "timestep": times.numpy()}]
        ).outputs
        apart = np.abs(found["output"] - expected) / (np.abs(expected).max() / 127)
        assert (apart <= 1.001).mean() > 0.95


def test_interpolated_ranges_are_refused_before_anything_is_computed(folders, tmp_path, monkeypatch):
    monkeypatch.setattr("ptqcore.quantization.Walk", lambda *_: pytest.fail("blocks are walked"))
    with pytest.raises(ExportError, match="unseen timesteps to nearest, not to interpolate"):
        export(folders("unet"), tmp_path / "out", [FSC, "round"], unseen="interpolate")
