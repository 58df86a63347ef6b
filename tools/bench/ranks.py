"""Several processes against one, on the embedded SmolLM2: seconds, and whether the integers are the same.

    python tools/bench/ranks.py [--recipes w8a8 …] [--processes 2] [--blocks 2] [--samples 6]

Each recipe runs as one process of one thread, as processes of one thread (`torchrun`), and as one process
of as many threads as there were processes. Printed are the seconds of quantizing the blocks, those of the
processor that the busiest process used for that (which other load moves little), those of all of the run
(loading, metrics and writing are done by one process), and by how much the blocks' errors differ from those
of one process. Nothing else should run on the machine.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any
from unittest.mock import patch

from ptqcore import distributed, markdown_table, quantize
from ptqcore.files import digest
from ptqcore.plugin import discover
from ptqcore.quantization import Quantization
from ptqcore.recipe import read_recipe

_RECONSTRUCTED = ["steps=[{brecq: {iterations: 40, batch: 8}}]"]
_CHANGES = {
    "w8a8": [],
    "w4a16": [],
    "brecq": [*_RECONSTRUCTED, "quant.weights.bits=4"],
    "qdrop": ["steps=[{qdrop: {iterations: 40, batch: 8}}]", "quant.weights.bits=4"],
}
_MODEL = "model.safetensors"
_TEXT = Path(__file__).parents[2] / "README.md"
_WINDOW = 256


@dataclass(frozen=True)
class Run:
    """Seconds of the blocks, of the processor in the process that used most of it for them, and of all;
    errors of the blocks, and the digest of the stored integers."""

    blocks: float
    busiest: float
    whole: float
    errors: list[float]
    digest: str


def measure(recipe: str, changes: list[str], processes: int, threads: int) -> Run:
    """Quantize with so many processes of so many threads.

    Raises:
        SystemExit: if that fails.
    """
    command = [sys.executable]
    if processes > 1:
        command += ["-m", "torch.distributed.run", "--nproc-per-node", str(processes)]
    with TemporaryDirectory(prefix="ptq-bench-") as name:
        folder = Path(name)
        done = subprocess.run(
            [*command, __file__, "--worker", str(folder), recipe, *changes],
            env=os.environ | {"OMP_NUM_THREADS": str(threads)},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
        )
        if done.returncode:
            raise SystemExit(f"{recipe} failed: {done.stderr}")
        found = json.loads((folder / "figures.json").read_text())
        return Run(**found, digest=digest(folder / "run" / _MODEL))


def work(folder: Path, recipe: str, changes: list[str]) -> None:
    """Quantize in this process, one of several, and write the figures."""
    registry = discover()
    chosen = read_recipe(registry.recipe_file(recipe, "llm"), changes)
    used, run = [], Quantization.run

    def measured(self: Quantization, *given: Any) -> None:
        begun = time.process_time()
        run(self, *given)
        used.append(time.process_time() - begun)

    with patch.object(Quantization, "run", measured):
        record = quantize(chosen, "llm", folder / "run", registry=registry)
    busiest = max(map(sum, distributed.everywhere(used)))
    if distributed.is_first():
        figures = {
            "blocks": record.phases["quantize blocks"],
            "busiest": busiest,
            "whole": record.seconds,
            "errors": [block.relative_error for block in record.blocks],
        }
        (folder / "figures.json").write_text(json.dumps(figures))


def rows(name: str, options: argparse.Namespace) -> list[dict[str, str]]:
    """The runs of one recipe."""
    last = options.blocks - 1
    changes = [
        f"blocks=model.layers.[0-{last}]",
        f"task.calibration={_TEXT}",
        f"task.text={_TEXT}",
        f"task.calibration_samples={options.samples}",
        f"task.calibration_window={_WINDOW}",
        "task.max_windows=1",
        "export=[]",
        *_CHANGES[name],
    ]
    recipe = name if name.startswith("w") else "w8a8"
    count = options.processes
    found: list[dict[str, str]] = []
    for processes, threads in ((1, 1), (count, 1), (1, count)):
        run = measure(recipe, changes, processes, threads)
        if not found:
            first = run
        apart = max(abs(a - b) / a for a, b in zip(first.errors, run.errors, strict=True))
        found.append(
            {
                "recipe": name,
                "processes x threads": f"{processes} x {threads}",
                "blocks": f"{run.blocks:.1f} s",
                "speed-up": f"{first.blocks / run.blocks:.2f}",
                "processor": f"{run.busiest:.1f} s",
                "whole run": f"{run.whole:.1f} s",
                "integers": "same" if run.digest == first.digest else "other",
                "errors of blocks": f"{apart:.2%} apart",
            }
        )
        print(markdown_table(list(found[0]), found[-1:]).splitlines()[-1], flush=True)
    return found


def main(arguments: list[str] | None = None) -> None:
    """Measure and print the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--recipes", nargs="+", default=["w8a8", "brecq"], choices=list(_CHANGES))
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--blocks", type=int, default=2, help="blocks that are quantized, at most 10")
    parser.add_argument("--samples", type=int, default=6, help="calibration samples")
    options = parser.parse_args(arguments)
    table = [row for name in options.recipes for row in rows(name, options)]
    print(markdown_table(list(table[0]), table))


if __name__ == "__main__":
    if sys.argv[1:2] == ["--worker"]:
        work(Path(sys.argv[2]), sys.argv[3], sys.argv[4:])
    else:
        main()
