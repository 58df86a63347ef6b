"""Feed broken files to everything that reads files from strangers.

    python tools/fuzz.py [--seconds N] [--executions N] [--reader NAME ...] [--seed N] [--limit SECONDS]
                         [--failures FOLDER] [--first N] [--list]

Valid inputs are made on the fly and changed: bytes anywhere, and values inside JSON, YAML, safetensors
headers, archives and ONNX graphs, with checksums right again. A reader may return, or raise a PtqError of
one line. Anything else is a failure: another exception, the death of the process, more than --limit
seconds, or more memory than twice the input's size and 64 MiB. Failing inputs are kept in the folder of
failures, the same failure three times at most, with what happened and the command that runs it again. The
exit code is 1 if there was any.

Every reader runs in a process of its own, one after the other; the time is shared evenly among them.
"""

import argparse
import json
import math
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("MALLOC_ARENA_MAX", "1")  # another thread's arena would count as memory of a reader

_KEPT_EACH = 3


@dataclass
class Result:
    """What became of one reader."""

    done: int = 0
    tally: Counter[str] = field(default_factory=Counter)
    seconds: float = 0.0


class Failures:
    """The folder of failing inputs."""

    def __init__(self, folder: Path, seed: int) -> None:
        self._folder, self._seed, self._known = folder, seed, Counter[str]()

    def keep(self, reader: str, number: int, kind: str, details: str, case: Path) -> None:
        """Keep an input, unless the same failure is kept three times already."""
        signature = f"{reader} {kind} {_place(details)}"
        self._known[signature] += 1
        if self._known[signature] > _KEPT_EACH:
            return
        folder = self._folder / f"{reader}-{number}"
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(case, folder / "input")
        again = (
            f"python tools/fuzz.py --reader {reader} --seed {self._seed} --first {number} --executions 1"
        )
        (folder / "what.txt").write_text(f"{kind}\n{again}\n\n{details}\n")
        print(f"\n{reader}: {kind}, kept in {folder}: {_place(details)}", flush=True)


def _place(details: str) -> str:
    """The last line of a traceback and the line of code before it; else the text without numbers."""
    code = re.findall(r'File ".*?([^/"]+)", line (\d+)', details)
    last = details.strip().splitlines()[-1:] or [""]
    return " ".join([*(code[-1] if code else ()), re.sub(r"\d+", "N", last[0])[:160]])


def fuzz(
    reader: str, options: argparse.Namespace, seconds: float, executions: int, failures: Failures
) -> Result:
    """Run one reader, in new processes wherever it ends one."""
    result = Result()
    with tempfile.TemporaryDirectory(prefix="fuzz-", dir=_fast()) as name:
        folder = Path(name)
        while result.done < executions and result.seconds < seconds:
            span = (options.first + result.done, executions - result.done, seconds - result.seconds)
            _run(reader, options, span, folder, result, failures)
    return result


def _run(
    reader: str,
    options: argparse.Namespace,
    span: tuple[int, int, float],
    folder: Path,
    result: Result,
    failures: Failures,
) -> None:
    """One process: from an execution on, so many, for so many seconds."""
    first, executions, seconds = span
    arguments = [reader, options.seed, first, executions, seconds, options.limit, folder]
    before, spent = result.done, result.seconds
    tally: Counter[str] = Counter()
    (folder / "number").unlink(missing_ok=True)
    with (folder / "stderr").open("w+") as stderr:
        command = [sys.executable, sys.argv[0], "--worker", *map(str, arguments)]
        with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=stderr, text=True) as process:
            assert process.stdout is not None
            for line in process.stdout:
                if not line.startswith("@"):
                    continue
                said = json.loads(line[1:])
                if "found" in said:
                    kept = Path(said["kept"])
                    failures.keep(reader, said["number"], said["found"], said["details"], kept)
                    shutil.rmtree(kept)
                else:
                    tally = Counter(said["tally"])
                    result.done, result.seconds = before + said["done"], spent + said["seconds"]
                    print(f"\r{reader}: {result.done} {dict(tally)}   ", end="", flush=True)
        if process.returncode:
            stderr.seek(0)
            ended = stderr.read()
            if not (folder / "number").exists():
                print(f"\n{reader} does not read its own valid input:\n{ended}")
                result.tally["invalid seed"] += 1
                result.seconds = math.inf
                return
            number = int((folder / "number").read_text())
            kind = "hang" if "Timeout" in ended else f"death (code {process.returncode})"
            failures.keep(reader, number, kind, ended[-20000:], folder / "case")
            tally[kind.split()[0]] += 1
            result.seconds += options.limit if kind == "hang" else 0
            result.done = number + 1 - options.first
    result.tally += tally


def _fast() -> str | None:
    """A folder in memory, where there is one."""
    return "/dev/shm" if os.access("/dev/shm", os.W_OK) else None


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seconds", type=float, default=3600, help="of reading, for all readers together")
    parser.add_argument("--executions", type=int, default=1_000_000, help="for all readers together")
    parser.add_argument("--reader", action="append", help="only this one; may be given again")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--first", type=int, default=0, help="number of the first execution")
    parser.add_argument("--limit", type=float, default=10, help="seconds that one execution may take")
    parser.add_argument("--failures", type=Path, default=Path("runs/fuzz"))
    parser.add_argument("--list", action="store_true", help="names of the readers")
    parser.add_argument("--worker", nargs=7, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        from fuzz_targets.worker import work

        name, seed, first, executions, seconds, limit, folder = options.worker
        work(name, int(seed), int(first), int(executions), float(seconds), float(limit), Path(folder))
        return
    from fuzz_targets import all_targets

    names = list(all_targets())
    if options.list:
        print("\n".join(names))
        return
    readers = options.reader or names
    if unknown := [name for name in readers if name not in names]:
        sys.exit(f"no reader {unknown[0]!r}; known: {', '.join(names)}")
    sys.exit(_all(readers, options))


def _all(readers: list[str], options: argparse.Namespace) -> int:
    """Run readers one after the other; what one leaves of its time and executions is for those after it."""
    failures = Failures(options.failures, options.seed)
    results: dict[str, Result] = {}
    seconds, executions = options.seconds, options.executions
    for place, reader in enumerate(readers):
        after = len(readers) - place
        results[reader] = fuzz(reader, options, seconds / after, -(-executions // after), failures)
        seconds -= min(results[reader].seconds, seconds / after)
        executions -= results[reader].done
        print()
    bad = 0
    for reader, result in results.items():
        found = {kind: count for kind, count in result.tally.items() if kind not in ("read", "refused")}
        bad += sum(found.values())
        print(
            f"{reader:24} {result.done:8} executions in {result.seconds:6.0f} s, "
            f"{result.tally['refused']:8} refused, {result.tally['read']:8} read, "
            f"failures {found or 'none'}"
        )
    print(f"{sum(result.done for result in results.values())} executions, {bad} failures")
    return 1 if bad else 0


if __name__ == "__main__":
    main()
