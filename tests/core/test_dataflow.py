"""Records of forward passes: order, who feeds whom, who reads the same tensor."""

import weakref
from itertools import pairwise
from typing import NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from ptqcore.dataflow import inside, tensors_in, trace


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


# Functions


class Function(nn.Module):
    """Any function as a model."""

    def __init__(self, compute, **modules):
        super().__init__()
        self.compute = compute
        for name, module in modules.items():
            self.add_module(name, module)

    def forward(self, *inputs):
        return self.compute(self, *inputs)


def ops_of(compute, *inputs, **modules):
    return flow_of(Function(compute, **modules), *(inputs or (torch.ones(2, 4),))).ops


def sites_of(flow):
    return [str(op.site) for op in flow.ops]


def test_ops_are_named_by_the_module_that_runs_them():
    flow = residual_flow()
    assert sites_of(flow) == [
        "conv1:conv2d",
        "bn:batch_norm",
        "relu:relu",
        "conv2:conv2d",
        "shortcut:conv2d",
        ":add",
    ]


def test_ops_of_one_name_are_counted_within_each_call():
    flow = attention_flow()
    own = [site for site in sites_of(flow) if site.startswith(":")]
    assert own == [":mT", ":matmul", ":softmax", ":matmul.1", ":add", ":sigmoid", ":mul", ":add.1"]


@pytest.mark.parametrize(
    "write",
    [
        lambda x: x + x,
        lambda x: torch.add(x, x),
        lambda x: x.add(x),
        lambda x: x.add_(x),
        lambda x: x.__iadd__(x),
        lambda x: 1 + x,
    ],
)
def test_all_ways_to_write_a_sum_have_one_name(write):
    assert [op.name for op in ops_of(lambda m, x: write(x))] == ["add"]


def test_sites_are_the_same_in_every_pass_and_for_every_batch_size():
    model = Attention()
    expected = sites_of(flow_of(model, torch.randn(1, 5, 8)))
    assert sites_of(flow_of(model, torch.randn(1, 5, 8))) == expected
    assert sites_of(flow_of(model, torch.randn(7, 3, 8))) == expected


def test_each_call_of_a_shared_module_has_sites_of_its_own():
    flow = flow_of(
        Function(lambda m, x: m.shared(m.shared(x)), shared=nn.Sequential(nn.Linear(4, 4), nn.ReLU())),
        torch.ones(2, 4),
    )
    assert sites_of(flow) == [
        "shared.0:linear",
        "shared.1:relu",
        "shared.0#1:linear",
        "shared.1#1:relu",
    ]


def test_a_tensor_changed_in_place_is_another_one_to_those_who_read_it_later():
    def compute(m, x):
        y = x * 2
        before = y + 1
        y.relu_()
        return before, y + 1

    double, before, relu, after = ops_of(compute)
    assert before.inputs == relu.inputs == double.outputs
    assert after.inputs == relu.outputs != relu.inputs


def test_an_activation_function_in_place_makes_a_new_tensor():
    double, relu, after = ops_of(lambda m, x: m.relu(x * 2) + 1, relu=nn.ReLU(inplace=True))
    assert (relu.inputs, after.inputs) == (double.outputs, relu.outputs)
    assert relu.inputs != relu.outputs


def test_writing_a_part_makes_a_new_tensor():
    def compute(m, x):
        y = x * 2
        y[:, 0] = 1
        return y + 1

    double, write, after = ops_of(compute)
    assert write.name == "setitem"
    assert write.inputs == double.outputs
    assert after.inputs == write.outputs != write.inputs


def test_functions_that_return_what_they_were_given_or_only_look_are_not_recorded():
    def compute(m, x):
        x = F.dropout(x.contiguous().to(torch.float32), 0.5, training=False)
        assert x.shape[0] == x.size(0) == len(x)
        return x.float() * x.dim()

    assert [op.name for op in ops_of(compute)] in (["mul"], ["dropout", "mul"])


def test_properties_are_functions():
    (transpose,) = ops_of(lambda m, x: x.mT)
    assert transpose.name == "mT"
    assert str(transpose.site) == ":mT"


def test_other_arguments_are_kept():
    (clamp,) = ops_of(lambda m, x: x.clamp(0, 6))
    assert clamp.arguments == (0, 6)
    (pad,) = ops_of(lambda m, x: F.pad(x, (1, 2), value=0.5))
    assert pad.arguments == (1, 2, "constant", 0.5)


def test_every_output_has_a_number_a_shape_and_a_kind():
    flow = flow_of(Function(lambda m, x: x.max(1)), torch.ones(2, 4))
    (op,) = flow.ops
    values, places = op.outputs
    assert flow.shapes[values] == flow.shapes[places] == (2,)
    assert values in flow.floating
    assert places not in flow.floating


def test_what_depends_on_the_inputs_is_variable():
    def compute(m, x):
        constant = torch.arange(4.0) * 2
        return x * constant + constant

    flow = flow_of(Function(compute), torch.ones(2, 4))
    variable = flow.variable()
    made = {op.site.name + str(op.site.ordinal): op.outputs[0] in variable for op in flow.ops}
    assert made == {"arange0": False, "mul0": False, "mul1": True, "add0": True}


def test_producers_and_consumers_are_found_by_tensor():
    flow = flow_of(Function(lambda m, x: (y := x * 2) + y.relu() + y), torch.ones(2, 4))
    double, relu, first, second = flow.ops
    assert flow.producers()[double.outputs[0]] == double
    assert flow.consumers()[double.outputs[0]] == [relu, first, second]
    assert flow.inputs == double.inputs


def test_what_is_computed_outside_the_model_is_not_recorded():
    model = Function(lambda m, x: x.relu() + 1)
    flow = trace(model, lambda: model((torch.ones(2, 4) * 2).relu() + 1).relu())
    assert sites_of(flow) == [":relu", ":add"]
    assert flow.inputs == flow.ops[0].inputs


def test_a_failed_call_that_the_model_catches_leaves_the_record_straight():
    def compute(m, x):
        try:
            m.wrong(x)
        except RuntimeError:
            return m.right(x) + 1

    flow = flow_of(Function(compute, wrong=nn.Linear(3, 3), right=nn.Linear(4, 3)), torch.ones(2, 4))
    assert sites_of(flow) == ["right:linear", ":add"]
    assert flow.called("")[0].inputs == flow.called("right")[0].inputs


def test_paths_are_inside_themselves_what_is_below_and_everything_is_inside_the_model():
    assert inside("a.b", "a.b")
    assert inside("a.b.c", "a.b")
    assert not inside("a.bc", "a.b")
    assert not inside("a", "a.b")
    assert inside("a", "")
    assert inside("", "")
