"""Numbers that are no good: named and refused, or handled; never is there a NaN in an artifact."""

import math
import shutil

import pytest
import torch
from safetensors.torch import load_file
from tiny_task import W3A4, W8A8, run
from torch import nn

from ptqcore import ModelError, Step, artifact
from ptqcore.errors import DataError
from ptqcore.finite import check_samples

GROUPS = {
    "weights": {"bits": 4, "granularity": "group", "group_size": 4},
    "activations": {"bits": 8, "symmetric": False},
}
OTHER_OBSERVERS = {
    "weights": {"bits": 4, "granularity": "channel", "observer": "mse"},
    "activations": {"bits": 4, "symmetric": False, "observer": "percentile"},
    "scope": "dataflow",
}
QUICK = {"iterations": 4}
RECIPES = {
    "round": (["round"], W3A4),
    "groups": (["round"], GROUPS),
    "other observers": (["round"], OTHER_OBSERVERS),
    "qdrop": (["equalize", {"qdrop": QUICK | {"learn_biases": True}}, "bias-correction"], W3A4),
    "adaround": ([{"adaround": QUICK}], W3A4),
    "brecq": ([{"brecq": QUICK}], W8A8),
}


class Net(nn.Module):
    """A convolution with its norm, a residual one, a linear head, and a layer that nothing reaches."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv, self.norm = nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.mid, self.head, self.unused = nn.Conv2d(8, 8, 1), nn.Linear(8, 4), nn.Linear(3, 3)
        self.eval()

    def forward(self, x):
        x = self.norm(self.conv(x)).relu()
        x = x + self.mid(x).relu()
        return self.head(x.mean((2, 3)))


def net(change=lambda model: None, dtype=torch.float32):
    def make():
        model = Net().to(dtype)
        with torch.no_grad():
            change(model)
        return model

    return make


def images(count=3, batch=2, change=lambda samples: None, dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    samples = [torch.randn(batch, 3, 6, 6, generator=generator).to(dtype) for _ in range(count)]
    change(samples)
    return samples


@pytest.fixture(params=RECIPES)
def recipe(request):
    return dict(zip(("step", "quant"), RECIPES[request.param], strict=True))


@pytest.fixture(scope="module")
def earlier(tmp_path_factory):
    """The folder of an artifact."""
    folder = tmp_path_factory.mktemp("earlier") / "out"
    run(folder, net(), images(), "round", W3A4)
    return folder


@pytest.fixture
def refused(tmp_path, earlier):
    """The sentence of a run that must be refused with exit code 2, and that leaves the earlier artifact."""

    def refused(error, make, samples, step="round", quant=W3A4, **keys):
        out = shutil.copytree(earlier, tmp_path / "out")
        with pytest.raises(error) as caught:
            run(out, make, samples, step, quant, **keys)
        assert type(caught.value) is error
        assert caught.value.exit_code == 2
        assert not list((out / ".work").rglob("model.safetensors"))
        for file in earlier.rglob("*"):
            assert file.is_dir() or (out / file.relative_to(earlier)).read_bytes() == file.read_bytes()
        return str(caught.value)

    return refused


# Handled


def _dead(model):
    model.norm.weight[2:4].zero_()
    model.norm.bias[2:4].fill_(-1)  # and a relu behind it


def _silent(model):
    model.conv.weight.zero_()
    model.conv.bias.zero_()


HANDLED = {
    "a channel of zeros": (net(lambda model: model.mid.weight[1].zero_()), images()),
    "a constant channel": (net(lambda model: model.mid.weight[1].fill_(0.3)), images()),
    "a layer of zeros": (net(lambda model: model.mid.weight.zero_()), images()),
    "a layer that makes zeros": (net(_silent), images()),
    "dead inputs": (net(_dead), images()),
    "a norm of no variance": (net(lambda model: model.norm.running_var.zero_()), images()),
    "weights near the smallest number": (net(lambda model: model.mid.weight.mul_(1e-38)), images()),
    "constant pictures": (net(), [torch.full((2, 3, 6, 6), 0.5)] * 2),
    "black pictures": (net(), [torch.zeros(2, 3, 6, 6)] * 2),
    "one sample of one picture": (net(), images(1, 1)),
}


@pytest.mark.parametrize("case", HANDLED)
def test_what_is_degenerate_is_quantized_and_everything_stored_is_a_number(tmp_path, recipe, case):
    make, samples = HANDLED[case]
    record = run(tmp_path, make, samples, **recipe)
    for name, tensor in load_file(tmp_path / "model.safetensors").items():
        assert not tensor.is_floating_point() or tensor.isfinite().all(), name
    assert math.isfinite(record.after["sum"])
    assert all(math.isfinite(block.relative_error) for block in record.blocks)
    assert {layer.path for layer in record.layers} == {"conv", "mid", "head"}
    assert "not used by the forward pass" in record.skipped["unused"]
    artifact.load(tmp_path, make())


def test_a_layer_of_zeros_stays_one(tmp_path):
    def silence(model):
        model.mid.weight.zero_()
        model.mid.bias.zero_()

    run(tmp_path, net(silence), images(), "round", GROUPS)
    restored = artifact.load(tmp_path, Net())
    assert not restored.mid(torch.randn(1, 8, 6, 6)).any()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("kind", ["round", "groups", "other observers"])
def test_half_precision(tmp_path, dtype, kind):
    step, quant = RECIPES[kind]
    run(tmp_path, net(dtype=dtype), images(dtype=dtype), step, quant)
    tensors = load_file(tmp_path / "model.safetensors")
    assert all(x.isfinite().all() for x in tensors.values() if x.is_floating_point())


# Refused


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("kind", ["qdrop", "adaround", "brecq"])
def test_half_precision_where_something_is_learned(refused, dtype, kind):
    step, quant = RECIPES[kind]
    sentence = refused(ModelError, net(dtype=dtype), images(dtype=dtype), step, quant)
    name = next(iter(next(each for each in step if isinstance(each, dict))))
    assert sentence == (
        f"layer 'conv' has weights of {dtype}, and the step {name} learns in float32: give it the model in "
        "float32"
    )


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_weights(refused, value):
    make = net(lambda model: model.mid.weight[0, 0].fill_(value))
    sentence = refused(ModelError, make, images())
    assert (
        sentence == "tensor 'mid.weight' of the model holds NaN or infinite values: repair the checkpoint"
    )


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_samples(refused, value):
    samples = images(change=lambda samples: samples[1][0, 0, 0].fill_(value))
    sentence = refused(DataError, net(), samples)
    assert sentence == "calibration sample 2 holds NaN or infinite values: repair it, or leave it out"


def test_no_samples(refused):
    sentence = refused(DataError, net(), [])
    assert sentence == "the task gave no calibration samples: give it at least one"


def test_a_batch_of_nothing(refused):
    sentence = refused(DataError, net(), [*images(1), *images(1, 0)])
    assert sentence == "calibration sample 2 is empty: leave it out"


def test_a_mask_may_hold_minus_infinity_and_a_part_of_a_sample_be_empty():
    mask = torch.tensor([0.0, -math.inf])
    check_samples([(torch.ones(2), mask, torch.zeros(0, 3)), {"step": 4}])
    for wrong in (torch.tensor([1.0, -math.inf]), torch.tensor([0.0, math.inf]), torch.tensor([math.nan])):
        with pytest.raises(DataError, match="calibration sample 1 holds NaN"):
            check_samples([(torch.ones(2), wrong)])


def test_activations_that_are_not_finite_name_the_layer_and_the_sample(refused):
    """Only the second sample is bright enough to overflow float32 in the layer in the middle."""
    make = net(lambda model: model.mid.weight.fill_(1e29))
    samples = images(change=lambda samples: samples[1].mul_(1e10))
    sentence = refused(ModelError, make, samples)
    assert sentence == (
        "layer 'mid' gives NaN or infinite values in full precision, for calibration sample 2"
    )


def test_activations_too_large_for_float16_say_so(refused):
    make = net(lambda model: model.mid.weight.fill_(3e4), dtype=torch.float16)
    sentence = refused(ModelError, make, images(dtype=torch.float16))
    assert sentence == (
        "layer 'mid' gives NaN or infinite values in full precision, for calibration sample 1; float16 "
        "ends at 65504: give the model in float32 or bfloat16"
    )


def test_a_norm_with_a_negative_variance_is_named(refused):
    make = net(lambda model: model.norm.running_var.fill_(-1))
    assert "layer 'norm' gives NaN or infinite values in full precision" in refused(
        ModelError,
        make,
        images(),
    )


def test_a_function_that_divides_by_zero_is_named_by_its_block(refused):
    class Divides(nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.layer = nn.Linear(3, 3)

        def forward(self, x):
            return self.layer(x) / (x.sum() - x.sum())

    class Holder(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = Divides()

        def forward(self, x):
            return self.inner(x).nan_to_num()

    sentence = refused(ModelError, Holder, [torch.ones(2, 3)], step="round", quant=W3A4, blocks="inner")
    assert (
        "layer 'inner' gives NaN or infinite values in full precision, for calibration sample 1" in sentence
    )


# The gate in front of the artifact


class Spoils(Step):
    """Puts a NaN where its options say, once the rounding is done."""

    name = "spoils"
    where = ("mid", "weight_scale")

    def after(self, block, calibration):
        path, name = type(self).where
        if block.path == path:
            getattr(block.module, name)[..., :1] = math.nan


class SpoilsAtTheEnd(Spoils):
    """As `Spoils`, behind the last block."""

    name = "spoils-at-the-end"

    def after(self, block, calibration):
        pass

    def finish(self, model):
        path, name = type(self).where
        getattr(model.get_submodule(path), name)[..., :1] = math.nan


SPOIL = {"spoils": f"{__name__}:Spoils", "spoils-at-the-end": f"{__name__}:SpoilsAtTheEnd"}


@pytest.mark.parametrize("step", SPOIL)
@pytest.mark.parametrize(
    "where", [("mid", "weight_scale"), ("head", "bias"), ("conv", "bias"), ("unused", "weight")]
)
def test_no_nan_reaches_an_artifact(refused, monkeypatch, step, where):
    if where == ("unused", "weight") and step == "spoils":
        pytest.skip("is in no block")
    monkeypatch.setattr(Spoils, "where", where)
    sentence = refused(ModelError, net(), images(), step=["round", step], quant=GROUPS, steps=SPOIL)
    assert f"layer {where[0]!r}" in sentence
    assert "NaN or infinite values" in sentence


def test_a_block_with_a_nan_is_not_in_the_journal(refused, tmp_path):
    """Or the run could not go on once the step is mended."""
    refused(ModelError, net(), images(), step=["round", "spoils"], quant=GROUPS, steps=SPOIL)
    journal = sorted(path.name for path in (tmp_path / "out/.work").glob("block-*.json"))
    assert journal == ["block-0000.json"]


@pytest.mark.parametrize(
    ("quant", "what"), [(W3A4, "the activation :div"), (GROUPS, "the input of layer 'one'")]
)
def test_an_activation_that_is_not_finite_inside_a_block_is_named(refused, quant, what):
    """What comes out of the block is: nobody would notice."""

    class Hides(nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.one, self.two = nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, x):
            return self.two(self.one(x / 0).nan_to_num(posinf=1.0, neginf=-1.0))

    sentence = refused(ModelError, Hides, [torch.randn(2, 4)], quant=quant, blocks="network-wise")
    assert sentence == (
        f"{what} holds NaN or infinite values on the calibration samples, so that it has no range: add the "
        "layer to quant.ignore, or quantize weights alone"
    )
