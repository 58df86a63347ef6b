"""Factors and offsets moved from what makes channels to what reads them: closed forms, layer by layer."""

import json

import pytest
import torch
import torch.nn.functional as F
from tiny_blocks import difference
from torch import nn
from transformers.models.gemma.modeling_gemma import GemmaRMSNorm
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from ptq_llm.groups import Group
from ptq_llm.rescale import Affine, Rescaling, rescale
from ptqcore import Block, QuantLinear, QuantSpec, attachments_of

WIDTH = 6


def change(channels=WIDTH, shift=True, seed=0):
    generator = torch.Generator().manual_seed(seed)
    scale = torch.rand(channels, generator=generator).double() * 3 + 0.2
    offsets = torch.randn(channels, generator=generator).double()
    return Rescaling(scale, offsets if shift else torch.zeros(channels).double())


class Net(nn.Module):
    """A norm that two layers read, and a layer that reads a product of theirs."""

    def __init__(self, norm=nn.LayerNorm, bias=True):
        super().__init__()
        torch.manual_seed(1)
        self.norm = norm(WIDTH)
        self.left, self.right = nn.Linear(WIDTH, 8, bias), nn.Linear(WIDTH, 8, bias)
        self.last = nn.Linear(8, 3, bias)
        with torch.no_grad():
            for parameter in self.norm.parameters():
                parameter.add_(torch.randn_like(parameter), alpha=0.4)
        self.requires_grad_(False)

    def forward(self, x):
        x = self.norm(x)
        return self.last(self.left(x).tanh() * self.right(x))


NORMS = {"layer norm": nn.LayerNorm, "RMS norm": LlamaRMSNorm, "gain of 1 + weight": GemmaRMSNorm}


def group_of(norm):
    return Group("norm", "norm", ("left", "right"), unit_offset=norm is GemmaRMSNorm)


def x_of(*shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(7))


# What flows instead


def test_the_changed_input_is_shifted_then_scaled():
    found = Rescaling(torch.tensor([2.0, 4.0]).double(), torch.tensor([1.0, -3.0]).double())
    assert torch.equal(found.inputs(torch.tensor([[5.0, 5.0]])), torch.tensor([[2.0, 2.0]]))


def test_weights_are_multiplied_and_biases_take_what_the_shift_leaves_out():
    found, layer = change(), nn.Linear(WIDTH, 4)
    weight, bias = found.weight(layer.weight), found.bias(layer.weight, layer.bias)
    torch.testing.assert_close(weight, layer.weight * found.scale.float())
    torch.testing.assert_close(bias, layer.bias + layer.weight @ found.shift.float())  # W as it was
    x = x_of(5, WIDTH)
    torch.testing.assert_close(F.linear(found.inputs(x), weight, bias), layer(x))


def test_without_a_shift_a_missing_bias_stays_missing():
    assert change(shift=False).bias(torch.ones(2, WIDTH), None) is None
    assert change().bias(torch.ones(2, WIDTH), None) is not None


def test_the_identity_changes_nothing_at_all():
    net = Net()
    parameters = dict(net.named_parameters())
    rescale(Block(net, ""), group_of(nn.LayerNorm), Rescaling.identity(WIDTH))
    assert all(parameter is parameters[name] for name, parameter in net.named_parameters())
    assert Rescaling.identity(WIDTH).is_identity
    assert not change().is_identity
    assert not change(shift=False).is_identity


# Norms


