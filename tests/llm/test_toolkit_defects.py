"""Defects of LLMC (D1 to D13 of the notes on toolkits) that belong to no module of ours.

The others are tested beside what they concern, under their names: D1 and D4 in test_scaling, D1, D3
and D10 in test_clip, D5, D6 and F1 (of compressed-tensors) in test_compressed_readers, D7 and D8 in
test_kv_cache, D9 in test_hqq.
"""

import pdb
import re
import resource
from pathlib import Path

import pytest
import tiny_lm
import torch
import yaml
from gram_data import heavy_tailed
from one_block import OneBlock
from torch import nn

import ptq_llm
import ptqcore
from ptq_llm.clip import Clip
from ptq_llm.gptq import GPTQ
from ptqcore import Recipe
from ptqcore.plugin import discover
from ptqcore.recipe import read_recipe, validate

RECIPES = sorted(path.stem for path in (Path(ptq_llm.__file__).parent / "recipes").glob("*.yaml"))


class Shared(nn.Module):
    """Three layers that read the same inputs."""

    NAMES = ("q", "k", "v")

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.block = nn.ModuleDict({name: nn.Linear(16, 8) for name in self.NAMES})
        for index, layer in enumerate(self.block.values()):
            layer.weight.data = heavy_tailed(8, 16, seed=index)
        self.block.forward = lambda x: sum(layer(x) for layer in self.block.values())

    def forward(self, x):
        return self.block(x)


@pytest.mark.parametrize("kind", [Clip, GPTQ])
def test_d2_every_layer_that_reads_the_same_inputs_is_treated(kind):
    """D2: an assignment outside of the loop changed the last layer of each set alone."""
    generator = torch.Generator().manual_seed(1)
    samples = [torch.randn(64, 16, generator=generator) for _ in range(2)]
    weights = {"bits": 3, "granularity": "group", "group_size": 8, "symmetric": False}
    together = OneBlock(Shared(), "block", samples, {"weights": weights})
    before = {name: layer.weight.clone() for name, layer in together.model.block.items()}
    together.step(kind).block(together.block, together.calibration)
    for name in Shared.NAMES:
        layer = together.model.block[name]
        if kind is GPTQ:
            assert len(layer.weight.unique()) < len(before[name].unique())
            nearest = ptqcore.QuantizedTensor.from_range(
                before[name],
                *ptqcore.grid.value_range(before[name], together.context.grids.weights("block.q").spec),
                together.context.grids.weights("block.q").spec,
            )
            assert not torch.equal(layer.weight, nearest.dequantize())
        else:
            low, high = together.calibration.weight_range(f"block.{name}", layer)
            spec = together.context.grids.weights("block.q").spec
            widest = ptqcore.grid.value_range(before[name], spec)
            assert (high - low < widest[1] - widest[0]).any()


@pytest.mark.parametrize("name", RECIPES)
def test_d11_every_recipe_runs_without_a_gpu_a_process_group_or_a_debugger(name, tmp_path, monkeypatch):
    """D11: NCCL and `.cuda()` were unconditional, and NaN opened a debugger."""

    def refuse(*_, **__):
        raise AssertionError("not on a machine without a GPU")

    for owner, attribute in (
        (torch.Tensor, "cuda"),
        (nn.Module, "cuda"),
        (torch.distributed, "init_process_group"),
        (pdb, "set_trace"),
    ):
        monkeypatch.setattr(owner, attribute, refuse)
    tiny_lm.save(tmp_path / "model", num_hidden_layers=2)
    text = tiny_lm.write_text(tmp_path / "text.txt", 1200)
    overrides = [
        f"task.model={tmp_path / 'model'}",
        f"task.text={text}",
        f"task.calibration={text}",
        "task.window=32",
        "task.max_windows=2",
        "task.calibration_window=32",
        "task.calibration_samples=2",
        "export=[]",
    ]
    if name == "kv4":
        overrides += ["task.kv_cache.group_size=8", "task.kv_cache.residual=8"]
    elif name.endswith("a16") or name == "w4a8":
        overrides.append("quant.weights.group_size=32")
    recipe = read_recipe(discover().recipe_file(name, "llm"), overrides)
    record = ptqcore.quantize(recipe, "llm", tmp_path / "run")
    assert len(record.layers) == 14


def test_d12_errors_of_many_tokens_take_no_memory_of_tokens_squared():
    """D12: similarities of tokens went through a matrix of all pairs; for these it would take 360 GB."""
    tokens = 300_000
    samples = [torch.randn(tokens // 4, 16) for _ in range(4)]
    one = OneBlock(Shared(), "block", samples, {"weights": {"bits": 4}})
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    one.step(GPTQ).block(one.block, one.calibration)
    error = one.calibration.gram("block.q").relative_error(torch.ones(8, 16), torch.zeros(8, 16))
    assert error == pytest.approx(1)
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    assert grown * 1024 < 8 * tokens * 16 * 4  # kilobytes; a few copies of the inputs


@pytest.mark.parametrize("name", RECIPES)
def test_d13_what_recipes_and_the_readme_name_exists(name):
    """D13: the manual described keys that were gone, and shipped configurations swapped two paths. Here a
    chain is one recipe, so there is nothing to hand over, and unknown keys are refused."""
    data = yaml.safe_load(discover().recipe_file(name, "llm").read_text())
    assert validate(Recipe, {"name": name} | data).steps
    with pytest.raises(ptqcore.RecipeError, match="mix_bits"):
        validate(Recipe, {"name": name} | data | {"mix_bits": {}})


def test_d13_every_step_of_the_readme_is_there_and_every_step_is_in_it():
    readme = (Path(__file__).parents[2] / "plugins/ptq-llm/README.md").read_text()
    table = readme.split("| step | stage |")[1].split("\n\n")[0]
    named = re.findall(r"^\| `([a-z-]+)` \| ([a-z]+) \|", table, re.MULTILINE)
    registry = discover()
    steps = (registry.find("steps", name, "llm") for name in registry.plugin("llm").steps)
    ours = {step.name: step.stage for step in steps}
    assert dict(named) == ours
    recipes = readme.split("| recipe | weights |")[1].split("\n\n")[0]
    assert sorted(set(re.findall(r"`([a-z]+[0-9a-z]+)`", recipes)) & set(RECIPES)) == RECIPES
