"""What goes wrong through no fault of the code: one sentence, exit code 2, and nothing half written."""

import json
import re
from types import SimpleNamespace

import pytest
import tiny_pipelines as tiny
import torch
from diffusers import DDIMPipeline, DDIMScheduler, DiffusionPipeline
from safetensors.torch import load_file, save_file

import ptq_diffusion
from ptqcore import ModelError

PROGRESS = re.compile(r".+: \d+(/\d+)? (done )?in \d+ .*|\d+ denoiser calls for calibration data, .*")
WEIGHTS = "diffusion_pytorch_model.safetensors"
SIZES = ["task.steps=3", "task.samples=2", "task.calibration_samples=4", "task.calibration_keep=2"]


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """Pipelines that are good: of images, of images for words, and of images for classes."""
    base = tmp_path_factory.mktemp("base")
    DDIMPipeline(tiny.unet(), DDIMScheduler()).save_pretrained(base / "images")
    tiny.text_to_image().save_pretrained(base / "words")
    DDIMPipeline(tiny.unet(num_class_embeds=3), DDIMScheduler()).save_pretrained(base / "classes")
    (base / "prompts.txt").write_text("a cat\n")
    return base


@pytest.fixture
def folder(tmp_path):
    """A good pipeline, to be damaged."""
    DDIMPipeline(tiny.unet(), DDIMScheduler()).save_pretrained(tmp_path / "pipeline")
    return tmp_path / "pipeline"


@pytest.fixture
def quantize(ptq, tmp_path):
    """Run `ptq quantize` in this process: exit code, standard error, and the output folder."""

    def quantize(pipeline, *sets):
        overrides = [f"task.pipeline={pipeline}", "steps=[round]", "export=[]", *SIZES, *sets]
        output = tmp_path / "out"
        arguments = ["quantize", "--plugin", "diffusion", "--output", str(output)]
        arguments += [f"--set={override}" for override in overrides]
        code, _, stderr = ptq(*arguments)
        return SimpleNamespace(code=code, stderr=stderr, output=output)

    return quantize


@pytest.fixture
def fail(quantize):
    """The sentence of a run that must fail."""

    def fail(pipeline, *sets):
        run = quantize(pipeline, *sets)
        assert run.code == 2, run.stderr
        assert "Traceback" not in run.stderr
        lines = [line for line in run.stderr.splitlines() if not PROGRESS.fullmatch(line)]
        assert len(lines) == 1, run.stderr
        written = [path for path in run.output.rglob("*") if ".work" not in path.parts and path.is_file()]
        assert [path.name for path in written if path.name != ".lock"] == []
        assert lines[0].startswith("error: ")
        return lines[0].removeprefix("error: ")

    return fail


def change(file, **entries):
    file.write_text(json.dumps(json.loads(file.read_text()) | entries))


# What is quantized


def test_a_pipeline_without_a_timestep(folder, fail):
    change(folder / "model_index.json", unet=["diffusers", "AutoencoderKL"])
    assert fail(folder) == (
        f"task.pipeline '{folder}' has no component with a timestep among scheduler, unet: only denoisers "
        "that are told the time can be quantized"
    )


def test_a_network_that_is_not_told_the_time(tmp_path, fail):
    tiny.vae().save_pretrained(tmp_path / "vae")
    assert "has no component with a timestep among denoiser" in fail(
        tmp_path / "vae", "task.scheduler=DDIMScheduler"
    )


@pytest.mark.parametrize("component", ["vae", "text_encoder", "scheduler"])
def test_a_component_that_cannot_be_quantized(base, fail, component):
    assert fail(base / "words", f"task.component={component}") == (
        f"task.component '{component}' cannot be quantized: it is not told the time; task.pipeline "
        f"'{base / 'words'}' has unet"
    )


def test_a_component_that_is_not_there(base, fail):
    assert "task.component 'transformer' cannot be quantized: there is no such component; " in fail(
        base / "words", "task.component=transformer"
    )


def test_nothing_left_to_quantize(base, fail):
    assert "the model has no layer to quantize" in fail(base / "images", "quant.ignore=['*']")


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite(folder, fail, value):
    weights = load_file(folder / "unet" / WEIGHTS)
    weights["conv_in.weight"][0, 0, 1, 1] = value
    save_file(weights, folder / "unet" / WEIGHTS)
    sentence = fail(folder)
    assert "tensor 'conv_in.weight' of the model holds NaN or infinite values" in sentence


def test_a_pipeline_that_is_quantized_already(base, quantize, fail, tmp_path):
    run = quantize(base / "images", "export=[diffusers]")
    assert run.code == 0
    exported = (run.output / "exports/diffusers").rename(tmp_path / "quantized")
    (run.output).rename(tmp_path / "artifact")
    assert fail(exported) == (
        f"task.pipeline: the denoiser '{exported / 'unet'}' is quantized already: give the full-precision "
        "model"
    )


# Its schedule


def test_a_scheduler_that_no_schedule_can_be_made_with(base, fail):
    assert fail(base / "images", "task.scheduler=ScoreSdeVeScheduler") == (
        "ScoreSdeVeScheduler has no step, so that no schedule can be made with it: set task.scheduler to "
        "another, for example DDIMScheduler"
    )


def test_a_scheduler_that_cannot_set_timesteps(folder, fail):
    change(folder / "model_index.json", scheduler=["diffusers", "VQModel"])
    assert fail(folder).startswith("VQModel has no set_timesteps, so that no schedule can be made with it")


