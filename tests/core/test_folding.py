"""Batch norms folded into the layers before them: the same outputs, or no folding at all."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from ptqcore.dataflow import trace
from ptqcore.folding import Folded, fold, fold_structure, folded_norms

LAYERS = {
    "linear": (lambda bias: nn.Linear(6, 8, bias=bias), nn.BatchNorm1d, (5, 6)),
    "conv1d": (lambda bias: nn.Conv1d(6, 8, 3, bias=bias), nn.BatchNorm1d, (2, 6, 7)),
    "conv2d": (lambda bias: nn.Conv2d(6, 8, 3, bias=bias), nn.BatchNorm2d, (2, 6, 7, 7)),
    "groups": (lambda bias: nn.Conv2d(6, 8, 3, groups=2, bias=bias), nn.BatchNorm2d, (2, 6, 7, 7)),
    "depthwise": (lambda bias: nn.Conv2d(6, 12, 3, groups=6, bias=bias), nn.BatchNorm2d, (2, 6, 7, 7)),
    "conv3d": (lambda bias: nn.Conv3d(6, 8, 2, bias=bias), nn.BatchNorm3d, (2, 6, 3, 3, 3)),
    "transposed": (lambda bias: nn.ConvTranspose2d(6, 8, 2, 2, bias=bias), nn.BatchNorm2d, (2, 6, 5, 5)),
    "transposed in groups": (
        lambda bias: nn.ConvTranspose2d(6, 9, 3, 2, groups=3, bias=bias),
        nn.BatchNorm2d,
        (2, 6, 5, 5),
    ),
}


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def trained(norm):
    """A batch norm with statistics, scale and shift as after training."""
    with torch.no_grad():
        norm.running_mean.normal_()
        norm.running_var.uniform_(0.1, 4)
        if norm.weight is not None:
            norm.weight.normal_()
            norm.bias.normal_()
    return norm.eval()


def norm_of(channels):
    return trained(nn.BatchNorm2d(channels))


def folded(model, x):
    """What `fold` says, with the outputs before and after."""
    model.eval().requires_grad_(False)
    flow = trace(model, lambda: model(x))
    before = model(x)
    found = fold(model, flow, lambda: model(x))
    return found, before, model(x)


def assert_same(before, after):
    assert float((before - after).abs().max()) <= 1e-5 * float(before.abs().max())


# Folded


@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("kind", LAYERS)
def test_a_folded_layer_gives_the_outputs_of_layer_and_norm(kind, bias, affine):
    make, norm, shape = LAYERS[kind]
    layer = make(bias)
    channels = layer.out_features if kind == "linear" else layer.out_channels
    model = nn.Sequential(layer, trained(norm(channels, affine=affine)), nn.ReLU())
    found, before, after = folded(model, torch.randn(shape))
    assert found == {"1": "0"}
    assert_same(before, after)
    assert type(model[1]) is Folded
    assert model[0] is layer
    assert not any(parameter.requires_grad for parameter in model.parameters())


def test_a_folded_weight_is_the_weight_times_the_scale_of_its_row():
    layer, norm = nn.Linear(2, 2), nn.BatchNorm1d(2, eps=0.0)
    with torch.no_grad():
        layer.weight.copy_(torch.tensor([[1.0, 2.0], [3.0, 4.0]]))
        layer.bias.copy_(torch.tensor([1.0, 1.0]))
        norm.running_mean.copy_(torch.tensor([3.0, 0.0]))
        norm.running_var.copy_(torch.tensor([4.0, 0.25]))
        norm.weight.copy_(torch.tensor([6.0, 1.0]))
        norm.bias.copy_(torch.tensor([0.5, -0.5]))
    folded(nn.Sequential(layer, norm), torch.randn(3, 2))
    assert layer.weight.tolist() == [[3, 6], [6, 8]]
    assert layer.bias.tolist() == [(1 - 3) * 3 + 0.5, 1 * 2 - 0.5]


def test_all_norms_of_a_network_are_folded():
    model = nn.Sequential(
        nn.Conv2d(3, 4, 3), norm_of(4), nn.ReLU(), nn.Conv2d(4, 4, 3, bias=False), norm_of(4)
    )
    found, before, after = folded(model, torch.randn(2, 3, 9, 9))
    assert found == {"1": "0", "4": "3"}
    assert_same(before, after)


class ActivatedNorm(nn.BatchNorm2d):
    """Batch norms of some networks come with their activation function."""

    def __init__(self, channels):
        super().__init__(channels)
        self.act = nn.LeakyReLU(0.1, inplace=True)

    def forward(self, x):
        return self.act(super().forward(x)) + 1


def test_what_a_kind_of_batch_norm_does_besides_stays():
    model = nn.Sequential(nn.Conv2d(3, 4, 3), trained(ActivatedNorm(4)))
    found, before, after = folded(model, torch.randn(2, 3, 9, 9))
    assert found == {"1": "0"}
    assert_same(before, after)
    assert not [name for name in model.state_dict() if name.startswith("1")]


def test_the_structure_of_a_folded_model_takes_its_state():
    def make():
        return nn.Sequential(nn.Conv2d(3, 4, 3, bias=False), trained(ActivatedNorm(4))).eval()

    x, model, other = torch.randn(2, 3, 9, 9), make(), make()
    found, _, after = folded(model, x)
    fold_structure(other, found)
    other.load_state_dict(dict(model.state_dict()))  # as read from a file: without PyTorch's notes
    assert torch.equal(other(x), after)
    assert torch.equal(copy.deepcopy(model)(x), after)


def test_a_folded_model_knows_what_was_folded_into_what():
    model = nn.Sequential(
        nn.Conv2d(3, 4, 3), trained(ActivatedNorm(4)), nn.Conv2d(4, 4, 3), norm_of(4), norm_of(4)
    )
    found, _, _ = folded(model, torch.randn(2, 3, 9, 9))
    assert folded_norms(model) == found == {"1": "0", "3": "2"}
    assert folded_norms(copy.deepcopy(model)) == found


def test_structure_that_a_model_lacks_is_an_error():
    with pytest.raises(AttributeError):
        fold_structure(nn.Sequential(nn.Linear(2, 2)), {"1": "0"})


# Left alone


class Net(nn.Module):
    def __init__(self, forward, **modules):
        super().__init__()
        self.compute = forward
        for name, module in modules.items():
            self.add_module(name, module)

    def forward(self, x):
        return self.compute(self, x)


def conv(bias=True):
    return nn.Conv2d(3, 3, 3, padding=1, bias=bias)


LEFT_ALONE = {
    "the layer is read by others too": (
        lambda m, x: m.norm(y := m.conv(x)) + y,
        {"conv": conv(), "norm": norm_of(3)},
    ),
    "the layer is called twice": (
        lambda m, x: m.norm(m.conv(m.conv(x))),
        {"conv": conv(), "norm": norm_of(3)},
    ),
    "the norm is called twice": (
        lambda m, x: m.norm(m.norm(m.conv(x))),
        {"conv": conv(), "norm": norm_of(3)},
    ),
    "something lies between": (
        lambda m, x: m.norm(m.conv(x).relu()),
        {"conv": conv(), "norm": norm_of(3)},
    ),
    "nothing is in front": (lambda m, x: m.conv(m.norm(x)), {"conv": conv(), "norm": norm_of(3)}),
    "it has no statistics": (
        lambda m, x: m.norm(m.conv(x)),
        {"conv": conv(), "norm": nn.BatchNorm2d(3, track_running_stats=False)},
    ),
    "it is another norm": (
        lambda m, x: m.norm(m.conv(x)),
        {"conv": conv(), "norm": nn.GroupNorm(1, 3)},
    ),
    "the layer is of another class": (
        lambda m, x: m.norm(m.conv(x)),
        {"conv": type("MyConv", (nn.Conv2d,), {})(3, 3, 1), "norm": norm_of(3)},
    ),
    "the function has weights of its own": (
        lambda m, x: m.norm(F.conv2d(x, torch.ones(3, 3, 1, 1))),
        {"norm": norm_of(3)},
    ),
}


@pytest.mark.parametrize("reason", LEFT_ALONE)
def test_a_norm_is_left_alone_if(reason):
    forward, modules = LEFT_ALONE[reason]
    model = Net(forward, **copy.deepcopy(modules))
    state = copy.deepcopy(model.state_dict())
    found, before, after = folded(model, torch.randn(2, 3, 7, 7))
    assert found == {}
    assert torch.equal(before, after)
    assert state.keys() == model.state_dict().keys()
    assert all(torch.equal(state[name], tensor) for name, tensor in model.state_dict().items())


def test_another_layer_with_the_same_weight_keeps_it():
    model = Net(lambda m, x: m.other(m.norm(m.conv(x))), conv=conv(), norm=norm_of(3), other=conv())
    model.other.weight = model.conv.weight
    expected = model.eval().requires_grad_(False)(x := torch.randn(2, 3, 7, 7))
    _, _, after = folded(model, x)
    assert_same(expected, after)


class Amplified(nn.BatchNorm2d):
    """A kind of norm whose outputs folding does not keep: it reads its own statistics twice."""

    def forward(self, x):
        return super().forward(x) * (1 if self.running_var is None else 2)


def test_a_norm_that_folding_would_change_is_left_bit_for_bit():
    model = nn.Sequential(
        nn.Conv2d(3, 4, 3, bias=False), trained(Amplified(4)), nn.Conv2d(4, 4, 1), norm_of(4)
    )
    state, kinds = copy.deepcopy(model.state_dict()), [type(module) for module in model]
    conv, norm = model[0], model[1]
    found, before, after = folded(model, torch.randn(2, 3, 9, 9))
    assert found == {"3": "2"}
    assert (model[0], model[1]) == (conv, norm)
    assert [type(module) for module in model][:3] == kinds[:3]
    for name in ("0.weight", "1.weight", "1.bias", "1.running_mean", "1.running_var"):
        assert torch.equal(model.state_dict()[name], state[name])
    assert "0.bias" not in model.state_dict()
    assert_same(before, after)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
