"""Whole runs through the core, as a user starts them."""

import json
import sys

import numpy as np
import pytest
import torch
import yaml

import ptqcore
from ptq_vision.cifar_resnet import CifarResNet
from ptq_vision.espnet import ESPNet
from ptqcore import cli


@pytest.fixture
def run(tmp_path, monkeypatch, capfd):
    """Run `ptq quantize --plugin vision`: its exit code, and what it wrote to standard error."""

    def run(*sets, recipe="w8a8", output="out"):
        overrides = [f"--set={override}" for override in sets]
        where = ["--recipe", recipe, "--output", str(tmp_path / output)]
        arguments = ["ptq", "quantize", "--plugin", "vision", *overrides, *where]
        monkeypatch.setattr(sys, "argv", arguments)
        try:
            cli.main()
            code = 0
        except SystemExit as end:
            code = end.code or 0
        return code, capfd.readouterr().err

    return run


@pytest.fixture
def cifar(tmp_path):
    """Overrides for a small random network on small random pictures."""
    torch.manual_seed(0)
    torch.save({"state_dict": CifarResNet(20).state_dict()}, tmp_path / "a.pth")
    random = np.random.default_rng(0)
    images = random.integers(0, 256, (12, 3, 32, 32), dtype=np.uint8)
    np.savez(tmp_path / "a.npz", images=images, labels=random.integers(0, 10, 12))
    return [
        "task.model=cifar-resnet-20",
        f"task.checkpoint={tmp_path / 'a.pth'}",
        f"task.images={tmp_path / 'a.npz'}",
        "task.calibration=4",
    ]


def metrics(folder):
    return json.loads((folder / "metrics.json").read_text())


def test_a_classifier_is_quantized_and_restored(run, cifar, tmp_path):
    code, error = run(*cifar)
    assert code == 0, error
    found = metrics(tmp_path / "out")
    assert found["before"]["agreement"] == 100
    assert found["before"].keys() == {"top1", "top5", "agreement", "logit_error"}
    assert 0 < found["after"]["logit_error"] < 0.1
    recipe = yaml.safe_load((tmp_path / "out" / "recipe.yaml").read_text())
    assert recipe["task"]["preprocess"]["size"] == [32, 32]
    assert recipe["task"]["preprocess"]["mean"] == [0.485, 0.456, 0.406]
    restored = ptqcore.load(tmp_path / "out")
    with torch.no_grad():
        assert restored(torch.zeros(2, 3, 32, 32)).shape == (2, 10)


def test_the_resolved_recipe_gives_the_same_figures(run, cifar, tmp_path):
    run(*cifar)
    code, error = run(recipe=str(tmp_path / "out" / "recipe.yaml"), output="again")
    assert code == 0, error
    assert metrics(tmp_path / "again")["after"] == metrics(tmp_path / "out")["after"]


def test_a_segmentation_network_is_quantized(run, tmp_path):
    torch.manual_seed(0)
    torch.save(ESPNet().state_dict(), tmp_path / "a.pth")
    random = np.random.default_rng(0)
    images = random.integers(0, 256, (3, 3, 32, 48), dtype=np.uint8)
    np.savez(tmp_path / "a.npz", images=images, labels=random.integers(0, 12, (3, 32, 48)))
    code, error = run(
        "task.kind=segmentation",
        f"task.checkpoint={tmp_path / 'a.pth'}",
        f"task.images={tmp_path / 'a.npz'}",
        "task.preprocess.size=[32, 48]",
        "task.calibration=1",
    )
    assert code == 0, error
    found = metrics(tmp_path / "out")
    assert found["before"].keys() == {"miou", "dice", "pixel_accuracy", "agreement"}


@pytest.mark.parametrize(
    ("overrides", "sentence"),
    [
        (
            ["task.images=/no"],
            "task.images '/no' does not exist: give a folder of pictures, or an .npz file",
        ),
        (["task.calibration=12"], "task.calibration is 12, but task.images"),
        (["task.preprocess.sise=3"], "'task.preprocess.sise' is unknown; did you mean 'size'?"),
        (["task.model=espnet"], "does not fit the model: it has no tensor"),
        (["task.checkpoint=/no.pth"], "task.checkpoint '/no.pth' is no file"),
    ],
)
def test_mistakes_are_one_sentence(run, cifar, overrides, sentence):
    code, error = run(*cifar, *overrides)
    assert code == 2
    (line,) = [line for line in error.splitlines() if line.startswith("error: ")]
    assert sentence in line
    assert "Traceback" not in error
