"""Channels taken apart and put together: exact where it must be, and by the distance where it may not."""

import json

import pytest
import tiny_lm
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_blocks import difference, quantization, setup, unified
from torch import nn

import ptqcore
from ptq_llm.objective import Objective
from ptq_llm.qllm import ChannelReassembly, ReassembleOptions, apply
from ptq_llm.reassembly import Reassemble, Reassembly, distances, parts, reassemble
from ptqcore import ExportError, StepOptions, attachments_of
from ptqcore.recipe import Recipe, validate
from ptqcore.rounding import Round

WIDTH = 12


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


# Disassembly, eq. 3


def test_a7_the_parts_of_a_channel_are_the_thresholds_that_it_fills():
    magnitude = torch.tensor([0.0, 1.0, 2.0, 2.1, 7.9, 8.0])
    assert parts(magnitude, 2.0).tolist() == [1, 1, 1, 2, 4, 4]


def split_only(magnitude, threshold):
    """Channels taken apart, as many new ones as it takes."""
    count = parts(magnitude, threshold)
    source = torch.arange(len(count)).repeat_interleave(count)
    return Reassembly(source, torch.arange(len(source)), 1 / count[source].float())


@pytest.mark.parametrize("threshold", [0.3, 1.0, 2.5, 100.0])
def test_a7_taking_apart_is_exact_and_keeps_below_the_threshold(threshold):
    x, weight = draw(50, WIDTH) * torch.linspace(0.1, 9, WIDTH), draw(5, WIDTH, seed=1)
    magnitude = x.abs().amax(0)
    change = split_only(magnitude, threshold)
    assert change.channels == int(parts(magnitude, threshold).sum())
    found = F.linear(change.inputs(x), change.weight(weight))
    assert difference(found, F.linear(x, weight)) <= 1e-6
    assert change.inputs(x).abs().max() <= threshold * (1 + 1e-6)


# Distance, eq. 5


def merged_pair(i, j, count=WIDTH):
    """Channels i and j become one, by hand: the last new channel, averaged."""
    others = [c for c in range(count) if c not in (i, j)]
    source = torch.tensor([*others, i, j])
    target = torch.tensor([*range(len(others)), count - 2, count - 2])
    return Reassembly(source, target, torch.tensor([1.0] * len(others) + [0.5, 0.5]))


def test_a8_the_distance_of_a_pair_is_the_error_that_merging_it_makes():
    x, weight = draw(40, WIDTH).double(), draw(7, WIDTH, seed=1).double()
    found = distances(x.T @ x, weight)
    assert found.dtype == torch.float64
    for i in range(WIDTH):
        for j in range(i + 1, WIDTH):
            change = merged_pair(i, j)
            error = F.linear(change.inputs(x), change.weight(weight)) - F.linear(x, weight)
            assert float(error.square().sum()) == pytest.approx(float(found[i, j]), rel=1e-5)
            closed = (
                0.25 * (x[:, i] - x[:, j]).square().sum() * (weight[:, i] - weight[:, j]).square().sum()
            )
            assert float(found[i, j]) == pytest.approx(float(closed), rel=1e-9)
    assert torch.equal(found, found.T)
    assert not found.diagonal().any()


# Assembly, eq. 4, and both together


def sets(change):
    """New channel → the channels in it, and what of each."""
    found = {}
    for source, target, share in zip(
        *(each.tolist() for each in (change.source, change.target, change.share)), strict=True
    ):
        found.setdefault(target, {})[source] = share
    return found


def problem(seed, heavy=2, tokens=30):
    """Inputs with some outlier channels, a weight, and what the search knows of them."""
    x, weight = draw(tokens, WIDTH, seed=seed), draw(6, WIDTH, seed=seed + 100)
    chosen = torch.randperm(WIDTH, generator=torch.Generator().manual_seed(seed))[:heavy]
    x[:, chosen] *= 6
    return x, weight, x.abs().amax(0), distances(x.T @ x, weight)