def test_a_scheduler_that_cannot_set_so_many_timesteps(base, fail):
    sentence = fail(base / "images", "task.steps=2000")
    assert sentence.startswith("DDIMPipeline with DDIMScheduler cannot sample as asked: ")
    assert "2000" in sentence


def test_an_unknown_scheduler(base, fail):
    assert fail(base / "images", "task.scheduler=DDIMSheduler") == (
        "task.scheduler 'DDIMSheduler' is not a scheduler of diffusers; did you mean 'DDIMScheduler'?"
    )


def test_another_schedule_than_the_calibrated_one_where_that_is_refused(base, quantize):
    """A run itself has one schedule: what it leaves refuses others, in whatever process it is loaded."""
    steps = "steps=[finite-set-calibration, round]"
    run = quantize(base / "images", "export=[diffusers]", "task.unseen=refuse", steps)
    assert run.code == 0, run.stderr
    load = {"ours": ptq_diffusion.load_pipeline, "diffusers": DiffusionPipeline.from_pretrained}
    for pipeline in (each(run.output / "exports/diffusers") for each in load.values()):
        pipeline.set_progress_bar_config(disable=True)
        pipeline(num_inference_steps=3)
        with pytest.raises(ModelError) as caught:
            pipeline(num_inference_steps=4)
        assert str(caught.value) == (
            "timestep 750 is not among those that the model was calibrated for (0 … 666, 3 of them): "
            "sample with the calibrated schedule, or give the model ranges for this one with "
            "add_timesteps, which a model with tables in the place of layers can't have"
        )


# What is drawn


def test_words_that_are_missing(base, fail):
    assert fail(base / "words") == (
        "StableDiffusionPipeline draws what words say: set task.prompts to a file of prompts"
    )


@pytest.mark.parametrize("key", ["prompts", "negative_prompts"])
def test_files_of_words_that_cannot_be_read(base, fail, tmp_path, key):
    good = f"task.prompts={base / 'prompts.txt'}"
    for name, content in (("none.txt", None), ("empty.txt", b"\n"), ("latin.txt", b"n\xe9")):
        file = tmp_path / name
        if content is not None:
            file.write_bytes(content)
        sentence = fail(base / "words", good, f"task.{key}={file}")
        assert sentence.startswith(f"task.{key} '{file}' ")


@pytest.mark.parametrize(
    ("key", "value", "sentence"),
    [
        ("labels", "[1]", "DDIMPipeline takes no class labels, but task.labels is (1,)"),
        ("frames", "9", "DDIMPipeline takes no frames: leave task.frames out"),
        ("guidance", "3", "DDIMPipeline cannot be guided, but task.guidance is 3"),
        ("height", "16", "task.height and task.width must be set together: pipelines ignore one alone"),
    ],
)
def test_what_a_network_of_images_cannot_be_told(base, fail, key, value, sentence):
    assert fail(base / "images", f"task.{key}={value}") == sentence


def test_words_for_a_network_that_takes_none(base, fail):
    for key in ("prompts", "negative_prompts"):
        assert fail(base / "images", f"task.{key}={base / 'prompts.txt'}") == (
            f"DDIMPipeline takes no {key.replace('_', ' ')}: leave task.{key} out"
        )


def test_a_video_of_a_pipeline_of_images(base, fail):
    assert fail(base / "words", f"task.prompts={base / 'prompts.txt'}", "task.frames=9") == (
        "StableDiffusionPipeline takes no num_frames: leave task.frames out"
    )


def test_a_class_that_is_not_known(base, fail):
    assert fail(base / "classes", "task.labels=[0, 3]") == (
        "task.labels has 3, but DDIMPipeline knows 0 to 2"
    )


# The recipe


@pytest.mark.parametrize(
    ("override", "sentence"),
    [
        ("task.pipelin=x", "'task.pipelin' is unknown; did you mean 'pipeline'?"),
        ("task.unseen=never", "'task.unseen' is 'never': "),
        ("task.layers=some", "'task.layers' is 'some': "),
        ("task.samples=1", "'task.samples' is 1: "),
        ("task.frames=0", "'task.frames' is 0: "),
        ("task.calibration_keep=0", "'task.calibration_keep' is 0: "),
        ("steps=[tia, round]", "'tia' is unknown; did you mean 'tiar'?"),
        ("steps=[{tiar: {mode: cached}}, round]", "cached"),
        ("steps=[{finite-set-calibration: {scop: all}}, round]", "scop' is unknown; did you mean 'scope'?"),
    ],
)
def test_a_wrong_recipe(base, fail, override, sentence):
    assert sentence in fail(base / "images", override)


def test_a_folder_that_is_missing(fail, tmp_path):
    assert fail(tmp_path / "none").startswith(f"task.pipeline '{tmp_path / 'none'}' is not a folder: ")


def test_weights_that_are_damaged(folder, fail):
    weights = folder / "unet" / WEIGHTS
    weights.write_bytes(weights.read_bytes()[:1000])
    sentence = fail(folder)
    assert sentence.startswith(f"task.pipeline: the denoiser '{folder / 'unet'}' cannot be loaded: ")


def test_weights_that_are_pickled(folder, fail):
    weights = folder / "unet" / WEIGHTS
    torch.save(load_file(weights), weights.with_suffix(".bin"))
    weights.unlink()
    assert "are pickled, and loading them could run foreign code" in fail(folder)
