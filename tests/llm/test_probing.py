"""Groups in models made to mislead: what is found, what is refused, and what is said about it."""

import pytest
import torch
import torch.nn.functional as F
from test_groups import described, found_in
from tiny_blocks import setup, unified
from torch import nn

from ptq_llm.groups import Finder, Group
from ptq_llm.probing import Unreached, channel_map, in_precision
from ptq_llm.rescale import TOLERANCE, check
from ptq_llm.smoothquant import SmoothQuant, SmoothQuantOptions
from ptqcore import RecipeError

WIDTH, INNER = 8, 16


class Block(nn.Module):
    """x + second(between(first(norm(x)))); models change a part of it."""

    def __init__(self, inner: int = INNER, second: int = INNER):
        super().__init__()
        self.norm, self.first, self.second = (
            nn.LayerNorm(WIDTH),
            nn.Linear(WIDTH, inner),
            nn.Linear(second, WIDTH),
        )

    def forward(self, x):
        return x + self.second(self.between(self.first(self.norm(x))))

    def between(self, h):
        return h.relu()


class Model(nn.Module):
    """Some blocks in a row, behind a layer and in front of one."""

    def __init__(self, make, count=1):
        super().__init__()
        self.stem, self.head = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)
        self.blocks = nn.ModuleList(make() for _ in range(count))

    def forward(self, x):
        x = self.stem(x)
        for block in self.blocks:
            x = block(x)
        return self.head(x)


def ready(make, count=1, samples=None):
    torch.manual_seed(0)
    model = Model(make, count).eval().requires_grad_(False)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter.add_(torch.randn_like(parameter), alpha=0.3)
    if samples is None:
        samples = [torch.randn(2, 5, WIDTH) for _ in range(2)]
    return setup(model, samples=samples, blocks="blocks.*")


def candidates(made):
    io = first_io(made)
    return Finder(made.model, made.flow).candidates(io.block, io)


def only(found, kind):
    """The one group of a kind."""
    (group,) = [group for group in found if group.kind == kind]
    return group


def first_io(made):
    return next(iter(made.ios()))


FIRST, SECOND, NORM = "blocks.0.first", "blocks.0.second", "blocks.0.norm"


# Rows of linear layers


def of_rows(between, inner=INNER, second=INNER):
    """The rows that the second layer's channels are found to be."""

    class Changed(Block):
        def __init__(self):
            super().__init__(inner, second)

        def between(self, h):
            return between(h)

    found = [group for group in candidates(ready(Changed)) if group.kind == "linear"]
    assert all((group.producer, group.consumers) == (FIRST, (SECOND,)) for group in found)
    return found[0].rows.tolist() if found else None


PERMUTED = torch.randperm(INNER, generator=torch.Generator().manual_seed(5)).tolist()
ALL = list(range(INNER))


@pytest.mark.parametrize(
    ("between", "rows"),
    [
        (torch.relu, ALL),
        (lambda h: F.leaky_relu(h, 0.2), ALL),
        (lambda h: h[..., PERMUTED].relu(), PERMUTED),
        (lambda h: h * h.sum(-1, keepdim=True), None),
        (F.gelu, None),
        (F.silu, None),
        (torch.tanh, None),
        (lambda h: h + 1, None),
        (lambda h: F.layer_norm(h, (INNER,)), None),
        (lambda h: h.softmax(-1), None),
    ],
)
def test_positive_factors_pass_or_not(between, rows):
    if rows is None:
        assert of_rows(between) is None
    else:
        assert of_rows(between) == rows


@pytest.mark.parametrize("gate", [F.silu, F.gelu, torch.sigmoid])
def test_of_a_fused_gate_and_up_the_rows_are_those_of_up(gate):
    def gate_first(h):
        left, right = h.chunk(2, -1)
        return gate(left) * right

    def interleaved(h):
        return gate(h[..., 1::2]) * h[..., ::2]

    assert of_rows(gate_first, 2 * INNER) == list(range(INNER, 2 * INNER))
    assert of_rows(interleaved, 2 * INNER) == list(range(0, 2 * INNER, 2))


