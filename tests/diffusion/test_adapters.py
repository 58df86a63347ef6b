"""LoRA on top of a quantized denoiser: refused in one sentence of ours, with diffusers' PEFT or without."""

import copy

import pytest
import tiny_pipelines as tiny
import torch
from diffusers import DiffusionPipeline
from test_denoising import recipe

import ptq_diffusion
import ptqcore
from ptqcore import ModelError

LAYER = "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q"
LORA = {f"unet.{LAYER}.lora_A.weight": torch.ones(2, 8), f"unet.{LAYER}.lora_B.weight": torch.ones(8, 2)}
ON_DENOISERS = ("add_adapter", "load_lora_adapter", "load_attn_procs", "fuse_lora")
ON_PIPELINES = ("load_lora_weights", "fuse_lora")


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A run of a pipeline that LoRA can be loaded into, and its export."""
    base = tmp_path_factory.mktemp("run")
    tiny.text_to_image().save_pretrained(base / "pipeline")
    (base / "prompts.txt").write_text("a cat\n")
    task = {"prompts": str(base / "prompts.txt"), "steps": 2, "calibration_samples": 2}
    chosen = recipe(base / "pipeline", ["round"], task=task | {"samples": 2})
    exported = chosen.model_copy(update={"export": [ptqcore.recipe.Entry(name="diffusers")]})
    ptqcore.quantize(exported, "diffusion", base / "out")
    return base / "out"


@pytest.fixture
def pipeline(finished):
    return ptq_diffusion.load_pipeline(finished / "exports/diffusers")


def assert_refused(owner, method):
    with pytest.raises(ModelError) as caught:
        getattr(owner, method)(LORA)
    sentence = str(caught.value)
    assert sentence.startswith(f"{method}: a quantized denoiser takes no adapters such as LoRA")
    assert sentence.endswith(
        "fuse_lora, unload_lora_weights), save that with save_pretrained, and quantize it"
    )
    assert "\n" not in sentence


@pytest.mark.parametrize("method", ON_PIPELINES)
def test_a_pipeline_with_a_quantized_denoiser_refuses(pipeline, method):
    assert_refused(pipeline, method)


@pytest.mark.parametrize("method", ON_DENOISERS)
def test_a_denoiser_that_diffusers_itself_has_loaded_refuses(finished, method):
    loaded = DiffusionPipeline.from_pretrained(finished / "exports/diffusers", local_files_only=True)
    assert_refused(loaded.unet, method)
    assert_refused(copy.deepcopy(loaded.unet), method)


@pytest.mark.parametrize("method", ON_DENOISERS)
def test_the_denoiser_of_an_artifact_refuses(finished, method):
    assert_refused(ptqcore.load(finished), method)


def test_what_refused_is_as_before(pipeline, finished, tmp_path):
    before = dict(pipeline.unet.state_dict())
    for owner, methods in ((pipeline, ON_PIPELINES), (pipeline.unet, ON_DENOISERS)):
        for method in methods:
            assert_refused(owner, method)
    pipeline.save_pretrained(tmp_path)
    after = ptq_diffusion.load_pipeline(tmp_path).unet.state_dict()
    assert list(after) == list(before)
    assert all(torch.equal(after[name], before[name]) for name in before)


def test_pipelines_in_full_precision_are_left_alone(finished):
    whole = ptq_diffusion.load_pipeline(finished.parent / "pipeline")
    for owner in (whole, whole.unet):
        assert not {*ON_PIPELINES, *ON_DENOISERS} & set(vars(owner))
