"""Quantizers of language models side by side: perplexity, seconds and memory.

    pip install --constraint constraints.txt --editable . --editable plugins/ptq-llm
    python tools/bench/language.py --text wikitext.txt [--model FOLDER] [--samples 16] [--windows 16]
        [--methods gptq awq]

Every quantizer gets the same full-precision model and the same calibration tokens (the text's first
windows of 512), and makes 4-bit symmetric weights in groups of 64, one process each. Their checkpoints
are read by transformers with compressed-tensors, dequantized, and judged on the same other tokens (the
windows that follow). Seconds are those of calibrating and quantizing, without loading and saving; they
mean something on a quiet machine only. llm-compressor is installed in an environment of its own.
"""

import argparse
import json
import math
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from environment import HOME, last_line, python_with
from rich.console import Console
from rich.table import Table
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, CompressedTensorsConfig

from ptq_llm import models, text
from ptqcore import DataError, PtqError
from ptqcore.progress import say, track

_WINDOW = 512
_PEERS = Path(__file__).parent / "peers"
_LLM_COMPRESSOR = ("torch==2.13.0", "llmcompressor==0.14.0.1", "datasets", "pydantic", "rich", "PyYAML")
_SCHEME = (
    "quant.weights.bits=4",
    "quant.weights.symmetric=true",
    "quant.weights.granularity=group",
    "quant.weights.group_size=64",
    "quant.activations=null",
)
_STEPS = {
    "gptq": {"gptq": "[gptq]", "clip gptq": "[clip,gptq]"},
    "awq": {"awq": "[awq,round]", "awq clip": "[awq,clip,round]"},
}


@dataclass(frozen=True)
class Row:
    """A quantizer and what it gave; problem: why there are no figures."""

    name: str
    perplexity: float = math.nan
    seconds: float = math.nan
    peak_memory_bytes: float = math.nan
    problem: str = ""


@dataclass(frozen=True)
class Bench:
    """What all quantizers get.

    model: its folder. text, tokens: calibration tokens [samples, 512], as the text that they are read
    from and as such. judged: the tokens that all are judged on.
    """

    folder: Path
    model: Path
    text: Path
    tokens: Path
    samples: int
    judged: Tensor

    def ours(self, name: str, steps: str) -> Row:
        """Steps of ours, on the same tokens."""
        task = {
            "model": self.model,
            "text": self.text,
            "calibration": self.text,
            "calibration_samples": self.samples,
            "calibration_window": _WINDOW,
        }
        overrides = [f"steps={steps}", *_SCHEME, *(f"task.{key}={value}" for key, value in task.items())]
        request = {"recipe": "w4a16", "overrides": overrides}
        return self._run(name, Path(sys.executable), "lm_by_ptqcore.py", request)

    def llm_compressor(self, name: str, method: str) -> Row:
        """A method of llm-compressor."""
        python = python_with("llmcompressor", *_LLM_COMPRESSOR, constrained=False)
        request = {"model": str(self.model), "samples": str(self.tokens), "method": method}
        return self._run(name, python, "lm_by_llmcompressor.py", request)

    def _run(self, name: str, python: Path, script: str, request: dict[str, Any]) -> Row:
        say(f"quantizing by {name}")
        folder = self.folder / name.replace(" ", "-")
        folder.mkdir()
        (folder / "request.json").write_text(json.dumps(request))
        path = os.pathsep.join(filter(None, (str(HOME), os.environ.get("PYTHONPATH"))))
        done = subprocess.run(
            [str(python), str(_PEERS / script), str(folder)],
            env={**os.environ, "PYTHONPATH": path},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
        )
        if done.returncode != 0:
            return Row(name, problem=last_line(done.stderr))
        result = json.loads((folder / "result.json").read_text())
        found = perplexity(read_dequantized(folder / result["file"]), self.judged, f"judging {name}")
        return Row(name, found, result["seconds"], result["peak_memory_bytes"])


def read_dequantized(folder: Path) -> Any:
    """A compressed-tensors checkpoint as transformers reads it, in floating point."""
    config = AutoConfig.from_pretrained(folder)
    dequantize = CompressedTensorsConfig(dequantize=True)
    model: Any = AutoModelForCausalLM.from_pretrained(
        folder, config=config, quantization_config=dequantize, dtype=torch.float32
    )
    return model.eval()