def test_rows_that_several_channels_share_are_found():
    assert of_rows(lambda h: h.repeat_interleave(2, -1).relu(), INNER // 2) == [row // 2 for row in ALL]


def with_dead_channels(between):
    class Dead(Block):
        def __init__(self):
            super().__init__()
            with torch.no_grad():
                self.first.bias[[3, 7]] = -1e3

        def between(self, h):
            return between(h)

    return [group for group in candidates(ready(Dead)) if group.kind == "linear"]


def test_channels_that_are_always_zero_follow_the_rule_of_the_others():
    (group,) = with_dead_channels(torch.relu)
    assert group.rows.tolist() == ALL


def test_without_such_a_rule_they_are_in_no_group():
    assert with_dead_channels(lambda h: h[..., PERMUTED].relu()) == []


def test_one_token_proves_nothing():
    made = ready(Block, samples=[torch.randn(1, 1, WIDTH)])
    with pytest.raises(Unreached):
        channel_map(first_io(made), FIRST, SECOND)


def test_a_layer_whose_output_another_reads_as_it_is_is_direct():
    class Direct(Block):
        def between(self, h):
            return h.reshape(-1, INNER).view(h.shape)

    group = only(candidates(ready(Direct)), "linear")
    assert group.direct
    assert group.rows.tolist() == ALL
    assert not only(candidates(ready(Block)), "linear").direct


def test_it_is_not_if_something_else_reads_it_too():
    class ReadTwice(Block):
        def between(self, h):
            self.seen = h.square().sum()
            return h

    found = [group for group in candidates(ready(ReadTwice)) if group.kind == "linear"]
    assert not any(group.direct for group in found)


# Experts


class Expert(nn.Module):
    def __init__(self):
        super().__init__()
        self.w1, self.w3 = nn.Linear(WIDTH, INNER, bias=False), nn.Linear(WIDTH, INNER, bias=False)
        self.w2 = nn.Linear(INNER, WIDTH, bias=False)

    def forward(self, x):
        return self.w2(F.silu(self.w1(x)) * self.w3(x))


class Mixture(nn.Module):
    """x + the expert that the sign of its first channel chooses; the third expert is for nobody."""

    def __init__(self):
        super().__init__()
        self.experts = nn.ModuleList(Expert() for _ in range(3))

    def forward(self, x):
        rows = x.flatten(0, -2)
        chosen = [rows[:, 0] > 0, rows[:, 0] <= 0, torch.zeros(len(rows), dtype=torch.bool)]
        result = rows.clone()
        for expert, mask in zip(self.experts, chosen, strict=True):
            result[mask] = result[mask] + expert(rows[mask])
        return result.view(x.shape)


def test_an_expert_that_no_sample_reaches_has_the_rows_of_its_siblings():
    found = [group for group in candidates(ready(Mixture)) if group.kind == "linear"]
    expected = [
        (f"blocks.0.experts.{index}.w3", (f"blocks.0.experts.{index}.w2",), ALL) for index in range(3)
    ]
    assert [(group.producer, group.consumers, group.rows.tolist()) for group in found] == expected


def test_a_group_is_checked_on_a_sample_that_reaches_it():
    positive = torch.randn(1, 4, WIDTH)
    made = ready(Mixture, samples=[positive, -positive, positive])
    with torch.no_grad():
        made.model.stem.weight.copy_(torch.eye(WIDTH))
        made.model.stem.bias.zero_()
        for sample in made.samples:
            sample[..., 0] = sample[..., 0].abs() * (1 if sample is not made.samples[1] else -1)
    io = first_io(made)
    wrong = Group("linear", "blocks.0.experts.1.w1", ("blocks.0.experts.1.w2",), rows=torch.arange(INNER))
    assert check(io.block, io, wrong, shift=False) > 0.01


# Norms


class ResidualOfTheNorm(Block):
    def forward(self, x):
        h = self.norm(x)
        return h + self.second(self.between(self.first(h)))


def test_a_norm_that_the_residual_reads_too_is_shared():
    found = candidates(ready(ResidualOfTheNorm))
    assert [group.kind for group in found if FIRST in group.consumers] == ["shared"]
    assert next(group for group in found if FIRST in group.consumers).behind_norm


def test_a_norm_that_a_parameter_reads_too_has_it_among_the_others():
    class Routed(Block):
        def __init__(self):
            super().__init__()
            self.router = nn.Parameter(torch.randn(WIDTH, WIDTH))

        def forward(self, x):
            h = self.norm(x)
            return x + self.second(self.between(self.first(h))) * F.linear(h.float(), self.router).sigmoid()

    group = only(candidates(ready(Routed)), "norm")
    assert group.others == ("blocks.0.router",)


class Gated(nn.LayerNorm):
    """A norm of two tensors."""

    def forward(self, x, gate):
        return super().forward(x) * F.silu(gate)


def test_a_norm_may_take_other_arguments_too():
    class WithGate(Block):
        def __init__(self):
            super().__init__()
            self.norm, self.gate = Gated(WIDTH), nn.Linear(WIDTH, WIDTH)

        def forward(self, x):
            return x + self.second(self.between(self.first(self.norm(x, self.gate(x)))))

    made = ready(WithGate)
    group = only(candidates(made), "norm")
    io = first_io(made)
    assert (group.producer, group.consumers, group.unit_offset) == (NORM, (FIRST,), False)
    assert check(io.block, io, group, shift=False) <= TOLERANCE


def test_in_post_norm_models_the_first_block_may_differ_from_the_others():
    """The first block of OPT-350m reads embeddings, the others what a norm returns."""
    made = setup(unified("opt", do_layer_norm_before=False, word_embed_proj_dim=32))
    finder = Finder(made.model, made.flow)
    behind = []
    for io in made.ios():
        groups = finder.candidates(io.block, io)
        behind += [group.behind_norm for group in groups if any("q_proj" in p for p in group.consumers)]
    assert behind == [False, True, True]


# Half precision


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["llama", "gemma2", "phi3", "bert", "mixtral"])
def test_models_of_half_precision_have_the_same_groups(name, dtype):
    made, found = found_in(name, dtype)
    _, expected = found_in(name)
    for block, ours, theirs in zip(made.blocks, found, expected, strict=True):
        assert [described(group, block.path) for group in ours] == [
            described(group, block.path) for group in theirs
        ]
        assert [group.unit_offset for group in ours] == [group.unit_offset for group in theirs]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_and_are_checked_as_sharply(dtype):
    made, found = found_in("phi3", dtype)
    for io, groups in zip(made.ios(), found, strict=True):
        assert all(check(io.block, io, group, shift=False) <= TOLERANCE for group in groups)
        path = f"{io.block.path}.mlp"
        rows = torch.arange(128)  # those of the gate, which a smooth function follows
        wrong = Group("linear", f"{path}.gate_up_proj", (f"{path}.down_proj",), rows=rows)
        assert check(io.block, io, wrong, shift=False) > 0.01
    assert {parameter.dtype for parameter in made.model.parameters()} == {dtype}


