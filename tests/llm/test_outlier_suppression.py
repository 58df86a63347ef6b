"""Outlier Suppression: gains migrated out of norms, and ranges without the tokens that stand out."""

import pytest
import tiny_lm
import torch
import zoo
from one_block import OneBlock
from tiny_blocks import difference, unified
from torch import nn

import ptqcore
from ptq_llm.outlier_suppression import OutlierSuppression, gamma_migration
from ptq_llm.token_wise import TokenWise
from ptqcore import MinMax, QuantSpec, attachments_of, find_recipe

W8A8 = {
    "weights": {"bits": 8, "granularity": "channel"},
    "activations": {"bits": 8, "symmetric": False},
}
BLOCKS = {
    "llama": "model.layers.1",
    "gemma2": "model.layers.1",
    "cohere": "model.layers.1",
    "opt": "model.decoder.layers.1",
    "bert": "bert.encoder.layer.1",
}


def random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


# Gamma Migration


def of_zoo(name):
    model = unified(name)
    return OneBlock(model, BLOCKS[name], [zoo.tokens(model, 2, 16, seed) for seed in range(2)], W8A8)


def migrated(one):
    one.step(OutlierSuppression).transform(one.block, one.calibration)
    return one.block.module


def predictions(one):
    with torch.no_grad():
        return one.model(zoo.tokens(one.model, 3, 20, seed=99)).logits.clone()


@pytest.mark.parametrize("name", BLOCKS)
def test_the_function_stays(name):
    one = of_zoo(name)
    before = predictions(one)
    migrated(one)
    assert difference(predictions(one), before) <= 1e-5


@pytest.mark.parametrize(("name", "one_is"), [("llama", 1.0), ("gemma2", 0.0)])
def test_norms_are_left_without_gain_and_layers_have_it_in_their_weights(name, one_is):
    one = of_zoo(name)
    block = one.block.module
    gains = block.input_layernorm.weight + 1 - one_is
    expected = [block.get_submodule(f"self_attn.{x}_proj").weight * gains for x in "qkv"]
    migrated(one)
    torch.testing.assert_close(block.input_layernorm.weight, torch.full((64,), one_is))
    for x, weight in zip("qkv", expected, strict=True):
        torch.testing.assert_close(block.get_submodule(f"self_attn.{x}_proj").weight, weight)


def test_biases_of_norms_are_divided_too():
    one = of_zoo("opt")
    norm = one.block.module.self_attn_layer_norm
    expected = norm.bias / norm.weight
    migrated(one)
    torch.testing.assert_close(norm.bias, expected)


def test_beside_a_residual_the_norm_stays_and_layers_read_it_without_gain():
    """BERT: queries, keys and values read the norm of the block before, the residual does, too."""
    one = of_zoo("bert")
    norm = one.model.bert.encoder.layer[0].output.LayerNorm
    gains, block = norm.weight.clone(), migrated(one)
    assert torch.equal(norm.weight, gains)
    for path in ("attention.self.query", "attention.self.key", "attention.self.value"):
        (attached,) = attachments_of(block.get_submodule(path))
        torch.testing.assert_close(attached.scale, gains)
        x = random(5, 64)
        torch.testing.assert_close(
            attached(norm(x)), nn.functional.layer_norm(x, (64,), eps=norm.eps) + norm.bias / gains
        )


def test_gains_of_zero_stay_in_the_norm_and_negative_ones_move():
    change = gamma_migration(torch.tensor([2.0, 0.0, -0.5]).double())
    assert change.scale.tolist() == [2.0, 1.0, -0.5]
    assert not change.shifts


def test_layers_behind_no_norm_are_left_alone():
    one = of_zoo("llama")
    before = one.block.module.mlp.down_proj.weight.clone()
    assert torch.equal(migrated(one).mlp.down_proj.weight, before)


# Token-wise clipping


TENSOR = QuantSpec(bits=8, symmetric=False)
TOKENS = torch.tensor([[-1.0, 5.0], [-7.0, 2.0], [-2.0, 90.0], [-40.0, 3.0], [-3.0, 4.0]])


def ends(observer):
    return tuple(float(end) for end in observer.range())


