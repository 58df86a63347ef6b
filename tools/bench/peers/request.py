"""What a quantizer's process is asked, and what it answers; imports nothing that a peer may not have."""

import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from ptqcore.meter import Meter


def read_request() -> tuple[Path, dict[str, Any]]:
    """The folder to write in, and the request that lies there."""
    folder = Path(sys.argv[1])
    return folder, json.loads((folder / "request.json").read_text())


def sample_files(request: dict[str, Any]) -> list[Path]:
    """The calibration samples, in order."""
    return sorted(Path(request["samples"]).iterdir())


def read_sample(file: Path) -> dict[str, np.ndarray]:
    """The inputs of one sample by name."""
    with np.load(file) as arrays:
        return dict(arrays)


@contextmanager
def measured(folder: Path, file: str) -> Iterator[None]:
    """Measure what makes `file` in `folder`, and answer."""
    with Meter().measure() as measurement:
        yield
    answer(folder, file, measurement.seconds, measurement.peak_memory_bytes)


def answer(folder: Path, file: str, seconds: float, peak_memory_bytes: int) -> None:
    """Write the result."""
    result = {"file": file, "seconds": seconds, "peak_memory_bytes": peak_memory_bytes}
    (folder / "result.json").write_text(json.dumps(result))
