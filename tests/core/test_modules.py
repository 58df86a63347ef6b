"""Quantized layers against the functional layer with the dequantized weight."""

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from ptqcore import grid
from ptqcore.modules import (
    QuantConv2d,
    QuantConvTranspose2d,
    QuantLinear,
    quantizable_layers,
    quantized_class,
    replace_module,
    rows_to_weight,
    state_bytes,
    weight_rows,
)
from ptqcore.packed import QuantizedTensor
from ptqcore.quantizers import FakeQuant
from ptqcore.spec import QuantSpec

W4 = QuantSpec(bits=4, granularity="channel")
WEIGHT_SPECS = [
    W4,
    QuantSpec(bits=8),
    QuantSpec(bits=3, symmetric=False, granularity="channel"),
    QuantSpec(bits=4, symmetric=False, granularity="group", group_size=5),
    QuantSpec(dtype="e4m3", granularity="channel"),
]
DYNAMIC = QuantSpec(granularity="token", dynamic=True)
STATIC = QuantSpec(symmetric=False)


def random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def rounded(layer, spec):
    """The weight of a float layer, rounded to the grid that covers it."""
    weight = layer.weight.detach()
    return QuantizedTensor.from_range(weight, *grid.value_range(weight.flatten(1), spec), spec)


def quantize_layer(layer, weight_spec=W4, input_spec=None):
    module = quantized_class(layer)(layer, weight_spec, input_spec)
    module.set_weight(rounded(layer, weight_spec))
    return module


def linear(dtype=torch.float32, bias=True):
    torch.manual_seed(0)
    return nn.Linear(12, 5, bias=bias, dtype=dtype)


CONVOLUTIONS = {
    "plain": {"kernel_size": 3},
    "pointwise": {"kernel_size": 1, "bias": False},
    "stride and padding": {"kernel_size": 3, "stride": 2, "padding": 1},
    "uneven": {"kernel_size": (3, 2), "stride": (1, 2), "padding": (2, 1), "dilation": (1, 2)},
    "groups": {"kernel_size": 3, "groups": 2, "padding": 1},
    "depthwise": {"kernel_size": 3, "groups": 4},
    "dilation": {"kernel_size": 3, "dilation": 2},
    "same": {"kernel_size": 3, "padding": "same"},
    "reflect": {"kernel_size": 3, "padding": (1, 2), "padding_mode": "reflect"},
    "circular": {"kernel_size": 3, "padding": 1, "padding_mode": "circular", "stride": 2},
    "replicate same": {"kernel_size": (3, 4), "padding": "same", "padding_mode": "replicate"},
}


def conv(name="plain"):
    torch.manual_seed(0)
    return nn.Conv2d(4, 8, **CONVOLUTIONS[name])


# Layers compute with the dequantized weight


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("spec", WEIGHT_SPECS, ids=str)
def test_linear_is_the_functional_with_the_dequantized_weight(spec, bias):
    layer, x = linear(bias=bias), random(2, 3, 12)
    expected = F.linear(x, rounded(layer, spec).dequantize(), layer.bias)
    assert torch.equal(quantize_layer(layer, spec)(x), expected)


@pytest.mark.parametrize("spec", WEIGHT_SPECS, ids=str)
@pytest.mark.parametrize("name", ["plain", "groups"])
def test_conv_of_every_spec_is_the_functional_with_the_dequantized_weight(name, spec):
    layer, x = conv(name), random(2, 4, 9, 8)
    weight = rounded(layer, spec).dequantize()
    expected = F.conv2d(x, weight, layer.bias, padding=layer.padding, groups=layer.groups)
    assert torch.equal(quantize_layer(layer, spec)(x), expected)


@pytest.mark.parametrize("name", CONVOLUTIONS)
def test_conv_keeps_every_hyperparameter_of_the_float_layer(name):
    layer, x = conv(name), random(2, 4, 9, 8)
    module = quantize_layer(layer, W4)
    with torch.no_grad():
        layer.weight.copy_(rounded(layer, W4).dequantize())
        assert torch.equal(module(x), layer(x))


def test_conv_pads_by_reflection_before_the_convolution():
    layer, x = conv("reflect"), random(1, 4, 6, 7)
    weight = rounded(layer, W4).dequantize()
    expected = F.conv2d(F.pad(x, (2, 2, 1, 1), mode="reflect"), weight, layer.bias)
    assert torch.equal(quantize_layer(layer)(x), expected)


def test_weight_on_the_grid_is_kept_exactly():
    layer = linear()
    with torch.no_grad():
        layer.weight.copy_(torch.arange(60.0).view(5, 12) % 16)
    module = quantize_layer(layer, QuantSpec(bits=4, symmetric=False))
    assert torch.equal(module.weight, layer.weight)


