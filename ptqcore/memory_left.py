"""How much memory this process may still take: what the machine has free, and the limits set on it."""

import sys
from collections.abc import Iterator
from pathlib import Path

_UNKNOWN = 8 * 2**30
_GROUPS = Path("/sys/fs/cgroup")
# In the two kinds of control groups: the limit, what is used of it, and the line of `memory.stat` that says
# how much of that are copies of files, which the system drops where memory is short.
_FILES = (
    ("memory.max", "memory.current", "inactive_file"),
    ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
)


def free_memory() -> int:
    """Bytes that this process may still take: the least of what is free on the machine, of what its control
    groups leave, and of what `ulimit -v` leaves (8 GiB where the system says nothing)."""
    return max(0, min([_UNKNOWN] if sys.platform != "linux" else _limits()))


def _limits() -> list[int]:
    found = [*_machine(), *_address_space()]
    for folder in _groups():
        for names in _FILES:
            found += _group(folder, *names)
    return found or [_UNKNOWN]


def _machine() -> Iterator[int]:
    available = _line(Path("/proc/meminfo"), "MemAvailable:")
    if available is not None:
        yield available * 1024


def _address_space() -> Iterator[int]:
    import resource  # does not exist on Windows

    limit, _ = resource.getrlimit(resource.RLIMIT_AS)
    used = _line(Path("/proc/self/status"), "VmSize:")
    if limit != resource.RLIM_INFINITY and used is not None:
        yield limit - used * 1024


def _groups() -> Iterator[Path]:
    """The folders of the process's control groups, and of those around them."""
    for line in _text(Path("/proc/self/cgroup")).splitlines():
        _, kinds, path = line.split(":", 2)
        if kinds in ("", "memory"):
            root = _GROUPS / kinds
            inside = root / path.lstrip("/")
            yield from (folder for folder in (inside, *inside.parents) if folder.is_relative_to(root))


def _group(folder: Path, limit: str, used: str, files: str) -> Iterator[int]:
    most, now = _text(folder / limit).strip(), _text(folder / used).strip()
    if most.isdigit() and now.isdigit():
        yield int(most) - int(now) + (_line(folder / "memory.stat", files) or 0)


def _line(file: Path, name: str) -> int | None:
    """The number behind a name, in a file of such lines."""
    for line in _text(file).splitlines():
        words = line.split()
        if len(words) > 1 and words[0] == name:
            return int(words[1])
    return None


def _text(file: Path) -> str:
    try:
        return file.read_text(encoding="ascii")
    except OSError:
        return ""
