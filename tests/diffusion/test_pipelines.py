"""What loads as a diffusion model, and the sentence for what does not."""

import json
import os
import pickle
import socket
from pathlib import Path

import pytest
import tiny_pipelines as tiny
import torch
from diffusers import DDIMScheduler, DiTTransformer2DModel, EulerDiscreteScheduler, UNet2DModel
from safetensors.torch import load_file, save_file

from ptq_diffusion import embedded
from ptq_diffusion.pipelines import load
from ptqcore import ModelError, PtqError, RecipeError

WEIGHTS = "diffusion_pytorch_model.safetensors"


@pytest.fixture
def folder(tmp_path):
    tiny.ddim().save_pretrained(tmp_path / "ddim")
    return tmp_path / "ddim"


def fails(*args, error=ModelError):
    with pytest.raises(PtqError) as caught:
        load(*map(str, args))
    assert type(caught.value) is error
    assert "\n" not in str(caught.value)
    return str(caught.value)


def same(one, other):
    tensors = other.state_dict()
    return all(torch.equal(tensor, tensors[name]) for name, tensor in one.state_dict().items())


def change(file, **entries):
    file.write_text(json.dumps(json.loads(file.read_text()) | entries))


def test_a_pipeline(folder):
    loaded = load(str(folder))
    assert loaded.component == "unet"
    assert loaded.denoiser is loaded.pipeline.unet
    assert loaded.scheduler is loaded.pipeline.scheduler
    assert type(loaded.scheduler) is DDIMScheduler
    assert not loaded.denoiser.training
    assert same(loaded.denoiser, tiny.unet())


def test_a_denoiser_alone_with_a_scheduler_by_name(folder):
    loaded = load(str(folder / "unet"), "EulerDiscreteScheduler")
    assert loaded.pipeline is None
    assert type(loaded.scheduler) is EulerDiscreteScheduler
    assert same(loaded.denoiser, tiny.unet())


def test_a_denoiser_beside_its_scheduler(tmp_path):
    tiny.dit().save_pretrained(tmp_path / "transformer")
    DDIMScheduler(beta_end=0.03).save_pretrained(tmp_path / "scheduler")
    loaded = load(str(tmp_path))
    assert type(loaded.denoiser) is DiTTransformer2DModel
    assert loaded.scheduler.config.beta_end == 0.03
    replaced = load(str(tmp_path), "EulerDiscreteScheduler").scheduler
    assert type(replaced) is EulerDiscreteScheduler
    assert replaced.config.beta_end == 0.03


def test_a_pipeline_that_draws_what_words_say(tmp_path):
    tiny.text_to_image().save_pretrained(tmp_path)
    loaded = load(str(tmp_path))
    assert loaded.component == "unet"
    assert same(loaded.denoiser, tiny.text_to_image().unet)
    assert same(loaded.pipeline.vae, tiny.vae())


def test_a_denoiser_that_its_pipeline_can_do_without(tmp_path):
    """Of Wan's two networks either may be left out; the other is the one that is sampled with."""
    tiny.text_to_video().save_pretrained(tmp_path)
    loaded = load(str(tmp_path))
    assert loaded.component == "transformer"
    assert loaded.pipeline.transformer is loaded.denoiser
    assert loaded.pipeline.transformer_2 is None


def test_a_scheduler_by_name_replaces_that_of_a_pipeline(folder):
    loaded = load(str(folder), "EulerDiscreteScheduler")
    assert type(loaded.scheduler) is EulerDiscreteScheduler
    assert loaded.pipeline.scheduler is loaded.scheduler


@pytest.mark.parametrize("name", embedded.names())
def test_embedded_models(name):
    assert load(name).denoiser.config.sample_size == 16


@pytest.mark.parametrize("variant", [None, "fp16"])
def test_half_precision_becomes_single(tmp_path, variant):
    pipeline = tiny.ddim()
    pipeline.unet.half()
    pipeline.save_pretrained(tmp_path, variant=variant)
    loaded = load(str(tmp_path)).denoiser
    assert {parameter.dtype for parameter in loaded.parameters()} == {torch.float32}
    assert same(loaded, tiny.unet().half().float())


