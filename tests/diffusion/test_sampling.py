"""Images from seeds: those of diffusers' own pipelines, whatever else is in the batch."""

import copy
from types import SimpleNamespace
from typing import ClassVar

import diffusers
import pytest
import tiny_pipelines as tiny
import torch
from diffusers import DDIMScheduler, DDPMPipeline, DDPMScheduler

from ptq_diffusion.drawing import SamplingOptions
from ptq_diffusion.pipelines import Loaded
from ptq_diffusion.prompts import read_prompts
from ptq_diffusion.sampling import sample
from ptq_diffusion.schedules import set_scheduler
from ptqcore import DataError, ModelError

PROMPTS = ("a cat", "two dogs on a hill")
SEEDS = range(5)
SCHEDULERS = [
    "DDIMScheduler",
    "DDPMScheduler",
    "DEISMultistepScheduler",
    "DPMSolverMultistepScheduler",
    "DPMSolverSinglestepScheduler",
    "EulerAncestralDiscreteScheduler",
    "EulerDiscreteScheduler",
    "FlowMatchEulerDiscreteScheduler",
    "HeunDiscreteScheduler",
    "KDPM2DiscreteScheduler",
    "LCMScheduler",
    "LMSDiscreteScheduler",
    "PNDMScheduler",
    "TCDScheduler",
    "UniPCMultistepScheduler",
]
RANDOM = {"DDPMScheduler", "EulerAncestralDiscreteScheduler", "LCMScheduler", "TCDScheduler"}


def bare(denoiser=None, scheduler=None):
    return Loaded(denoiser or tiny.unet(), "denoiser", scheduler or DDIMScheduler())


def whole(pipeline, component="unet"):
    return Loaded(getattr(pipeline, component), component, pipeline.scheduler, pipeline)


def generators(seeds):
    return [torch.Generator().manual_seed(seed) for seed in seeds]


def fails(loaded, error, **options):
    with pytest.raises(error) as caught:
        sample(loaded, SamplingOptions(steps=2, **options), [0])
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("eta", [0.0, 1.0])
def test_without_a_pipeline_as_ddim_pipeline_does(eta):
    samples = sample(bare(), SamplingOptions(steps=4, eta=eta), SEEDS)
    pipeline = tiny.ddim()
    pipeline.set_progress_bar_config(disable=True)
    expected = pipeline(5, generators(SEEDS), num_inference_steps=4, eta=eta, output_type="pt").images
    assert torch.equal(samples.images, expected)
    assert samples.images.dtype == torch.float32


def test_without_a_pipeline_as_ddpm_pipeline_does():
    scheduler = DDPMScheduler()
    samples = sample(bare(scheduler=scheduler), SamplingOptions(steps=4), SEEDS)
    pipeline = DDPMPipeline(tiny.unet(), scheduler)
    pipeline.set_progress_bar_config(disable=True)
    expected = pipeline(5, generators(SEEDS), num_inference_steps=4, output_type="pt").images
    assert torch.equal(samples.images, expected)
    own = sample(whole(pipeline), SamplingOptions(steps=4), SEEDS)
    assert torch.equal(own.images, expected)


def test_without_a_pipeline_as_dit_pipeline_does():
    options = SamplingOptions(steps=3, labels=(7, 400), guidance=3.0)
    within = sample(whole(tiny.class_to_image(), "transformer"), options, SEEDS)
    alone = sample(bare(tiny.dit(1000), DDIMScheduler(clip_sample=False)), options, SEEDS)
    assert within.images.shape == (5, 3, 16, 16)
    assert within.states.shape == alone.states.shape == (3, 5, 4, 8, 8)
    assert torch.allclose(within.states, alone.states, atol=1e-5)


def test_a_text_pipeline_makes_the_same_images_when_called_itself():
    pipeline = tiny.text_to_image()
    options = SamplingOptions(steps=3, prompts=PROMPTS, guidance=4.0, height=24, width=16)
    samples = sample(whole(pipeline), options, [4, 7])
    pipeline.set_progress_bar_config(disable=True)
    given = {"num_inference_steps": 3, "guidance_scale": 4.0, "height": 24, "width": 16}
    expected = pipeline(list(PROMPTS), generator=generators([4, 7]), output_type="pt", **given).images
    assert samples.images.shape == (2, 3, 24, 16)
    assert torch.equal(samples.images, expected)
    latents = pipeline(list(PROMPTS), generator=generators([4, 7]), output_type="latent", **given).images
    assert torch.equal(samples.states[-1], latents)


