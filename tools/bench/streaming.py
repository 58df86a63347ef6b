"""Models larger than memory: a random Llama of several times a hard limit, quantized under it.

    python tools/bench/streaming.py [--limit 1500] [--times 8] [--hidden 1024] [--methods round …]
                                    [--samples 4] [--window 128] [--folder FOLDER]

The model is written shard by shard, and quantized in a process of its own whose address space is limited
as `ulimit -v` does it: memory beyond the limit cannot be had at all. Printed are the limit, the size of the
weights in memory (float32, never held whole), the largest resident memory and address space of the process
(VmHWM and VmPeak of Linux), the seconds, and how often the weights would have fitted into the limit.
"""

import argparse
import json
import resource
import sys
import time
from multiprocessing import get_context
from multiprocessing.queues import Queue
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from transformers import LlamaConfig

from ptq_llm import models
from ptqcore import PtqError, quantize, track, write_tensors
from ptqcore.plugin import discover
from ptqcore.recipe import read_recipe

_MIB = 2**20
_VOCABULARY = 49152  # that of the tokenizer
METHODS = {
    "round": ("w8a8", '["round"]'),
    "smoothquant": ("w8a8", '["smoothquant", "round"]'),
    "os-plus": ("w8a8", '["os-plus", "round"]'),
    "gptq": ("w4a16", '["gptq"]'),
}


def write_model(folder: Path, hidden: int, least: int) -> int:
    """A random Llama of at least so many bytes in float32, one shard a block; its bytes."""
    inner = hidden * 11 // 4
    block = 4 * (4 * hidden**2 + 3 * hidden * inner + 2 * hidden)
    ends = 4 * (_VOCABULARY * hidden + hidden)
    blocks = -(-(least - ends) // block)
    LlamaConfig(
        vocab_size=_VOCABULARY,
        hidden_size=hidden,
        intermediate_size=inner,
        num_hidden_layers=blocks,
        num_attention_heads=hidden // 64,
        num_key_value_heads=hidden // 64,
        tie_word_embeddings=True,
        architectures=["LlamaForCausalLM"],
    ).save_pretrained(folder)
    models.outline(models.EMBEDDED).tokenizer.save_pretrained(folder)
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator) * 0.03

    places: dict[str, str] = {}
    first = {
        "model.embed_tokens.weight": random(_VOCABULARY, hidden),
        "model.norm.weight": torch.ones(hidden),
    }
    for index in track(range(-1, blocks), "writing the model"):
        path = f"model.layers.{index}."
        attention = {f"{path}self_attn.{name}_proj.weight": random(hidden, hidden) for name in "qkvo"}
        gates = {f"{path}mlp.{name}_proj.weight": random(inner, hidden) for name in ("gate", "up")}
        norms = {
            f"{path}{name}_layernorm.weight": torch.ones(hidden) for name in ("input", "post_attention")
        }
        down = {f"{path}mlp.down_proj.weight": random(hidden, inner)}
        tensors = first if index < 0 else attention | gates | norms | down
        file = f"model-{index + 1:05}.safetensors"
        write_tensors(folder / file, tensors, {"format": "pt"})
        places |= dict.fromkeys(tensors, file)
    text = json.dumps({"metadata": {}, "weight_map": places})
    (folder / "model.safetensors.index.json").write_text(text)
    (folder / "text.txt").write_text("a quick brown fox jumps over the lazy dog, " * 400)
    return ends + blocks * block


def _peaks() -> tuple[int, int]:
    """Largest resident memory and address space of this process, bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    found = {line.split(":")[0]: int(line.split()[1]) * 1024 for line in lines if line.startswith("Vm")}
    return found["VmHWM"], found["VmPeak"]


def _run(results: "Queue[Any]", folder: Path, method: str, arguments: argparse.Namespace) -> None:
    """Quantize in this process, under the limit."""
    limit = arguments.limit * _MIB
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    recipe, steps = METHODS[method]
    overrides = {
        "task.model": folder,
        "task.text": folder / "text.txt",
        "task.calibration": folder / "text.txt",
        "task.window": arguments.window,
        "task.calibration_window": arguments.window,
        "task.calibration_samples": arguments.samples,
        "task.max_windows": 1,
        "steps": steps,
        "export": "[]",
    }
    begin = time.monotonic()
    try:
        registry = discover()
        given = [f"{key}={value}" for key, value in overrides.items()]
        chosen = read_recipe(registry.recipe_file(recipe, "llm"), given)
        with TemporaryDirectory(dir=folder) as output:
            record = quantize(chosen, "llm", Path(output) / "run", registry=registry)
        largest = max(block.peak_memory_bytes for block in record.blocks)
        results.put((time.monotonic() - begin, max(record.peak_memory_bytes, largest), _peaks()[1]))
    except PtqError as error:
        results.put(str(error))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--limit", type=int, default=1500, help="MiB of address space")
    parser.add_argument("--times", type=float, default=8, help="the model, as a multiple of the limit")
    parser.add_argument("--hidden", type=int, default=1024)
    parser.add_argument("--samples", type=int, default=4)
    parser.add_argument("--window", type=int, default=128)
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument(
        "--folder", type=Path, help="where the model is written, by default a temporary one"
    )
    arguments = parser.parse_args()
    table = Table(
        "method", "limit MiB", "weights MiB", "times", "peak resident MiB", "peak address MiB", "s"
    )
    with TemporaryDirectory(prefix="ptq-bench-", dir=arguments.folder) as temporary:
        folder = Path(temporary)
        size = write_model(folder, arguments.hidden, int(arguments.times * arguments.limit * _MIB))
        for method in arguments.methods:
            context = get_context("spawn")
            results: Queue[Any] = context.Queue()
            process = context.Process(target=_run, args=(results, folder, method, arguments))
            process.start()
            found = results.get()
            process.join()
            if isinstance(found, str):
                sys.exit(f"{method}: {found}")
            seconds, resident, address = found
            figures = arguments.limit, size // _MIB, resident // _MIB, address // _MIB
            limit, weights, *peaks = map(str, figures)
            table.add_row(
                method, limit, weights, f"{size / arguments.limit / _MIB:.1f}", *peaks, f"{seconds:.0f}"
            )
    Console().print(table)


if __name__ == "__main__":
    main()