def test_another_denoiser_leaves_the_first_in_place(folder):
    loaded, other = load(str(folder)), tiny.unet(dropout=0.1)
    changed = loaded.with_denoiser(other)
    assert changed.denoiser is changed.pipeline.unet is other
    assert loaded.denoiser is loaded.pipeline.unet is not other
    assert changed.component == loaded.component
    assert load(str(folder / "unet"), "DDIMScheduler").with_denoiser(other).denoiser is other


def test_one_of_several_denoisers_is_chosen(folder):
    (folder / "second").mkdir()
    for file in (folder / "unet").iterdir():
        (folder / "second" / file.name).write_bytes(file.read_bytes())
    (folder / "model_index.json").unlink()
    assert "second and unet: set task.component" in fails(folder)
    assert same(load(str(folder), component="second").denoiser, tiny.unet())
    assert "'vae' cannot be quantized" in fails(folder, "DDIMScheduler", "vae")


def test_two_transformers_of_one_pipeline(tmp_path):
    parts = {name: ["diffusers", "WanTransformer3DModel"] for name in ("transformer", "transformer_2")}
    index = {"_class_name": "WanPipeline", "vae": ["diffusers", "AutoencoderKLWan"], **parts}
    (tmp_path / "model_index.json").write_text(json.dumps(index))
    assert "transformer and transformer_2: set task.component" in fails(tmp_path)


def test_nothing_is_fetched(folder, tmp_path, monkeypatch):
    assert os.environ["HF_HUB_OFFLINE"] == "1"
    assert "'stabilityai/sdxl-turbo' is not a folder" in fails("stabilityai/sdxl-turbo")
    tiny.text_to_image().save_pretrained(tmp_path / "sd")
    reached = []
    monkeypatch.setattr(socket, "getaddrinfo", lambda *where, **how: reached.append(where))
    load(str(tmp_path / "sd"))
    (tmp_path / "sd" / "vae" / WEIGHTS).unlink()
    assert "cannot be loaded" in fails(tmp_path / "sd")
    assert not reached


def test_no_foreign_code_is_run(folder):
    (folder / "unet" / "network.py").write_text("raise SystemExit")
    change(folder / "model_index.json", unet=["network", "Network"])
    assert "takes unet from 'network', which nobody has imported" in fails(folder)
    change(folder / "model_index.json", unet=["diffusers", "UNet2DModel"], extra=["network", "Network"])
    load(str(folder))
    (folder / "pipeline.py").write_text("raise SystemExit")
    change(folder / "model_index.json", _class_name=["pipeline", "Pipeline"])
    assert "which is no pipeline of diffusers" in fails(folder)


def test_no_such_folder_or_model_in_it(tmp_path):
    message = fails(tmp_path / "none")
    assert "is not a folder" in message
    assert all(name in message for name in embedded.names())
    assert "holds neither a pipeline (model_index.json) nor a denoiser" in fails(tmp_path)


def test_no_component_with_a_timestep(folder, tmp_path):
    change(folder / "model_index.json", unet=["diffusers", "AutoencoderKL"])
    assert "no component with a timestep among scheduler, unet" in fails(folder)
    tiny.vae().save_pretrained(tmp_path / "vae")
    assert "no component with a timestep among denoiser" in fails(tmp_path / "vae", "DDIMScheduler")


def test_classes_that_diffusers_does_not_have(folder):
    change(folder / "model_index.json", unet=["diffusers", "UNet9DModel"])
    assert "unet is a UNet9DModel, which diffusers" in fails(folder)