def test_guidance_changes_images():
    loaded = whole(tiny.text_to_image())
    images = [
        sample(loaded, SamplingOptions(steps=2, prompts=PROMPTS, guidance=guidance), SEEDS).images
        for guidance in (1.0, 3.0, 6.0)
    ]
    assert not torch.equal(images[0], images[1])
    assert not torch.equal(images[1], images[2])


def test_images_are_what_becomes_of_the_last_state():
    samples = sample(bare(), SamplingOptions(steps=4), SEEDS)
    assert samples.states.shape == (4, 5, 1, 8, 8)
    assert torch.equal(samples.images, (samples.states[-1] / 2 + 0.5).clamp(0, 1))


def test_a_scheduler_whose_library_is_not_installed(monkeypatch):
    """diffusers then has a class of that name which can only raise."""

    class Absent(type):
        def __getattr__(cls, key):
            raise ImportError("long text")

    dummy = Absent("LMSDiscreteScheduler", (), {"_backends": ["torch", "sci_not_there"]})
    monkeypatch.setattr("diffusers.LMSDiscreteScheduler", dummy)
    with pytest.raises(ModelError, match="of diffusers needs sci_not_there: pip install sci_not_there"):
        set_scheduler(bare(), "LMSDiscreteScheduler")


@pytest.mark.parametrize("name", SCHEDULERS)
def test_schedulers_with_a_denoiser_alone(name):
    loaded = set_scheduler(bare(), name)
    options = SamplingOptions(steps=4, batch=3)
    one, two = (sample(loaded, options, SEEDS) for _ in range(2))
    assert torch.equal(one.states, two.states)
    assert one.states.isfinite().all()
    assert len(one.states) == len(loaded.scheduler.timesteps)
    assert one.images.min() >= 0
    assert one.images.max() <= 1
    # a scheduler's own pipelines draw noise for the whole batch: each seed must bring its own
    alone = sample(loaded, options, [3])
    assert torch.allclose(alone.states[:, 0], one.states[:, 3], atol=1e-4, rtol=1e-4)


class Exact(torch.nn.Module):
    """Denoises as well as can be what is normally distributed with standard deviation 1/2."""

    config: ClassVar = {"sample_size": 4, "in_channels": 1}

    def __init__(self, flow):
        super().__init__()
        self.flow, self.kept = flow, DDIMScheduler().alphas_cumprod.double()

    def forward(self, sample, timestep, return_dict=False):
        time = timestep.double()[:, None, None, None]
        if self.flow:
            noise = time / 1000
            share = (noise - (1 - noise) / 4) / ((1 - noise) ** 2 / 4 + noise**2)
        else:
            below = time.floor().long().clamp(0, 998)
            kept = self.kept[below].log().lerp(self.kept[below + 1].log(), time - below).exp()
            share = (1 - kept).sqrt() / (kept / 4 + 1 - kept)
        return ((share * sample).float(),)


@pytest.mark.parametrize("name", sorted({*SCHEDULERS} - RANDOM))
def test_an_exact_denoiser_shrinks_noise_to_what_it_knows(name):
    """The ordinary differential equation that schedulers solve (Song et al., arXiv 2011.13456, section
    4.3) then maps every value to half of it."""
    flow = name.startswith("Flow")
    loaded = Loaded(Exact(flow), "denoiser", DDIMScheduler(clip_sample=False, timestep_spacing="trailing"))
    states = sample(set_scheduler(loaded, name), SamplingOptions(steps=50), SEEDS).states
    noise = torch.cat([torch.randn(1, 1, 4, 4, generator=each) for each in generators(SEEDS)])
    assert torch.allclose(states[-1], noise / 2, atol=0.01, rtol=0.06)


def test_frames_of_videos_stand_below_each_other():
    loaded = whole(tiny.text_to_video(), "transformer")
    options = SamplingOptions(steps=2, prompts=PROMPTS, height=16, width=16)
    samples = sample(loaded, options, [0, 1])
    assert samples.images.shape == (2, 3, 81 * 16, 16)
    assert samples.states.shape == (2, 2, 16, 21, 2, 2)
    pipeline = loaded.pipeline
    pipeline.set_progress_bar_config(disable=True)
    given = {"num_inference_steps": 2, "height": 16, "width": 16, "generator": generators([0, 1])}
    frames = pipeline(list(PROMPTS), output_type="np", **given).frames
    assert torch.equal(samples.images[1, :, 16:32], torch.tensor(frames[1, 1]).movedim(-1, 0))