def test_weight_is_stored_in_as_many_bits_as_its_spec_says():
    layer = nn.Linear(64, 3, bias=False)
    for bits in range(2, 9):
        module = quantize_layer(layer, QuantSpec(bits=bits, granularity="channel"))
        assert module.weight_codes.nbytes == 3 * 64 * bits // 8


def test_quantized_weight_is_the_record_that_was_set():
    layer = conv()
    spec = QuantSpec(bits=3, symmetric=False, granularity="channel")
    record = quantize_layer(layer, spec).quantized_weight
    expected = rounded(layer, spec)
    assert torch.equal(record.codes, expected.codes)
    assert torch.equal(record.scale, expected.scale)
    assert torch.equal(record.zero_point, expected.zero_point)
    assert (record.spec, record.shape) == (spec, (8, 4, 3, 3))


# Setting a weight


@pytest.mark.parametrize(
    ("spec", "shape"),
    [
        (QuantSpec(bits=3, granularity="channel"), (5, 12)),
        (QuantSpec(bits=4), (5, 12)),
        (QuantSpec(bits=4, granularity="channel", symmetric=False), (5, 12)),
        (W4, (12, 5)),
        (W4, (5, 11)),
    ],
)
def test_weight_of_another_spec_or_shape_is_refused(spec, shape):
    module = quantize_layer(linear())
    before = module.weight.clone()
    weight = random(*shape)
    other = QuantizedTensor.from_range(weight, *grid.value_range(weight, spec), spec)
    with pytest.raises(ValueError, match="does not fit a layer"):
        module.set_weight(other)
    assert torch.equal(module.weight, before)


def test_setting_a_weight_replaces_the_one_in_use():
    layer, x = linear(), random(2, 12)
    module = quantize_layer(layer)
    module(x)
    with torch.no_grad():
        layer.weight.mul_(-2)
    module.set_weight(rounded(layer, W4))
    assert torch.equal(module(x), F.linear(x, rounded(layer, W4).dequantize(), layer.bias))


# State


@pytest.mark.parametrize("input_spec", [None, DYNAMIC, STATIC], ids=str)
@pytest.mark.parametrize("spec", WEIGHT_SPECS, ids=str)
@pytest.mark.parametrize("make", [linear, conv])
def test_state_dict_round_trip_into_an_empty_module_is_bit_equal(make, spec, input_spec):
    x = random(2, 4, 9, 12)
    filled, empty = (
        quantize_layer(make(), spec, input_spec),
        quantized_class(make())(make(), spec, input_spec),
    )
    if input_spec is STATIC:
        filled.input_quantizer.set_range(torch.tensor(-1.0), torch.tensor(2.0))
    with torch.no_grad():
        filled.bias.mul_(3)
    empty(x)
    empty.load_state_dict(filled.state_dict())
    assert torch.equal(empty(x), filled(x))


def test_state_names():
    module = quantize_layer(linear(), QuantSpec(bits=4, symmetric=False, granularity="channel"), STATIC)
    assert set(module.state_dict()) == {
        "weight_codes",
        "weight_scale",
        "weight_zero_point",
        "bias",
        "input_quantizer.scale",
        "input_quantizer.zero_point",
    }
    assert set(quantize_layer(linear(bias=False), W4, DYNAMIC).state_dict()) == {
        "weight_codes",
        "weight_scale",
    }


@pytest.mark.parametrize("input_spec", [None, DYNAMIC, STATIC], ids=str)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_layer_survives_its_state_dict(dtype, input_spec):
    layer, x = linear(dtype), random(3, 12).to(dtype)
    filled, empty = quantize_layer(layer, W4, input_spec), QuantLinear(layer, W4, input_spec)
    if input_spec is STATIC:
        filled.input_quantizer.set_range(x.amin(), x.amax())
    empty.load_state_dict(filled.state_dict())
    assert filled(x).dtype == dtype
    assert torch.equal(empty(x), filled(x))


def test_change_of_dtype_leaves_no_stale_weight():
    module, x = quantize_layer(linear(), W4, STATIC), random(3, 12).double()
    module.input_quantizer.set_range(torch.tensor(-3.0), torch.tensor(3.0))
    module(x.float())
    module.to(torch.float64)
    assert module.weight.dtype == torch.float64
    assert module(x).dtype == torch.float64
    outer = nn.Sequential(module).to(torch.bfloat16)
    assert outer(x.bfloat16()).dtype == torch.bfloat16


def test_change_of_dtype_keeps_the_codes():
    module = quantize_layer(linear())
    codes = module.weight_codes.clone()
    assert torch.equal(module.half().weight_codes, codes)


