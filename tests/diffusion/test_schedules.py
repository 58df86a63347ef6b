"""The timesteps of a schedule, known before sampling, are those that the denoiser is then given."""

import diffusers
import pytest
import tiny_pipelines as tiny
import torch
from diffusers import DDIMScheduler

from ptq_diffusion.drawing import SamplingOptions
from ptq_diffusion.pipelines import Loaded
from ptq_diffusion.sampling import calls_by_step
from ptq_diffusion.schedules import set_scheduler, timesteps_of
from ptq_diffusion.trajectories import collect, timesteps
from ptqcore import ModelError, RecipeError

SCHEDULES = {
    "ddim leading": ("DDIMScheduler", {}),
    "ddim trailing": ("DDIMScheduler", {"timestep_spacing": "trailing"}),
    "pndm": ("PNDMScheduler", {"skip_prk_steps": True, "steps_offset": 1}),
    "heun": ("HeunDiscreteScheduler", {"timestep_spacing": "linspace"}),
    "euler karras": ("EulerDiscreteScheduler", {"use_karras_sigmas": True, "timestep_spacing": "linspace"}),
    "dpm-solver": ("DPMSolverMultistepScheduler", {}),
    "flow matching": ("FlowMatchEulerDiscreteScheduler", {"shift": 3.0}),
    "lcm": ("LCMScheduler", {}),
}


def bare(name="ddim leading"):
    scheduler, config = SCHEDULES[name]
    return set_scheduler(Loaded(tiny.unet(), "denoiser", DDIMScheduler()), scheduler, **config)


def text():
    pipeline = tiny.text_to_image()
    return Loaded(pipeline.unet, "unet", pipeline.scheduler, pipeline)


def flow():
    pipeline = tiny.flow()
    return Loaded(pipeline.transformer, "transformer", pipeline.scheduler, pipeline)


def options(steps=10, side=8, **more):
    return SamplingOptions(steps=steps, prompts=("a cat",), height=side, width=side, **more)


@pytest.mark.parametrize("name", SCHEDULES)
def test_a_denoiser_alone_is_given_them(name):
    loaded = bare(name)
    known = timesteps_of(loaded, SamplingOptions(steps=10))
    calls = calls_by_step(loaded, SamplingOptions(steps=10), [0])
    assert torch.equal(known, torch.stack([call.times[0].float() for (call,) in calls]))
    assert known.dtype == torch.float32
    recorded = collect(loaded, SamplingOptions(steps=10), range(2), keep=2)
    assert torch.equal(timesteps(recorded.calls), known.unique())


def test_whole_numbers_and_repeated_ones():
    given = {name: timesteps_of(bare(name), SamplingOptions(steps=10)).tolist() for name in SCHEDULES}
    assert given["ddim leading"] == list(range(900, -1, -100))
    assert given["ddim trailing"] == list(range(999, 98, -100))
    assert given["pndm"] == [901, 801, 801, 701, 601, 501, 401, 301, 201, 101, 1]
    assert len(given["heun"]) == 19
    assert len(set(given["heun"])) == 10
    assert timesteps_of(bare("lcm"), SamplingOptions(steps=4)).tolist() == [999, 759, 499, 259]


def test_fractional_timesteps():
    karras = timesteps_of(bare("euler karras"), SamplingOptions(steps=10))
    assert karras[1].item() == pytest.approx(936.92, abs=0.01)
    # shifted times are 3 t / (1 + 2 t), of the scheduler's own steps from 1 to 3 / 1002
    shifted = timesteps_of(bare("flow matching"), SamplingOptions(steps=10))
    plain = torch.linspace(1, 3 / 1002, 10, dtype=torch.float64)
    assert torch.allclose(shifted.double(), 1000 * 3 * plain / (1 + 2 * plain), atol=1e-3)
    assert shifted[7].item() == pytest.approx(464.88, abs=0.01)


@pytest.mark.parametrize("make", [text, flow])
def test_pipelines_give_their_denoisers_them(make):
    loaded = make()
    known = timesteps_of(loaded, options(steps=4))
    calls = calls_by_step(loaded, options(steps=4), [5])
    assert torch.equal(known, torch.stack([step[0].times.reshape(-1)[0].float() for step in calls]))
    recorded = collect(loaded, options(steps=4), range(2), keep=1)
    assert torch.equal(timesteps(recorded.calls), known.unique())


@pytest.mark.parametrize(("side", "tokens"), [(8, 4), (64, 256)])
def test_pipelines_scale_and_shift_by_the_size_of_images(side, tokens):
    """Flux: times in [0, 1], shifted by an exponent that grows linearly with the number of tokens."""
    exponent = 0.5 + (tokens - 256) * (1.15 - 0.5) / (4096 - 256)
    plain = torch.tensor([1, 0.75, 0.5, 0.25])
    expected = 1 / (1 + (1 / plain - 1) / torch.tensor(exponent).exp())
    assert torch.allclose(timesteps_of(flow(), options(steps=4, side=side)), expected, atol=1e-6)


@pytest.mark.parametrize(("make", "first"), [(text, "conv_in"), (flow, "x_embedder")])
def test_the_denoiser_is_computed_once(make, first):
    loaded, computed = make(), []
    layer = getattr(loaded.denoiser, first)
    layer.register_forward_hook(lambda *_: computed.append(1))
    decoded = []
    loaded.pipeline.vae.decoder.register_forward_hook(lambda *_: decoded.append(1))
    assert len(timesteps_of(loaded, options(steps=6))) == 6
    assert len(computed) == 1
    assert not decoded
    assert "forward" not in vars(loaded.denoiser)


def test_a_scheduler_that_is_asked_stays_as_it_was():
    loaded = bare()
    before = loaded.scheduler.timesteps.clone()
    timesteps_of(loaded, SamplingOptions(steps=10))
    assert torch.equal(loaded.scheduler.timesteps, before)


def test_another_scheduler_takes_over_what_both_know():
    loaded = text()
    changed = set_scheduler(loaded, "EulerDiscreteScheduler", use_karras_sigmas=True, beta_end=0.03)
    assert type(changed.scheduler) is diffusers.EulerDiscreteScheduler
    assert changed.pipeline.scheduler is changed.scheduler
    assert changed.scheduler.config.steps_offset == loaded.scheduler.config.steps_offset == 1
    assert changed.scheduler.config.use_karras_sigmas
    assert changed.scheduler.config.beta_end == 0.03
    assert type(loaded.scheduler) is type(loaded.pipeline.scheduler) is DDIMScheduler


def test_a_default_of_one_scheduler_is_not_given_up_for_that_of_another():
    loaded = Loaded(tiny.unet(), "denoiser", DDIMScheduler())
    assert diffusers.HeunDiscreteScheduler().config.beta_end == 0.012
    assert set_scheduler(loaded, "HeunDiscreteScheduler").scheduler.config.beta_end == 0.02


def test_schedulers_and_settings_that_do_not_exist():
    with pytest.raises(
        RecipeError, match=r"no setting 'use_karas_sigmas'; did you mean 'use_karras_sigmas'"
    ):
        set_scheduler(bare(), "EulerDiscreteScheduler", use_karas_sigmas=True)
    with pytest.raises(RecipeError, match="did you mean 'HeunDiscreteScheduler'"):
        set_scheduler(bare(), "HeunDiscretScheduler")
    with pytest.raises(ModelError, match=r"'DDIMScheduler' cannot be made: .*"):
        set_scheduler(bare(), "DDIMScheduler", beta_schedule="steep")
