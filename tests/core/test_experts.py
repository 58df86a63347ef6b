"""Mixtures of experts written as lists of modules: which of them run is for the data to decide."""

import pytest
import tiny_task
import torch
from torch import nn

import ptqcore
from ptqcore import ModelError, QuantLinear
from ptqcore.adaround import _pairs
from ptqcore.audit import never_called
from ptqcore.blocks import find_blocks
from ptqcore.dataflow import trace
from ptqcore.modules import quantizable_layers


class Expert(nn.Module):
    def __init__(self):
        super().__init__()
        self.up, self.down = nn.Linear(4, 8), nn.Linear(8, 4)

    def forward(self, x):
        return self.down(self.up(x).relu())


class Mixture(nn.Module):
    """x + the expert of each row: the first for rows with a positive sum, the second for the others."""

    def __init__(self):
        super().__init__()
        self.mix = nn.Linear(4, 4)
        self.experts = nn.ModuleList(Expert() for _ in range(3))  # the third is for nobody

    def forward(self, x):
        result, mixed = x.clone(), self.mix(x)
        for index, rows in enumerate((x.sum(1) > 0, x.sum(1) <= 0)):
            if rows.any():
                result[rows] = x[rows] + self.experts[index](mixed[rows])
        return result


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList(Mixture() for _ in range(2))

    def forward(self, x):
        for layer in self.layers:
            x = layer(x)
        return x


POSITIVE, NEGATIVE = torch.full((3, 4), 5.0), torch.full((2, 4), -5.0)


def make():
    torch.manual_seed(0)
    model = Model().eval()
    with torch.no_grad():
        for layer in model.layers:
            layer.mix.weight.mul_(0.1)  # rows keep their sign
    return model


@pytest.fixture
def model():
    return make()


def test_experts_that_another_sample_reaches_are_not_left_out(model):
    flow = trace(model, lambda: model(POSITIVE))
    alone = {path for path in quantizable_layers(model) if ".experts.1." in path or ".experts.2." in path}
    assert never_called(model, flow).keys() == alone
    both = never_called(model, flow, [lambda: model(NEGATIVE)])
    assert both.keys() == {path for path in alone if ".experts.2." in path}


def test_the_other_samples_run_only_as_long_as_a_layer_is_missing(model):
    del model.layers[0].experts[2], model.layers[1].experts[2]
    ran = []

    def run(x):
        ran.append(x)
        model(x)

    flow = trace(model, lambda: model(POSITIVE))
    others = [lambda x=x: run(x) for x in (POSITIVE, NEGATIVE, NEGATIVE)]
    assert not never_called(model, flow, others)
    assert len(ran) == 2
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_a_layer_with_experts_that_the_traced_sample_does_not_reach_is_one_block(model):
    flow = trace(model, lambda: model(POSITIVE))
    blocks = find_blocks(model, flow, set(quantizable_layers(model)))
    assert [block.path for block in blocks] == ["layers.0", "layers.1"]


@pytest.mark.parametrize("step", ["round", "adaround", "brecq"])
def test_a_run_quantizes_every_expert_that_some_sample_reaches(tmp_path, step):
    chosen = "round" if step == "round" else {step: {"iterations": 20, "batch": 2}}
    quant = tiny_task.W3 | {"min_tokens": 0}
    record = tiny_task.run(tmp_path / "out", make, [POSITIVE, NEGATIVE], chosen, quant)
    assert [block.path for block in record.blocks] == ["layers.0", "layers.1"]
    assert set(record.skipped) == {
        f"layers.{i}.experts.2.{name}" for i in range(2) for name in ("up", "down")
    }
    loaded = ptqcore.load(tmp_path / "out", make())
    assert isinstance(loaded.layers[1].experts[1].down, QuantLinear)
    assert isinstance(loaded.layers[1].experts[2].down, nn.Linear)


def test_a_step_that_learns_from_tokens_wants_enough_for_each_expert(tmp_path):
    quant = tiny_task.W3 | {"min_tokens": 3}
    sentence = r"'layers\.0\.experts\.1\.\w+' saw 2 calibration tokens, fewer than quant\.min_tokens 3"
    with pytest.raises(ModelError, match=sentence):
        tiny_task.run(tmp_path / "out", make, [POSITIVE, NEGATIVE], {"brecq": {"iterations": 5}}, quant)


@torch.no_grad()
def test_rounding_is_learned_for_the_outputs_of_full_precision_where_they_are_of_the_same_rows():
    layer = nn.Linear(4, 2)
    inputs, outputs = (
        [torch.randn(rows, 4) for rows in (3, 0, 2)],
        [torch.randn(rows, 2) for rows in (3, 0, 2)],
    )
    found, wanted = _pairs(layer, inputs, outputs)
    assert [len(x) for x in found] == [3, 2]
    assert wanted == [outputs[0], outputs[2]]


@torch.no_grad()
def test_rounding_is_learned_for_the_layers_own_outputs_where_other_rows_reach_it():
    layer = nn.Linear(4, 2)
    inputs = [torch.randn(rows, 4) for rows in (3, 0, 2)]
    for outputs in ([torch.randn(rows, 2) for rows in (2, 1, 2)], [torch.randn(3, 2)]):
        found, wanted = _pairs(layer, inputs, outputs)
        assert [len(x) for x in found] == [3, 2]
        assert all(torch.equal(y, layer(x)) for x, y in zip(found, wanted, strict=True))