def test_deep_copy_is_independent():
    module, x = quantize_layer(linear()), random(3, 12)
    before = module(x)
    twin = copy.deepcopy(module)
    assert torch.equal(twin(x), before)
    other = linear()
    with torch.no_grad():
        other.weight.mul_(-1)
    twin.set_weight(rounded(other, W4))
    assert not torch.equal(twin(x), before)
    assert torch.equal(module(x), before)


def test_nothing_of_a_quantized_layer_is_trained():
    module = quantize_layer(linear(), W4, DYNAMIC)
    assert not any(parameter.requires_grad for parameter in module.parameters())


def test_gradient_reaches_the_input_of_a_quantized_layer():
    layer, x = linear(), random(3, 12).requires_grad_()
    module = quantize_layer(layer)
    module(x).sum().backward()
    torch.testing.assert_close(x.grad, module.weight.sum(0).expand(3, 12))


def test_gradient_flows_even_after_a_first_use_in_inference_mode():
    module, x = quantize_layer(linear()), random(3, 12)
    with torch.inference_mode():
        module(x)
    x.requires_grad_()
    module(x).sum().backward()
    torch.testing.assert_close(x.grad, module.weight.sum(0).expand(3, 12))


# Input quantizers


def test_static_input_is_rounded_to_the_range_that_was_set():
    layer = linear()
    module, x = quantize_layer(layer, W4, QuantSpec(bits=8)), 2 * random(4, 12)
    module.input_quantizer.set_range(torch.tensor([[-0.5]]), torch.tensor([[1.0]]))
    scale = torch.tensor(1.0) / 127
    rounded_x = (x / scale).round().clamp(-128, 127) * scale
    assert torch.equal(module(x), F.linear(rounded_x, module.weight, layer.bias))


def test_static_asymmetric_input_uses_its_zero_point():
    quantizer = FakeQuant(QuantSpec(bits=4, symmetric=False))
    quantizer.set_range(torch.tensor(-1.0), torch.tensor(14.0))
    x = torch.tensor([-5.0, -1.2, 0.4, 3.6, 14.0, 99.0])
    assert quantizer(x).tolist() == [-1.0, -1.0, 0.0, 4.0, 14.0, 14.0]


def test_dynamic_input_takes_its_range_from_each_token():
    layer = linear()
    module = quantize_layer(layer, W4, DYNAMIC)
    x = random(4, 12) * torch.tensor([[1e-3], [1.0], [1e3], [0.0]])
    scale = x.abs().amax(1, keepdim=True) / 127.5
    scale[3] = 1
    rounded_x = (x / scale).round().clamp(-128, 127) * scale
    assert torch.equal(module(x), F.linear(rounded_x, module.weight, layer.bias))


def test_dynamic_quantizer_has_no_state():
    assert not FakeQuant(DYNAMIC).state_dict()


@pytest.mark.parametrize("spec", [QuantSpec(), STATIC], ids=str)
def test_static_quantizer_without_a_range_gives_nan(spec):
    assert FakeQuant(spec)(torch.ones(3)).isnan().all()


def test_conv_input_per_tensor_is_rounded_before_padding():
    layer, x = conv("stride and padding"), random(2, 4, 9, 8) + 1
    module = quantize_layer(layer, W4, QuantSpec(symmetric=False, dynamic=True))
    low, high = x.min(), x.max()
    scale = (high - low) / 255
    zero_point = (-low / scale).round()
    rounded_x = (((x / scale).round() + zero_point).clamp(0, 255) - zero_point) * scale
    assert torch.equal(module(x), F.conv2d(rounded_x, module.weight, layer.bias, stride=2, padding=1))


# Which layers


class NamedLinear(nn.Linear):
    """A subclass, which may use its weight in any way."""


def test_only_exact_types_are_quantizable():
    assert quantized_class(nn.Linear(2, 2)) is QuantLinear
    assert quantized_class(nn.Conv2d(2, 2, 1)) is QuantConv2d
    attention_output = nn.MultiheadAttention(4, 2).out_proj
    for layer in (NamedLinear(2, 2), nn.Conv1d(2, 2, 1), nn.Embedding(2, 2), attention_output):
        assert quantized_class(layer) is None


def test_quantized_layers_are_not_quantizable_again():
    assert quantized_class(quantize_layer(linear())) is None


def test_quantizable_layers_are_found_by_path():
    model = nn.ModuleDict(
        {
            "stem": nn.Conv2d(3, 4, 3),
            "body": nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Sequential(nn.Linear(4, 4))),
            "odd": NamedLinear(4, 4),
        }
    )
    assert list(quantizable_layers(model)) == ["stem", "body.0", "body.2.0"]
    assert list(quantizable_layers(model["body"], "body")) == ["body.0", "body.2.0"]
    layer = nn.Linear(2, 2)
    assert quantizable_layers(layer, "head") == {"head": layer}