def test_as_many_frames_as_asked_for():
    options = SamplingOptions(steps=2, prompts=PROMPTS, height=16, width=16, frames=5)
    samples = sample(whole(tiny.text_to_video(), "transformer"), options, [0, 1])
    assert samples.images.shape == (2, 3, 5 * 16, 16)
    assert samples.states.shape == (2, 2, 16, 2, 2, 2)


def test_negative_prompts_in_turn_as_prompts():
    pipeline, away = tiny.text_to_image(), ("blurred", "ugly", "many hands")
    options = SamplingOptions(steps=3, prompts=PROMPTS, negative_prompts=away, guidance=4.0)
    samples = sample(whole(pipeline), options, [1, 2])
    pipeline.set_progress_bar_config(disable=True)
    given = {"num_inference_steps": 3, "guidance_scale": 4.0, "generator": generators([1, 2])}
    expected = pipeline(
        [PROMPTS[1], PROMPTS[0]], negative_prompt=[away[1], away[2]], output_type="pt", **given
    ).images
    assert torch.equal(samples.images, expected)
    without = sample(whole(pipeline), SamplingOptions(steps=3, prompts=PROMPTS, guidance=4.0), [1, 2])
    assert not torch.equal(samples.images, without.images)


def test_heun_has_a_state_for_each_half_of_a_step():
    loaded = set_scheduler(bare(), "HeunDiscreteScheduler")
    assert len(sample(loaded, SamplingOptions(steps=5), SEEDS).states) == 2 * 5 - 1


@pytest.mark.parametrize("make", ["bare", "text", "flow"])
def test_the_image_of_a_seed_does_not_depend_on_the_others(make):
    loaded = {
        "bare": bare,
        "text": lambda: whole(tiny.text_to_image()),
        "flow": lambda: whole(tiny.flow(), "transformer"),
    }[make]()
    prompts = () if make == "bare" else PROMPTS
    options = SamplingOptions(steps=2, prompts=prompts, batch=5, height=8, width=8)
    together = sample(loaded, options, SEEDS)
    assert torch.equal(sample(loaded, options, SEEDS).images, together.images)
    few = sample(loaded, SamplingOptions(**vars(options) | {"batch": 2}), [1, 4, 2])
    assert torch.allclose(few.images, together.images[[1, 4, 2]], atol=1e-5)
    assert not torch.allclose(together.images[0], together.images[2], atol=1e-2)


def test_classes_in_turn_or_as_asked():
    loaded = bare(tiny.unet(num_class_embeds=3))
    in_turn = sample(loaded, SamplingOptions(steps=2), range(6)).images
    assert torch.equal(in_turn, sample(loaded, SamplingOptions(steps=2, labels=(0, 1, 2)), range(6)).images)
    ones = sample(loaded, SamplingOptions(steps=2, labels=(1,)), range(6)).images
    assert torch.equal((ones != in_turn).flatten(1).any(1), torch.arange(6) % 3 != 1)


def test_another_denoiser_is_sampled_with():
    loaded = whole(tiny.text_to_image())
    options = SamplingOptions(steps=2, prompts=PROMPTS)
    before = sample(loaded, options, SEEDS).images
    other = copy.deepcopy(loaded.denoiser)
    torch.nn.init.zeros_(other.conv_out.weight)
    changed = sample(loaded.with_denoiser(other), options, SEEDS).images
    assert not torch.equal(changed, before)
    assert torch.equal(sample(loaded, options, SEEDS).images, before)


def test_what_is_watched_is_left_as_it_was():
    loaded = whole(tiny.text_to_image())
    sample(loaded, SamplingOptions(steps=2, prompts=PROMPTS), SEEDS)
    fails(loaded, DataError, prompts=PROMPTS, height=7, width=8)
    assert "step" not in vars(loaded.scheduler)
    assert not loaded.denoiser._forward_pre_hooks
    assert not hasattr(loaded.pipeline, "_progress_bar_config")


def test_images_are_not_blackened():
    class Checker(torch.nn.Module):
        def forward(self, images, **_):
            return torch.zeros_like(torch.as_tensor(images)), [True] * len(images)

    pipeline = tiny.text_to_image()
    expected = sample(whole(pipeline), SamplingOptions(steps=2, prompts=PROMPTS), SEEDS).images
    pipeline.safety_checker = checker = Checker()
    images = sample(whole(pipeline), SamplingOptions(steps=2, prompts=PROMPTS), SEEDS).images
    assert torch.equal(images, expected)
    assert pipeline.safety_checker is checker


