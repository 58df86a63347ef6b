"""Outlier Suppression+: shift and scale in closed form, the search, and offsets in whole models."""

import json
from functools import cache
from itertools import pairwise

import pytest
import tiny_lm
import torch
import zoo
from tiny_blocks import difference, quantization, setup, unified
from torch import nn
from transformers import AutoModel

import ptqcore
from ptq_llm.objective import Objective
from ptq_llm.os_plus import OSPlus, OSPlusOptions, centre, scale_for, thresholds
from ptq_llm.rescale import Rescaling
from ptq_llm.scaling import ChannelStatistics
from ptq_llm.smoothquant import SmoothQuant, SmoothQuantOptions
from ptqcore import ExportError, FakeQuant, QuantSpec, StepOptions, attachments_of
from ptqcore.recipe import Recipe, validate
from ptqcore.rounding import Round

WIDTH = 64

# Closed forms


def test_a2_the_shift_is_the_middle_of_each_channels_range():
    low, high = torch.tensor([-97.0, 5.5, -1.0]).double(), torch.tensor([-58.0, 43.0, 1.0]).double()
    assert centre(low, high).tolist() == [-77.5, 24.25, 0.0]
    width = high - centre(low, high)
    assert float(width.max()) * 2 == max(-58 + 97, 43 - 5.5, 2)  # the widest channel is the whole range


def test_a3_only_channels_beyond_the_threshold_are_scaled_down_to_it():
    magnitude = torch.tensor([0.0, 0.5, 2.0, 2.5, 40.0]).double()
    scale = scale_for(magnitude, 2.0)
    assert scale.tolist() == [1.0, 1.0, 1.0, 1.25, 20.0]
    assert (magnitude / scale).max() == 2.0


def test_thresholds_fall_evenly_in_the_logarithm_from_the_largest_to_a_quarter_of_the_median():
    magnitude = torch.tensor([0.0, 1.0, 2.0, 4.0, 512.0, 0.0, 3.0]).double()
    found = thresholds(magnitude, 11)
    assert found[0] == 512.0
    assert found[-1] == pytest.approx(3.0 / 4)
    ratios = [after / before for before, after in pairwise(found)]
    assert ratios == pytest.approx([(0.75 / 512) ** 0.1] * 10)
    assert (scale_for(magnitude, found[0]) == 1).all()


def test_channels_that_are_constant_are_shifted_to_zero_and_not_scaled():
    x = torch.full((5, 2), 7.0)
    shift = centre(x.amin(0).double(), x.amax(0).double())
    magnitude = x.amax(0).double() - shift
    assert (scale_for(magnitude, thresholds(magnitude, 4)[-1]) == 1).all()
    assert not (x - shift).any()


# One norm and one layer


class Net(nn.Module):
    """A norm with gains and offsets of an ordinary spread, and a layer."""

    def __init__(self):
        super().__init__()
        self.block = nn.Sequential()
        self.block.add_module("norm", nn.LayerNorm(WIDTH))
        self.block.add_module("layer", nn.Linear(WIDTH, 96))
        with torch.no_grad():
            self.block.norm.weight.copy_(torch.exp(torch.randn(WIDTH) * 0.5))
            self.block.norm.bias.normal_(0, 0.5)
        self.requires_grad_(False)

    def forward(self, x):
        return self.block(x)


ONE, ZERO = torch.ones(WIDTH), torch.zeros(WIDTH)
OUTLIERS = ZERO.index_put((torch.tensor([5, 17]),), torch.tensor([60.0, -90.0]))
SPREAD = 20 * torch.randn(WIDTH, generator=torch.Generator().manual_seed(9))
INJECTED = {"nothing": ZERO, "outliers": OUTLIERS, "everywhere": SPREAD}
GAINS = ONE.index_put((torch.tensor([5, 17, 40]),), torch.tensor([50.0, 80.0, 30.0]))


def behind(norm, *layers, gain=ONE, offset=ZERO):
    """The norm gives x·gain + offset instead of x, and its readers undo that."""
    gain, offset = gain.to(norm.weight), offset.to(norm.weight)
    with torch.no_grad():
        norm.bias.mul_(gain).add_(offset)
        norm.weight.mul_(gain)
        for layer in layers:
            layer.bias.sub_(layer.weight @ (offset / gain))
            layer.weight.div_(gain)


def started(bits, static, kind=OSPlus, options=None, samples=None, masks=None, **injected):
    """A step ready for the one group of the net, the group's statistics and objective."""
    torch.manual_seed(0)
    net = Net().eval()
    behind(net.block.norm, net.block.layer, **injected)
    samples = samples or [torch.randn(512, WIDTH) for _ in range(4)]
    made = setup(net, quantization(bits, bits, static), samples, blocks="block", masks=masks)
    io = next(iter(made.ios()))
    calibration = made.calibration(io)
    step = made.prepare(kind(options or OSPlusOptions(), made.context))
    (group,) = step.groups(io.block, calibration)
    seen = ChannelStatistics.of(group, io.block, calibration)
    return step, group, seen, Objective(calibration, made.context, group, step.finder.map)


