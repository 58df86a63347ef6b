"""Mixed bits: the allocation against brute force, sensitivities against blocks run again, the step."""

import itertools
import math

import pytest
import torch
import zoo
from gram_data import gram_of, heavy_tailed, inputs, rounded
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from ptq_llm.allocation import Choice, allocate, cost, error
from ptq_llm.mixed_bits import MixedBits
from ptq_llm.sensitivity import measure
from ptq_llm.unify import unify
from ptqcore import Block, Context, MinMax, QuantSection, QuantSpec, RecipeError
from ptqcore.dataflow import trace
from ptqcore.grids import Grids

WIDTHS = (2, 3, 4, 8)


def choice(weights, errors):
    """A layer of so many weights, without scales."""
    return Choice({width: weights * width for width in errors}, errors)


# The allocation


@st.composite
def layers(draw):
    """Layers whose error mostly falls with the width, as real ones do, but need not."""
    found = []
    for _ in range(draw(st.integers(1, 6))):
        first = draw(st.floats(0, 10))
        falls = draw(st.lists(st.floats(-0.1, 1), min_size=3, max_size=3))
        values = [first * (1 - sum(falls[:step]) / 3.5) for step in range(4)]
        found.append(choice(draw(st.integers(1, 50)), dict(zip(WIDTHS, values, strict=True))))
    return found


