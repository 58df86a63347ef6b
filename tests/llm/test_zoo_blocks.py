"""The blocks of every family are its decoder layers, and replayed one by one they are the model."""

from functools import cache

import pytest
import torch
import zoo
from torch import nn

from ptq_llm.causal_lm import CausalLM
from ptq_llm.unify import unify
from ptqcore.audit import never_called
from ptqcore.blocks import find_blocks
from ptqcore.dataflow import tensors_in, trace
from ptqcore.modules import quantizable_layers
from ptqcore.walk import Walk

LISTS = {"gpt2": "transformer.h", "bloom": "transformer.h", "falcon_old": "transformer.h"}
LISTS |= {"falcon_new": "transformer.h", "gpt_neox": "gpt_neox.layers", "opt": "model.decoder.layers"}
LISTS |= {"bert": "bert.encoder.layer", "roberta": "roberta.encoder.layer"}
HEADS = {"bert": {"cls.predictions.transform.dense", "cls.predictions.decoder"}}
HEADS |= {"roberta": {"lm_head.dense", "lm_head.decoder"}}


@cache
def unified(name):
    model = zoo.build(name)
    unify(model)
    return model


def samples_of(model):
    """Texts of different lengths, as the task gives them."""
    return [
        {"input_ids": zoo.tokens(model, 1, length, seed), "use_cache": False}
        for seed, length in enumerate((24, 9, 17))
    ]


def blocks_of(model):
    """The blocks as a run finds them, from the first sample."""
    task = CausalLM.__new__(CausalLM)
    task._model = model
    sample = samples_of(model)[0]
    flow = trace(model, lambda: model(**sample))
    assert not never_called(model, flow)
    return find_blocks(model, flow, set(quantizable_layers(model)) - task.excluded(model).keys())


@pytest.mark.parametrize("name", zoo.NAMES)
def test_the_blocks_are_the_decoder_layers(name):
    layers = LISTS.get(name, "model.layers")
    assert [block.path for block in blocks_of(unified(name))] == [f"{layers}.{index}" for index in range(3)]


@pytest.mark.parametrize("name", zoo.NAMES)
def test_every_linear_layer_but_the_head_is_in_a_block(name):
    model = unified(name)
    inside = {path for block in blocks_of(model) for path in block.layers()}
    linear = {path for path, module in model.named_modules() if isinstance(module, nn.Linear)}
    assert linear - inside == HEADS.get(name, {"lm_head"})


@pytest.mark.parametrize("name", zoo.NAMES)
def test_replayed_blocks_give_what_the_whole_model_gives(name):
    model = unified(name)
    blocks, samples, seen = blocks_of(model), samples_of(model), {}
    handles = [
        block.module.register_forward_hook(
            lambda _, args, output, path=block.path: seen.setdefault(path, []).append(
                [tensor.clone() for tensor in tensors_in(output)]
            )
        )
        for block in blocks
    ]
    with torch.no_grad():
        for sample in samples:
            model(**sample)
    for handle in handles:
        handle.remove()
    walk = Walk(blocks, samples, lambda sample: model(**sample))
    for io in walk:
        outputs = io.run_tensors()
        walk.advance(outputs)
        assert len(outputs) == len(seen[io.block.path]) == 3
        for found, expected in zip(outputs, seen[io.block.path], strict=True):
            assert all(torch.equal(*pair) for pair in zip(found, expected, strict=True))


@pytest.mark.parametrize("name", ["gpt2", "mixtral", "cohere"])
def test_a_changed_block_changes_what_flows_into_the_next(name):
    model = zoo.build(name)
    unify(model)
    samples = samples_of(model)
    walk = Walk(blocks_of(model), samples, lambda sample: model(**sample))
    for io in walk:
        if io.block is walk.blocks[0]:
            with torch.no_grad():
                for layer in io.block.layers().values():
                    layer.weight.mul_(0.9)
        outputs = io.run_tensors()
        walk.advance(outputs)
    last = []
    handle = walk.blocks[-1].module.register_forward_hook(lambda _, args, out: last.append(tensors_in(out)))
    with torch.no_grad():
        for sample in samples:
            model(**sample)
    handle.remove()
    assert all(torch.equal(found[0], expected[0]) for found, expected in zip(outputs, last, strict=True))
