"""Whole runs in the scope of the dataflow: what is saved is what was computed, and nothing is lost."""

import copy
import json

import pytest
import torch
from tiny_task import W3A4, W8A8, TinyTask, manifest_of, run, weights_of
from torch import nn

import ptqcore
from ptqcore.edges import detached
from ptqcore.learned_rounding import BRECQ


class ActivatedNorm(nn.BatchNorm2d):
    """A batch norm with its activation function, as some networks have it."""

    def forward(self, x):
        return super().forward(x).relu()


class Stage(nn.Module):
    """conv – norm – relu – conv – norm."""

    def __init__(self):
        super().__init__()
        self.conv, self.norm = nn.Conv2d(4, 4, 3, padding=1, bias=False), ActivatedNorm(4)
        self.conv2, self.norm2 = nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4)

    def forward(self, x):
        return self.norm2(self.conv2(self.norm(self.conv(x))))


class Net(nn.Module):
    """Scales the image, and adds and concatenates what its stages make."""

    def __init__(self):
        super().__init__()
        self.stem, self.one, self.two = nn.Conv2d(3, 4, 3, padding=1), Stage(), Stage()
        self.up = nn.ConvTranspose2d(8, 4, 2, 2, groups=2)
        self.head = nn.Linear(4, 5)

    def forward(self, x):
        x = self.stem(x * 2 - 1).relu()
        first = (x + self.one(x)).relu_()
        second = self.two(first)
        return self.head(self.up(torch.cat([first, second], 1)).mean((2, 3)))


def make():
    torch.manual_seed(0)
    model = Net().eval()
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.running_mean.normal_(std=0.2)
                module.running_var.uniform_(0.2, 2)
                module.weight.uniform_(0.5, 2)
                module.bias.normal_()
    return model


def images(count=6):
    return list(torch.rand(count, 3, 8, 8, generator=torch.Generator().manual_seed(1)).split(1))


@pytest.mark.parametrize("step", ["round", "adaround", "brecq", "qdrop"])
def test_the_artifact_gives_the_outputs_of_the_run(tmp_path, step):
    entry = step if step == "round" else {step: {"iterations": 3}}
    record = run(tmp_path, make, images(), entry, W3A4)
    model = ptqcore.load(tmp_path, make())
    assert sum(float(model(image).sum()) for image in images()) == pytest.approx(record.after["sum"], abs=0)
    assert not model.training
    manifest = manifest_of(tmp_path)
    assert manifest["folded"] == {
        f"{stage}.norm{n}": f"{stage}.conv{n}" for stage in ("one", "two") for n in ("", "2")
    }
    assert list(manifest["layers"]) == [
        "stem",
        *(f"{stage}.conv{n}" for stage in ("one", "two") for n in ("", "2")),
        "up",
        "head",
    ]


def test_every_edge_is_calibrated_wherever_it_lies(tmp_path):
    """In blocks, between them, and in front of the first one."""
    record = run(tmp_path, make, images(), "round", W8A8)
    assert not [name for name in record.skipped if ":" in name]
    owners = {(edge["owner"], edge["function"]) for edge in manifest_of(tmp_path)["edges"]}
    assert owners == {
        ("", "sub"),
        ("", "relu"),
        ("one.norm.norm", "relu"),
        ("one.conv2", "conv2d"),
        ("two.norm.norm", "relu"),
        ("two.conv2", "conv2d"),
        ("", "cat"),
        ("up", "conv_transpose2d"),
        ("", "mean"),
    }


def test_at_eight_bits_the_outputs_are_those_of_the_model(tmp_path):
    run(tmp_path, make, images(), "round", W8A8)
    model, plain = ptqcore.load(tmp_path, make()), make().requires_grad_(False)
    for image in images():
        expected = plain(image)
        assert float((model(image) - expected).norm() / expected.norm()) < 0.05


def test_the_loaded_model_can_be_copied_and_run_without_its_activations(tmp_path):
    run(tmp_path, make, images(), "round", W3A4)
    model, image = ptqcore.load(tmp_path, make()), images()[0]
    expected = model(image)
    assert torch.equal(copy.deepcopy(model)(image), expected)
    with detached(model):
        assert not torch.equal(model(image), expected)
    assert torch.equal(model(image), expected)


