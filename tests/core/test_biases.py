"""Biases in whole steps of input scale times weight scale."""

import pytest
import torch
from torch import nn

from ptqcore.biases import LARGEST, input_scales, round_biases
from ptqcore.dataflow import trace
from ptqcore.edges import ActivationQuantizers
from ptqcore.modules import QuantConv2d, replace_module
from ptqcore.packed import QuantizedTensor
from ptqcore.placement import find_edges
from ptqcore.spec import QuantSpec

INPUT_SCALE = 0.05


def quantized(
    tiny_channel: float = 1.0, symmetric: bool = True
) -> tuple[nn.Module, dict, object, ActivationQuantizers]:
    """Two convolutions; the first channel of the second has weights times `tiny_channel`."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(4, 5, 3)).eval()
    with torch.no_grad():
        model[3].weight[0] *= tiny_channel
    flow = trace(model, lambda: model(torch.randn(1, 3, 16, 16)))
    spec = QuantSpec(granularity="channel", symmetric=symmetric)
    for path in ("0", "3"):
        layer = QuantConv2d(model.get_submodule(path), spec, None)
        matrix = model.get_submodule(path).weight.detach().flatten(1)
        ends = (matrix.amin(1, keepdim=True), matrix.amax(1, keepdim=True))
        layer.set_weight(QuantizedTensor.from_range(model.get_submodule(path).weight, *ends, spec))
        replace_module(model, path, layer)
    quantizers = ActivationQuantizers(
        dict.fromkeys(find_edges(flow, {"0", "3"}), QuantSpec(symmetric=False))
    )
    for edge in quantizers.names:
        quantizers[edge].set_range(torch.tensor([0.0]), torch.tensor([INPUT_SCALE * 255]))
    return {"0": model[0], "3": model[3]}, flow, quantizers


def test_the_grid_of_an_input_is_found_behind_what_moves_values():
    _, flow, quantizers = quantized()
    found = input_scales(flow, quantizers)
    assert {path: len(scales) for path, scales in found.items()} == {"0": 1, "3": 1}
    for (scale,) in found.values():
        assert scale == pytest.approx(INPUT_SCALE)


@pytest.mark.parametrize("symmetric", [True, False])
def test_biases_are_whole_steps_and_the_nearest_ones(symmetric):
    layers, flow, quantizers = quantized(symmetric=symmetric)
    before = {path: layer.bias.clone() for path, layer in layers.items()}
    codes = {path: layer.weight_codes.clone() for path, layer in layers.items()}
    round_biases(layers, flow, quantizers)
    for path, layer in layers.items():
        step = layer.weight_scale.flatten().double() * float(INPUT_SCALE)
        steps = layer.bias.double() / step
        assert torch.allclose(steps, steps.round(), atol=1e-2)
        assert (layer.bias - before[path]).abs().le(step * 0.51).all()
        assert torch.equal(layer.weight_codes, codes[path])


@pytest.mark.parametrize("symmetric", [True, False])
def test_a_bias_that_would_not_fit_makes_the_steps_of_its_channel_coarser(symmetric):
    layers, flow, quantizers = quantized(tiny_channel=1e-12, symmetric=symmetric)
    layer = layers["3"]
    weight, bias, scale = layer.weight.clone(), layer.bias.clone(), layer.weight_scale.clone()
    round_biases(layers, flow, quantizers)
    factor = layer.weight_scale / scale
    assert factor.flatten()[0] > 1
    assert torch.log2(factor).eq(torch.log2(factor).round()).all()
    assert factor.flatten()[1:].eq(1).all()
    assert (layer.weight - weight).abs().amax((1, 2, 3)).le(layer.weight_scale.flatten() * 0.5001).all()
    steps = layer.bias.double() / (layer.weight_scale.flatten().double() * INPUT_SCALE)
    assert steps.abs().le(LARGEST * 1.0001).all()
    assert torch.allclose(layer.bias, bias, rtol=1e-5, atol=1e-3)


def test_layers_with_a_float_input_keep_their_bias():
    layers, flow, _ = quantized()
    before = layers["3"].bias.clone()
    round_biases(layers, flow, ActivationQuantizers({}))
    assert torch.equal(layers["3"].bias, before)