def test_a_block_of_half_precision_is_itself_again_behind_the_probe():
    made, _ = found_in("llama", torch.bfloat16)
    block = made.blocks[0]
    before = {name: (id(p), p.data_ptr(), p.dtype) for name, p in block.module.named_parameters()}
    with in_precision(block, torch.float32):
        assert {p.dtype for p in block.module.parameters()} == {torch.float32}
    assert {name: (id(p), p.data_ptr(), p.dtype) for name, p in block.module.named_parameters()} == before


# What is unsafe is refused


def test_the_check_finds_a_residual_that_reads_the_norm():
    made = ready(ResidualOfTheNorm)
    io = first_io(made)
    assert check(io.block, io, Group("norm", NORM, (FIRST,)), shift=False) > 0.01
    assert check(io.block, io, Group("shared", "", (FIRST,)), shift=True) <= TOLERANCE


def test_the_check_finds_a_smooth_function_between():
    class Smooth(Block):
        def between(self, h):
            return F.gelu(h)

    made = ready(Smooth)
    io = first_io(made)
    group = Group("linear", FIRST, (SECOND,), rows=torch.arange(INNER))
    assert check(io.block, io, group, shift=False) > 0.01


def test_the_check_finds_the_other_convention_of_the_gain():
    made, found = found_in("gemma2")
    for io, groups in zip(made.ios(), found, strict=True):
        norm = next(group for group in groups if group.kind == "norm")
        plain = Group("norm", norm.producer, norm.consumers, unit_offset=False)
        assert check(io.block, io, plain, shift=False) > 0.01


class HiddenResidual(Block):
    """The dataflow map cannot see what leaves torch and comes back."""

    def forward(self, x):
        h = self.norm(x)
        return torch.from_numpy(h.numpy().copy()) + self.second(self.between(self.first(h)))


def test_what_the_map_cannot_see_is_found_by_the_check_and_said_once(capsys):
    made = ready(HiddenResidual, count=3)
    state = {key: value.clone() for key, value in made.model.state_dict().items()}
    made.transform(SmoothQuant(SmoothQuantOptions(alpha=0.5), made.context))
    said = [line for line in capsys.readouterr().err.splitlines() if "left alone" in line]
    assert len(said) == 1
    assert said[0].startswith("smoothquant: norm → first of blocks.0 (and blocks alike) is left alone")
    error = float(said[0].rpartition(" by ")[2])
    assert 0.01 < error < 10
    assert all(torch.equal(value, state[key]) for key, value in made.model.state_dict().items())


# What the recipe leaves alone


def changed_by(made, **options):
    """The layers whose weights a step changes."""
    before = {path: layer.weight.clone() for path, layer in made.blocks[0].layers().items()}
    made.transform(SmoothQuant(SmoothQuantOptions(alpha=0.7, **options), made.context))
    layers = made.blocks[0].layers()
    return {path for path, weight in before.items() if not torch.equal(layers[path].weight, weight)}


def test_groups_of_layers_that_skip_names_are_left_alone():
    assert changed_by(ready(Block), groups="all") == {FIRST, SECOND}
    assert changed_by(ready(Block), groups="all", skip=["*.second"]) == {FIRST}
    assert changed_by(ready(Block), groups="all", skip=["blocks.0.norm"]) == {FIRST, SECOND}
    assert changed_by(ready(Block), groups="norms", skip=["blocks.0.norm"]) == set()
    assert changed_by(ready(Block), groups="all", skip=["*.first"]) == set()


def test_skipping_what_is_not_there_is_one_sentence():
    with pytest.raises(RecipeError, match=r"'steps\.smoothquant\.skip': '\*\.frist' matches no layer"):
        changed_by(ready(Block), skip=["*.frist"])
