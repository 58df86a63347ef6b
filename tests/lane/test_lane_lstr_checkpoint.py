"""Published checkpoints of LSTR load without rest, and others are refused with one clear sentence."""

import pytest
import torch
from published_lstr import random_state, with_counters

from ptq_lane.lstr import LSTR, VARIANTS, load
from ptqcore import ModelError


@pytest.fixture
def path(tmp_path):
    return tmp_path / "lstr.pkl"


def without_module(state):
    return {name.removeprefix("module."): tensor for name, tensor in state.items()}


def test_network_has_as_many_parameters_as_published():
    assert sum(parameter.numel() for parameter in LSTR(classes=2).parameters()) == 765_786


@pytest.mark.parametrize("variant", VARIANTS)
def test_every_tensor_is_used_and_every_tensor_filled(variant, path):
    state = random_state(VARIANTS[variant].classes)
    network = load(variant, state, path)
    own = {n: t for n, t in network.state_dict().items() if not n.endswith("num_batches_tracked")}
    values = torch.cat([tensor.flatten() for tensor in state.values()]).sort().values
    loaded = torch.cat([tensor.flatten() for tensor in own.values()]).sort().values
    assert torch.equal(values, loaded)
    assert not network.training


def test_last_layer_of_a_lane_is_split_by_rows(path):
    state = random_state()
    network = load("tusimple", state, path)
    weight = state["module.specific_embed.layers.2.weight"]
    assert torch.equal(network.bounds_head.weight, weight[:2])
    assert torch.equal(network.specific_head.weight, weight[2:])


def test_prefix_and_counters_do_not_matter(path):
    state = random_state()
    first = load("tusimple", state, path).state_dict()
    for other in (without_module(state), with_counters(state)):
        second = load("tusimple", other, path).state_dict()
        assert all(torch.equal(first[name], second[name]) for name in first)


def test_state_is_not_changed(path):
    state = with_counters(random_state())
    before = {name: tensor.clone() for name, tensor in state.items()}
    load("tusimple", state, path)
    assert state.keys() == before.keys()
    assert all(torch.equal(state[name], before[name]) for name in state)


@pytest.mark.parametrize(("variant", "other"), [("tusimple", "culane"), ("culane", "tusimple")])
def test_checkpoint_of_the_other_variant_is_refused(variant, other, path):
    with pytest.raises(
        ModelError, match=f"lstr.pkl.* looks like the variant '{other}'.*task.variant to {other}"
    ):
        load(variant, random_state(VARIANTS[other].classes), path)


def test_number_of_classes_of_no_variant_is_refused(path):
    with pytest.raises(ModelError, match=r"lstr\.pkl.* 5 classes.*tusimple 2, culane 3"):
        load("tusimple", random_state(5), path)


def test_checkpoint_of_another_network_is_refused(path):
    with pytest.raises(ModelError, match=r"lstr\.pkl.* not one of LSTR.*'stem.weight'.*set task.family"):
        load("tusimple", {"stem.weight": torch.zeros(3)}, path)


def test_empty_checkpoint_is_refused(path):
    with pytest.raises(ModelError, match="not one of LSTR"):
        load("tusimple", {}, path)


def test_unknown_variant_is_refused(path):
    with pytest.raises(ModelError, match=r"'tusimpel': LSTR has no such variant; did you mean 'tusimple'"):
        load("tusimpel", random_state(), path)


def test_missing_and_unexpected_tensors_are_named(path):
    state = random_state()
    weight = state.pop("module.layer3.1.conv2.weight")
    with pytest.raises(ModelError, match=r"no tensor 'backbone\.layer3\.1\.conv2\.weight'"):
        load("tusimple", state, path)
    state |= {"module.layer3.1.conv2.weight": weight, "module.layer3.2.conv2.weight": weight}
    with pytest.raises(ModelError, match=r"unexpected tensor 'backbone\.layer3\.2\.conv2\.weight'"):
        load("tusimple", state, path)


def test_other_sizes_are_refused(path):
    state = random_state()
    state["module.query_embed.weight"] = torch.zeros(9, 32)
    with pytest.raises(
        ModelError, match=r"lstr\.pkl.*'query_embed.weight' has the shape \[9, 32\], the model \[7, 32\]"
    ):
        load("tusimple", state, path)
