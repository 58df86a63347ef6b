"""Selective Focus beside QDrop and the other baselines of ptq-lane: families × methods × seeds in a table.

    pip install --constraint constraints.txt --editable . --editable plugins/ptq-lane
    python tools/bench/lanes.py [--families anchor,curve] [--methods qdrop,selective-focus] [--seeds 0,1,2]

Every cell is an ordinary run of a shipped recipe (at `--bits`), on rendered scenes that no network was
trained on; a seed is that of the run and of its scenes. What is finished in the output folder is kept. All
methods over the whole network make the same updates on the same calibration images, of which Selective
Focus holds some out. Seconds are CPU-seconds of whole runs, judging included.
"""

import argparse
import json
import time
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

import torch

from ptqcore import Spread, find_recipe, markdown_table, quantize

FAMILIES = ("segmentation", "row-anchor", "anchor", "keypoint", "curve")
_STEP = "steps.1.selective-focus"
METHODS: dict[str, tuple[str, list[str]]] = {
    "minmax": ("-minmax", []),
    "mse": ("-mse", []),
    "adaround": ("-adaround", []),
    "brecq": ("-brecq", []),
    "qdrop": ("-qdrop", []),
    "selective-focus": ("", []),
    "… without focus": ("", [f"{_STEP}.focus.mode=none"]),
    "… without selection": ("", [f"{_STEP}.selection.mode=none"]),
    "… without both": ("", [f"{_STEP}.focus.mode=none", f"{_STEP}.selection.mode=none"]),
    "… with a warm start": ("", [f"{_STEP}.warm_start=0.3"]),
    "… without a warm start": ("", [f"{_STEP}.warm_start=0"]),
    "… focus by a threshold": ("", [f"{_STEP}.focus.mode=threshold"]),
    "… focus on the top tenth": ("", [f"{_STEP}.focus.mode=top-k"]),
    "… the groups that distort most": ("", [f"{_STEP}.selection.mode=top"]),
    "… a quarter of the error probed": ("", [f"{_STEP}.selection.probe_scale=0.25"]),
    "… without learned biases": ("", [f"{_STEP}.learn_biases=false"]),
    "… without free codes": ("", [f"{_STEP}.weights=adaround"]),
    "… with the loss in pixels": ("", [f"{_STEP}.pixels=1"]),
    "… best state": ("", [f"{_STEP}.held_out=0.25"]),
    "qdrop by blocks": ("-qdrop", ["blocks=null"]),
    "qdrop with codes and biases": (
        "-qdrop",
        ["steps.0.qdrop.learn_biases=true", "steps.0.qdrop.weights=adaquant"],
    ),
}
_METRICS = ("f1@0.5", "f1@0.75", "ego_f1@0.5", "agreement_f1@0.5", "lds")

Figures = dict[str, float]


def cell(family: str, method: str, seed: int, arguments: argparse.Namespace) -> Figures:
    """The metrics of one run, in percent and pixels, and the loss of F1 in points."""
    suffix, changes = METHODS[method]
    changes = [*changes, f"task.family={family}", f"seed={seed}", f"task.max_images={arguments.images}"]
    if arguments.iterations is not None and "iterations" not in str(changes):
        name = "selective-focus" if not suffix else suffix.removeprefix("-")
        if name in ("selective-focus", "qdrop"):
            place = 1 if not suffix else 0
            changes.append(f"steps.{place}.{name}.iterations={arguments.iterations}")
    changes += ["export=[]", "evaluate.baseline=false", *arguments.set]
    folder = Path(arguments.output) / f"{family}-{method}-{seed}".replace(" ", "-").replace("…", "sf")
    done = folder / "bench.json"
    if not done.exists():
        recipe = find_recipe(f"{arguments.bits}{suffix}", "lane", changes)
        begun = time.process_time()
        record = quantize(recipe, "lane", folder)
        seconds = time.process_time() - begun
        metrics: dict[str, Any] = record.metrics()
        found = {key: metrics["after"][key] for key in _METRICS}
        found["loss"] = metrics["before"]["f1@0.5"] - found["f1@0.5"]
        found["seconds"] = seconds
        done.write_text(json.dumps(found))
    figures: Figures = json.loads(done.read_text())
    return figures


def spread(values: Sequence[float]) -> Spread:
    """Mean and standard deviation of the sample."""
    return Spread(fmean(values), stdev(values) if len(values) > 1 else None)


def main() -> None:
    """Run what is asked for, and print the tables."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--families", default=",".join(FAMILIES))
    parser.add_argument("--methods", default="mse,qdrop,selective-focus", help=f"of {'; '.join(METHODS)}")
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--bits", default="w4a4", help="w8a8, w4a8 or w4a4")
    parser.add_argument("--images", type=int, default=512, help="scenes that are judged")
    parser.add_argument(
        "--iterations", type=int, help="updates over the whole network; default: the recipes'"
    )
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE")
    parser.add_argument("--output", default="runs/bench-lanes")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    families, methods = arguments.families.split(","), arguments.methods.split(",")
    seeds = [int(seed) for seed in arguments.seeds.split(",")]
    rows, wins = [], []
    for family in families:
        for method in methods:
            runs = [cell(family, method, seed, arguments) for seed in seeds]
            figures = {key: spread([run[key] for run in runs]) for key in (*_METRICS, "loss", "seconds")}
            rows.append({"family": family, "method": method, **figures})
            print(markdown_table(["family", "method", *figures], rows[-1:]).splitlines()[-1], flush=True)
            if method != "qdrop" and "qdrop" in methods:
                qdrop = [cell(family, "qdrop", seed, arguments) for seed in seeds]
                wins += [
                    (method, run["f1@0.5"] - other["f1@0.5"], run["lds"] < other["lds"])
                    for run, other in zip(runs, qdrop, strict=True)
                ]
    print(markdown_table(["family", "method", *_METRICS, "loss", "seconds"], rows))
    for method in dict.fromkeys(name for name, _, _ in wins):
        own = [win for win in wins if win[0] == method]
        gain, better = fmean(win[1] for win in own), sum(win[2] for win in own)
        print(f"{method} against qdrop: {gain:+.2f} points of F1, LDS lower in {better} of {len(own)}")


if __name__ == "__main__":
    main()