METHODS = {
    "rounding": None,
    "smoothquant": (SmoothQuant, SmoothQuantOptions()),
    "os-plus without shift": (OSPlus, OSPlusOptions(groups="norms", shift=False)),
    "os-plus": (OSPlus, OSPlusOptions(groups="norms")),
}


def loss(method, bits, static, **injected):
    """What the objective says of what the method finds."""
    kind, options = METHODS[method] or (SmoothQuant, SmoothQuantOptions())
    step, group, seen, objective = started(bits, static, kind, options, **injected)
    found = step.search(group, seen, objective) if METHODS[method] else Rescaling.identity(WIDTH)
    return objective.loss(found)


@pytest.mark.parametrize("static", [False, True])
@pytest.mark.parametrize("bits", [8, 6, 4])
@pytest.mark.parametrize("offsets", ["outliers", "everywhere"])
def test_a4_the_loss_does_not_depend_on_offsets(offsets, bits, static):
    found = loss("os-plus", bits, static, offset=INJECTED[offsets])
    assert found == pytest.approx(loss("os-plus", bits, static), rel=1e-4)


@pytest.mark.parametrize("static", [False, True])
@pytest.mark.parametrize("bits", [8, 6, 4])
@pytest.mark.parametrize("method", ["rounding", "smoothquant", "os-plus without shift"])
def test_a4_of_methods_without_a_shift_it_grows_ten_times(method, bits, static):
    assert loss(method, bits, static, offset=OUTLIERS) >= 10 * loss(method, bits, static)


@pytest.mark.parametrize("bits", [8, 6, 4])
def test_a5_gains_and_offsets_together_are_undone(bits):
    injected = {"gain": GAINS, "offset": OUTLIERS}
    clean = loss("os-plus", bits, static=True)
    assert loss("os-plus", bits, static=True, **injected) <= 1.05 * clean
    assert loss("rounding", bits, static=True, **injected) >= 10 * loss("rounding", bits, static=True)
    assert loss("smoothquant", bits, static=True, **injected) > 1.1 * clean
    assert loss("os-plus without shift", bits, static=True, **injected) > 1.1 * clean


@pytest.mark.parametrize("shift", ["auto", False])
def test_a3_what_the_search_returns_is_one_threshold_and_never_worse_than_scaling_nothing(shift):
    step, group, seen, objective = started(4, True, options=OSPlusOptions(shift=shift), gain=GAINS)
    found = step.search(group, seen, objective)
    assert found.shifts == (shift == "auto")
    magnitude = torch.maximum(seen.high - found.shift, found.shift - seen.low)
    threshold = float((magnitude / found.scale).max())
    torch.testing.assert_close(found.scale, (magnitude / threshold).clamp(min=1))
    assert (found.scale[magnitude <= threshold] == 1).all()
    assert (found.scale > 1).any()
    assert objective.loss(found) <= objective.loss(Rescaling(torch.ones(WIDTH).double(), found.shift))


def test_it_is_the_best_of_all_that_were_tried():
    step, group, seen, objective = started(4, False, options=OSPlusOptions(thresholds=9), gain=GAINS)
    tried, measure = {}, objective.loss

    def note(change, limit):
        tried[change] = measure(change)
        return tried[change]

    objective.loss = note
    found = step.search(group, seen, objective)
    assert 3 + 1 + 1 <= len(tried) <= 3 + 2 + 2
    assert found is min(tried, key=tried.__getitem__)
    assert any((change.scale == 1).all() for change in tried)


def test_measuring_stops_above_the_limit_and_only_there():
    _step, _group, _seen, objective = started(4, False, gain=GAINS)
    change = Rescaling(torch.ones(WIDTH).double(), torch.zeros(WIDTH).double())
    whole = objective.loss(change)
    assert objective.loss(change, whole) == whole
    assert whole / 2 < objective.loss(change, whole / 2) <= whole


def test_of_equal_losses_the_larger_threshold_is_taken():
    step, group, seen, objective = started(4, False)
    objective.loss = lambda change, limit: 1.0
    assert (step.search(group, seen, objective).scale == 1).all()


