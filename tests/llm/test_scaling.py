"""One factor a channel: SmoothQuant and AWQ in closed form, and what their searches are judged by."""

import copy
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from tiny_blocks import difference, logits, quantization, setup, texts, unified
from torch import nn

from ptq_llm.awq import AWQ, AWQOptions, GramLoss, powers
from ptq_llm.objective import Objective
from ptq_llm.os_plus import OSPlus, OSPlusOptions
from ptq_llm.qllm import ChannelReassembly, ReassembleOptions
from ptq_llm.rescale import Rescaling
from ptq_llm.scaling import ChannelStatistics
from ptq_llm.simulation import Simulation, rounded
from ptq_llm.smoothquant import SmoothQuant, SmoothQuantOptions, smoothing
from ptqcore import FakeQuant, QuantSpec, attachments_of, grid

WIDTH = 8


def statistics(low, high, weight=None, magnitude=None):
    ends = [torch.tensor(each, dtype=torch.float64) for each in (low, high)]
    largest = torch.maximum(-ends[0], ends[1])
    others = [largest if each is None else ends[0].new_tensor(each) for each in (magnitude, weight)]
    return ChannelStatistics(*ends, *others)


# SmoothQuant, eq. 4


@pytest.mark.parametrize("alpha", [0.0, 0.3, 0.5, 0.85, 1.0])
def test_smoothquant_is_the_ratio_of_powers(alpha):
    found = smoothing(statistics([-4.0, -0.5, -9.0], [1.0, 2.0, 3.0], weight=[0.25, 3.0, 0.01]), alpha)
    expected = [a**alpha / w ** (1 - alpha) for a, w in ((4.0, 0.25), (2.0, 3.0), (9.0, 0.01))]
    assert found.scale.tolist() == pytest.approx(expected, rel=1e-12)
    assert not found.shifts


def test_at_one_half_both_sides_get_the_geometric_mean():
    given = statistics([-8.0, -0.1], [0.5, 0.2], weight=[0.5, 3.0])
    scale = smoothing(given, 0.5).scale
    largest = torch.maximum(-given.low, given.high)
    torch.testing.assert_close(largest / scale, given.weight * scale)


def test_channels_that_are_always_zero_or_never_read_keep_their_factor():
    given = statistics([0.0, -1.0, -2.0], [0.0, 1.0, 2.0], weight=[1.0, 0.0, 0.5])
    assert smoothing(given, 0.5).scale.tolist() == pytest.approx([1.0, 1.0, 2.0])


# AWQ, section 3.2


def test_awq_is_a_power_normalised_to_one_between_its_extremes():
    magnitude = torch.tensor([0.5, 2.0, 8.0]).double()
    for ratio in (0.25, 0.5, 0.95):
        scale = powers(magnitude, ratio).scale
        assert float(scale.max() * scale.min()) == pytest.approx(1.0)
        torch.testing.assert_close(scale / scale[0], (magnitude / magnitude[0]).pow(ratio))


def test_awq_with_ratio_zero_is_the_identity():
    assert powers(torch.tensor([0.0, 1e-9, 3.0, 1e4]).double(), 0).is_identity


def test_channels_that_are_always_zero_get_factor_one():
    assert powers(torch.tensor([0.0, 2.0, 8.0]).double(), 0.5).scale[0] == 1


# One group, and what its candidates are judged by


class Net(nn.Module):
    """A norm in front of two layers with channels of very different sizes."""

    def __init__(self):
        super().__init__()
        self.block = nn.Sequential()
        self.block.add_module("norm", nn.LayerNorm(WIDTH))
        self.block.add_module("layer", nn.Linear(WIDTH, 5))
        with torch.no_grad():
            self.block.norm.weight.copy_(torch.tensor([1.0, 0.3, 20.0, 0.7, 6.0, 1.3, 0.1, 2.0]))
            self.block.norm.bias.normal_()
        self.requires_grad_(False)

    def forward(self, x):
        return self.block(x)


def ready(samples, quant=None, masks=None, seed=0):
    torch.manual_seed(seed)
    return setup(Net().eval(), quant or quantization(4, 4), samples, blocks="block", masks=masks)