@given(st.integers(0, 40), st.integers(0, 3), st.sampled_from([0.9, 0.6, 0.45, 0.3]))
@settings(max_examples=150, deadline=None)
def test_a8_the_width_stays_and_every_channel_is_somewhere_exactly_once(seed, heavy, share):
    _, _, magnitude, distance = problem(seed, heavy)
    threshold = float(magnitude.max()) * share
    change = reassemble(magnitude, threshold, distance)
    count = parts(magnitude, threshold)
    extra = int((count - 1).sum())
    whole = int((count == 1).sum())
    if change is None:
        assert extra > (whole + 1) // 2
        return
    assert change.channels == WIDTH
    found = sets(change)
    assert sorted(found) == list(range(WIDTH))
    for channel in range(WIDTH):
        homes = [target for target, members in found.items() if channel in members]
        assert len(homes) == count[channel]
        if count[channel] > 1:  # a channel taken apart is in no merged one
            assert all(found[home] == {channel: pytest.approx(1 / int(count[channel]))} for home in homes)
    merged = [members for members in found.values() if len(members) > 1]
    assert sum(len(members) - 1 for members in merged) == extra <= WIDTH // 2
    for members in merged:
        assert list(members.values()) == [pytest.approx(1 / len(members))] * len(members)


def nearest_pairs(magnitude, threshold, distance):
    """Every other whole channel with the nearest of the rest, nearest pairs first: said plainly."""
    count = parts(magnitude, threshold).tolist()
    whole = [channel for channel in range(len(count)) if count[channel] == 1]
    first, second = whole[::2], whole[1::2]
    pairs = [
        (float(distance[a, b]), a, b)
        for a in first
        for b in [min(second, key=lambda b: float(distance[a, b]))]
    ]
    return {a: b for _, a, b in sorted(pairs)[: sum(count) - len(count)]}


@given(st.integers(0, 200))
@settings(max_examples=60, deadline=None)
def test_a8_the_nearest_of_both_halves_are_merged(seed):
    _, _, magnitude, distance = problem(seed)
    threshold = float(magnitude.max()) * 0.55
    change = reassemble(magnitude, threshold, distance)
    if change is None:
        return
    expected = {}
    for a, b in nearest_pairs(magnitude, threshold, distance).items():
        expected.setdefault(b, {b}).add(a)
    found = [set(members) for members in sets(change).values() if len(members) > 1]
    assert sorted(map(sorted, found)) == sorted(map(sorted, expected.values()))


def test_a8_a_merged_channel_is_the_mean_with_the_sum_of_the_weights():
    x, weight, magnitude, distance = problem(3)
    change = reassemble(magnitude, float(magnitude.max()) * 0.6, distance)
    inputs, weights = change.inputs(x), change.weight(weight)
    for target, members in sets(change).items():
        if len(members) > 1:
            torch.testing.assert_close(inputs[:, target], x[:, list(members)].mean(1))
            torch.testing.assert_close(weights[:, target], weight[:, list(members)].sum(1))


@pytest.mark.parametrize("alike", ["activations", "weights"])
def test_a8_channels_alike_are_merged_first_and_without_loss(alike):
    x, weight, _, _ = problem(1, heavy=0)
    x[:, 0] *= 5  # is taken apart; of the others, 4 and 7 are alike and of different parity
    if alike == "activations":
        x[:, 7] = x[:, 4]
    else:
        weight[:, 7] = weight[:, 4]
    magnitude = x.abs().amax(0)
    threshold = float(magnitude[0]) * 0.51
    assert parts(magnitude, threshold).tolist() == [2] + [1] * (WIDTH - 1)
    change = reassemble(magnitude, threshold, distances(x.T @ x, weight))
    assert [set(members) for members in sets(change).values() if len(members) > 1] == [{4, 7}]
    found = F.linear(change.inputs(x), change.weight(weight))
    assert difference(found, F.linear(x, weight)) <= 1e-6


def test_with_nothing_to_take_apart_nothing_changes():
    _, _, magnitude, distance = problem(0)
    assert reassemble(magnitude, float(magnitude.max()), distance).is_identity
    assert Reassembly.identity(WIDTH).is_identity
    assert not reassemble(magnitude, float(magnitude.max()) * 0.6, distance).is_identity


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_the_attachment_equals_the_function(dtype):
    x, _, magnitude, distance = problem(2)
    change = reassemble(magnitude, float(magnitude.max()) * 0.5, distance)
    made = Reassemble.of(change, torch.device("cpu"))
    again = Reassemble(**json.loads(json.dumps(made.settings())))
    again.load_state_dict(made.state_dict())
    for shape in ((30, WIDTH), (2, 15, WIDTH), (WIDTH,)):
        given_x = x.flatten()[: torch.Size(shape).numel()].view(shape).to(dtype)
        found = again(given_x)
        assert found.dtype == dtype
        assert found.shape == given_x.shape
        torch.testing.assert_close(found, change.inputs(given_x))


# The step


