"""LSTR computes what the published network does, in parts that can be quantized."""

import numpy as np
import pytest
import torch
from published_lstr import published, random_state, wave
from torch import nn

from ptq_lane.lstr import LSTR, load
from ptq_lane.lstr.transformer import Attention, DecoderLayer, EncoderLayer, sine_positions
from ptqcore import trace

CHANNELS, HEADS = 32, 2


def fused(attention, module):
    """Copy an `nn.MultiheadAttention` into ours."""
    layers = (attention.query, attention.key, attention.value)
    for layer, weight, bias in zip(
        layers, module.in_proj_weight.chunk(3), module.in_proj_bias.chunk(3), strict=True
    ):
        layer.load_state_dict({"weight": weight, "bias": bias})
    attention.output.load_state_dict(module.out_proj.state_dict())


def randomize(module, seed=0):
    torch.manual_seed(seed)
    for parameter in module.parameters():
        nn.init.normal_(parameter, std=0.3)
    return module.eval()


def test_attention_is_that_of_pytorch():
    theirs = randomize(nn.MultiheadAttention(CHANNELS, HEADS, batch_first=True))
    ours = Attention(CHANNELS, HEADS)
    fused(ours, theirs)
    query, key, value = torch.randn(3, 5, 32), torch.randn(3, 9, 32), torch.randn(3, 9, 32)
    with torch.no_grad():
        torch.testing.assert_close(ours(query, key, value), theirs(query, key, value)[0])


def test_encoder_layer_without_positions_is_that_of_pytorch():
    theirs = randomize(nn.TransformerEncoderLayer(CHANNELS, HEADS, 128, dropout=0, batch_first=True))
    ours = EncoderLayer(CHANNELS, HEADS, 128)
    fused(ours.self_attn, theirs.self_attn)
    for name in ("norm1", "linear1", "linear2", "norm2"):
        getattr(ours, name).load_state_dict(getattr(theirs, name).state_dict())
    x = torch.randn(2, 11, CHANNELS)
    with torch.no_grad():
        torch.testing.assert_close(ours(x, torch.zeros(11, CHANNELS)), theirs(x))


def test_decoder_layer_without_positions_is_that_of_pytorch():
    theirs = randomize(nn.TransformerDecoderLayer(CHANNELS, HEADS, 128, dropout=0, batch_first=True))
    ours = DecoderLayer(CHANNELS, HEADS, 128)
    fused(ours.self_attn, theirs.self_attn)
    fused(ours.multihead_attn, theirs.multihead_attn)
    for name in ("norm1", "linear1", "linear2", "norm2", "norm3"):
        getattr(ours, name).load_state_dict(getattr(theirs, name).state_dict())
    x, memory = torch.randn(2, 7, CHANNELS), torch.randn(2, 11, CHANNELS)
    with torch.no_grad():
        found = ours(x, torch.zeros(2, 7, CHANNELS), memory, torch.zeros(11, CHANNELS))
        torch.testing.assert_close(found, theirs(x, memory))


def test_positions_tell_places_apart_but_are_no_values():
    """With queries and keys of zero weight every place counts the same, and positions change nothing."""
    layer = randomize(EncoderLayer(CHANNELS, HEADS, 128))
    x, positions = torch.randn(2, 11, CHANNELS), torch.randn(11, CHANNELS)
    with torch.no_grad():
        assert not torch.allclose(layer(x, positions), layer(x, 0 * positions), atol=1e-3)
        nn.init.zeros_(layer.self_attn.query.weight)
        nn.init.zeros_(layer.self_attn.key.weight)
        torch.testing.assert_close(layer(x, positions), layer(x, 0 * positions))


@pytest.mark.parametrize(("height", "width"), [(12, 20), (1, 1), (3, 26)])
def test_positions_are_sines_and_cosines_of_the_place(height, width):
    found = sine_positions(height, width, CHANNELS)
    expected = [
        wave(row, height, 16) + wave(column, width, 16)
        for row in range(1, height + 1)
        for column in range(1, width + 1)
    ]
    np.testing.assert_allclose(found.numpy(), expected, atol=2e-6)


@pytest.mark.parametrize(
    ("variant", "classes", "size"), [("tusimple", 2, (96, 128)), ("culane", 3, (73, 201))]
)
def test_network_with_published_weights_is_the_published_network(tmp_path, variant, classes, size):
    state = random_state(classes)
    network = load(variant, state, tmp_path / "lstr.pkl")
    images = torch.randn(2, 3, *size, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        outputs = network(images)
    logits, curves = published(state, images)
    expected = {
        "class": logits,
        "bounds": curves[..., :2],
        "shared": curves[:, :1, 2:6],
        "specific": curves[..., 6:],
    }
    assert outputs.keys() == expected.keys()
    for name, values in expected.items():
        torch.testing.assert_close(outputs[name], values, rtol=0, atol=1e-5)
    for name in ("class", "bounds", "specific"):
        assert expected[name].std(dim=1).amin() > 1e-3  # queries differ, so that their order is tested


def test_images_do_not_see_each_other():
    network = randomize(LSTR(classes=2))
    images = torch.randn(3, 3, 64, 96)
    with torch.no_grad():
        together, alone = network(images), network(images[1:2])
    for name, output in alone.items():
        torch.testing.assert_close(together[name][1:2], output, rtol=1e-4, atol=1e-4)


def test_every_weight_belongs_to_a_layer_that_is_called():
    """No fused attention, and every group comes from a layer of its own."""
    network = LSTR(classes=2).eval()
    images = torch.randn(1, 3, 64, 96)
    flow = trace(network, lambda: network(images))
    layers = {p for p, m in network.named_modules() if isinstance(m, (nn.Linear, nn.Conv2d))}
    assert {op.site.owner for op in flow.ops if op.name in ("linear", "conv2d")} == layers
    names = [op.name for op in flow.ops]
    assert not {"scaled_dot_product_attention", "multi_head_attention_forward"} & set(names)
    assert names.count("matmul") == 12  # two a layer of attention
    assert names.count("softmax") == 6
    makers = [flow.producers()[number] for number in flow.called("")[0].outputs]
    assert [(op.site.owner, op.name) for op in makers] == [
        ("class_head", "linear"),
        ("bounds_head", "linear"),
        ("", "mean"),
        ("specific_head", "linear"),
    ]
