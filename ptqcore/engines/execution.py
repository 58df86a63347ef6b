"""Run a model in an engine, in a process of its own: what the engine does to that process is a sentence."""

import json
import os
import signal
import subprocess
import sys
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np

from ptqcore.errors import ExportError, nearest

Arrays = dict[str, np.ndarray]

ENGINES = {"onnxruntime": "onnx", "openvino": "openvino"}
"""The engines, and the optional dependency of ptqcore that brings each."""

_CONVERSIONS = {"QuantizeLinear", "DequantizeLinear", "FakeQuantize", "Convert"}
_LONGEST_REASON = 300


@dataclass(frozen=True)
class ExecutedNode:
    """One node of the graph that the engine made of the file and ran.

    name, op: as the engine calls them.
    inputs_integer: it reads its operands as integers of 8 bits or fewer.
    integer: it also computes on those integers; an integer tensor that is only moved counts.
    microseconds: time of the fastest of the profiled runs.
    sources: names of the nodes or tensors of the file that went into it.
    """

    name: str
    op: str
    inputs_integer: bool
    integer: bool
    microseconds: float
    sources: tuple[str, ...] = ()


@dataclass(frozen=True)
class Execution:
    """What an engine returned for a model.

    outputs: for each sample, its outputs by name.
    milliseconds: wall time of each timed run of the first sample, warm.
    nodes: what ran, in order; empty unless it was profiled.
    """

    engine: str
    outputs: list[Arrays]
    milliseconds: list[float]
    nodes: list[ExecutedNode]

    @property
    def minimum(self) -> float | None:
        """Milliseconds of the fastest timed run; None if none was timed."""
        return min(self.milliseconds, default=None)

    @property
    def median(self) -> float | None:
        """Median milliseconds of the timed runs; None if none was timed."""
        return median(self.milliseconds) if self.milliseconds else None

    @property
    def conversions(self) -> int:
        """How many nodes do nothing but change between integers and floats."""
        return sum(node.op in _CONVERSIONS for node in self.nodes)


def execute(
    engine: str,
    model: Path,
    inputs: list[Arrays],
    *,
    threads: int = 1,
    repeats: int = 0,
    profile: bool = False,
    timeout_s: float = 600.0,
) -> Execution:
    """Run `model` on each sample of `inputs` on the CPU, in a process of its own.

    Args:
        engine: one of `ENGINES`.
        inputs: each sample is its input arrays by name.
        repeats: how many more times to run the first sample against the clock, after a warm-up.
        profile: also run the first sample in a session that reports every executed node.

    Raises:
        ExportError: in one sentence, if the engine is missing, fails, crashes or does not finish in time.
    """
    _check(engine, model, inputs, repeats > 0 or profile)
    try:
        with TemporaryDirectory(prefix="ptq-engine-") as name:
            folder = Path(name)
            options = {"threads": threads, "repeats": repeats, "profile": profile}
            _write_request(folder, engine, model, inputs, options)
            _run_worker(folder, engine, model, timeout_s)
            return _read_result(folder, engine)
    except OSError as error:
        raise ExportError(f"cannot hand {model.name} to {engine}: {error.strerror or error}") from error


def _check(engine: str, model: Path, inputs: list[Arrays], needs_sample: bool) -> None:
    if engine not in ENGINES:
        raise ExportError(f"there is no engine {engine!r}{nearest(engine, ENGINES)}")
    if find_spec(engine) is None:
        raise ExportError(f"{engine} is not installed: pip install 'ptqcore[{ENGINES[engine]}]'")
    if not model.is_file():
        raise ExportError(f"there is no file {model} to run in {engine}")
    if needs_sample and not inputs:
        raise ExportError(f"{engine} needs a sample of inputs to time or profile {model.name}")


def _write_request(
    folder: Path, engine: str, model: Path, inputs: list[Arrays], options: dict[str, Any]
) -> None:
    request = {"engine": engine, "model": str(model.resolve()), **options}
    request["inputs"] = write_samples(folder / "inputs.npz", inputs)
    (folder / "request.json").write_text(json.dumps(request))


def _run_worker(folder: Path, engine: str, model: Path, timeout_s: float) -> None:
    package_home = str(Path(__file__).parents[2])
    path = os.pathsep.join(filter(None, (package_home, os.environ.get("PYTHONPATH"))))
    command = [sys.executable, "-P", "-m", "ptqcore.engines.worker", str(folder)]
    try:
        done = subprocess.run(
            command,
            env={**os.environ, "PYTHONPATH": path},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
            errors="replace",
            timeout=timeout_s,
        )
    except subprocess.TimeoutExpired as error:
        raise ExportError(f"{engine} did not finish {model.name} within {timeout_s:g} s") from error
    if done.returncode != 0:
        raise ExportError(f"{engine} {_end(done.returncode)} on {model.name}{_last_line(done.stderr)}")


def _end(code: int) -> str:
    if code == 1:
        return "failed"
    known = -code in set(signal.Signals)
    return f"crashed with {signal.Signals(-code).name}" if known else f"ended with exit code {code}"


def _last_line(text: str) -> str:
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return f": {lines[-1][:_LONGEST_REASON]}" if lines else ""


def _read_result(folder: Path, engine: str) -> Execution:
    result = json.loads((folder / "result.json").read_text())
    nodes = [ExecutedNode(**{**node, "sources": tuple(node["sources"])}) for node in result["nodes"]]
    outputs = read_samples(folder / "outputs.npz", result["outputs"])
    return Execution(engine, outputs, result["milliseconds"], nodes)


def write_result(folder: Path, execution: Execution) -> None:
    """Write what `execute` reads back in the other process."""
    result = {
        "outputs": write_samples(folder / "outputs.npz", execution.outputs),
        "milliseconds": execution.milliseconds,
        "nodes": [asdict(node) for node in execution.nodes],
    }
    (folder / "result.json").write_text(json.dumps(result))


def write_samples(path: Path, samples: list[Arrays]) -> list[list[str]]:
    """Write the arrays without their names, which need not suit a file; returns the names per sample."""
    arrays = {
        f"{i}.{j}": array for i, sample in enumerate(samples) for j, array in enumerate(sample.values())
    }
    with path.open("wb") as file:
        np.savez(file, **arrays)  # type: ignore[arg-type]
    return [list(sample) for sample in samples]


def read_samples(path: Path, names: list[list[str]]) -> list[Arrays]:
    """Read what `write_samples` wrote under `names`."""
    with np.load(path, allow_pickle=False) as arrays:
        return [
            {name: arrays[f"{i}.{j}"] for j, name in enumerate(sample)} for i, sample in enumerate(names)
        ]