def draw(count, rows=6, seed=3):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(rows, WIDTH, generator=generator) for _ in range(count)]


def started(made, kind, options, **more):
    """A step that is prepared, the group of the block, its statistics and its objective."""
    step = made.prepare(kind(options, made.context))
    io = next(iter(made.ios()))
    calibration = made.calibration(io)
    (group,) = step.groups(io.block, calibration)
    seen = ChannelStatistics.of(group, io.block, calibration)
    return step, group, seen, Objective(calibration, made.context, group, step.finder.map)


def round_rows(x, bits):
    """Each row on the asymmetric grid of its own extremes: an independent statement in NumPy's terms."""
    low, high = x.amin(-1, keepdim=True).clamp(max=0), x.amax(-1, keepdim=True).clamp(min=0)
    scale = (high - low) / (2**bits - 1)
    zero = (-low / scale).round()
    return ((x / scale).round() + zero).clamp(0, 2**bits - 1).sub(zero) * scale


def loss_of(made, scale, samples, bits=4):
    """Σ‖Q(x/s)Q(Ws)ᵀ − xWᵀ‖² / Σ‖xWᵀ + b‖² over samples."""
    block = made.model.block
    weight, bias = block.layer.weight, block.layer.bias
    error = energy = 0.0
    for sample in samples:
        x = block.norm(sample)
        wanted = x @ weight.T + bias
        found = round_rows(x / scale, bits) @ round_rows(weight * scale, bits).T + bias
        error += float((found - wanted).double().square().sum())
        energy += float(wanted.double().square().sum())
    return error / energy


@pytest.mark.parametrize("alpha", [0.3, 0.5, 0.9])
def test_the_objective_of_a_layer_alone_is_its_relative_output_error(alpha):
    made = ready(draw(3))
    _, _, seen, objective = started(made, SmoothQuant, SmoothQuantOptions())
    change = smoothing(seen, alpha)
    expected = loss_of(made, change.scale.float(), made.samples)
    assert objective.loss(change) == pytest.approx(expected, rel=1e-3)


@pytest.mark.parametrize("seed", range(4))
def test_the_power_is_the_best_of_what_is_tried_and_never_worse_than_the_identity(seed):
    made = ready(draw(3, seed=seed), seed=seed)
    step, group, seen, objective = started(made, SmoothQuant, SmoothQuantOptions())
    found = step.search(group, seen, objective)
    powers_first = [smoothing(seen, alpha) for alpha in (0.3, 0.5, 0.7, 0.9)]
    losses = [objective.loss(change) for change in (Rescaling.identity(WIDTH), *powers_first)]
    assert objective.loss(found) <= min(losses)


def test_d1_the_best_candidate_is_judged_over_all_batches_not_over_the_first_ones():
    """Batches that, each alone, ask for different powers; the choice is that of their sum."""
    for seed in range(20):
        small, large = draw(2, seed=seed)
        made = ready([small, small, large * torch.linspace(0.1, 5, WIDTH)], seed=seed)
        step, group, seen, objective = started(made, SmoothQuant, SmoothQuantOptions())
        line = [smoothing(seen, alpha).scale.float() for alpha in (0.3, 0.5, 0.7, 0.9)]
        of_first = [loss_of(made, scale, made.samples[:1]) for scale in line]
        of_all = [loss_of(made, scale, made.samples) for scale in line]
        if of_first.index(min(of_first)) != of_all.index(min(of_all)):
            break
    else:
        pytest.fail("no samples found that disagree")
    found = step.search(group, seen, objective).scale.float()
    assert loss_of(made, found, made.samples) <= min(of_all) * (1 + 1e-4)


def test_d4_statistics_and_objective_see_every_sample():
    samples = draw(4)
    made = ready(samples)
    _, _, seen, objective = started(made, OSPlus, OSPlusOptions())
    normed = torch.cat([made.model.block.norm(sample) for sample in samples])
    torch.testing.assert_close(seen.low.float(), normed.amin(0))
    torch.testing.assert_close(seen.high.float(), normed.amax(0))
    torch.testing.assert_close(seen.magnitude.float(), normed.abs().mean(0))
    torch.testing.assert_close(seen.weight.float(), made.model.block.layer.weight.abs().amax(0))
    one = ready(samples[:1])
    _, _, _, of_one = started(one, OSPlus, OSPlusOptions())
    assert objective.loss(Rescaling.identity(WIDTH)) != of_one.loss(Rescaling.identity(WIDTH))