class Counting(BRECQ):
    """Notes its blocks, and fails at one of them."""

    name = "counting"
    done: list = []  # noqa: RUF012
    fails_at = None

    def block(self, block, calibration):
        if block.path == Counting.fails_at:
            raise KeyboardInterrupt
        Counting.done.append(block.path)
        super().block(block, calibration)


STEPS = {"counting": f"{__name__}:Counting"}
ENTRY = {"counting": {"iterations": 3}}


@pytest.mark.parametrize("fails_at", ["stem", "two", "head"])
def test_an_interrupted_run_goes_on_and_gives_the_same_bytes(tmp_path, fails_at):
    Counting.fails_at = None
    run(tmp_path / "whole", make, images(), ENTRY, W3A4, steps=STEPS)
    blocks = Counting.done[-5:]
    assert blocks == ["stem", "one", "two", "up", "head"]
    Counting.fails_at = fails_at
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "resumed", make, images(), ENTRY, W3A4, steps=STEPS)
    Counting.fails_at = None
    Counting.done.clear()
    run(tmp_path / "resumed", make, images(), ENTRY, W3A4, resume=True, steps=STEPS)
    assert Counting.done == blocks[blocks.index(fails_at) :]
    assert weights_of(tmp_path / "resumed") == weights_of(tmp_path / "whole")
    assert manifest_of(tmp_path / "resumed") == manifest_of(tmp_path / "whole")


def test_a_damaged_block_of_the_journal_is_computed_again(tmp_path):
    Counting.fails_at = None
    run(tmp_path / "whole", make, images(), ENTRY, W3A4, steps=STEPS)
    Counting.fails_at = "up"
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "resumed", make, images(), ENTRY, W3A4, steps=STEPS)
    (damaged,) = (tmp_path / "resumed" / ".work").glob("block-0001.safetensors")
    damaged.write_bytes(damaged.read_bytes()[:-8])
    Counting.fails_at = None
    Counting.done.clear()
    run(tmp_path / "resumed", make, images(), ENTRY, W3A4, resume=True, steps=STEPS)
    assert Counting.done == ["one", "up", "head"]
    assert weights_of(tmp_path / "resumed") == weights_of(tmp_path / "whole")


class Scaled(TinyTask):
    """Prepares its samples itself, with functions of the same names as the model's."""

    name = "tiny"

    def forward(self, model, sample):
        return model((sample.float() - 1).relu().mul(1.0) + 0)


def test_what_the_task_computes_in_front_of_the_model_is_no_part_of_it(tmp_path):
    run(tmp_path / "own", make, [image + 1 for image in images()], "round", W3A4, task=Scaled)
    prepared = [((image + 1).float() - 1).relu().mul(1.0) + 0 for image in images()]
    run(tmp_path / "prepared", make, prepared, "round", W3A4)
    assert manifest_of(tmp_path / "own")["edges"] == manifest_of(tmp_path / "prepared")["edges"]
    assert weights_of(tmp_path / "own") == weights_of(tmp_path / "prepared")


class Mlp(nn.Sequential):
    """A container as the model itself: its quantizers become one of its children."""

    def __init__(self):
        super().__init__(nn.Flatten(), nn.Linear(192, 8), nn.ReLU(inplace=True), nn.Linear(8, 3))


def test_a_model_that_is_a_container_keeps_its_outputs(tmp_path):
    def make_mlp():
        torch.manual_seed(0)
        return Mlp().eval()

    record = run(tmp_path, make_mlp, images(), "round", W3A4)
    model = ptqcore.load(tmp_path, make_mlp())
    assert sum(float(model(image).sum()) for image in images()) == pytest.approx(record.after["sum"], abs=0)
    assert not [name for name in record.skipped if ":" in name]
    assert [edge["function"] for edge in manifest_of(tmp_path)["edges"]] == ["flatten", "relu"]


def test_metrics_are_written_with_the_artifact(tmp_path):
    record = run(tmp_path, make, images(), "round", W3A4)
    assert json.loads((tmp_path / "metrics.json").read_text())["after"] == record.after
