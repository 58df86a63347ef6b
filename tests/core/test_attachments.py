"""Attachments: computed where they are attached, kept by artifacts and journals, refused by exports."""

import copy
import json
from typing import ClassVar

import pytest
import torch
from tiny_task import TinyTask, run, weights_of
from torch import nn

from ptqcore import Attachment, Exporter, QuantizedTensor, QuantLinear, QuantSpec, attach, attachments_of
from ptqcore.artifact import restore
from ptqcore.attachments import build_attachments, carry_over, describe_attachments
from ptqcore.blocks import Block
from ptqcore.errors import ArtifactError, ExportError, ModelError, PluginError
from ptqcore.rounding import Round
from ptqcore.step import Step


class Times(Attachment):
    """x times a vector of so many channels."""

    name = "tiny:times"

    def __init__(self, channels, factor=1.0):
        super().__init__()
        self.register_buffer("factor", torch.full((channels,), float(factor)))

    def settings(self):
        return {"channels": len(self.factor)}

    def forward(self, x):
        return x * self.factor


class Plus(Attachment):
    """x plus a number that is a setting, not a buffer."""

    name = "tiny:plus"

    def __init__(self, number):
        super().__init__()
        self.number = number

    def settings(self):
        return {"number": self.number}

    def forward(self, x):
        return x + self.number


KINDS = {Times.name: Times, Plus.name: Plus}
BRINGS = {"attachments": {"times": f"{__name__}:Times", "plus": f"{__name__}:Plus"}}


class Sum(nn.Module):
    def forward(self, x, y):
        return 10 * x + y


# What is computed


def test_an_input_is_changed_before_the_module_and_an_output_behind_it():
    layer, x = nn.Linear(3, 2), torch.randn(4, 3)
    attach(layer, Plus(1.0))
    attach(layer, Times(2, 3.0), "output")
    assert torch.equal(layer(x), 3 * nn.functional.linear(x + 1, layer.weight, layer.bias))


def test_what_is_attached_later_is_behind_what_was_there():
    layer = nn.Identity()
    attach(layer, Plus(1.0))
    attach(layer, Times(1, 5.0))
    attach(layer, Plus(2.0), "output")
    attach(layer, Times(1, 7.0), "output")
    assert layer(torch.tensor([1.0])).item() == ((1 + 1) * 5 + 2) * 7


def test_the_second_input_alone_can_be_changed():
    module = Sum()
    attach(module, Times(1, -1.0), "second input")
    assert module(torch.tensor([1.0]), torch.tensor([2.0])).item() == 10 - 2


@pytest.mark.parametrize("place", ["input", "second input"])
def test_an_input_that_is_not_there_by_position_is_one_sentence(place):
    module = Sum()
    attach(module, Plus(1.0), place)
    with pytest.raises(
        ModelError, match=f"tiny:plus changes the {place} of a Sum, which is called without"
    ):
        module(x=torch.ones(1), y=torch.ones(1))


def test_a_copy_of_a_module_has_attachments_of_its_own():
    layer, x = nn.Linear(3, 3), torch.randn(2, 3)
    attach(layer, Times(3, 2.0))
    other = copy.deepcopy(layer)
    attachments_of(layer)[0].factor.fill_(0)
    assert torch.equal(
        other(x), layer(2 * x) - layer.bias + nn.functional.linear(2 * x, other.weight, other.bias)
    )


def test_a_quantized_layer_rounds_what_the_attachment_returns():
    """Attached to the float layer, and carried over to the one that replaces it."""
    model = nn.Sequential(nn.Linear(3, 2, bias=False))
    attach(model[0], Times(3, 1000.0))
    spec = QuantSpec(bits=8, granularity="channel")
    ends = model[0].weight.detach().amin(1, keepdim=True), model[0].weight.detach().amax(1, keepdim=True)
    weight = QuantizedTensor.from_range(model[0].weight, *ends, spec)
    layer = Block(model, "").quantize_layer("0", weight, QuantSpec())
    layer.input_quantizer.set_range(torch.tensor(-128.0), torch.tensor(127.0))  # whole numbers
    x = torch.tensor([[0.0014, -0.0026, 0.0]])
    assert torch.equal(model(x), torch.tensor([[1.0, -3.0, 0.0]]) @ weight.dequantize().T)


def test_nothing_is_carried_over_where_nothing_is_attached():
    new = nn.Linear(2, 2)
    carry_over(nn.Linear(2, 2), new)
    assert attachments_of(new) is None


# Described and made again


def two_layers():
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    attach(model[1], Times(3, 2.0))
    attach(model[1], Plus(0.5), "output")
    attach(model[0], Times(3, 4.0), "output")
    return model


def test_a_description_and_the_state_make_the_same_function_again():
    model, x = two_layers(), torch.randn(4, 3)
    entries = [json.loads(json.dumps(entry.model_dump())) for entry in describe_attachments(model)]
    assert entries == [
        {"path": "0", "place": "output", "name": "tiny:times", "settings": {"channels": 3}},
        {"path": "1", "place": "input", "name": "tiny:times", "settings": {"channels": 3}},
        {"path": "1", "place": "output", "name": "tiny:plus", "settings": {"number": 0.5}},
    ]
    new = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    build_attachments(new, describe_attachments(model), KINDS.__getitem__)
    new.load_state_dict(model.state_dict())
    assert torch.equal(new(x), model(x))