def test_padding_is_in_neither():
    tokens = draw(1, 6)[0].view(2, 3, WIDTH)
    padded = torch.cat([tokens, torch.full((2, 2, WIDTH), 7.0) * torch.linspace(-9, 9, WIDTH)], 1)
    mask = torch.tensor([[True] * 3 + [False] * 2] * 2)
    change = Rescaling(torch.linspace(0.5, 2, WIDTH).double(), torch.zeros(WIDTH).double())
    found, expected = (
        started(ready([x], masks=[m]), OSPlus, OSPlusOptions()) for x, m in ((padded, mask), (tokens, None))
    )
    for name in ("low", "high", "magnitude"):
        torch.testing.assert_close(getattr(found[2], name), getattr(expected[2], name))
    assert found[3].loss(change) == pytest.approx(expected[3].loss(change), rel=1e-5)


@pytest.mark.parametrize("kind", ["gram", "outputs"])
def test_awq_is_never_worse_than_ratio_zero_on_its_objective(kind):
    for seed in range(4):
        made = ready(draw(3, seed=seed), quantization(3, None), seed=seed)
        step, group, seen, objective = started(made, AWQ, AWQOptions(objective=kind))
        found = step.search(group, seen, objective)
        losses = {
            ratio: loss_without_inputs(made, powers(seen.magnitude, ratio / 20)) for ratio in range(20)
        }
        tried = [losses[ratio] for ratio in (0, 4, 8, 12, 16, 19)]
        assert loss_without_inputs(made, found) <= min(tried) * (1 + 1e-4)


def loss_without_inputs(made, change):
    """The output's error from 3-bit weights alone."""
    block, scale = made.model.block, change.scale.float()
    x = torch.cat([block.norm(sample) for sample in made.samples])
    new = round_rows(block.layer.weight * scale, 3) / scale
    return float(
        (x @ (new - block.layer.weight).T).square().sum() / (x @ block.layer.weight.T).square().sum()
    )


def test_the_gram_says_what_the_outputs_say_where_only_weights_are_rounded():
    made = ready(draw(3), quantization(3, None))
    made.model.block.layer.bias.zero_()  # the Gram knows of no bias
    _, _, seen, objective = started(made, AWQ, AWQOptions(objective="gram"))
    loss = GramLoss(objective, made.context)
    for ratio in (0.0, 0.35, 0.9):
        change = powers(seen.magnitude, ratio)
        assert loss(change) == pytest.approx(objective.loss(change), rel=1e-4)


# What lies behind the group is compared, through the model's own modules


def first_norm(made, kind=OSPlus, options=None):
    """The objective of queries, keys and values of the first block, and the candidates' block."""
    step = made.prepare(kind(options or OSPlusOptions(), made.context))
    io = next(iter(made.ios()))
    calibration = made.calibration(io)
    group = next(g for g in step.groups(io.block, calibration) if g.kind != "linear")
    return group, io.block, Objective(calibration, made.context, group, step.finder.map)


def attention_error(made, block, group, change):
    """‖y′ − y‖²/‖y‖² of the input of o_proj, with the layers of the group really replaced."""
    attention, seen = block.module.self_attn, []
    handle = attention.o_proj.register_forward_pre_hook(lambda _, args: seen.append(args[0].double()))
    made.outputs()
    kept = {path: dict(made.model.get_submodule(path)._parameters) for path in group.consumers}
    handles = []
    for path in group.consumers:
        layer = made.model.get_submodule(path)
        weight = nn.Parameter(round_rows(change.weight(layer.weight), 4))
        bias = change.bias(layer.weight, layer.bias)
        layer._parameters.update(weight=weight, bias=None if bias is None else nn.Parameter(bias))
        hook = lambda _, args: (round_rows(change.inputs(args[0]), 4),)  # noqa: E731
        handles.append(layer.register_forward_pre_hook(hook))
    count = len(seen)
    made.outputs()
    for each in (handle, *handles):
        each.remove()
    for path, parameters in kept.items():
        made.model.get_submodule(path)._parameters.update(parameters)
    pairs = list(zip(seen[:count], seen[count:], strict=True))
    error = sum(float((new - old).square().sum()) for old, new in pairs)
    return error / sum(float(old.square().sum()) for old, _ in pairs)


