"""Rounding methods side by side: accuracy, time and memory, each over several seeds.

    python tools/bench/reconstruct.py --set task.model=cifar-resnet-20 --set task.checkpoint=FILE \
        --set task.images=FOLDER --bits 4/4 3/3

Every row is a whole run of the recipe with another step: the same images, grids and observers. The
seed changes what is random in learning; rounding to nearest has none, and runs once.
"""

import argparse
from pathlib import Path
from statistics import mean, pstdev
from tempfile import TemporaryDirectory

from rich.console import Console
from rich.table import Table

from ptqcore import quantize
from ptqcore.plugin import discover
from ptqcore.recipe import read_recipe
from ptqcore.report.record import RunRecord

METHODS = ("round", "adaround", "brecq", "qdrop")


def main() -> None:
    """Run everything and print one table per pair of widths."""
    options = _options()
    console = Console(width=120)
    for bits in options.bits:
        weights, activations = bits.split("/")
        widths = [f"quant.weights.bits={weights}", f"quant.activations.bits={activations}"]
        rows = {method: _runs(method, widths, options) for method in options.methods}
        console.print(_table(f"W{weights}A{activations}", rows))


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--plugin", default="vision")
    parser.add_argument("--recipe", default="w4a4")
    parser.add_argument("--set", dest="overrides", action="append", default=[], metavar="KEY=VALUE")
    parser.add_argument("--bits", nargs="+", default=["4/4", "3/3"], metavar="W/A")
    parser.add_argument("--methods", nargs="+", default=METHODS)
    parser.add_argument("--iterations", type=int, default=400)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--seeds", type=int, default=3)
    return parser.parse_args()


def _runs(method: str, widths: list[str], options: argparse.Namespace) -> list[RunRecord]:
    learned = f"{{{method}: {{iterations: {options.iterations}, batch: {options.batch}}}}}"
    step = "round" if method == "round" else learned
    registry = discover()
    records = []
    for seed in range(1 if method == "round" else options.seeds):
        overrides = [*options.overrides, *widths, f"steps=[{step}]", f"seed={seed}", "export=[]"]
        recipe = read_recipe(registry.recipe_file(options.recipe, options.plugin), overrides)
        with TemporaryDirectory() as folder:
            records.append(quantize(recipe, options.plugin, Path(folder), registry=registry))
    return records


def _table(title: str, rows: dict[str, list[RunRecord]]) -> Table:
    table = Table(title=title)
    metrics = list(next(iter(rows.values()))[0].before)
    for name in ("step", *metrics, "seconds", "peak GB"):
        table.add_column(name, justify="left" if name == "step" else "right")
    first = next(iter(rows.values()))[0]
    table.add_row("full precision", *(f"{first.before[name]:.2f}" for name in metrics), "", "")
    for method, records in rows.items():
        figures = [_spread([record.after[name] for record in records]) for name in metrics]
        seconds = mean(record.seconds for record in records)
        peak = max(record.peak_memory_bytes for record in records) / 1e9
        table.add_row(method, *figures, f"{seconds:.0f}", f"{peak:.2f}")
    return table


def _spread(values: list[float]) -> str:
    """Mean and standard deviation."""
    return f"{mean(values):.3f} ± {pstdev(values):.3f}" if len(values) > 1 else f"{values[0]:.3f}"


if __name__ == "__main__":
    main()