@settings(max_examples=200, deadline=None)
@given(choices=layers(), average=st.floats(2, 9))
def test_the_budget_holds_and_no_uniform_width_that_fits_has_less_error(choices, average):
    weights = sum(one.bits[2] // 2 for one in choices)
    budget = math.ceil(average * weights)
    chosen = allocate(choices, budget)
    assert cost(choices, chosen) <= budget
    for width in WIDTHS:
        uniform = [width] * len(choices)
        if cost(choices, uniform) <= budget:
            assert error(choices, chosen) <= error(choices, uniform)


@settings(max_examples=50, deadline=None)
@given(
    sizes=st.lists(st.floats(0.01, 10), min_size=1, max_size=5),
    falls=st.lists(st.floats(1.5, 8), min_size=5, max_size=5),
    left=st.integers(0, 20),
)
def test_of_layers_of_one_size_whose_errors_are_convex_the_best_is_found(sizes, falls, left):
    widths = (2, 3, 4, 5)
    choices = [
        choice(10, {width: size / fall**width for width in widths})
        for size, fall in zip(sizes, falls, strict=False)
    ]
    budget = 20 * len(choices) + 10 * min(left, 3 * len(choices))
    best = min(
        error(choices, each)
        for each in itertools.product(widths, repeat=len(choices))
        if cost(choices, each) <= budget
    )
    assert error(choices, allocate(choices, budget)) == pytest.approx(best, rel=1e-9)


def test_one_width_is_uniform():
    choices = [choice(weights, {3: 1.0}) for weights in (5, 7)]
    assert allocate(choices, 36) == [3, 3]


def test_a_width_that_adds_error_is_not_bought():
    assert allocate([choice(5, {2: 1.0, 3: 2.0, 4: 1.0})], 1000) == [2]


def test_a_jump_over_a_width_that_gains_nothing_is_made():
    assert allocate([choice(5, {2: 1.0, 3: 1.0, 4: 0.0}), choice(5, {2: 1.0, 3: 0.9})], 30) == [4, 2]


def test_ties_go_to_the_first_layer():
    alike = choice(5, {2: 1.0, 3: 0.5})
    assert allocate([alike, alike], 25) == [3, 2]


def test_a_budget_below_the_lowest_widths_is_refused():
    with pytest.raises(ValueError, match="take 1 bits more"):
        allocate([choice(5, {2: 1.0})], 9)


# Sensitivities


def nearest(path, weight, width):
    return rounded(weight, QuantSpec(bits=width, granularity="channel")).dequantize()


class Residual(nn.Module):
    """x + W x."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.linear = nn.Linear(12, 12, bias=False)

    def forward(self, x):
        return x + self.linear(x)


class Gated(nn.Module):
    """x + down(tanh(up x) · gate x): not linear in any error."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(1)
        self.up, self.gate, self.down = nn.Linear(12, 20), nn.Linear(12, 20), nn.Linear(20, 12)

    def forward(self, x):
        return x + self.down(torch.tanh(self.up(x)) * self.gate(x))


class Bank(nn.Module):
    """The sum of a list of layers, of which the last reads nothing."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(2)
        self.experts = nn.ModuleList(nn.Linear(12, 12) for _ in range(3))

    def forward(self, x):
        rows = [x[:5], x[5:], x[:0]]
        return torch.cat([expert(part) for expert, part in zip(self.experts, rows, strict=True)]) + x


class Stack(nn.Module):
    def __init__(self, *blocks):
        super().__init__()
        self.layers = nn.ModuleList(blocks)

    def forward(self, x):
        for block in self.layers:
            x = block(x)
        return x


def measured(model, x, probe=3):
    model.requires_grad_(False)
    paths = [path for path, module in model.named_modules() if isinstance(module, nn.Linear)]
    return measure(model, paths, lambda: model(x), WIDTHS, probe, nearest)


def block_error(block, x, path, width):
    """‖f̂ − f‖² / ‖f‖² with the layer at `path` rounded, computed by running the block."""
    expected = block(x).double()
    layer = block.get_submodule(path)
    kept = layer.weight.data
    layer.weight.data = nearest(path, kept, width)
    change = block(x).double() - expected
    layer.weight.data = kept
    return float(change.square().sum() / expected.square().sum())


@torch.no_grad()
def test_where_the_block_is_linear_every_width_is_exact():
    model, x = Stack(Residual(), Residual()), inputs(30, 12)
    found = measured(model, x)
    for index, block in enumerate(model.layers):
        for width in WIDTHS:
            expected = block_error(block, x, "linear", width)
            assert found[f"layers.{index}.linear"][width] == pytest.approx(expected, rel=1e-3)
        x = block(x)


@torch.no_grad()
def test_elsewhere_the_probed_width_is_exact_and_the_others_scale_with_the_layer_s_own_error():
    model, x = Stack(Gated()), inputs(30, 12) * 0.3
    found, block = measured(model, x), model.layers[0]
    hidden = torch.tanh(block.up(x)) * block.gate(x)
    for name, read in (("up", x), ("gate", x), ("down", hidden)):
        errors, gram, weight = found[f"layers.0.{name}"], gram_of(read), block.get_submodule(name).weight
        assert errors[3] == pytest.approx(block_error(block, x, name, 3), rel=1e-3)
        for width in WIDTHS:
            own = gram.relative_error(weight, nearest(name, weight, width))
            at_probe = gram.relative_error(weight, nearest(name, weight, 3))
            assert errors[width] / errors[3] == pytest.approx(own / at_probe, rel=1e-3)


@torch.no_grad()
def test_experts_are_probed_together_and_one_without_tokens_counts_like_their_mean():
    model, x = Stack(Bank()), inputs(30, 12)
    found = measured(model, x)
    first, second, silent = (found[f"layers.0.experts.{index}"] for index in range(3))
    block = model.layers[0]
    for index, errors in enumerate((first, second)):
        assert errors[3] == pytest.approx(block_error(block, x, f"experts.{index}", 3), rel=1e-3)
    for width in WIDTHS:
        assert silent[width] == pytest.approx((first[width] + second[width]) / 2)


@torch.no_grad()
def test_a_layer_that_is_never_called_counts_by_its_weights():
    model = Stack(Residual())
    model.layers[0].other = nn.Linear(12, 4)
    found = measured(model, inputs(30, 12))["layers.0.other"]
    weight = model.layers[0].other.weight
    for width in WIDTHS:
        change = nearest("", weight, width) - weight
        assert found[width] == pytest.approx(float(change.square().sum() / weight.square().sum()), rel=1e-4)


@torch.no_grad()
def test_a_layer_in_no_list_is_its_own_block():
    torch.manual_seed(3)
    model, x = nn.Sequential(), inputs(30, 12)
    model.add_module("first", nn.Linear(12, 12))
    found = measured(model, x)
    assert found["first"][3] == pytest.approx(block_error(model, x, "first", 3), rel=1e-3)


@torch.no_grad()
def test_members_of_the_outermost_list_are_the_blocks():
    """Numbers that begin a path count too: a Sequential has no name of its own."""
    model, x = nn.Sequential(Gated(), Residual()), inputs(30, 12) * 0.3
    found = measured(model, x)
    assert found["0.up"][3] == pytest.approx(block_error(model[0], x, "up", 3), rel=1e-3)
    assert found["1.linear"][3] == pytest.approx(block_error(model[1], model[0](x), "linear", 3), rel=1e-3)


def test_the_model_is_left_as_it_was():
    model, x = Stack(Gated(), Bank()), inputs(30, 12)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    measured(model, x)
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


# The step


def step_of(model, options, **quant):
    weights = {"bits": 4, "granularity": "group", "group_size": 16} | quant.pop("weights", {})
    section = QuantSection.model_validate({"weights": weights} | quant)
    grids = Grids(section, ends=frozenset(["model.layers.0.self_attn.q_proj"]))
    context = Context(section, lambda each: MinMax(each.spec), {"lm_head": "head"}, 0, grids, None)
    return MixedBits(MixedBits.Options(**options), context)


@pytest.fixture(scope="module")
def llama():
    model = zoo.build("llama")
    unify(model)
    return model.requires_grad_(False)


def prepared(model, options, **quant):
    step = step_of(model, options, **quant)
    with torch.no_grad():
        tokens = zoo.tokens(model, 1, 40)

        def run():
            return model(input_ids=tokens, use_cache=False)

        step.prepare(model, trace(model, run), run)
    return step.context.grids


def bits_a_weight(model, grids, scale_bits, zero_bits=0):
    layers = {
        path: layer
        for path, layer in Block(model, "").layers().items()
        if isinstance(layer, nn.Linear) and path != "lm_head"
    }
    total = sum(
        layer.weight.numel() * grids.weights(path).bits
        + layer.weight.numel() / 16 * (scale_bits + zero_bits)
        for path, layer in layers.items()
    )
    return total / sum(layer.weight.numel() for layer in layers.values())


@pytest.mark.parametrize("average", [5.0, 5.5, 6.3])
def test_the_average_includes_scales_and_is_nearly_reached(llama, average):
    grids = prepared(llama, {"average": average})
    found = bits_a_weight(llama, grids, 32)
    assert average - 0.1 < found <= average
    assert len(set(grids.bits.values())) > 1


def test_scales_and_zero_points_count_as_the_recipe_keeps_them(llama):
    grids = prepared(llama, {"average": 4.5}, weights={"scale_dtype": "float16", "symmetric": False})
    assert 4.4 < bits_a_weight(llama, grids, 16, 8) <= 4.5


def test_one_candidate_is_uniform(llama):
    grids = prepared(llama, {"bits": [3], "average": 6})
    assert set(grids.bits.values()) == {3}
    assert "lm_head" not in grids.bits


def test_a_second_look_chooses_the_same(llama):
    assert prepared(llama, {"average": 5.5}).bits == prepared(llama, {"average": 5.5}).bits


def test_the_prediction_is_better_than_that_of_a_uniform_width(llama):
    grids = prepared(llama, {"average": 5.0})  # 3 bits and a scale of 32 for each 16 weights
    context = step_of(llama, {"average": 5.0}).context
    tokens = zoo.tokens(llama, 1, 40)
    layers = list(grids.bits)

    def nearest_in_groups(path, weight, width):
        return rounded(
            weight, context.grids.weights(path).spec.model_copy(update={"bits": width})
        ).dequantize()

    errors = measure(
        llama, layers, lambda: llama(input_ids=tokens, use_cache=False), WIDTHS, 3, nearest_in_groups
    )
    chosen = sum(errors[path][grids.bits[path]] for path in layers)
    assert chosen < 0.8 * sum(errors[path][3] for path in layers)


def test_first_and_last_layers_keep_the_width_that_the_recipe_gives_them(llama):
    first = "model.layers.0.self_attn.q_proj"
    grids = prepared(llama, {"average": 5.0}, first_last_bits=6)
    assert grids.weights(first).bits == 6
    assert bits_a_weight(llama, grids, 32) <= 5.0


def test_an_average_below_the_lowest_widths_is_refused(llama):
    with pytest.raises(RecipeError, match=r"mixed-bits.average' is 3.9, but .* take 4.000 bits a weight"):
        prepared(llama, {"average": 3.9})


def test_float_weights_are_refused(llama):
    weights = {"dtype": "e4m3", "bits": 8, "granularity": "channel", "group_size": None}
    with pytest.raises(RecipeError, match=r"chooses widths of integers, but quant\.weights\.dtype is e4m3"):
        step_of(llama, {}, weights=weights)


def test_what_was_chosen_is_said(llama, capsys):
    grids = prepared(llama, {"average": 5.5})
    counts = {width: list(grids.bits.values()).count(width) for width in sorted(set(grids.bits.values()))}
    line = capsys.readouterr().err.splitlines()[-1]
    assert line.startswith("mixed-bits: layers by width: ")
    assert ", ".join(f"{count} at {width}" for width, count in counts.items()) in line


def test_weights_of_heavy_tails_do_not_break_the_measure():
    model = Stack(Residual())
    model.layers[0].linear.weight.data = heavy_tailed(12, 12, seed=1) * 5
    found = measured(model, inputs(30, 12))["layers.0.linear"]
    assert found[2] > found[3] > found[4] > found[8] > 0