@pytest.mark.parametrize("name", ["llama", "opt", "qwen3", "gemma2"])
def test_queries_keys_and_values_are_judged_by_the_output_of_attention(name):
    made = setup(unified(name), quantization(4, 4))
    group, block, objective = first_norm(made)
    if name == "opt":  # its output projection has another name
        block.module.self_attn.o_proj = block.module.self_attn.out_proj
    generator = torch.Generator().manual_seed(0)
    change = Rescaling(torch.rand(64, generator=generator).double() + 0.5, torch.zeros(64).double())
    expected = attention_error(made, block, group, change)
    assert objective.loss(change) == pytest.approx(expected, rel=1e-3)


def test_a6_what_attention_does_not_read_has_no_say():
    """With one token the softmax is 1: queries and keys are irrelevant, and only values count."""
    model = unified("llama")
    layer = model.model.layers[0].self_attn
    with torch.no_grad():  # keys whose rounding would drown everything else
        layer.k_proj.weight.mul_(100)
        layer.k_proj.weight[:, ::7] *= 30
    made = setup(model, quantization(4, 4), texts(model, [1] * 40))
    _, block, objective = first_norm(made)
    io = next(iter(made.ios()))
    normed = torch.cat(
        [block.module.input_layernorm(io.tapes[i].arguments(io.nodes[i])[0][0])[0] for i in range(40)]
    )
    normed = normed.detach()
    magnitude = normed.abs().amax(0).double()
    top = float(magnitude.max())
    candidates = [
        Rescaling((magnitude / (top * 0.85**k)).clamp(min=1), torch.zeros(64).double()) for k in range(16)
    ]

    def summed(change, layers):
        total = 0.0
        for each in layers:
            found = round_rows(change.inputs(normed), 4) @ round_rows(change.weight(each.weight), 4).T
            wanted = normed @ each.weight.T
            total += float((found - wanted).double().square().sum())
        return total

    values = [summed(change, [layer.v_proj]) for change in candidates]
    all_three = [summed(change, [layer.q_proj, layer.k_proj, layer.v_proj]) for change in candidates]
    losses = [objective.loss(change) for change in candidates]
    chosen, by_sum = losses.index(min(losses)), all_three.index(min(all_three))
    assert chosen == values.index(min(values))
    assert chosen != by_sum
    assert values[chosen] < values[by_sum]


def test_a_gate_and_its_product_are_judged_by_the_product():
    made = setup(unified("llama"), quantization(4, 4))
    step = made.prepare(OSPlus(OSPlusOptions(), made.context))
    io = next(iter(made.ios()))
    calibration = made.calibration(io)
    group = next(g for g in step.groups(io.block, calibration) if "mlp" in g.consumers[0])
    objective = Objective(calibration, made.context, group, step.finder.map)
    mlp, seen = io.block.module.mlp, []
    handle = mlp.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    made.outputs()
    handle.remove()
    x = torch.cat([each[0] for each in seen])
    gate, up = (layer.weight for layer in (mlp.gate_proj, mlp.up_proj))
    wanted = F.silu(x @ gate.T) * (x @ up.T)
    rounded_x = round_rows(x, 4)
    found = F.silu(rounded_x @ round_rows(gate, 4).T) * (rounded_x @ round_rows(up, 4).T)
    expected = float((found - wanted).square().sum() / wanted.square().sum())
    assert objective.loss(Rescaling.identity(64)) == pytest.approx(expected, rel=1e-3)


def test_the_objective_leaves_the_model_as_it_was():
    made = setup(unified("llama"))
    state = {key: value.clone() for key, value in made.model.state_dict().items()}
    group, _, objective = first_norm(made)
    objective.loss(Rescaling(torch.full((64,), 3.0).double(), torch.full((64,), 0.5).double()))
    assert all(torch.equal(value, state[key]) for key, value in made.model.state_dict().items())
    assert all(made.model.get_submodule(path).bias is None for path in group.consumers)
    assert not any(m._forward_pre_hooks for m in made.model.modules())


