"""How much memory a process may still take."""

import subprocess
import sys
from pathlib import Path

import pytest

from ptqcore import memory_left
from ptqcore.memory_left import free_memory

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="elsewhere the system does not say")


def test_a_limit_on_the_address_space_counts() -> None:
    code = (
        "import resource; resource.setrlimit(resource.RLIMIT_AS, (2**30, 2**30));"
        "from ptqcore.memory_left import free_memory; print(free_memory())"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert 2**29 < int(done.stdout) < 2**30


@pytest.mark.parametrize(
    ("line", "folder", "files"),
    [
        (
            "0::/a/b",
            "a",
            {"memory.max": "5000", "memory.current": "3000", "memory.stat": "inactive_file 700"},
        ),
        (
            "4:memory:/a",
            "memory/a",
            {
                "memory.limit_in_bytes": "5000",
                "memory.usage_in_bytes": "3000",
                "memory.stat": "cache 900\ntotal_inactive_file 700",
            },
        ),
    ],
)
def test_limits_of_control_groups_count(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, line: str, folder: str, files: dict[str, str]
) -> None:
    """Copies of files count as free."""
    (tmp_path / folder).mkdir(parents=True)
    for name, text in files.items():
        (tmp_path / folder / name).write_text(text + "\n")
    read = memory_left._text
    monkeypatch.setattr(memory_left, "_GROUPS", tmp_path)
    own = Path("/proc/self/cgroup")
    monkeypatch.setattr(memory_left, "_text", lambda file: line if file == own else read(file))
    assert free_memory() == 2700


def test_no_limit_is_no_limit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "memory.max").write_text("max\n")
    (tmp_path / "memory.current").write_text("3000\n")
    monkeypatch.setattr(memory_left, "_GROUPS", tmp_path)
    assert free_memory() > 2**20