def test_options_that_a_model_cannot_take():
    text, unet = whole(tiny.text_to_image()), bare()
    assert "set task.prompts to a file" in fails(text, DataError)
    assert fails(text, DataError, prompts=PROMPTS, labels=(1,)) == (
        "StableDiffusionPipeline takes no class_labels: leave task.labels out"
    )
    assert fails(text, DataError, prompts=PROMPTS, frames=5) == (
        "StableDiffusionPipeline takes no num_frames: leave task.frames out"
    )
    assert fails(whole(tiny.class_to_image(), "transformer"), DataError, negative_prompts=PROMPTS) == (
        "DiTPipeline takes no negative_prompt: leave task.negative_prompts out"
    )
    assert "have to be divisible by 8" in fails(text, DataError, prompts=PROMPTS, height=7, width=8)
    assert fails(unet, DataError, prompts=PROMPTS) == "UNet2DModel takes no prompts: leave task.prompts out"
    assert "takes no negative prompts: leave task.negative_prompts out" in fails(
        unet, DataError, negative_prompts=PROMPTS
    )
    assert "takes no frames: leave task.frames out" in fails(unet, DataError, frames=5)
    assert "takes no class labels" in fails(unet, DataError, labels=(1,))
    assert "cannot be guided" in fails(unet, DataError, guidance=2.0)
    assert "task.labels has 3, but UNet2DModel knows 0 to 2" in fails(
        bare(tiny.unet(num_class_embeds=3)), DataError, labels=(0, 3)
    )
    assert "takes no height" in fails(
        whole(tiny.class_to_image(), "transformer"), DataError, height=16, width=16
    )
    assert "must be set together" in fails(text, DataError, prompts=PROMPTS, height=16)


def test_schedules_that_cannot_be_made():
    message = fails(bare(scheduler=diffusers.LCMScheduler(original_inference_steps=1)), DataError)
    assert message.startswith("UNet2DModel with LCMScheduler cannot sample as asked: ")
    shifted = diffusers.FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True)
    assert "`mu` must be passed" in fails(bare(scheduler=shifted), DataError)


def test_a_denoiser_that_needs_its_pipeline():
    message = fails(bare(tiny.text_to_image().unet), ModelError)
    assert "give the folder of the pipeline" in message


class Other(diffusers.StableDiffusionPipeline):
    """Pipelines that are sampled from in other ways."""

    def __call__(self, prompt, num_inference_steps, generator, output_type):
        self.scheduler.set_timesteps(num_inference_steps)
        noise = torch.zeros(1, 4, 8, 8)
        for timestep in self.scheduler.timesteps:
            self.scheduler.step(noise, timestep, noise)
        return {"audio": noise}


class WithoutSteps(Other):
    def __call__(self, prompt, num_inference_steps, generator, output_type):
        return SimpleNamespace(images=torch.zeros(1, 8, 8, 3).numpy())


class OfImages(Other):
    def __call__(self, prompt, image, num_inference_steps, generator, output_type):
        raise AssertionError


class OfOneLength(Other):
    def __call__(self, prompt, generator, output_type):
        raise AssertionError


def test_pipelines_that_are_sampled_from_in_other_ways():
    def message(kind, error):
        parts = tiny.text_to_image().components
        return fails(whole(kind(**parts, requires_safety_checker=False)), error, prompts=PROMPTS)

    assert "makes neither images nor videos" in message(Other, ModelError)
    assert "does not sample with the steps of its scheduler" in message(WithoutSteps, ModelError)
    assert "needs 'image'" in message(OfImages, ModelError)
    assert "cannot be told 'num_inference_steps'" in message(OfOneLength, ModelError)
    edits = message(diffusers.StableDiffusionInstructPix2PixPipeline, DataError)
    assert "StableDiffusionInstructPix2PixPipeline with DDIMScheduler cannot sample as asked" in edits


def test_prompts_from_a_file(tmp_path):
    file = tmp_path / "prompts.txt"
    file.write_text("a cat\n\n  zwei Hunde äße \n", encoding="utf-8")
    assert read_prompts(str(file)) == ("a cat", "zwei Hunde äße")
    assert read_prompts(None) == ()
    file.write_text("\n \n")
    with pytest.raises(DataError, match="holds no prompt"):
        read_prompts(str(file))
    file.write_bytes(b"\xff\xfe")
    for path in (file, tmp_path / "none"):
        with pytest.raises(DataError, match=r"^task.prompts .* cannot be read as UTF-8 text"):
            read_prompts(str(path))