# Everything in front is computed as it will be


@pytest.mark.parametrize("static", [False, True])
def test_simulated_layers_are_rounded_and_exact_again_behind(static):
    made = ready(draw(3), quantization(3, 5, static))
    io = next(iter(made.ios()))
    layer, calibration = made.model.block.layer, made.calibration(io)
    weight, (sample, *_) = layer.weight, made.samples
    x = made.model.block.norm(sample)
    exact = made.model(sample)
    everything = torch.cat([made.model.block.norm(each) for each in made.samples])
    with Simulation(io.block, calibration, made.context) as simulation:
        simulation.add(["block.layer", "block.nothing"])
        if static:
            spec = QuantSpec(bits=5, symmetric=False)
            ends = everything.min().reshape(1, 1), everything.max().reshape(1, 1)
            on_grid = grid.fake_quantize(x, *grid.scale_and_zero_point(*ends, spec), spec)
        else:
            on_grid = round_rows(x, 5)
        torch.testing.assert_close(made.model(sample), F.linear(on_grid, round_rows(weight, 3), layer.bias))
        with simulation.paused():
            assert layer.weight is weight
            assert torch.equal(made.model(sample), exact)
        assert not torch.equal(made.model(sample), exact)
    assert layer.weight is weight
    assert torch.equal(made.model(sample), exact)


def test_rounded_is_rounding_to_nearest_in_the_weights_own_range():
    weight = torch.randn(4, 9, generator=torch.Generator().manual_seed(0))
    spec = QuantSpec(bits=3, granularity="channel", symmetric=False)
    torch.testing.assert_close(rounded(weight, spec), round_rows(weight, 3))
    assert rounded(weight.to(torch.bfloat16), spec).dtype == torch.bfloat16


class Two(nn.Module):
    """Two groups in a row, each a norm and a layer."""

    def __init__(self):
        super().__init__()
        self.block = nn.Sequential()
        for name in ("1", "2"):
            self.block.add_module(f"norm{name}", nn.LayerNorm(WIDTH))
            self.block.add_module(f"layer{name}", nn.Linear(WIDTH, WIDTH))
        with torch.no_grad():
            self.block.norm1.weight[2] = 50.0
        self.requires_grad_(False)

    def forward(self, x):
        return self.block(x)


def test_the_second_group_sees_what_the_first_gives_once_it_is_changed_and_rounded():
    """Also the static range of the first layer's input is that of the changed channels."""
    torch.manual_seed(0)
    quant, seen = quantization(4, 4, static=True), []

    class Watching(SmoothQuant):
        def search(self, group, statistics, objective):
            seen.append(statistics)
            return (
                smoothing(statistics, 1.0) if "layer1" in group.consumers[0] else Rescaling.identity(WIDTH)
            )

    made = setup(Two().eval(), quant, draw(3), blocks="block")
    made.transform(Watching(SmoothQuantOptions(), made.context))
    block, spec = made.model.block, QuantSpec(bits=4, symmetric=False)
    x = torch.cat([block.norm1(sample) for sample in made.samples])
    assert x.abs().max() == pytest.approx(1.0, rel=1e-5)
    quantizer = FakeQuant(spec)
    quantizer.set_range(x.min(), x.max())
    on_grid = quantizer(x)
    behind = block.norm2(F.linear(on_grid, round_rows(block.layer1.weight, 4), block.layer1.bias))
    torch.testing.assert_close(seen[1].high.float(), behind.amax(0))
    torch.testing.assert_close(seen[1].low.float(), behind.amin(0))


# Whole models


STEPS = {
    "smoothquant": (SmoothQuant, SmoothQuantOptions()),
    "smoothquant on all": (SmoothQuant, SmoothQuantOptions(alpha=0.6, groups="all")),
    "awq": (AWQ, AWQOptions(ratios=5)),
    "os-plus": (OSPlus, OSPlusOptions(thresholds=5)),
    "os-plus with shifts": (OSPlus, OSPlusOptions(thresholds=5, shift=True)),
}


