"""Groups of layers that read the same channels: found in every family, and safe to rescale."""

import copy
from functools import cache

import pytest
import torch
import zoo
from tiny_blocks import difference, logits, setup, unified

from ptq_llm.groups import Finder
from ptq_llm.rescale import TOLERANCE, Rescaling, check, rescale
from ptq_llm.smoothquant import SmoothQuant, SmoothQuantOptions
from ptqcore import Block

HEADS, KEY_HEADS, SIZE, INNER = 4, 2, 16, 128  # of the zoo: 64 channels


# The rows that a fused or grouped projection has for the channels behind it, by the layouts of the models


def heads(row):
    """The row of every channel of all heads, from the head and the place in it."""
    return [row(head, place) for head in range(HEADS) for place in range(SIZE)]


PLAIN = heads(lambda head, place: head * SIZE + place)
GROUPED = heads(lambda head, place: head // (HEADS // KEY_HEADS) * SIZE + place)
UP = list(range(INNER))


def behind(rows, count):
    """The same rows of a projection that has others in front."""
    return [row + count for row in rows]


QUERIES, KEYS = HEADS * SIZE, KEY_HEADS * SIZE
QUERY_KEY_VALUE = behind(GROUPED, QUERIES + KEYS)  # Phi-3: all queries, all keys, all values
EACH_HEAD = heads(lambda head, place: head * 3 * SIZE + 2 * SIZE + place)  # BLOOM, GPT-NeoX: q k v a head
EACH_GROUP = heads(lambda head, place: head // 2 * 4 * SIZE + 3 * SIZE + place)  # Falcon: q q k v a group
MULTI_QUERY = heads(lambda head, place: QUERIES + SIZE + place)  # Falcon: queries, one key, one value
LATENT = heads(lambda head, place: head * (8 + SIZE) + 8 + place)  # DeepSeek: 8 of the key, then the value

ATTENTION = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
GATES = ("mlp.gate_proj", "mlp.up_proj")
NORMED = [
    ("norm", "input_layernorm", ATTENTION),
    ("norm", "post_attention_layernorm", GATES),
]
VALUES = ("linear", "self_attn.v_proj", ("self_attn.o_proj",), GROUPED)
UPS = ("linear", "mlp.up_proj", ("mlp.down_proj",), UP)
LLAMA = [*NORMED, VALUES, UPS]
BEHIND_NORM = "behind a norm"  # instead of a producer: read by the residual too


def experts(count, inner):
    ups = tuple(f"mlp.experts.gate_up_proj.{index}" for index in range(count))
    downs = [f"mlp.experts.down_proj.{index}" for index in range(count)]
    rows = list(range(inner, 2 * inner))
    each = [("linear", up, (down,), rows) for up, down in zip(ups, downs, strict=True)]
    return ups, each


def mixture(count, inner):
    ups, each = experts(count, inner)
    router = ("norm", "post_attention_layernorm", ups, "mlp.gate.weight")
    return [NORMED[0], VALUES, router, *each]


SHARED_EXPERT = ("mlp.shared_experts.gate_proj", "mlp.shared_experts.up_proj")
DEEPSEEK = [
    ("norm", "input_layernorm", ("self_attn.q_a_proj", "self_attn.kv_a_proj_with_mqa")),
    ("norm", "self_attn.q_a_layernorm", ("self_attn.q_b_proj",)),
    ("norm", "self_attn.kv_a_layernorm", ("self_attn.kv_b_proj",)),
    ("linear", "self_attn.kv_b_proj", ("self_attn.o_proj",), LATENT),
    ("norm", "post_attention_layernorm", (*experts(8, 32)[0], *SHARED_EXPERT), "mlp.gate.weight"),
    *experts(8, 32)[1],
    ("linear", "mlp.shared_experts.up_proj", ("mlp.shared_experts.down_proj",), list(range(32))),
]
GEMMA = [NORMED[0], ("norm", "pre_feedforward_layernorm", GATES), VALUES, UPS]
POST_NORM = [
    (BEHIND_NORM, "", ("attention.self.query", "attention.self.key", "attention.self.value")),
    (BEHIND_NORM, "", ("intermediate.dense",)),
    ("linear", "attention.self.value", ("attention.output.dense",), PLAIN),
]

# name → the groups of its second block: kind, producer, layers, and the rows or the router
EXPECTED = {
    "llama": LLAMA,
    "mistral": LLAMA,
    "qwen2": LLAMA,
    "qwen3": LLAMA,
    "stablelm": LLAMA,
    "gemma2": GEMMA,
    "gemma3_text": GEMMA,
    "olmo2": [VALUES, UPS],
    "cohere": [("norm", "input_layernorm", (*ATTENTION, *GATES)), VALUES, UPS],
    "phi": [
        ("norm", "input_layernorm", (*ATTENTION, "mlp.fc1")),
        ("linear", "self_attn.v_proj", ("self_attn.dense",), GROUPED),
    ],
    "phi3": [
        ("norm", "input_layernorm", ("self_attn.qkv_proj",)),
        ("norm", "post_attention_layernorm", ("mlp.gate_up_proj",)),
        ("linear", "self_attn.qkv_proj", ("self_attn.o_proj",), QUERY_KEY_VALUE),
        ("linear", "mlp.gate_up_proj", ("mlp.down_proj",), behind(UP, INNER)),
    ],
    "falcon_old": [
        ("norm", "input_layernorm", ("self_attention.query_key_value", "mlp.dense_h_to_4h")),
        ("linear", "self_attention.query_key_value", ("self_attention.dense",), MULTI_QUERY),
    ],
    "falcon_new": [
        ("norm", "ln_attn", ("self_attention.query_key_value",)),
        ("norm", "ln_mlp", ("mlp.dense_h_to_4h",)),
        ("linear", "self_attention.query_key_value", ("self_attention.dense",), EACH_GROUP),
    ],
    "bloom": [
        ("norm", "input_layernorm", ("self_attention.query_key_value",)),
        ("norm", "post_attention_layernorm", ("mlp.dense_h_to_4h",)),
        ("linear", "self_attention.query_key_value", ("self_attention.dense",), EACH_HEAD),
    ],
    "gpt_neox": [
        ("norm", "input_layernorm", ("attention.query_key_value",)),
        ("norm", "post_attention_layernorm", ("mlp.dense_h_to_4h",)),
        ("linear", "attention.query_key_value", ("attention.dense",), EACH_HEAD),
    ],
    "gpt2": [
        ("norm", "ln_1", ("attn.c_attn",)),
        ("norm", "ln_2", ("mlp.c_fc",)),
        ("linear", "attn.c_attn", ("attn.c_proj",), behind(PLAIN, 2 * QUERIES)),
    ],
    "opt": [  # between fc1 and fc2 is a ReLU, through which positive factors pass
        ("norm", "self_attn_layer_norm", ATTENTION),
        ("norm", "final_layer_norm", ("fc1",)),
        ("linear", "self_attn.v_proj", ("self_attn.out_proj",), PLAIN),
        ("linear", "fc1", ("fc2",), UP),
    ],
    "starcoder2": [NORMED[0], ("norm", "post_attention_layernorm", ("mlp.c_fc",)), VALUES],
    "bert": POST_NORM,
    "roberta": POST_NORM,
    "mixtral": mixture(4, 64),
    "qwen3_moe": mixture(8, 32),
    "deepseek_v3": DEEPSEEK,
}
UNIT_OFFSET = {"gemma2", "gemma3_text"}


@cache
def found_in(name, dtype=torch.float32):
    """The model as it is set up, and the candidates of each block."""
    ready = setup(unified(name, dtype))
    finder = Finder(ready.model, ready.flow)
    return ready, [finder.candidates(io.block, io) for io in ready.ios()]


def useful(groups):
    """Without the groups that are only inputs."""
    return [group for group in groups if group.kind != "shared" or group.behind_norm]


def described(group, block):
    """As in `EXPECTED`."""

    def short(path):
        return path.removeprefix(f"{block}.")

    kind = BEHIND_NORM if group.kind == "shared" else group.kind
    found = (kind, short(group.producer), tuple(map(short, group.consumers)))
    if group.rows is not None:
        return (*found, group.rows.tolist())
    return (*found, *map(short, group.others))


def by_name(groups):
    return sorted(groups, key=str)


# What is found


def test_every_family_of_the_zoo_has_its_groups_written_down():
    assert EXPECTED.keys() == set(zoo.NAMES)


@pytest.mark.parametrize("name", zoo.NAMES)
def test_the_groups_are_those_of_the_architecture(name):
    ready, candidates = found_in(name)
    found = [described(group, ready.blocks[1].path) for group in useful(candidates[1])]
    assert by_name(found) == by_name(EXPECTED[name])


@pytest.mark.parametrize("name", zoo.NAMES)
def test_the_gain_is_one_more_than_the_weight_in_gemma_alone(name):
    _, candidates = found_in(name)
    norms = [group for groups in candidates for group in groups if group.kind == "norm"]
    assert all(group.unit_offset == (name in UNIT_OFFSET) for group in norms)


@pytest.mark.parametrize("name", zoo.NAMES)
def test_the_inputs_of_every_layer_are_in_one_group_that_needs_no_probe(name):
    ready, candidates = found_in(name)
    for block, groups in zip(ready.blocks, candidates, strict=True):
        of_inputs = [path for g in groups if g.kind != "linear" for path in g.consumers]
        assert sorted(of_inputs) == sorted(block.layers())


@pytest.mark.parametrize("name", zoo.NAMES)
def test_attention_lies_in_front_of_the_output_projection_alone(name):
    _, candidates = found_in(name)
    ends = ("o_proj", "out_proj", "attention.output.dense", "attn.c_proj", "attn.dense", "attention.dense")
    for group in (group for groups in candidates for group in groups):
        mixed = [path.endswith(ends) for path in group.consumers]
        assert all(expected == group.behind_attention for expected in mixed)


# That they keep the function


def random_change(group, channels, shift, seed=1):
    """Factors from 1/2 to 2 and offsets, the same for all channels of a row."""
    generator = torch.Generator().manual_seed(seed)
    exponents = torch.rand(channels, generator=generator).double() * 2 - 1
    if group.rows is not None:
        for row in group.rows.unique():
            exponents[group.rows == row] = exponents[group.rows == row][0].clone()
    offsets = torch.randn(channels, generator=generator).double()
    return Rescaling(2**exponents, offsets if shift else torch.zeros(channels).double())


def rescaled(model, block, group):
    """A copy of the model with one group changed at random, offsets too where they pass."""
    model = copy.deepcopy(model)
    channels = model.get_submodule(group.consumers[0]).in_features
    shift = group.kind != "linear" and not group.others
    rescale(Block(model, block.path), group, random_change(group, channels, shift))
    return model


@pytest.mark.parametrize("name", zoo.NAMES)
def test_every_group_keeps_the_logits_under_random_factors(name):
    ready, candidates = found_in(name)
    expected = logits(ready.model)
    for group in candidates[1]:
        changed = rescaled(ready.model, ready.blocks[1], group)
        assert not torch.equal(logits(changed), expected)
        assert difference(logits(changed), expected) <= 1e-5


@pytest.fixture
def double_throughout(monkeypatch):
    """Models compute in float64 even where they ask for float32 (norms, the softmax)."""
    monkeypatch.setattr(torch.Tensor, "float", torch.Tensor.double)
    monkeypatch.setattr(torch, "float32", torch.float64)


@pytest.mark.parametrize("name", zoo.NAMES)
def test_in_double_precision_they_keep_them_to_ten_digits(name, double_throughout):
    ready, candidates = found_in(name, torch.float64)
    expected = logits(ready.model)
    for group in candidates[1]:
        changed = logits(rescaled(ready.model, ready.blocks[1], group))
        assert changed.dtype == torch.float64
        assert difference(changed, expected) <= 1e-10


@pytest.mark.parametrize("name", zoo.NAMES)
def test_the_groups_of_all_blocks_together_keep_the_logits(name):
    ready, candidates = found_in(name)
    step = SmoothQuant(SmoothQuantOptions(groups="all"), ready.context)
    changed = copy.deepcopy(ready.model)
    for block, groups in zip(ready.blocks, candidates, strict=True):
        for group in step.choose(groups):
            channels = changed.get_submodule(group.consumers[0]).in_features
            rescale(Block(changed, block.path), group, random_change(group, channels, shift=False))
    assert difference(logits(changed), logits(ready.model)) <= 1e-5


@pytest.mark.parametrize("name", zoo.NAMES)
def test_the_check_measures_that_and_leaves_the_block_as_it_was(name):
    ready, _ = found_in(name)
    state = {key: value.clone() for key, value in ready.model.state_dict().items()}
    for io, groups in zip(ready.ios(), found_in(name)[1], strict=True):
        for group in groups:
            shift = group.kind != "linear" and not group.others
            assert check(io.block, io, group, shift) <= TOLERANCE
    assert ready.model.state_dict().keys() == state.keys()
    assert all(torch.equal(value, state[key]) for key, value in ready.model.state_dict().items())
    assert not any(getattr(module, "has_new_bias", False) for module in ready.model.modules())
