"""Records of forward passes: order, who feeds whom, who reads the same tensor."""

import weakref
from itertools import pairwise
from typing import NamedTuple

import pytest
import torch
from torch import nn

from ptqcore.dataflow import tensors_in, trace


class Attention(nn.Module):
    """A pre-norm attention block with a gated feed-forward part."""

    def __init__(self):
        super().__init__()
        self.norm = nn.LayerNorm(8)
        self.q, self.k, self.v = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 8)
        self.out = nn.Linear(8, 8)
        self.norm2 = nn.LayerNorm(8)
        self.gate, self.up, self.down = nn.Linear(8, 16), nn.Linear(8, 16), nn.Linear(16, 8)

    def forward(self, x):
        h = self.norm(x)
        attention = (self.q(h) @ self.k(h).mT).softmax(-1)
        x = x + self.out(attention @ self.v(h))
        h = self.norm2(x)
        return x + self.down(self.gate(h).sigmoid() * self.up(h))


class Residual(nn.Module):
    """conv – norm – relu – conv, with a projected shortcut."""

    def __init__(self):
        super().__init__()
        self.conv1, self.bn, self.relu = nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU()
        self.conv2, self.shortcut = nn.Conv2d(4, 4, 3, padding=1), nn.Conv2d(3, 4, 1)

    def forward(self, x):
        return self.conv2(self.relu(self.bn(self.conv1(x)))) + self.shortcut(x)


def flow_of(model, *inputs, **named):
    return trace(model, lambda: model(*inputs, **named))


def attention_flow():
    return flow_of(Attention(), torch.randn(1, 5, 8))


def residual_flow():
    return flow_of(Residual().eval(), torch.randn(1, 3, 6, 6))


def test_calls_come_in_the_order_in_which_they_end():
    paths = [call.path for call in attention_flow().calls]
    assert paths == ["norm", "q", "k", "v", "out", "norm2", "gate", "up", "down", ""]


def test_a_container_ends_after_its_children():
    model = nn.Sequential(nn.Sequential(nn.Linear(2, 2), nn.ReLU()), nn.Linear(2, 2))
    assert [call.path for call in flow_of(model, torch.ones(1, 2)).calls] == ["0.0", "0.1", "0", "1", ""]


def test_tensors_have_equal_numbers_exactly_if_they_are_the_same():
    model = nn.Sequential(nn.Linear(3, 4), nn.Identity(), nn.ReLU())
    flow = flow_of(model, torch.randn(2, 3))
    (linear,), (identity,), (relu,), (whole,) = (flow.called(path) for path in ("0", "1", "2", ""))
    assert linear.outputs == identity.inputs == identity.outputs == relu.inputs
    assert whole.inputs == linear.inputs
    assert whole.outputs == relu.outputs
    assert len({*linear.inputs, *linear.outputs, *relu.outputs}) == 3


def test_norms_feed_what_reads_their_output():
    flow = attention_flow()
    consumers = ["q", "k", "v", "out", "gate", "up", "down"]
    assert [path for path in consumers if flow.feeds("norm", path)] == ["q", "k", "v"]
    assert [path for path in consumers if flow.feeds("norm2", path)] == ["gate", "up"]


def test_computation_between_two_modules_breaks_the_feed():
    flow = attention_flow()
    assert not flow.feeds("v", "out")
    assert not flow.feeds("up", "down")
    assert not flow.feeds("out", "norm2")


def test_feeds_of_a_residual_net_follow_the_chain():
    flow = residual_flow()
    chain = ["conv1", "bn", "relu", "conv2"]
    for producer in chain:
        expected = dict(pairwise(chain)).get(producer)
        consumers = [path for path in [*chain, "shortcut"] if flow.feeds(producer, path)]
        assert consumers == ([expected] if expected else [])


def test_a_module_called_twice_feeds_nothing_for_certain():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.shared, self.head = nn.Linear(2, 2), nn.Linear(2, 2)

        def forward(self, x):
            return self.head(self.shared(self.shared(x)))

    flow = flow_of(Twice(), torch.ones(1, 2))
    assert len(flow.called("shared")) == 2
    assert not flow.feeds("shared", "head")


def test_a_module_never_called_feeds_nothing():
    flow = attention_flow()
    assert flow.called("missing") == []
    assert not flow.feeds("missing", "q")
    assert not flow.feeds("norm", "missing")


def test_tensors_passed_by_keyword_are_seen():
    class Outer(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm, self.inner = nn.LayerNorm(2), nn.Bilinear(2, 2, 1)

        def forward(self, x):
            return self.inner(input2=self.norm(x), input1=x)

    flow = flow_of(Outer(), x=torch.ones(1, 2))
    assert flow.feeds("norm", "inner")
    assert len(flow.called("inner")[0].inputs) == 2


class Pair(NamedTuple):
    first: torch.Tensor
    second: torch.Tensor


def test_tensors_are_found_in_nested_values():
    a, b, c, d = (torch.tensor(float(i)) for i in range(4))
    found = tensors_in(({"x": [a, 3, None]}, (b,), Pair(c, d), "text"))
    assert [tensor.item() for tensor in found] == [0, 1, 2, 3]
    assert tensors_in(None) == []


class Side(nn.Module):
    """A chain, and a head that reads a tensor from outside."""

    def __init__(self):
        super().__init__()
        self.chain = nn.ModuleList(nn.Linear(2, 2) for _ in range(4))
        self.head = nn.Linear(2, 2)

    def forward(self, x, outside):
        between = [x]
        for layer in self.chain:
            between.append(layer(between[-1]))
        return between, self.head(outside)


def test_tensors_of_earlier_passes_are_not_mistaken_for_those_of_this_one():
    model, outside, kept = Side(), torch.ones(1, 2), []
    for run in range(20):
        flow = trace(model, lambda: kept.append(model(torch.ones(1, 2), outside)))  # noqa: B023
        assert not any(flow.feeds(f"chain.{i}", "head") for i in range(4))
        chained = {number for i in range(3) for number in flow.called(f"chain.{i}")[0].inputs}
        assert chained.isdisjoint(flow.called("head")[0].inputs)
        del flow
        outside = kept.pop()[0][run % 5]


def test_a_record_keeps_no_tensor_alive():
    model, inner = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2)), []
    handle = model[0].register_forward_hook(lambda _, args, output: inner.append(weakref.ref(output)))
    flow = flow_of(model, torch.ones(1, 2))
    handle.remove()
    assert flow.feeds("0", "1")
    assert inner[0]() is None


def test_the_pass_runs_without_gradients():
    model, outputs = Attention(), []
    trace(model, lambda: outputs.append(model(torch.randn(1, 5, 8))))
    assert not outputs[0].requires_grad
    assert torch.is_grad_enabled()


def test_hooks_are_removed_even_if_the_pass_fails():
    model = nn.Sequential(nn.Linear(2, 2))
    flow_of(model, torch.ones(1, 2))
    with pytest.raises(RuntimeError):
        flow_of(model, torch.ones(1, 3))
    assert not any(module._forward_hooks for module in model.modules())
