"""Wall time and peak resident memory of the phases of a run."""

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from ptqcore.allocator import give_freed_memory_back

_STATUS = Path("/proc/self/status")
_CLEAR = Path("/proc/self/clear_refs")


@dataclass
class Measurement:
    """seconds: wall time; peak_memory_bytes: largest resident memory of the process meanwhile."""

    seconds: float = 0.0
    peak_memory_bytes: int = 0


@dataclass
class Meter:
    """Measures phases one after the other and keeps the largest peak of all."""

    start: float = field(default_factory=time.monotonic)
    peak_memory_bytes: int = 0

    @property
    def seconds(self) -> float:
        """Wall time since the meter was made."""
        return time.monotonic() - self.start

    @contextmanager
    def measure(self) -> Iterator[Measurement]:
        """Fill a `Measurement` when the block ends. Phases must not be nested."""
        measurement = Measurement()
        self.update()
        give_freed_memory_back()
        _reset_peak()
        begin = time.monotonic()
        try:
            yield measurement
        finally:
            measurement.seconds = time.monotonic() - begin
            measurement.peak_memory_bytes = peak_memory()
            self.update()

    @contextmanager
    def phase(self, name: str, seconds: dict[str, float]) -> Iterator[None]:
        """Measure, and write the wall time down under a name once the block has ended."""
        with self.measure() as measurement:
            yield
        seconds[name] = measurement.seconds

    def update(self) -> None:
        """Take the current peak into account."""
        self.peak_memory_bytes = max(self.peak_memory_bytes, peak_memory())


def peak_memory() -> int:
    """Largest resident memory in bytes since the last reset (Linux), or of the process; 0 if unknown."""
    try:
        for line in _STATUS.read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass
    if sys.platform == "win32":
        return 0
    import resource  # does not exist on Windows

    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def _reset_peak() -> None:
    """Start a new peak where the system allows it; elsewhere a phase reports the process's peak."""
    try:
        _CLEAR.write_text("5")
    except OSError:
        return
