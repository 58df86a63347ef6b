"""Packages that the bench compares with, in environments of their own, made when they are needed."""

import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

from ptqcore import ExportError
from ptqcore.progress import say

HOME = Path(__file__).parents[2]


def python_with(package: str, *requirements: str, constrained: bool = True) -> Path:
    """An interpreter that has `package`: this one, or that of an environment beside the checkout's own.

    Args:
        package: what is imported.
        requirements: what is installed.
        constrained: whether in the versions of `constraints.txt`; a peer may need others.

    Raises:
        ExportError: if the environment cannot be made.
    """
    if find_spec(package) is not None:
        return Path(sys.executable)
    folder = HOME / f".venv-bench-{package}"
    python, done = folder / "bin" / "python", folder / ".installed"
    if not done.exists():
        say(f"installing {package} in {folder}")
        _run(sys.executable, "-m", "venv", str(folder))
        constraints = ("--constraint", str(HOME / "constraints.txt")) if constrained else ()
        _run(str(python), "-m", "pip", "install", "--quiet", *constraints, *requirements)
        done.touch()
    return python


def _run(*command: str) -> None:
    done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True)
    if done.returncode != 0:
        raise ExportError(f"{' '.join(command)} failed: {last_line(done.stderr)}")


def last_line(text: str) -> str:
    """What a failed process said last."""
    return next((line.strip() for line in reversed(text.splitlines()) if line.strip()), "no reason given")
