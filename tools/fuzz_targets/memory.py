"""How much memory a reader takes: the peak of what is resident, and of what is only reserved (Linux)."""

from pathlib import Path

ALWAYS = 64 * 2**20  # bytes that nobody is blamed for: buffers of libraries, arenas of threads
_STATUS = Path("/proc/self/status")
_RESET = Path("/proc/self/clear_refs")


class Peak:
    """The memory taken between `start` and `taken`, in bytes."""

    def start(self) -> None:
        """Begin anew."""
        _RESET.write_text("5")  # the resident peak falls to what is resident; the reserved one cannot
        self._before = _read()

    def taken(self) -> int:
        """The larger of what was resident and what was reserved at a time, above the start."""
        after = _read()
        resident = after["VmHWM"] - self._before["VmRSS"]
        grown = after["VmPeak"] > self._before["VmPeak"]
        return max(resident, after["VmPeak"] - self._before["VmSize"] if grown else 0)


def _read() -> dict[str, int]:
    """Kilobytes by name, as bytes."""
    lines = (line.split() for line in _STATUS.read_text().splitlines() if line.startswith("Vm"))
    return {name.rstrip(":"): int(value) * 1024 for name, value, *_ in lines}