@pytest.mark.parametrize("shift", [True, False])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("kind", NORMS)
def test_the_function_stays_and_the_layers_read_the_changed_channels(kind, bias, shift):
    norm, x, found = NORMS[kind], x_of(4, WIDTH), change(shift=shift)
    net = Net(norm, bias).double()
    x = x.double()
    expected, normed = net(x), net.norm(x)
    rescale(Block(net, ""), group_of(norm), found)
    torch.testing.assert_close(net.norm(x), (normed - found.shift) / found.scale, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(net(x), expected, rtol=1e-6, atol=1e-6)


def test_a_layer_norm_takes_both_into_its_parameters():
    net, found = Net(), change()
    gain, bias = net.norm.weight.clone(), net.norm.bias.clone()
    rescale(Block(net, ""), group_of(nn.LayerNorm), found)
    torch.testing.assert_close(net.norm.weight.data, gain / found.scale.float())
    torch.testing.assert_close(net.norm.bias.data, (bias - found.shift.float()) / found.scale.float())
    assert attachments_of(net.norm) is None


def test_a_gain_of_one_more_than_the_weight_is_divided_whole():
    net, found = Net(GemmaRMSNorm), change(shift=False)
    weight = net.norm.weight.clone()
    rescale(Block(net, ""), group_of(GemmaRMSNorm), found)
    torch.testing.assert_close(net.norm.weight.data, (1 + weight) / found.scale.float() - 1)


def test_a_norm_without_bias_gets_one_attached_only_to_shift():
    for shift in (True, False):
        net = Net(LlamaRMSNorm)
        rescale(Block(net, ""), group_of(LlamaRMSNorm), change(shift=shift))
        assert (attachments_of(net.norm) is not None) == shift
        assert dict(net.norm.named_parameters(recurse=False)).keys() == {"weight"}


@pytest.mark.parametrize("kind", NORMS)
def test_groups_can_be_changed_again_and_again(kind):
    norm, x = NORMS[kind], x_of(4, WIDTH).double()
    net = Net(norm).double()
    expected, normed = net(x), net.norm(x)
    for seed in range(3):
        found = change(seed=seed)
        rescale(Block(net, ""), group_of(norm), found)
        normed = (normed - found.shift) / found.scale
    torch.testing.assert_close(net.norm(x), normed, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(net(x), expected, rtol=1e-5, atol=1e-5)


def test_other_parameters_that_read_the_norm_are_multiplied_too():
    net, found = Net(), change(shift=False)
    net.router = nn.Parameter(torch.randn(3, 2, WIDTH))
    expected = net.router.data * found.scale.float()
    rescale(Block(net, ""), Group("norm", "norm", ("left", "right"), ("router",)), found)
    torch.testing.assert_close(net.router.data, expected)


# Linear layers


@pytest.mark.parametrize("bias", [True, False])
def test_rows_of_a_linear_layer_are_divided_and_its_bias_with_them(bias):
    class Product(Net):
        def forward(self, x):
            return self.last(self.left(x).tanh() * self.right(x))

    net, found = Product(bias=bias), change(8, shift=False)
    expected, weight = net(x_of(4, WIDTH)), net.right.weight.clone()
    rescale(Block(net, ""), Group("linear", "right", ("last",), rows=torch.arange(8)), found)
    torch.testing.assert_close(net.right.weight.data, weight / found.scale.float()[:, None])
    torch.testing.assert_close(net(x_of(4, WIDTH)), expected)
    assert (net.right.bias is not None) == bias


def test_rows_that_no_channel_is_stay_and_rows_of_several_are_divided_once():
    net = nn.Sequential(nn.Linear(2, 5), nn.Linear(4, 1)).requires_grad_(False)
    weight, bias = net[0].weight.clone(), net[0].bias.clone()
    rows = torch.tensor([3, 1, 3, 1])
    scale = torch.tensor([2.0, 10.0, 2.0, 10.0]).double()
    rescale(
        Block(net, ""), Group("linear", "0", ("1",), rows=rows), Rescaling(scale, torch.zeros(4).double())
    )
    divisors = torch.tensor([1.0, 10.0, 1.0, 2.0, 1.0])
    torch.testing.assert_close(net[0].weight.data, weight / divisors[:, None])
    torch.testing.assert_close(net[0].bias.data, bias / divisors)


# Inputs that others read too: post-norm residuals


class PostNorm(nn.Module):
    """The residual reads the norm beside the layer."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(1)
        self.norm, self.layer = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x):
        x = self.norm(x)
        return x + self.layer(x)


def test_the_residual_reads_the_norm_as_it_was_and_the_layer_the_changed_channels():
    net, found, x, seen = PostNorm().requires_grad_(False), change(), x_of(4, WIDTH), []
    expected, normed = net(x), net.norm(x)
    rescale(Block(net, ""), Group("shared", "", ("layer",)), found)
    net.layer.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    torch.testing.assert_close(net(x), expected)
    torch.testing.assert_close(seen[0], (normed - found.shift.float()) / found.scale.float())
    assert torch.equal(net.norm(x), normed)


def test_what_is_changed_twice_is_read_through_both():
    net, x = PostNorm().requires_grad_(False), x_of(4, WIDTH)
    expected = net(x)
    for seed in range(2):
        rescale(Block(net, ""), Group("shared", "", ("layer",)), change(seed=seed))
    assert len(attachments_of(net.layer)) == 2
    torch.testing.assert_close(net(x), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_an_attachment_is_made_again_from_its_settings_and_state(dtype):
    found = change()
    made = Affine.of(found.scale, found.shift, torch.zeros(1, dtype=dtype))
    again = Affine(**json.loads(json.dumps(made.settings())))
    again.load_state_dict(made.state_dict())
    x = x_of(3, WIDTH).to(dtype)
    assert torch.equal(again(x), made(x))
    assert made(x).dtype == dtype


# Weights that others share, biases that were not there


def test_what_shares_its_memory_with_a_weight_keeps_its_values():
    net = Net()
    net.tied = nn.Linear(WIDTH, 8)
    net.tied.weight = net.left.weight
    before = net.tied.weight.clone()
    rescale(Block(net, ""), group_of(nn.LayerNorm), change())
    assert torch.equal(net.tied.weight, before)
    assert not torch.equal(net.left.weight, before)


def test_a_bias_that_was_not_there_is_marked_in_the_quantized_layer_too():
    net = Net(bias=False)
    rescale(Block(net, ""), group_of(nn.LayerNorm), change())
    spec = QuantSpec(granularity="channel")
    assert QuantLinear(net.left, spec, None).has_new_bias
    assert not QuantLinear(net.last, spec, None).has_new_bias
    kept = Net(bias=True)
    rescale(Block(kept, ""), group_of(nn.LayerNorm), change())
    assert not QuantLinear(kept.left, spec, None).has_new_bias


def test_in_half_precision_each_parameter_is_rounded_once():
    net, found = Net().to(torch.bfloat16), change()
    weight, bias = net.left.weight.clone(), net.left.bias.clone()
    rescale(Block(net, ""), group_of(nn.LayerNorm), found)
    assert torch.equal(net.left.weight.data, (weight.double() * found.scale).to(torch.bfloat16))
    exact = bias.double() + weight.double() @ found.shift
    assert torch.equal(net.left.bias.data, exact.to(torch.bfloat16))
    assert net.norm.weight.dtype == torch.bfloat16
    assert difference(net.left.weight.float(), (weight.double() * found.scale).float()) <= 2.0**-8