@torch.no_grad()
def perplexity(model: Any, windows: Tensor, label: str) -> float:
    """exp of the mean negative log-likelihood of all tokens but the first of each window [count, 512]."""
    total = 0.0
    for window in track(windows, label):
        logits = model(input_ids=window[None], use_cache=False).logits[0, :-1].float()
        total += float(torch.nn.functional.cross_entropy(logits, window[1:], reduction="sum"))
    return math.exp(total / (windows.numel() - len(windows)))


def prepare(folder: Path, source: str, file: str, samples: int, windows: int) -> tuple[Bench, Row]:
    """Write the model as a folder and the tokens as files; full precision's row.

    Raises:
        PtqError: if the model or the text cannot be used.
    """
    loaded = models.load(source, torch.float32)
    tokens = text.read_tokens(file, "--text", loaded.tokenizer)
    wanted = samples + 1 + windows
    cut = text.windows(tokens, _WINDOW, wanted, "--text")
    if len(cut) < wanted:
        raise DataError(f"--text holds {len(cut)} windows of {_WINDOW} tokens, fewer than {wanted}")
    plain: Any = AutoModelForCausalLM.from_config(loaded.model.config)  # type: ignore[no-untyped-call]
    plain.load_state_dict(loaded.model.state_dict())
    plain.save_pretrained(folder / "model")
    loaded.tokenizer.save_pretrained(folder / "model")
    # A text of its own, read again: cut where a window ends, its last token may be another.
    calibration = folder / "calibration.txt"
    calibration.write_text(loaded.tokenizer.decode(cut[: samples + 1].flatten()), encoding="utf-8")
    tokens = text.read_tokens(str(calibration), "--text", loaded.tokenizer)[: samples * _WINDOW]
    calibration.write_text(loaded.tokenizer.decode(tokens), encoding="utf-8")
    tokens = text.read_tokens(str(calibration), "--text", loaded.tokenizer)
    used = text.windows(tokens, _WINDOW, samples, "--text")
    np.savez(folder / "calibration.npz", tokens=used.numpy())
    judged = cut[samples + 1 :]
    bench = Bench(folder, folder / "model", calibration, folder / "calibration.npz", len(used), judged)
    return bench, Row("full precision", perplexity(loaded.model, judged, "judging full precision"))


def show(rows: list[Row]) -> None:
    """Print the table, and how many times faster ours are."""
    table = Table(title="4-bit symmetric weights in groups of 64")
    for column in ("quantizer", "perplexity", "seconds", "peak GB"):
        table.add_column(column, justify="left" if column == "quantizer" else "right")
    for row in rows:
        figures = (f"{row.perplexity:.3f}", f"{row.seconds:.1f}", f"{row.peak_memory_bytes / 1e9:.2f}")
        table.add_row(row.name, *((row.problem, "", "") if row.problem else figures))
    console = Console()
    console.print(table)
    by_name = {row.name: row for row in rows}
    for method in ("gptq", "awq"):
        ours, peer = by_name.get(f"ptqcore {method}"), by_name.get(f"llm-compressor {method}")
        if ours and peer and ours.seconds and peer.seconds == peer.seconds:
            console.print(f"{method}: {peer.seconds / ours.seconds:.2f} times as fast as llm-compressor")


def main() -> None:
    """Quantize by all, judge, print."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--text", required=True, help="UTF-8 text for calibration and judging")
    parser.add_argument("--model", default=models.EMBEDDED, help="folder, GGUF file or smollm2-135m")
    parser.add_argument("--samples", type=int, default=16, help="windows to calibrate on")
    parser.add_argument("--windows", type=int, default=16, help="windows to judge on")
    methods = ("gptq", "awq")
    parser.add_argument("--methods", nargs="+", choices=methods, default=methods, help="what is compared")
    options = parser.parse_args()
    with TemporaryDirectory(prefix="ptq-bench-") as name:
        bench, full = prepare(Path(name), options.model, options.text, options.samples, options.windows)
        rows = [full, bench.ours("ptqcore round", "[round]")]
        for method in options.methods:
            rows += [bench.ours(f"ptqcore {name}", steps) for name, steps in _STEPS[method].items()]
            rows.append(bench.llm_compressor(f"llm-compressor {method}", method))
    show(rows)


if __name__ == "__main__":
    try:
        main()
    except PtqError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
