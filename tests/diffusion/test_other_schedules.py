"""A denoiser calibrated for one schedule and sampled with others, as good as one calibrated for these."""

import json
import warnings
from functools import cache

import pytest
import tiny_pipelines
import torch
from diffusers import DDIMPipeline, DDIMScheduler
from test_denoising import FSC, recipe

import ptq_diffusion
import ptqcore
from ptq_diffusion import pipelines
from ptq_diffusion.denoising import Denoising
from ptq_diffusion.drawing import SamplingOptions
from ptq_diffusion.features_of_time import temporal_features
from ptq_diffusion.judge import temporal_error
from ptq_diffusion.sampling import calls_by_step
from ptq_diffusion.schedules import set_scheduler, timesteps_of
from ptq_diffusion.temporal import find_temporal
from ptqcore import FakeQuant, ModelError, RecipeError
from ptqcore.recipe import Entry

CALIBRATED = (20, "DDIMScheduler", {})
OTHERS = {
    "50 steps": (50, "DDIMScheduler", {}),
    "trailing": (20, "DDIMScheduler", {"timestep_spacing": "trailing"}),
    "heun": (30, "HeunDiscreteScheduler", {}),
    "euler karras": (20, "EulerDiscreteScheduler", {"use_karras_sigmas": True}),
}


class Digits:
    """The embedded denoiser, its temporal block rounded to 4 bits with ranges for some schedule."""

    def __init__(self, factory):
        self.factory = factory
        self.exact = pipelines.load("mnist-unet")
        denoiser = self.exact.denoiser
        self.call = calls_by_step(self.exact, SamplingOptions(2), [0, 1], only_first=True)[0][0]
        flow = ptqcore.trace(denoiser, lambda: self.call.run(denoiser))
        self.temporal = find_temporal(denoiser, flow, self.call)
        self.folder = cache(self._run)

    def calibrated(self, schedule, bits):
        return ptqcore.load(self.folder(json.dumps(schedule), bits))

    def timesteps(self, schedule):
        steps, kind, config = schedule
        return timesteps_of(set_scheduler(self.exact, kind, **config), SamplingOptions(steps)).unique()

    def error(self, denoiser, timesteps):
        call = self.call.with_timestep(float(timesteps[0]))
        found, expected = (
            temporal_features(each, call, self.temporal, timesteps)
            for each in (denoiser, self.exact.denoiser)
        )
        return temporal_error(found, expected)

    def _run(self, schedule, bits):
        steps, kind, config = json.loads(schedule)
        place = self.factory.mktemp("digits")
        other = set_scheduler(self.exact, kind, **config)
        other.denoiser.save_pretrained(place / "model")
        other.scheduler.save_pretrained(place / "model/scheduler")
        few = {"steps": steps, "calibration_samples": 2, "calibration_keep": 1, "samples": 2}
        chosen = recipe(place / "model", [FSC, "round"], 4, bits, "temporal", few)
        with (
            pytest.MonkeyPatch.context() as patch
        ):  # images take most of the time, and nobody looks at them
            patch.setattr(Denoising, "evaluate", lambda *_: {"nothing": 0.0})
            patch.setattr(Denoising, "figures", lambda _: [])
            ptqcore.quantize(chosen, "diffusion", place / "out")
        return place / "out"


@pytest.fixture(scope="module")
def digits(tmp_path_factory):
    return Digits(tmp_path_factory)


@pytest.mark.parametrize(
    ("name", "bits"), [*((name, 8) for name in OTHERS), ("trailing", 4), ("euler karras", 4)]
)
def test_temporal_features_are_as_close_as_those_of_a_denoiser_calibrated_for_it(digits, name, bits):
    schedule = OTHERS[name]
    timesteps = digits.timesteps(schedule)
    native = digits.error(digits.calibrated(schedule, bits), timesteps)
    denoiser = digits.calibrated(CALIBRATED, bits)
    with pytest.warns(UserWarning, match=r"not among those .* was calibrated for \(0 … 950, 20 of them\)"):
        by_itself = digits.error(denoiser, timesteps)
    added = ptq_diffusion.add_timesteps(denoiser, timesteps.tolist(), **digits.call.values)
    assert set(added) == set(timesteps.tolist()) - set(range(0, 1000, 50))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        prepared = digits.error(denoiser, timesteps)
    assert by_itself <= 1.2 * native
    assert prepared == pytest.approx(by_itself, rel=1e-3)


def test_with_the_nearest_ranges_they_would_not_be(digits):
    """At 8 bits clipping is most of what ranges can do wrong."""
    schedule = OTHERS["heun"]
    timesteps, denoiser = digits.timesteps(schedule), digits.calibrated(CALIBRATED, 8)
    for each in denoiser.modules():
        if isinstance(each, FakeQuant) and each.spec.of_timestep:
            each.spec = each.spec.model_copy(update={"of_timestep": False})
    with pytest.warns(UserWarning, match="is not among"):
        nearest = digits.error(denoiser, timesteps)
    assert nearest > 1.2 * digits.error(digits.calibrated(schedule, 8), timesteps)