# Size


def test_state_bytes_adds_parameters_and_persistent_buffers():
    model = nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3))
    model.register_buffer("scratch", torch.zeros(1000), persistent=False)
    assert state_bytes(model) == 4 * (12 + 3) + 4 * (3 + 3 + 3 + 3) + 8


def test_state_bytes_counts_shared_tensors_once():
    model = nn.ModuleDict({"embed": nn.Embedding(10, 4), "head": nn.Linear(4, 10, bias=False)})
    model["head"].weight = model["embed"].weight
    assert state_bytes(model) == 10 * 4 * 4


def test_state_bytes_of_a_quantized_layer_are_words_scales_and_zero_points():
    spec = QuantSpec(bits=3, symmetric=False, granularity="group", group_size=32)
    module = quantize_layer(nn.Linear(100, 8, bias=False), spec)
    groups = math.ceil(100 / 32)
    words = math.ceil(100 * 3 / 32)
    assert state_bytes(module) == 8 * (4 * words + 4 * groups + groups)


def test_dequantized_weight_does_not_count():
    module = quantize_layer(linear())
    before = state_bytes(module)
    module(random(1, 12))
    assert state_bytes(module) == before


# Transposed convolutions

TRANSPOSED = {
    "plain": {"kernel_size": 2, "stride": 2},
    "no bias": {"kernel_size": 3, "bias": False},
    "padding": {"kernel_size": 3, "stride": 2, "padding": 1, "output_padding": 1},
    "uneven": {"kernel_size": (3, 2), "stride": (1, 2), "padding": (1, 0), "dilation": (1, 2)},
    "groups": {"kernel_size": 3, "groups": 2},
    "depthwise": {"kernel_size": 4, "stride": 2, "padding": 1, "groups": 4},
}


def transposed(name):
    torch.manual_seed(0)
    return nn.ConvTranspose2d(4, 8, **TRANSPOSED[name])


def quantized_rows(layer, spec):
    rows = weight_rows(layer).detach()
    return QuantizedTensor.from_range(rows, *grid.value_range(rows.flatten(1), spec), spec)


@pytest.mark.parametrize("name", TRANSPOSED)
def test_rows_of_a_transposed_convolution_make_one_output_channel_each(name):
    layer = transposed(name)
    rows = weight_rows(layer)
    assert rows.shape[0] == 8
    assert torch.equal(rows_to_weight(rows, layer), layer.weight)
    with torch.no_grad():
        kept = torch.zeros_like(rows)
        kept[5] = rows[5]
        layer.weight.copy_(rows_to_weight(kept, layer))
        y = F.conv_transpose2d(random(1, 4, 5, 5), layer.weight, None, groups=layer.groups)
    assert [bool(channel.any()) for channel in y[0]] == [channel == 5 for channel in range(8)]


@pytest.mark.parametrize("spec", WEIGHT_SPECS, ids=str)
@pytest.mark.parametrize("name", TRANSPOSED)
def test_a_transposed_convolution_is_the_float_one_with_the_dequantized_weight(name, spec):
    layer, x = transposed(name), random(2, 4, 6, 5)
    record = quantized_rows(layer, spec)
    module = quantized_class(layer)(layer, spec, None)
    module.set_weight(record)
    assert type(module) is QuantConvTranspose2d
    assert module.weight.shape == layer.weight.shape
    with torch.no_grad():
        layer.weight.copy_(rows_to_weight(record.dequantize(), layer))
        assert torch.equal(module(x), layer(x))


def test_the_state_of_a_transposed_convolution_survives():
    layer, x = transposed("groups"), random(1, 4, 5, 5)
    module, empty = (QuantConvTranspose2d(layer, W4, STATIC) for _ in range(2))
    module.set_weight(quantized_rows(layer, W4))
    module.input_quantizer.set_range(torch.tensor(-1.0), torch.tensor(1.0))
    empty.load_state_dict(module.state_dict())
    assert torch.equal(empty(x), module(x))
    assert torch.equal(copy.deepcopy(module)(x), module(x))


# Modules in several places


def test_a_module_is_replaced_wherever_it_stands():
    shared = nn.Linear(2, 2)
    model = nn.ModuleDict({"a": shared, "b": nn.Sequential(nn.ReLU(), shared), "c": nn.Linear(2, 2)})
    model["d"] = model["b"]
    new = nn.Identity()
    replace_module(model, "b.1", new)
    assert model["a"] is model["b"][1] is model["d"][1] is new
    assert type(model["c"]) is nn.Linear
