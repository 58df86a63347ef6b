"""Peak memory of quantizing a model, against the model, one and a half blocks and its activations.

    python tools/bench/memory.py [--hidden 1024] [--blocks 12] [--samples 16] [--recipe w4a16 …]

A random Llama model is quantized by shipped recipes, each in a process of its own. What the process
takes without a model is measured on one whose blocks are tiny, and subtracted. Printed is the peak
while blocks are quantized, as a multiple of: the model's weights + 1.5 blocks + the inputs of a block
for all calibration tokens, once for each stream that the recipe walks (quantized and, where a step needs
it, full precision).
"""

import argparse
import sys
from multiprocessing import get_context
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import NamedTuple

import torch
from rich.console import Console
from rich.table import Table
from transformers import LlamaConfig, LlamaForCausalLM

from ptq_llm import models
from ptqcore import PtqError, quantize
from ptqcore.plan import make_plan
from ptqcore.plugin import discover
from ptqcore.recipe import read_recipe

_WINDOW = 512
_TINY = 64


class Peaks(NamedTuple):
    """Bytes: while blocks are quantized, and in the phase that took most; how many streams are walked."""

    blocks: int
    run: int
    streams: int


def save_model(folder: Path, hidden: int, blocks: int) -> tuple[int, int]:
    """A random model with SmolLM2's tokenizer as a folder; bytes of its weights and of one block."""
    tokenizer = models.load(models.EMBEDDED, torch.float32).tokenizer
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=hidden,
        intermediate_size=hidden * 11 // 4,
        num_hidden_layers=blocks,
        num_attention_heads=hidden // _TINY,
        num_key_value_heads=hidden // _TINY,
        tie_word_embeddings=True,
    )
    model = LlamaForCausalLM(config)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    count = [sum(p.numel() for p in part.parameters()) for part in (model, model.model.layers[0])]
    return 4 * count[0], 4 * count[1]


def peaks(folder: Path, text: Path, samples: int, recipe: str) -> Peaks:
    """Quantize in this process."""
    registry = discover()
    overrides = {
        "task.model": folder,
        "task.text": text,
        "task.calibration": text,
        "task.calibration_samples": samples,
        "task.calibration_window": _WINDOW,
        "task.max_windows": 1,
        "export": "[]",
    }
    chosen = read_recipe(
        registry.recipe_file(recipe, "llm"), [f"{key}={value}" for key, value in overrides.items()]
    )
    with TemporaryDirectory(prefix="ptq-bench-") as output:
        record = quantize(chosen, "llm", Path(output) / "run", registry=registry)
    exact = any(step.needs_exact for step, _ in make_plan(chosen, "llm", registry).step_classes)
    peak = max(block.peak_memory_bytes for block in record.blocks)
    return Peaks(peak, record.peak_memory_bytes, 1 + exact)


def main() -> None:
    """Measure all recipes and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--hidden", type=int, default=1024)
    parser.add_argument("--blocks", type=int, default=12)
    parser.add_argument("--samples", type=int, default=16, help=f"windows of {_WINDOW} tokens")
    parser.add_argument("--recipe", nargs="+", default=["w8a8", "w4a4", "w4a16"])
    options = parser.parse_args()
    table = Table(title="peak memory while blocks are quantized")
    for column in ("recipe", "peak MB", "without a model MB", "allowed MB", "used of it", "whole run MB"):
        table.add_column(column, justify="left" if column == "recipe" else "right")
    with (
        TemporaryDirectory(prefix="ptq-bench-") as name,
        get_context("spawn").Pool(1, maxtasksperchild=1) as pool,
    ):
        base = Path(name)
        text = base / "text.txt"
        text.write_text("The quick brown fox jumps over the lazy dog. " * 60 * (options.samples + 2))
        whole, block = save_model(base / "model", options.hidden, options.blocks)
        tiny, _ = save_model(base / "tiny", _TINY, options.blocks)
        inputs = 4 * options.samples * _WINDOW * options.hidden
        for recipe in options.recipe:
            found = pool.apply(peaks, (base / "model", text, options.samples, recipe))
            least = pool.apply(peaks, (base / "tiny", text, options.samples, recipe))
            nothing = least.blocks - tiny
            allowed = whole + 1.5 * block + found.streams * inputs
            figures = (found.blocks, nothing, allowed)
            shown = [f"{figure / 1e6:.0f}" for figure in figures]
            ratio = (found.blocks - nothing) / allowed
            table.add_row(recipe, *shown, f"{ratio:.0%}", f"{found.run / 1e6:.0f}")
    Console().print(table)


if __name__ == "__main__":
    try:
        main()
    except PtqError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