def observed(*tensors, spec=TENSOR, **options):
    observer = TokenWise(spec, **options)
    for x in tensors:
        observer.update(x)
    return observer


@pytest.mark.parametrize(
    ("quantile", "expected"),
    [
        (0.0, (-40.0, 90.0)),
        (0.19, (-40.0, 90.0)),
        (0.2, (-7.0, 5.0)),
        (0.4, (-3.0, 4.0)),
        (0.6, (-2.0, 3.0)),
        (0.8, (-1.0, 2.0)),
    ],
)
def test_the_range_ends_at_the_largest_token_that_is_left(quantile, expected):
    assert ends(observed(TOKENS, quantile=quantile)) == expected


def test_by_default_one_token_in_two_hundred_is_clipped():
    x = random(1000, 16)
    assert ends(observed(x)) == (float(x.amin(1).sort().values[5]), float(x.amax(1).sort().values[-6]))


def test_a_token_that_stands_out_in_all_channels_costs_one_token_not_its_channels():
    """A percentile of values would clip others; this one gives the range of the other tokens."""
    x = random(200, 32)
    x[17] *= 100
    others = torch.cat([x[:17], x[18:]])
    assert ends(observed(x)) == (float(others.min()), float(others.max()))


def test_no_more_than_the_share_of_tokens_is_clipped_on_a_side():
    x = random(400, 8) ** 3
    low, high = observed(x, quantile=0.1).range()
    assert int((x > high).any(1).sum()) == int((x < low).any(1).sum()) == 40


def test_with_a_share_of_nothing_it_is_min_max():
    x = random(3, 20, 8)
    expected = MinMax(TENSOR)
    expected.update(x)
    assert ends(observed(x, quantile=0)) == ends(expected)


def test_tokens_of_all_tensors_count_and_merging_is_seeing_both():
    parts = [random(2, 30, 8, seed=1), random(50, 8, seed=2) * 2, random(0, 8)]
    together = observed(*parts, quantile=0.1)
    assert ends(together) == ends(observed(torch.cat([part.view(-1, 8) for part in parts]), quantile=0.1))
    first = observed(parts[0], quantile=0.1)
    first.merge(observed(parts[1], quantile=0.1))
    assert ends(first) == ends(together)


def test_the_range_contains_zero():
    assert ends(observed(random(100, 8).abs() + 3))[0] == 0
    assert ends(observed(-random(100, 8).abs() - 3))[1] == 0


@pytest.mark.parametrize(
    "spec",
    [QuantSpec(granularity="channel"), QuantSpec(bits=4, granularity="group", group_size=4)],
    ids=str,
)
def test_where_a_scale_serves_one_vector_nothing_is_set_aside(spec):
    x = random(6, 10)
    expected = MinMax(spec)
    expected.update(x)
    for found, wanted in zip(observed(x, spec=spec, quantile=0.5).range(), expected.range(), strict=True):
        assert torch.equal(found, wanted)


# Whole runs


def test_both_in_one_recipe_and_the_ranges_are_narrower_than_min_max(tmp_path):
    model = tiny_lm.save(tmp_path / "model", num_hidden_layers=2)
    small = [f"task.model={model}", "task.window=24", "task.max_windows=3", "task.calibration_window=24"]
    small += ["task.calibration_samples=3", "export=[]", "steps=[outlier-suppression, round]"]
    small += ["quant.activations={bits: 8, symmetric: false, observer: %s}"]
    steps = {}
    for observer in ("minmax", "{token-wise: {quantile: 0.05}}"):
        overrides = [change.replace("%s", observer) for change in small]
        folder = tmp_path / str(len(steps))
        ptqcore.quantize(find_recipe("w8a8", "llm", overrides), "llm", folder)
        state = ptqcore.load(folder).state_dict()
        steps[observer] = {key: value for key, value in state.items() if key.endswith("quantizer.scale")}
    wide, narrow = steps.values()
    assert wide.keys() == narrow.keys()
    assert all(float(narrow[key]) <= float(wide[key]) for key in wide)
    assert any(float(narrow[key]) < float(wide[key]) for key in wide)