def test_a2_what_flows_behind_is_centred_without_the_padding():
    torch.manual_seed(1)
    x, mask = torch.randn(3, 7, WIDTH), torch.ones(3, 7, dtype=torch.bool)
    x[:, 5:] *= 50 * torch.rand(WIDTH)
    mask[:, 5:] = False
    net = Net().eval()
    made = setup(net, quantization(6, 6, static=True), [x, 2 * x], blocks="block", masks=[mask, mask])
    before = torch.cat([net.block.norm(y)[mask] for y in made.samples])
    made.transform(OSPlus(OSPlusOptions(), made.context))
    after = torch.cat([net.block.norm(y)[mask] for y in made.samples])
    low, high = after.amin(0), after.amax(0)
    assert ((low + high).abs() <= 1e-5 * (before.amax(0) - before.amin(0)).clamp(min=1)).all()
    beyond = net.block.norm(made.samples[0])[~mask]
    assert (beyond.amax(0) + beyond.amin(0)).abs().max() > 0.1


def test_a_range_that_is_centred_is_held_by_codes_on_both_sides():
    """Half way between two codes the last digit of an offset would decide: see A4."""
    for noise in (-1e-6, 0.0, 1e-6):
        quantizer = FakeQuant(QuantSpec(bits=4, symmetric=False))
        quantizer.set_range(torch.tensor(-3.5 + noise), torch.tensor(3.5))
        ends = quantizer(torch.tensor([-3.5, 3.5, 0.0]))
        torch.testing.assert_close(ends, torch.tensor([-3.5, 3.5, 0.0]))


# Whole models


def with_offsets(name, offsets, dtype=torch.float64):
    """A model of the zoo that gives what it gave before, with offsets behind every norm."""
    model, offsets = unified(name, dtype), INJECTED[offsets]
    if name == "opt":
        for layer in model.model.decoder.layers:
            attention = layer.self_attn
            heads = (attention.q_proj, attention.k_proj, attention.v_proj)
            behind(layer.self_attn_layer_norm, *heads, offset=offsets)
            behind(layer.final_layer_norm, layer.fc1, offset=offsets)
        return model
    norm = model.bert.embeddings.LayerNorm
    for layer in model.bert.encoder.layer:
        heads, output = layer.attention.self, layer.attention.output
        behind(norm, heads.query, heads.key, heads.value, offset=offsets)
        behind(output.LayerNorm, layer.intermediate.dense, offset=offsets)
        with torch.no_grad():  # the residuals read the norms too
            output.dense.bias.sub_(offsets.to(dtype))
            layer.output.dense.bias.sub_(offsets.to(dtype))
        norm = layer.output.LayerNorm
    return model


@cache
def error(name, method, bits, static, offsets="nothing", dtype=torch.float64):
    """‖Q − F‖² / ‖F‖² of the logits over the samples, the whole model quantized."""
    made = setup(with_offsets(name, offsets, dtype), quantization(bits, bits, static))
    wanted = made.outputs()
    steps = [] if METHODS[method] is None else [METHODS[method][0](METHODS[method][1], made.context)]
    made.quantize(*steps, Round(StepOptions(), made.context))
    pairs = list(zip(made.outputs(), wanted, strict=True))
    return sum(float((q - f).square().sum()) for q, f in pairs) / sum(
        float(f.square().sum()) for f in wanted
    )


@pytest.mark.parametrize("name", ["opt", "bert"])
def test_injected_offsets_do_not_change_the_model(name):
    made = setup(with_offsets(name, "nothing"))
    other = setup(with_offsets(name, "outliers"))
    for found, expected in zip(other.outputs(), made.outputs(), strict=True):
        assert difference(found, expected) <= 1e-10


@pytest.mark.parametrize("static", [False, True])
@pytest.mark.parametrize("bits", [8, 6, 4])
@pytest.mark.parametrize("name", ["opt", "bert"])
def test_a4_the_error_of_a_whole_model_has_the_same_digits_with_offsets(name, bits, static):
    clean = error(name, "os-plus", bits, static)
    assert error(name, "os-plus", bits, static, "outliers") == pytest.approx(clean, rel=1e-4)
    assert error(name, "os-plus", bits, static, "everywhere") == pytest.approx(clean, rel=1e-4)


@pytest.mark.parametrize("name", ["opt", "bert"])
def test_a4_in_float32_it_stays_within_what_the_lost_digits_explain(name):
    clean = error(name, "os-plus", 4, True, "nothing", torch.float32)
    assert error(name, "os-plus", 4, True, "outliers", torch.float32) == pytest.approx(clean, rel=0.1)


@pytest.mark.parametrize("method", ["rounding", "smoothquant", "os-plus without shift"])
@pytest.mark.parametrize("bits", [8, 6, 4])
@pytest.mark.parametrize("name", ["opt", "bert"])
def test_a4_of_the_other_methods_it_grows(name, bits, method):
    clean = error(name, method, bits, True)
    assert error(name, method, bits, True, "outliers") >= 4 * clean


# Where offsets can go