def test_paths_are_those_of_the_whole_model():
    assert [entry.path for entry in describe_attachments(two_layers(), "a.b")] == [
        "a.b.0",
        "a.b.1",
        "a.b.1",
    ]


def test_what_was_attached_before_is_replaced():
    model, x = two_layers(), torch.randn(4, 3)
    expected, entries = model(x), describe_attachments(model)
    state = copy.deepcopy(model.state_dict())
    for module in model:
        attach(module, Plus(9.0))
    build_attachments(model, entries, KINDS.__getitem__)
    model.load_state_dict(state)
    assert torch.equal(model(x), expected)


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"path": "7"}, "attachment 'tiny:times' of '7'"),
        ({"settings": {"width": 3}}, "attachment 'tiny:times' of '0'.*width"),
    ],
)
def test_a_description_that_does_not_fit_is_one_sentence(change, sentence):
    (entry, *_) = describe_attachments(two_layers())
    with pytest.raises(ArtifactError, match=sentence):
        build_attachments(two_layers(), [entry.model_copy(update=change)], KINDS.__getitem__)


# In runs


class Net(nn.Module):
    """Three blocks of a layer each, and a norm in front of them that belongs to none."""

    def __init__(self):
        super().__init__()
        self.norm = nn.LayerNorm(4)
        self.layers = nn.ModuleList(nn.Linear(4, 4) for _ in range(3))

    def forward(self, x):
        x = self.norm(x)
        for layer in self.layers:
            x = x + layer(x).relu()
        return x


def make():
    torch.manual_seed(0)
    return Net().eval()


SAMPLES = [torch.randn(2, 4, generator=torch.Generator().manual_seed(seed)) for seed in range(3)]


class Attaching(Round):
    """Attaches to the norm before the walk, and to every layer while it rounds."""

    name = "attaching"
    stage: ClassVar = None
    attaches = "factors"
    fails_at = None

    def prepare(self, model, flow, run):
        attach(model.norm, Times(4, 0.5), "output")

    def block(self, block, calibration):
        if block.path == Attaching.fails_at:
            raise KeyboardInterrupt
        for path, layer in block.layers().items():
            attach(layer, Times(4, 1 + len(path)))
        super().block(block, calibration)


STEPS = {"attaching": f"{__name__}:Attaching", "silent": f"{__name__}:Silent"}


class Silent(Attaching):
    """Does not say so."""

    name = "silent"
    attaches = ""


@pytest.fixture(autouse=True)
def _fails_nowhere():
    Attaching.fails_at = None


def test_an_artifact_has_the_attachments(tmp_path):
    run(tmp_path / "out", make, SAMPLES, "attaching", steps=STEPS, brings=BRINGS)
    entries = json.loads((tmp_path / "out/manifest.json").read_text())["attachments"]
    assert [entry["path"] for entry in entries] == ["norm", "layers.0", "layers.1", "layers.2"]
    model = restore(tmp_path / "out", lambda _: make(), KINDS.__getitem__)
    x = SAMPLES[0]
    expected = 0.5 * make().norm(x)
    for layer in model.layers:
        assert isinstance(layer, QuantLinear)
        expected = expected + nn.functional.linear(9 * expected, layer.weight, layer.bias).relu()
    torch.testing.assert_close(model(x), expected)


def test_an_artifact_of_a_plugin_that_is_not_installed_is_one_sentence(tmp_path):
    run(tmp_path / "out", make, SAMPLES, "attaching", steps=STEPS, brings=BRINGS)
    with pytest.raises(PluginError, match="tiny"):
        restore(tmp_path / "out", lambda _: make())


@pytest.mark.parametrize("fails_at", ["layers.0", "layers.1", "layers.2"])
def test_an_interrupted_run_goes_on_with_its_attachments(tmp_path, fails_at):
    def go(name, **options):
        run(tmp_path / name, make, SAMPLES, "attaching", steps=STEPS, brings=BRINGS, **options)

    go("whole")
    Attaching.fails_at = fails_at
    with pytest.raises(KeyboardInterrupt):
        go("resumed")
    Attaching.fails_at = None
    go("resumed", resume=True)
    assert weights_of(tmp_path / "resumed") == weights_of(tmp_path / "whole")
    manifests = [(tmp_path / name / "manifest.json").read_text() for name in ("resumed", "whole")]
    assert manifests[0] == manifests[1]


# Exports


class Format(Exporter):
    """A format of nothing at all."""

    name = "format"

    def check(self, quant):
        pass

    def export(self, model, task, samples, folder):
        raise AssertionError("it cannot hold this")

    def verify(self, model, task, samples, folder):
        raise AssertionError("it cannot hold this")


EXPORT = BRINGS | {"exporters": {"format": f"{__name__}:Format"}}


def test_a_format_that_cannot_hold_attachments_is_refused_before_the_walk(tmp_path):
    Attaching.fails_at = "layers.0"
    with pytest.raises(ExportError, match=r"format cannot hold what the step attaching .* \(factors\)"):
        run(tmp_path / "out", make, SAMPLES, "attaching", steps=STEPS, brings=EXPORT, export=["format"])


def test_and_if_a_step_did_not_say_so_before_the_export(tmp_path):
    with pytest.raises(ExportError, match=r"format cannot hold tiny:times.*did not say so.*norm"):
        run(tmp_path / "out", make, SAMPLES, "silent", steps=STEPS, brings=EXPORT, export=["format"])


def test_the_task_and_the_step_of_these_runs_are_complete():
    assert issubclass(Attaching, Step)
    assert TinyTask.name == "tiny"