class Net(nn.Module):
    """A norm with an outlier channel, a layer, and what stands between it and another one."""

    def __init__(self, between=F.gelu):
        super().__init__()
        self.block = nn.Module()
        self.block.norm, self.block.first = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 2 * WIDTH)
        self.block.second = nn.Linear(2 * WIDTH, 8)
        with torch.no_grad():
            self.block.norm.weight[3] = 12.0
            self.block.first.weight[5] *= 9

        def forward(x):
            block = self.block
            return block.second(between(block.first(block.norm(x))))

        self.block.forward = forward

    def forward(self, x):
        return self.block(x)


def ready(between=F.gelu, bits=4, static=True):
    torch.manual_seed(0)
    samples = [torch.randn(40, WIDTH) for _ in range(3)]
    return setup(Net(between), quantization(bits, bits, static), samples, blocks="block")


def searched(made, **options):
    """The step, its block and calibration, and the groups."""
    step = made.prepare(ChannelReassembly(ReassembleOptions(**options), made.context))
    io = next(iter(made.ios()))
    calibration = made.calibration(io)
    return step, io.block, calibration, step.groups(io.block, calibration)


@pytest.mark.parametrize("static", [False, True])
def test_a9_the_choice_is_never_worse_than_leaving_the_channels(static):
    made = ready(static=static)
    step, block, calibration, groups = searched(made)
    for group in groups:
        channels = made.model.get_submodule(group.consumers[0]).in_features
        objective = Objective(calibration, made.context, group, step.finder.map)
        found = step._search(group, block, calibration)
        assert objective.loss(found) <= objective.loss(Reassembly.identity(channels))


def test_a9_leaving_them_is_what_is_chosen_where_all_else_is_worse():
    made = ready()
    step, block, calibration, groups = searched(made)
    with torch.no_grad():  # no two channels may be merged, and none needs to be taken apart
        made.model.block.norm.weight.fill_(1)
        made.model.block.first.weight.copy_(3 * torch.randn(24, WIDTH))
    calibration.changed()
    for group in groups:
        found = step._search(group, block, calibration)
        if group.consumers == ("block.first",):
            assert found.is_identity


def test_an_outlier_channel_is_taken_apart_and_the_error_falls():
    made = ready()
    wanted = made.outputs()

    def error(*steps):
        again = ready()
        again.quantize(
            *[kind(options, again.context) for kind, options in steps], Round(StepOptions(), again.context)
        )
        return sum(float((a - b).square().sum()) for a, b in zip(again.outputs(), wanted, strict=True))

    assert error((ChannelReassembly, ReassembleOptions())) < error()


@pytest.mark.parametrize("ratio", [0.1, 0.25, 0.5])
def test_no_more_channels_are_added_than_the_ratio_allows(ratio):
    made = ready()
    step, _, _, _ = searched(made, ratio=ratio, thresholds=40)
    _, _, magnitude, distance = problem(5, heavy=3)
    candidates = step._candidates(magnitude, distance)
    added = [len(change.source) - WIDTH for change in candidates]
    assert added == sorted(set(added))
    assert all(0 < count <= ratio * WIDTH for count in added)
    assert all(change.channels == WIDTH for change in candidates)


def attached(made, options=None):
    """(module, place) of everything that the step attaches."""
    made.transform(ChannelReassembly(options or ReassembleOptions(ratio=0.5), made.context))
    named = made.model.named_modules()
    return {
        (path, place) for path, m in named if (all_of := attachments_of(m)) for place, _ in all_of.items()
    }


def test_channels_of_a_norm_are_gathered_behind_it_others_in_front_of_the_layers():
    assert attached(ready()) == {("block.norm", "output"), ("block.second", "input")}


def test_channels_of_a_linear_layer_are_changed_in_its_rows():
    made = ready(lambda h: h.reshape(-1, 2, 2 * WIDTH).flatten(0, 1))
    _, block, _, groups = searched(made)
    (group,) = [group for group in groups if group.direct]
    x = made.samples[0]
    plain = block.module.first(block.module.norm(x))
    magnitude = plain.abs().amax(0)
    gram, weight = plain.T @ plain, block.module.second.weight.clone()
    change = reassemble(magnitude, float(magnitude.max()) * 0.6, distances(gram, weight))
    assert not change.is_identity
    expected = F.linear(change.inputs(plain), change.weight(weight), block.module.second.bias)
    apply(block, group, change)
    assert difference(made.model(x), expected) <= 1e-6
    torch.testing.assert_close(block.module.first(block.module.norm(x)), change.inputs(plain))
    assert not any(attachments_of(module) for module in made.model.modules())


