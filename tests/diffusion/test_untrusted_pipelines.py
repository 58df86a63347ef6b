"""Pipelines of strangers: one sentence each, before memory is taken, and no code of theirs."""

import json
import sys
from pathlib import Path

import pytest
import tiny_pipelines as tiny
from diffusers import DDIMPipeline, DDIMScheduler

from ptq_diffusion import hub, pipelines
from ptq_diffusion.classifier import load_classifier
from ptq_diffusion.denoising import Denoising
from ptqcore import ArtifactError, ModelError, PtqError

WEIGHTS = "diffusion_pytorch_model.safetensors"


@pytest.fixture
def folder(tmp_path):
    """A good pipeline."""
    DDIMPipeline(tiny.unet(), DDIMScheduler()).save_pretrained(tmp_path / "pipeline")
    return tmp_path / "pipeline"


def change(file: Path, **keys: object) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | keys))


@pytest.fixture
def refused(ptq, tmp_path):
    """The sentence of `ptq quantize` for a pipeline, with an artifact that must stay as it is. The loader
    of exported pipelines refuses it too."""

    def refused(folder: Path) -> str:
        output = tmp_path / "out"
        output.mkdir(exist_ok=True)
        (output / "manifest.json").write_text("an earlier result")
        sets = [f"--set=task.pipeline={folder}", "--set=export=[]"]
        code, _, stderr = ptq("quantize", "--plugin", "diffusion", *sets, "--output", output)
        (line,) = (line for line in stderr.splitlines() if line.startswith("error: "))
        assert code == 2
        assert "Traceback" not in stderr
        assert (output / "manifest.json").read_text() == "an earlier result"
        if (folder / "model_index.json").is_file():
            with pytest.raises(PtqError):
                hub.load_pipeline(folder)
        return line

    return refused


# Code


@pytest.mark.parametrize("library", ["evil", "unet.evil", "os", "antigravity", "../evil", ""])
def test_a_component_of_code_that_nobody_has_imported(refused, folder, library, monkeypatch):
    for place in (folder, folder / "unet"):
        (place / "evil.py").write_text("raise SystemExit('run')")
    monkeypatch.syspath_prepend(str(folder))
    change(folder / "model_index.json", unet=[library, "Network"])
    assert f"model_index.json takes unet from {library!r}, which nobody has imported" in refused(folder)
    assert "antigravity" not in sys.modules


@pytest.mark.parametrize("kind", [["evil", "Pipeline"], "Evil", "utils", 3, None, "UNet2DModel\n"])
def test_a_pipeline_that_is_not_of_diffusers(refused, folder, kind):
    (folder / "evil.py").write_text("raise SystemExit('run')")
    change(folder / "model_index.json", _class_name=kind)
    assert "which is no pipeline of diffusers" in refused(folder)


@pytest.mark.parametrize("value", [["diffusers"], ["diffusers", 3], ["diffusers", "os.system"], [[], {}]])
def test_a_component_that_is_none(refused, folder, value):
    change(folder / "model_index.json", unet=value)
    assert "it must be a library and a class" in refused(folder)


# Places


@pytest.mark.parametrize("place", ["../../secret.safetensors", "/etc/passwd", 3])
def test_an_index_that_leads_out_of_the_folder(refused, folder, place):
    index = folder / "unet" / f"{WEIGHTS}.index.json"
    index.write_text(json.dumps({"weight_map": {"conv_in.weight": place}}))
    assert f"names {place!r}: weights lie right inside the folder" in refused(folder)


# Sizes


@pytest.mark.parametrize(
    ("part", "key", "value"),
    [
        ("unet", "block_out_channels", [8, 10**9]),
        ("unet", "layers_per_block", 5000),
        ("unet", "in_channels", -(10**9)),
        ("scheduler", "num_train_timesteps", 10**12),
    ],
)
def test_sizes_beyond_the_weights(refused, folder, part, key, value):
    name = "config.json" if part == "unet" else "scheduler_config.json"
    change(folder / part / name, **{key: value})
    assert f"{part}/{name}: the configuration has {key} " in refused(folder)


@pytest.mark.parametrize("changes", [{"block_out_channels": [2**15, 2**15]}, {"layers_per_block": 4000}])
def test_a_denoiser_far_larger_than_its_weights_is_not_built(refused, folder, changes):
    change(folder / "unet/config.json", **changes)
    assert "describes far " in refused(folder)


@pytest.mark.parametrize("text", ["", "[]", "[" * 5000])
@pytest.mark.parametrize(
    "name", ["model_index.json", "unet/config.json", "scheduler/scheduler_config.json"]
)
def test_files_that_are_none(refused, folder, name, text):
    (folder / name).write_text(text)
    assert "task.pipeline" in refused(folder)


def test_weights_that_claim_more_than_they_hold(refused, folder):
    file = folder / "unet" / WEIGHTS
    whole = file.read_bytes()
    length = int.from_bytes(whole[:8], "little")
    header = json.loads(whole[8 : 8 + length])
    header["conv_in.bias"]["shape"] = [10**12]
    text = json.dumps(header).encode()
    file.write_bytes(len(text).to_bytes(8, "little") + text + whole[8 + length :])
    assert "tensor 'conv_in.bias' of shape [1000000000000] needs 4000000000000 bytes" in refused(folder)


# What an artifact keeps


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", "does not describe a denoiser of diffusers"),
        ("[" * 5000, "does not describe a denoiser of diffusers"),
        ('{"_class_name": "utils"}', "does not describe a denoiser of diffusers"),
        ('{"_class_name": "DDIMScheduler"}', "it names the class 'DDIMScheduler', which is no model"),
        ('{"_class_name": "UNet2DModel", "layers_per_block": -1.5}', "does not describe a denoiser"),
        (
            '{"_class_name": "UNet2DModel", "sample_size": 10000000000000}',
            "the configuration has sample_size",
        ),
    ],
)
def test_assets_that_describe_no_denoiser(tmp_path, text, expected):
    (tmp_path / "assets").mkdir()
    (tmp_path / "assets/denoiser.json").write_text(text)
    with pytest.raises(ArtifactError, match=expected):
        Denoising.build(tmp_path / "assets")


@pytest.mark.parametrize(
    "structure", [{}, 3, {"layers": {"x": 3}}, {"layers": {}, "tables": {"conv_in": [10**12, 9]}}]
)
def test_a_denoiser_quantized_in_ways_that_there_are_not(folder, structure):
    stated = {"quant_method": "ptqcore", "structure": structure}
    change(folder / "unet/config.json", quantization_config=stated)
    with pytest.raises(PtqError) as caught:
        hub.load_pipeline(folder)
    assert "\n" not in str(caught.value)
    with pytest.raises(ModelError, match="is quantized already"):
        pipelines.load(str(folder))


@pytest.mark.parametrize("content", [b"", b"\xff" * 64, (2**62).to_bytes(8, "little")])
def test_a_classifier_that_is_none(tmp_path, content):
    (tmp_path / "model.safetensors").write_bytes(content)
    with pytest.raises(ModelError, match="holds no weights of the classifier"):
        load_classifier(tmp_path)
