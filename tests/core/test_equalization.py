"""Cross-layer equalization: which layers pair up, that the function stays, and closed forms."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ptqcore import QuantSpec
from ptqcore.dataflow import trace
from ptqcore.equalization import Equalize, EqualizeOptions, find_pairs
from ptqcore.modules import weight_rows
from ptqcore.packed import QuantizedTensor

W4 = QuantSpec(bits=4, granularity="tensor")


class Net(nn.Module):
    """Layers by name, and a function of them and the input."""

    def __init__(self, forward, **layers: nn.Module) -> None:
        super().__init__()
        for name, layer in layers.items():
            self.add_module(name, layer)
        self.compute = forward
        self.requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        return self.compute(self, x)


def image() -> Tensor:
    return torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(1))


def equalized(net: nn.Module, x: Tensor) -> nn.Module:
    def run() -> Tensor:
        return net(x)

    Equalize(EqualizeOptions(), None).prepare(net, trace(net, run), run)
    return net


def pairs_of(net: nn.Module, x: Tensor) -> list[tuple[str, str]]:
    return [(pair.first, pair.second) for pair in find_pairs(net, trace(net, lambda: net(x)))]


def relative_error(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).norm() / expected.norm())


def rounded_output(net: nn.Module, x: Tensor) -> Tensor:
    """The output with every weight on a 4-bit grid per tensor."""
    for layer in net.children():
        weight = layer.weight
        ends = (weight.min().clamp(max=0).reshape(1, 1), weight.max().clamp(min=0).reshape(1, 1))
        layer.weight = nn.Parameter(
            QuantizedTensor.from_range(weight_rows(layer), *ends, W4).dequantize(), requires_grad=False
        )
    return net(x)


def two_layers() -> nn.Module:
    torch.manual_seed(0)
    return Net(lambda m, x: m.b(m.a(x).relu()), a=nn.Linear(6, 5), b=nn.Linear(5, 4))


def test_a_channel_scaled_by_1000_is_restored_and_the_error_of_4_bits_falls():
    x = torch.randn(64, 6, generator=torch.Generator().manual_seed(2))
    fair, spoilt, mended = two_layers(), two_layers(), two_layers()
    for net in (spoilt, mended):
        net.a.weight[2] *= 1000
        net.a.bias[2] *= 1000
        net.b.weight[:, 2] /= 1000
    exact = fair(x)
    equalized(fair, x)
    equalized(mended, x)
    for one, other in zip(fair.parameters(), mended.parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-7)
    before = relative_error(rounded_output(spoilt, x), exact)
    after = relative_error(rounded_output(mended, x), exact)
    assert after < 0.25 < 0.5 < before


def test_both_ranges_become_the_geometric_mean():
    net, x = two_layers(), torch.randn(3, 6)
    wanted = (net.a.weight.abs().amax(1) * net.b.weight.abs().amax(0)).sqrt()
    equalized(net, x)
    torch.testing.assert_close(net.a.weight.abs().amax(1), wanted)
    torch.testing.assert_close(net.b.weight.abs().amax(0), wanted)


def test_a_depthwise_convolution_between_two_layers_gets_the_cube_root():
    torch.manual_seed(3)
    net = Net(
        lambda m, x: m.c(m.b(m.a(x).relu()).relu()),
        a=nn.Conv2d(3, 8, 1),
        b=nn.Conv2d(8, 8, 3, padding=1, groups=8),
        c=nn.Conv2d(8, 4, 1),
    )
    x = image()
    ranges = [
        net.a.weight.abs().amax((1, 2, 3)),
        net.b.weight.abs().amax((1, 2, 3)),
        net.c.weight.abs().amax((0, 2, 3)),
    ]
    wanted, exact = torch.stack(ranges).prod(0) ** (1 / 3), net(x)
    equalized(net, x)
    torch.testing.assert_close(net.b.weight.abs().amax((1, 2, 3)), wanted, rtol=1e-3, atol=0)
    torch.testing.assert_close(net.c.weight.abs().amax((0, 2, 3)), wanted, rtol=1e-3, atol=0)
    torch.testing.assert_close(net(x), exact, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    "net",
    [
        Net(lambda m, x: m.b(F.max_pool2d(m.a(x).relu(), 2)), a=nn.Conv2d(3, 4, 3), b=nn.Conv2d(4, 6, 1)),
        Net(lambda m, x: m.b(m.a(x)), a=nn.Conv2d(3, 4, 3), b=nn.Conv2d(4, 6, 3, groups=2)),
        Net(lambda m, x: m.b(m.a(x).relu()), a=nn.Conv2d(3, 4, 3), b=nn.ConvTranspose2d(4, 6, 2, groups=2)),
        Net(
            lambda m, x: m.b(m.a(x).relu()),
            a=nn.ConvTranspose2d(3, 6, 2, groups=3),
            b=nn.Conv2d(6, 4, 3),
        ),
        Net(lambda m, x: m.b(m.a(x).relu().flatten(1)), a=nn.Conv2d(3, 4, 3), b=nn.Linear(144, 5)),
        Net(lambda m, x: m.b(m.a(x).clamp(0, None)), a=nn.Conv2d(3, 4, 3), b=nn.Conv2d(4, 2, 1)),
        Net(lambda m, x: m.b(m.a(x).relu()), a=nn.Linear(8, 5, bias=False), b=nn.Linear(5, 3)),
    ],
    ids=["pooled", "grouped", "transposed", "from-transposed", "flattened", "clamped", "tokens"],
)
def test_layers_that_pair_keep_their_function(net):
    x = image()
    assert pairs_of(net, x) == [("a", "b")]
    exact, weight = net(x), net.a.weight.clone()
    equalized(net, x)
    assert not torch.equal(net.a.weight, weight)
    torch.testing.assert_close(net(x), exact, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    "net",
    [
        Net(lambda m, x: m.b(F.silu(m.a(x))), a=nn.Conv2d(3, 4, 1), b=nn.Conv2d(4, 2, 1)),
        Net(lambda m, x: m.b(F.relu6(m.a(x))), a=nn.Conv2d(3, 4, 1), b=nn.Conv2d(4, 2, 1)),
        Net(lambda m, x: m.b(y := m.a(x)) + y[:, :2], a=nn.Conv2d(3, 4, 1), b=nn.Conv2d(4, 2, 1)),
        Net(lambda m, x: m.b(m.a(x).clamp(-1, None)), a=nn.Conv2d(3, 4, 1), b=nn.Conv2d(4, 2, 1)),
        Net(lambda m, x: m.b(m.b(m.a(x))), a=nn.Conv2d(3, 3, 1), b=nn.Conv2d(3, 3, 1)),
        Net(lambda m, x: m.b(m.a(x).transpose(1, 2)), a=nn.Conv2d(3, 8, 1), b=nn.Conv2d(8, 2, 1)),
        Net(lambda m, x: m.b(m.a(x).transpose(1, 3)), a=nn.Conv2d(3, 8, 1), b=nn.Linear(8, 2)),
        Net(lambda m, x: m.b(m.a(x).flatten(1)), a=nn.Linear(8, 2), b=nn.Linear(48, 2)),
        Net(
            lambda m, x: m.b(m.a(x)) + m.b.weight.sum(),
            a=nn.Conv2d(3, 4, 1),
            b=nn.Conv2d(4, 2, 1),
        ),
    ],
    ids=["silu", "relu6", "read twice", "floor", "twice", "moved", "rows", "mixed", "weight elsewhere"],
)
def test_layers_that_do_not_pair(net):
    x = image()
    assert pairs_of(net, x) == []
    weights = {name: tensor.clone() for name, tensor in net.state_dict().items()}
    equalized(net, x)
    assert all(torch.equal(tensor, weights[name]) for name, tensor in net.state_dict().items())


def test_what_would_change_the_outputs_is_taken_back(monkeypatch, capsys):
    net, x = two_layers(), torch.randn(3, 6)
    monkeypatch.setattr("ptqcore.equalization._commutes", lambda op: True)
    net.compute = lambda m, x: m.b(m.a(x).clamp(-0.2, 0.1))
    weights = {name: tensor.clone() for name, tensor in net.state_dict().items()}
    equalized(net, x)
    assert all(torch.equal(tensor, weights[name]) for name, tensor in net.state_dict().items())
    assert "taken back, for it would change the outputs by" in capsys.readouterr().err


def test_a_model_without_pairs_is_told_so(capsys):
    equalized(Net(lambda m, x: m.a(x), a=nn.Linear(8, 2)), image())
    assert capsys.readouterr().err == "equalize: no two layers of this model can be equalized\n"