# Pipelines


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """Folders of quantized pipelines in diffusers' layout, each made once: `exported("ddim", "round")`."""

    @cache
    def run(key):
        kind, steps, task = json.loads(key)
        place = tmp_path_factory.mktemp(kind)
        if kind == "ddim":
            pipeline = DDIMPipeline(tiny_pipelines.unet(), DDIMScheduler())
        else:
            pipeline = tiny_pipelines.text_to_image()
            (place / "prompts.txt").write_text("a cat\na dog\n", encoding="utf-8")
            task |= {"prompts": str(place / "prompts.txt"), "height": 8, "width": 8, "samples": 2}
            task |= {"steps": 3, "calibration_samples": 2, "calibration_keep": 1}
        pipeline.save_pretrained(place / "pipeline")
        quant = {"scope": task.pop("scope", "layers")}
        chosen = recipe(place / "pipeline", steps, task=task, **quant)
        chosen = chosen.model_copy(update={"export": [Entry(name="diffusers")]})
        ptqcore.quantize(chosen, "diffusion", place / "out")
        return place / "out/exports/diffusers"

    return lambda kind, *steps, **task: run(json.dumps([kind, steps, task]))


ALL = {FSC: {"scope": "all"}}


def images_of(pipeline, steps):
    pipeline.set_progress_bar_config(disable=True)
    told = {"batch_size": 2}
    if not isinstance(pipeline, DDIMPipeline):
        told = {"prompt": "a cat", "height": 8, "width": 8}
    generator = torch.Generator().manual_seed(3)
    made = pipeline(generator=generator, num_inference_steps=steps, output_type="np", **told)
    return torch.from_numpy(made.images)


def silently(function, *arguments):
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        return function(*arguments)


@pytest.mark.parametrize(
    ("kind", "calibrated", "steps", "scheduler", "config"),
    [
        ("ddim", 6, 10, None, {"timestep_spacing": "trailing"}),
        ("text", 3, 5, "EulerDiscreteScheduler", {"use_karras_sigmas": True}),
    ],
)
def test_a_prepared_pipeline_samples_without_a_warning_and_is_saved_to_the_last_bit(
    exported, tmp_path, kind, calibrated, steps, scheduler, config
):
    folder = exported(kind, ALL, "round")
    pipeline = ptq_diffusion.load_pipeline(folder)
    before = images_of(pipeline, calibrated)
    added = ptq_diffusion.set_schedule(pipeline, steps, scheduler, **config)
    assert len(added) >= steps - 1  # Euler ends at a timestep that was calibrated
    made = silently(images_of, pipeline, steps)
    pipeline.save_pretrained(tmp_path / "again")
    again = ptq_diffusion.load_pipeline(tmp_path / "again")
    assert type(again.scheduler) is type(pipeline.scheduler)
    assert torch.equal(silently(images_of, again, steps), made)
    again.scheduler = ptq_diffusion.load_pipeline(folder).scheduler
    assert torch.equal(silently(images_of, again, calibrated), before)
    assert ptq_diffusion.set_schedule(again, calibrated) == []


def test_a_strict_pipeline_refuses_another_schedule_until_it_is_prepared(exported):
    pipeline = ptq_diffusion.load_pipeline(exported("ddim", ALL, "round", unseen="refuse"))
    images_of(pipeline, 6)
    with pytest.raises(ModelError, match=r"^timestep 900 is not among .*\(0 … 830, 6 of them\)") as caught:
        images_of(pipeline, 10)
    assert "add_timesteps" in str(caught.value)
    assert "\n" not in str(caught.value)
    ptq_diffusion.set_schedule(pipeline, 10)
    assert silently(images_of, pipeline, 10).isfinite().all()
    with pytest.raises(ModelError, match=r"15 of them"):
        images_of(pipeline, 9)


def test_activations_that_are_rounded_between_functions_are_prepared_too(exported, tmp_path):
    folder = exported("ddim", FSC, "round", scope="dataflow")
    pipeline = ptq_diffusion.load_pipeline(folder)
    with pytest.warns(UserWarning, match="timestep 900 is not among"):
        by_itself = images_of(pipeline, 10)
    assert ptq_diffusion.set_schedule(pipeline, 10)
    assert torch.equal(silently(images_of, pipeline, 10), by_itself)


def test_ranges_for_all_timesteps_are_fit_for_any_schedule(exported, capsys):
    pipeline = ptq_diffusion.load_pipeline(exported("ddim", "round"))
    assert ptq_diffusion.set_schedule(pipeline, 10, timestep_spacing="trailing") == []
    assert "the same range at all timesteps, there is nothing to prepare" in capsys.readouterr().err
    assert pipeline.scheduler.config.timestep_spacing == "trailing"
    assert silently(images_of, pipeline, 10).isfinite().all()
    with pytest.raises(ModelError, match="the same ranges at all timesteps: it can be given any"):
        ptq_diffusion.add_timesteps(pipeline.unet, [7.0], sample=torch.zeros(1, 1, 8, 8), timestep=3)


def test_what_cannot_be_prepared_is_refused_in_one_sentence(exported):
    with pytest.raises(
        ModelError, match=r"^DDIMPipeline has no denoiser that was quantized: give a pipeline"
    ):
        ptq_diffusion.set_schedule(DDIMPipeline(tiny_pipelines.unet(), DDIMScheduler()), 10)
    pipeline = ptq_diffusion.load_pipeline(exported("ddim", ALL, "round"))
    with pytest.raises(RecipeError, match="no setting 'spacing'"):
        ptq_diffusion.set_schedule(pipeline, 10, spacing="trailing")
    assert ptqcore.timesteps_of(pipeline.unet).values.tolist() == [0, 166, 332, 498, 664, 830]
