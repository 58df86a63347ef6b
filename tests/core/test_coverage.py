"""How much of the blocks' weights a run quantizes, and the run that quantizes too little."""

import json

import pytest
import torch
from tiny_task import W3, TinyTask, run
from torch import nn

from ptqcore import ModelError


class Mixed(nn.Module):
    """A linear layer of 6 · 6 weights, and a matrix of 6 · 2 that is no layer."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(6, 6)
        self.matrix = nn.Parameter(torch.ones(6, 2) / 6)
        self.gain = nn.Parameter(torch.ones(6))

    def forward(self, x):
        x = x + self.layer(x * self.gain)
        return x @ self.matrix


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.block = Mixed()

    def forward(self, x):
        return self.block(x)


class Strict(TinyTask):
    least_coverage = 0.95


SAMPLES = [torch.randn(4, 6, generator=torch.Generator().manual_seed(0))]


def test_the_share_is_of_all_matrices_inside_the_blocks(tmp_path):
    record = run(tmp_path, Net, SAMPLES, "round", blocks="block")
    assert record.coverage == 36 / (36 + 12)
    assert json.loads((tmp_path / "metrics.json").read_text())["coverage"] == record.coverage


def test_what_the_recipe_leaves_alone_by_name_does_not_count(tmp_path):
    record = run(tmp_path, Net, SAMPLES, "round", W3 | {"ignore": ["block"]}, blocks="block")
    assert record.coverage == 1


def test_a_run_that_quantizes_too_little_fails_and_names_what_is_left(tmp_path):
    sentence = r"only 75\.0% of the weights .* fewer than 95%: 'block\.matrix' and 0 others"
    with pytest.raises(ModelError, match=sentence):
        run(tmp_path, Net, SAMPLES, "round", task=Strict, blocks="block")
    assert not (tmp_path / "manifest.json").exists()


def test_it_passes_once_the_recipe_says_so(tmp_path):
    quant = W3 | {"ignore": ["block"]}
    assert run(tmp_path, Net, SAMPLES, "round", quant, task=Strict, blocks="block").coverage == 1