def test_a_linear_layer_that_something_else_reads_keeps_its_rows():
    made = ready(lambda h: h + 0 * h.sum())
    _, _, _, groups = searched(made)
    assert not any(group.direct for group in groups)


def test_a_model_of_such_layers_alone_attaches_nothing():
    class Chain(nn.Module):
        def __init__(self):
            super().__init__()
            self.block = nn.Sequential(
                nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, 4)
            )

        def forward(self, x):
            return self.block(x)

    made = setup(Chain(), samples=[torch.randn(40, WIDTH)], blocks="block")
    step = made.prepare(ChannelReassembly(ReassembleOptions(skip=["block.0"]), made.context))
    assert step.attaches == ""
    step = made.prepare(ChannelReassembly(ReassembleOptions(), made.context))
    assert step.attaches == "channels gathered at run time"


def test_what_stands_behind_attention_is_left_alone():
    made = setup(unified("llama"), quantization(4, 4, static=True))
    _, block, _, groups = searched(made)
    consumers = [path.removeprefix(f"{block.path}.") for group in groups for path in group.consumers]
    assert consumers == [
        *(f"self_attn.{name}_proj" for name in "qkv"),
        "mlp.gate_proj",
        "mlp.up_proj",
        "mlp.down_proj",
    ]


def test_where_a_router_reads_the_norm_each_expert_has_its_own_gather():
    made = setup(unified("mixtral"), quantization(4, 4, static=True))
    wanted = made.outputs()
    _, block, _, groups = searched(made)
    (group,) = [group for group in groups if group.others]
    swapped = Reassembly(torch.arange(64), torch.arange(64).flip(0), torch.ones(64))
    apply(block, group, swapped)
    found = {path for path, module in made.model.named_modules() if attachments_of(module)}
    assert found == {f"model.layers.0.mlp.experts.gate_up_proj.{index}" for index in range(4)}
    assert all(difference(a, b) <= 1e-5 for a, b in zip(made.outputs(), wanted, strict=True))


@pytest.mark.parametrize("name", ["llama", "gemma2", "bert", "phi3", "mixtral"])
def test_taking_apart_alone_leaves_what_the_model_computes(name):
    """Each group alone gets more channels; behind a norm, or in front of every layer."""
    made = setup(unified(name), quantization(4, 4, static=True))
    wanted = made.outputs()
    step = made.prepare(ChannelReassembly(ReassembleOptions(), made.context))
    changed = 0
    for io in made.ios():
        calibration = made.calibration(io)
        for group in step.groups(io.block, calibration):
            gram = calibration.gram(group.consumers[0])
            if gram is None:
                continue
            magnitude = torch.maximum(-gram.low, gram.high)
            count = parts(magnitude, float(magnitude.max()) * 0.6)
            source = torch.arange(len(count)).repeat_interleave(count)
            taken = Reassembly(source, torch.arange(len(source)), 1 / count[source].float())
            apply(io.block, group, taken)
            changed += taken.channels > len(count)
    assert changed
    assert all(difference(a, b) <= 1e-5 for a, b in zip(made.outputs(), wanted, strict=True))


# Whole runs


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    tiny_lm.write_text(folder / "text.txt", 600)
    return tiny_lm.save(folder / "llama", "llama", num_hidden_layers=2)


def run(model, output, export=()):
    text = str(model.parent / "text.txt")
    task = {"kind": "causal-lm", "model": str(model), "text": text, "calibration": text, "window": 32}
    data = {
        "name": "tiny",
        "task": task | {"calibration_window": 32, "calibration_samples": 3, "max_windows": 2},
        "quant": quantization(4, 4, static=True),
        "steps": [{"reassemble": {"thresholds": 8}}, "round"],
        "export": list(export),
    }
    return ptqcore.quantize(validate(Recipe, data), "llm", output)


def test_an_artifact_has_the_gathers(model, tmp_path):
    run(model, tmp_path / "out")  # which loads it back and compares
    entries = json.loads((tmp_path / "out/manifest.json").read_text())["attachments"]
    assert entries
    assert {entry["name"] for entry in entries} == {"llm:reassemble"}
    loaded = ptqcore.load(tmp_path / "out")
    for entry in entries:
        (made,) = attachments_of(loaded.get_submodule(entry["path"]))
        assert made.settings() == entry["settings"]
        assert entry["settings"]["channels"] in (64, 128)


def test_exports_that_cannot_hold_them_are_refused(model, tmp_path):
    with pytest.raises(ExportError, match=r"step reassemble attaches.*\(channels gathered at run time\)"):
        run(model, tmp_path / "out", export=["compressed-tensors"])