@pytest.mark.parametrize(
    ("name", "shift", "expected"),
    [
        ("opt", "auto", {True}),  # biases everywhere
        ("bert", "auto", {True}),
        ("llama", "auto", {False}),  # none
        ("starcoder2", "auto", {True}),
        ("qwen2", "auto", {False}),  # biases of queries, keys and values, but not of the norm
        ("llama", True, {True}),
        ("opt", False, {False}),
        ("mixtral", True, {True, False}),  # not what the router reads
    ],
)
def test_channels_are_shifted_where_biases_hold_it_or_where_one_asks_for_it(name, shift, expected):
    made = setup(unified(name))
    step = made.prepare(OSPlus(OSPlusOptions(shift=shift), made.context))
    io = next(iter(made.ios()))
    groups = step.groups(io.block, made.calibration(io))
    assert {step.shifts(group, io.block) for group in groups if group.kind != "linear"} == expected
    assert not any(
        step.shifts(group, io.block) for group in groups if group.kind == "linear" or group.others
    )


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Tiny Llama, OPT and BERT models, and texts."""
    base = tmp_path_factory.mktemp("models")
    for name in ("llama", "opt"):
        tiny_lm.save(base / name, name)
    zoo.build("bert", AutoModel, is_decoder=False).save_pretrained(base / "bert")
    tiny_lm.tokenizer().save_pretrained(base / "bert")
    tiny_lm.write_text(base / "text.txt", 600)
    lines = (base / "text.txt").read_text().replace("\n", " ")
    (base / "lines.txt").write_text("\n".join(lines[i : i + 7 + i % 19] for i in range(0, 560, 28)))
    return base


def quantized(folders, output, name, shift="auto", export=()):
    text = str(folders / ("lines.txt" if name == "bert" else "text.txt"))
    windows = (
        {"window": 24} if name == "bert" else {"window": 32, "calibration_window": 32, "max_windows": 2}
    )
    task = {"kind": "text-encoder" if name == "bert" else "causal-lm", "model": str(folders / name)}
    data = {
        "name": "tiny",
        "task": task | {"text": text, "calibration": text, "calibration_samples": 3} | windows,
        "quant": quantization(6, 6, static=True),
        "steps": [{"os-plus": {"shift": shift, "thresholds": 3}}, "round"],
        "export": list(export),
    }
    return ptqcore.quantize(validate(Recipe, data), "llm", output)


def attached_to(output):
    entries = json.loads((output / "manifest.json").read_text())["attachments"]
    return {(entry["path"].rpartition(".")[2], entry["place"], entry["name"]) for entry in entries}


def test_where_norms_have_no_bias_offsets_are_attached_and_biases_added(folders, tmp_path):
    quantized(folders, tmp_path / "out", "llama", shift=True)
    norms = {"input_layernorm", "post_attention_layernorm"}
    assert attached_to(tmp_path / "out") == {(norm, "output", "llm:affine") for norm in norms}
    model = ptqcore.load(tmp_path / "out")
    layer = model.model.layers[1]
    assert all(layer.get_submodule(path).has_new_bias for path in ("self_attn.q_proj", "mlp.up_proj"))
    assert layer.mlp.down_proj.bias is None
    assert attachments_of(layer.input_layernorm)[0].shift.any()


def test_where_they_have_one_nothing_is_added(folders, tmp_path):
    quantized(folders, tmp_path / "out", "opt")
    assert attached_to(tmp_path / "out") == set()
    assert not any(getattr(m, "has_new_bias", False) for m in ptqcore.load(tmp_path / "out").modules())


def test_behind_post_norms_each_layer_reads_through_an_attachment(folders, tmp_path):
    quantized(folders, tmp_path / "out", "bert")
    names = {"query", "key", "value", "dense"}
    assert attached_to(tmp_path / "out") == {(name, "input", "llm:affine") for name in names}
    model = ptqcore.load(tmp_path / "out")
    assert attachments_of(model.encoder.layer[0].output.dense) is None
    assert attachments_of(model.encoder.layer[0].intermediate.dense)[0].shift.any()


@pytest.mark.parametrize(("name", "shift"), [("llama", True), ("bert", "auto")])
def test_compressed_tensors_refuses_that_in_one_sentence_before_the_walk(folders, tmp_path, name, shift):
    with pytest.raises(ExportError) as caught:
        quantized(folders, tmp_path / "out", name, shift, export=["compressed-tensors"])
    said = {"llama": "biases of layers and norms that have none"}
    said["bert"] = "factors in front of layers that read a norm beside a residual"
    assert str(caught.value) == (
        "export compressed-tensors cannot hold what the step os-plus attaches to the model "
        f"({said[name]}): remove the export, or that option of the step"
    )
    assert not list((tmp_path / "out").glob(".work/block-*"))


def test_a_model_with_biases_is_exported(folders, tmp_path):
    """Nothing was attached: the offsets are in the parameters that the model has."""
    record = quantized(folders, tmp_path / "out", "opt", export=["compressed-tensors"])
    assert record.exports["compressed-tensors"].largest_difference == 0