def test_damaged_files(folder):
    weights = folder / "unet" / WEIGHTS
    whole = weights.read_bytes()
    weights.write_bytes(whole[: len(whole) // 2])
    assert "the denoiser" in fails(folder)
    weights.unlink()
    assert "the denoiser" in fails(folder)
    (folder / "unet" / "config.json").write_text("{")
    assert "config.json' cannot be read as JSON" in fails(folder)
    (folder / "model_index.json").write_text("[]")
    assert "does not hold a JSON object" in fails(folder)


def test_missing_and_misshapen_tensors(folder):
    weights = folder / "unet" / WEIGHTS
    tensors = load_file(weights)
    save_file({name: tensor for name, tensor in tensors.items() if name != "conv_in.bias"}, weights)
    assert "lacks 1 tensors, the first is conv_in.bias" in fails(folder)
    save_file(tensors | {"conv_in.bias": torch.zeros(3)}, weights)
    assert "conv_in.bias" in fails(folder)


class Trap:
    def __reduce__(self):
        return (Path.touch, (Path(os.environ["TRAP"]),))


@pytest.mark.parametrize("name", ["diffusion_pytorch_model.bin", "model.pt"])
def test_pickled_weights_are_not_read(folder, tmp_path, monkeypatch, name):
    monkeypatch.setenv("TRAP", str(tmp_path / "sprung"))
    (folder / "unet" / WEIGHTS).unlink()
    (folder / "unet" / name).write_bytes(pickle.dumps(Trap()))
    for each in (folder, folder / "unet"):
        message = fails(each, "DDIMScheduler")
        assert f"{name}' are pickled" in message
        assert "safe_serialization=True" in message
    assert not (tmp_path / "sprung").exists()


def test_pickled_weights_beside_safetensors_are_ignored(folder, tmp_path, monkeypatch):
    monkeypatch.setenv("TRAP", str(tmp_path / "sprung"))
    (folder / "unet" / "diffusion_pytorch_model.bin").write_bytes(pickle.dumps(Trap()))
    assert type(load(str(folder)).denoiser) is UNet2DModel
    assert not (tmp_path / "sprung").exists()


def test_pickled_weights_are_not_read_where_the_safetensors_are_others(folder):
    weights = folder / "unet" / WEIGHTS
    torch.save(load_file(weights), weights.with_suffix(".bin"))
    weights.rename(folder / "unet" / "others.safetensors")
    assert "cannot be loaded" in fails(folder)
    assert "cannot be loaded" in fails(folder / "unet", "DDIMScheduler")


def test_pickled_weights_of_other_components(tmp_path):
    tiny.text_to_image().save_pretrained(tmp_path)
    (tmp_path / "text_encoder" / "model.safetensors").rename(
        tmp_path / "text_encoder" / "pytorch_model.bin"
    )
    assert "pytorch_model.bin' are pickled" in fails(tmp_path)


def test_quantized_already(folder):
    change(folder / "unet" / "config.json", quantization_config={"quant_method": "gguf"})
    assert "is quantized already" in fails(folder)


def test_a_denoiser_without_a_scheduler(folder):
    message = fails(folder / "unet")
    assert "without a scheduler" in message
    assert "DDIMScheduler" in message


def test_schedulers_that_cannot_set_timesteps(folder):
    assert "ScoreSdeVeScheduler has no step" in fails(folder, "ScoreSdeVeScheduler")
    change(folder / "model_index.json", scheduler=["diffusers", "VQModel"])
    assert "VQModel has no set_timesteps" in fails(folder)


def test_a_pipeline_without_a_scheduler(tmp_path):
    pipeline = tiny.flow()
    pipeline.scheduler = None
    pipeline.save_pretrained(tmp_path)
    assert "has no scheduler: set task.scheduler" in fails(tmp_path)
    loaded = load(str(tmp_path), "FlowMatchEulerDiscreteScheduler")
    assert loaded.pipeline.scheduler is loaded.scheduler is not None


def test_unknown_schedulers(folder):
    assert "did you mean 'DDIMScheduler'?" in fails(folder, "DDIMSheduler", error=RecipeError)
    assert "'AutoencoderKL' is not a scheduler" in fails(folder, "AutoencoderKL", error=RecipeError)
