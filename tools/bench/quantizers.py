"""The quantizers that are compared, each in a process of its own, whose time and memory are its own."""

import json
import os
import subprocess
import sys
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

from environment import HOME, last_line, python_with

from ptqcore import ExportError
from ptqcore.progress import say

_PEERS = Path(__file__).parent / "peers"


@dataclass(frozen=True)
class Job:
    """What all of them get.

    folder: where to write; full_precision: the ONNX file; samples: folder of calibration samples,
    each an .npz file of its inputs by name; recipe, overrides: those of ours.
    """

    folder: Path
    full_precision: Path
    samples: Path
    plugin: str
    recipe: str
    overrides: list[str]


@dataclass(frozen=True)
class Quantized:
    """The file that came out; seconds and peak memory of calibrating and quantizing; our artifact."""

    file: Path
    seconds: float
    peak_memory_bytes: int
    artifact: Path | None = None


def by_ptqcore(job: Job) -> Quantized:
    """Our recipe, exported to ONNX."""
    found = _quantize(Path(sys.executable), "by_ptqcore.py", job)
    return replace(found, artifact=found.file.parents[2])


def by_onnxruntime(job: Job) -> Quantized:
    """ONNX Runtime's static quantizer."""
    return _quantize(Path(sys.executable), "by_onnxruntime.py", job)


def by_nncf(job: Job) -> Quantized:
    """NNCF on OpenVINO's own graph."""
    python = python_with("nncf", "nncf==3.4.0", f"openvino=={version('openvino')}")
    return _quantize(python, "by_nncf.py", job)


def _quantize(python: Path, script: str, job: Job) -> Quantized:
    """Run a script of `peers` on a request; it leaves `result.json`.

    Raises:
        ExportError: with the last line that it said, if it failed.
    """
    name = script.removesuffix(".py")
    say(f"quantizing {name.replace('_', ' ')}")
    folder = job.folder / name
    folder.mkdir()
    request = {key: value if isinstance(value, list) else str(value) for key, value in vars(job).items()}
    (folder / "request.json").write_text(json.dumps(request | {"folder": str(folder)}))
    path = os.pathsep.join(filter(None, (str(HOME), os.environ.get("PYTHONPATH"))))
    done = subprocess.run(
        [str(python), str(_PEERS / script), str(folder)],
        env={**os.environ, "PYTHONPATH": path},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
    )
    if done.returncode != 0:
        raise ExportError(last_line(done.stderr))
    result: dict[str, Any] = json.loads((folder / "result.json").read_text())
    return Quantized(folder / result["file"], result["seconds"], result["peak_memory_bytes"])