@pytest.mark.parametrize("step", STEPS)
@pytest.mark.parametrize("name", ["llama", "gemma2", "cohere", "phi3", "bloom", "opt", "bert", "mixtral"])
def test_a_step_changes_weights_but_not_what_the_model_computes(name, step):
    made = setup(unified(name), quantization(3, 4))
    expected = logits(made.model)
    state = {key: value.clone() for key, value in made.model.state_dict().items()}
    kind, options = STEPS[step]
    made.transform(kind(options, made.context))
    changed = [key for key, value in state.items() if not torch.equal(made.model.get_parameter(key), value)]
    assert changed
    assert difference(logits(made.model), expected) <= 1e-5


@pytest.mark.parametrize("name", ["llama", "gemma2", "bert", "mixtral"])
def test_steps_in_a_row_keep_what_the_model_computes(name):
    """Also behind norms that the first one has given offsets."""
    made = setup(unified(name), quantization(3, 4))
    expected = logits(made.model)
    chain = ["os-plus with shifts", "awq", "os-plus with shifts", "smoothquant on all"]
    made.transform(*(STEPS[step][0](STEPS[step][1], made.context) for step in chain))
    assert difference(logits(made.model), expected) <= 1e-5


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["llama", "bert", "phi3"])
def test_models_of_half_precision_lose_no_more_than_their_own_digits(name, dtype, capsys):
    """Each step rounds weights once more: what float32 makes of the model stays about as near."""
    made = setup(unified(name, dtype), quantization(4, 4))
    exact = logits(copy.deepcopy(made.model).float())
    before = (logits(made.model).float() - exact).square().mean().sqrt()
    made.transform(
        *(STEPS[step][0](STEPS[step][1], made.context) for step in ("os-plus with shifts", "awq"))
    )
    after = (logits(made.model).float() - exact).square().mean().sqrt()
    assert after <= 3 * before
    assert "left alone" not in capsys.readouterr().err
    assert all(parameter.dtype == dtype for parameter in made.model.parameters())


def attaches(name, kind, options, **changes):
    """What a step says that it attaches, and how many attachments there are behind it."""
    made = setup(unified(name, **changes), quantization(3, 4))
    step = kind(options, made.context)
    made.transform(step)
    count = sum(len(attachments_of(module) or ()) for module in made.model.modules())
    return step.attaches, count


def test_only_post_norm_models_get_anything_attached_and_only_online():
    said, count = attaches("bert", SmoothQuant, SmoothQuantOptions(alpha=0.5))
    assert said == "factors in front of layers that read a norm beside a residual"
    assert count == 3 * 4  # queries, keys, values and the first layer of the MLP, in three blocks
    assert attaches("bert", SmoothQuant, SmoothQuantOptions(alpha=0.5, online=False)) == ("", 0)
    assert attaches("llama", SmoothQuant, SmoothQuantOptions(alpha=0.5)) == ("", 0)
    assert attaches("opt", OSPlus, OSPlusOptions(thresholds=3)) == ("", 0)


def test_reassembly_says_so_too():
    said, _ = attaches("llama", ChannelReassembly, ReassembleOptions())
    assert said == "channels gathered at run time"


def test_channels_of_one_row_share_what_is_largest():
    """Grouped queries: two heads of the output projection read the same values."""
    made = setup(unified("llama"))
    step = made.prepare(SmoothQuant(SmoothQuantOptions(groups="all"), made.context))
    io = next(iter(made.ios()))
    calibration = made.calibration(io)
    group = next(g for g in step.groups(io.block, calibration) if "o_proj" in g.consumers[0])
    seen = ChannelStatistics.of(group, io.block, calibration)
    plain = ChannelStatistics.of(replace(group, rows=None), io.block, calibration)
    for ours, theirs, reduce in (
        (seen.low, plain.low, torch.minimum),
        (seen.high, plain.high, torch.maximum),
        (seen.weight, plain.weight, torch.maximum),
        (seen.magnitude, plain.magnitude, lambda a, b: (a + b) / 2),
    ):
        heads = theirs.view(2, 2, 16)
        expected = reduce(heads[:, 0], heads[:, 1])[:, None].expand(2, 2, 16).flatten()
        torch.testing.assert_close(ours, expected)
