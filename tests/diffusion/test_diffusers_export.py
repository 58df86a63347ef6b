"""Quantized pipelines in diffusers' layout: loaded in other processes, saved again, and refused."""

import subprocess
import sys

import diffusers
import pytest
import tiny_pipelines
import torch
from diffusers import ConfigMixin, DDIMPipeline, DDIMScheduler, ModelMixin
from diffusers.configuration_utils import register_to_config
from diffusers.models.unets.unet_2d import UNet2DOutput
from test_denoising import FSC, recipe

import ptq_diffusion
import ptqcore
from ptqcore import ModelError

SAMPLE = """
import sys
{imports}
import torch
pipeline = DiffusionPipeline.from_pretrained(sys.argv[1], local_files_only=True)
pipeline.set_progress_bar_config(disable=True)
images = pipeline(
    batch_size=2, generator=torch.Generator().manual_seed(3), num_inference_steps=6, output_type="np"
).images
torch.save(torch.from_numpy(images), sys.argv[2])
"""
ORDERS = {
    "ours first": "import ptq_diffusion\nfrom diffusers import DiffusionPipeline",
    "diffusers first": "from diffusers import DiffusionPipeline\nimport ptq_diffusion",
}


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """Folders of a run with both scopes of ranges, its pipeline exported."""
    base = tmp_path_factory.mktemp("run")
    DDIMPipeline(tiny_pipelines.unet(), DDIMScheduler()).save_pretrained(base / "pipeline")
    chosen = recipe(base / "pipeline", [{FSC: {"scope": "all"}}, "round"])
    exported = chosen.model_copy(update={"export": [ptqcore.recipe.Entry(name="diffusers")]})
    record = ptqcore.quantize(exported, "diffusion", base / "out")
    assert record.exports["diffusers"].largest_difference == 0
    return base / "out"


def images_of(pipeline):
    pipeline.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(3)
    made = pipeline(batch_size=2, generator=generator, num_inference_steps=6, output_type="np")
    return torch.from_numpy(made.images)


def expected(folder):
    pipeline = DDIMPipeline(tiny_pipelines.unet(), DDIMScheduler())
    pipeline.unet = ptqcore.load(folder)
    return images_of(pipeline)


@pytest.mark.parametrize("order", ORDERS)
def test_another_process_makes_the_same_images_to_the_last_bit(finished, tmp_path, order):
    script = SAMPLE.format(imports=ORDERS[order])
    place = str(finished / "exports/diffusers")
    command = [sys.executable, "-c", script, place, str(tmp_path / "images.pt")]
    subprocess.run(command, check=True, capture_output=True, text=True)
    found = torch.load(tmp_path / "images.pt", weights_only=True)
    assert torch.equal(found, expected(finished))


def test_a_loaded_pipeline_can_be_saved_and_loaded_again(finished, tmp_path):
    first = ptq_diffusion.load_pipeline(finished / "exports/diffusers")
    first.save_pretrained(tmp_path / "again")
    second = ptq_diffusion.load_pipeline(tmp_path / "again")
    assert torch.equal(images_of(second), expected(finished))


def test_weights_are_stored_as_packed_integers(finished):
    files = {
        folder: sum(file.stat().st_size for file in (folder).glob("*.safetensors"))
        for folder in (finished.parent / "pipeline/unet", finished / "exports/diffusers/unet")
    }
    before, after = files.values()
    assert after < 0.5 * before


def test_a_denoiser_alone_is_saved_with_its_scheduler(tmp_path):
    denoiser = tiny_pipelines.unet()
    denoiser.save_pretrained(tmp_path / "model")
    task = {"scheduler": "DDIMScheduler"}
    chosen = recipe(tmp_path / "model", ["round"], task=task).model_copy(
        update={"export": [ptqcore.recipe.Entry(name="diffusers")]}
    )
    ptqcore.quantize(chosen, "diffusion", tmp_path / "out")
    place = tmp_path / "out/exports/diffusers"
    read = type(denoiser).from_pretrained(place)
    x = torch.randn(2, 1, 8, 8)
    with torch.no_grad():
        assert torch.equal(read(x, 3).sample, ptqcore.load(tmp_path / "out")(x, 3).sample)
    assert DDIMScheduler.from_pretrained(place / "scheduler").config.num_train_timesteps == 1000


def test_listing_plugins_imports_neither_torch_nor_diffusers():
    script = "import sys, ptq_diffusion; sys.exit('torch' in sys.modules or 'diffusers' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", script]).returncode == 0


def test_what_is_no_pipeline_is_refused_in_one_sentence(tmp_path):
    with pytest.raises(ModelError, match="holds no pipeline that diffusers can load") as caught:
        ptq_diffusion.load_pipeline(tmp_path)
    assert "\n" not in str(caught.value)


class Activated(torch.nn.BatchNorm2d):
    """A batch norm that does more."""

    def forward(self, x):
        return torch.nn.functional.silu(super().forward(x))


class Normed(ModelMixin, ConfigMixin):
    """A denoiser with batch norms: after a quantized convolution, and after one that is not."""

    @register_to_config
    def __init__(self, in_channels=1, sample_size=8):
        super().__init__()
        self.conv_in = torch.nn.Conv2d(in_channels, 8, 3, padding=1, bias=False)
        self.norm_in = Activated(8)
        self.time = torch.nn.Linear(2, 8)
        self.middle = torch.nn.Conv2d(8, 8, 3, padding=1, bias=False)
        self.norm = torch.nn.BatchNorm2d(8)
        self.conv_out = torch.nn.Conv2d(8, in_channels, 3, padding=1)

    def forward(self, sample, timestep, return_dict=True):
        time = torch.as_tensor(timestep).float().expand(len(sample)) / 1000
        embedded = self.time(torch.stack([time.cos(), time.sin()], 1))
        x = self.norm_in(self.conv_in(sample)) + embedded[:, :, None, None]
        output = self.conv_out(self.norm(self.middle(x)))
        return UNet2DOutput(output) if return_dict else (output,)


def test_folded_batch_norms_are_described(tmp_path, monkeypatch):
    monkeypatch.setattr(diffusers, "Normed", Normed, raising=False)
    torch.manual_seed(0)
    denoiser = Normed()
    for norm in (denoiser.norm_in, denoiser.norm):
        norm.running_mean.normal_()
        norm.running_var.uniform_(0.5, 2)
    denoiser.save_pretrained(tmp_path / "model")
    task = {"scheduler": "DDIMScheduler"}
    chosen = recipe(tmp_path / "model", ["round"], task=task, ignore=["middle"])
    exported = chosen.model_copy(update={"export": [ptqcore.recipe.Entry(name="diffusers")]})
    record = ptqcore.quantize(exported, "diffusion", tmp_path / "out")
    assert record.map.folded == 2
    assert record.exports["diffusers"].largest_difference == 0
    read = Normed.from_pretrained(tmp_path / "out/exports/diffusers")
    assert not [name for name in read.state_dict() if "running" in name]
    read.save_pretrained(tmp_path / "again")
    x = torch.randn(2, 1, 8, 8)
    with torch.no_grad():
        expected = ptqcore.load(tmp_path / "out")(x, 3).sample
        for loaded in (read, Normed.from_pretrained(tmp_path / "again")):
            assert torch.equal(loaded(x, 3).sample, expected)
