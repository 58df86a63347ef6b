"""Kill a run at random moments, resume it each time, and compare its bytes with those of a whole run.

    python tools/bench/kill.py --plugin lane [--recipe w4a4] [--kills 20] [--seed 0] [--set KEY=VALUE …]

A run is killed once (SIGKILL, all its processes), at a moment drawn evenly from the processor time that a
whole run took, so that other load moves no moment; then `--resume` finishes it. Linux only. `lost`: seconds
from what was last on disk to the kill, which are computed again. The longest time between two writes of the
whole run bounds them; what comes before the first write (loading, calibration samples) and behind the last
block (exports) is always computed again, and so are metrics but those of language models.
"""

import argparse
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from ptqcore import markdown_table
from ptqcore.files import digest

_QUANTIZE = Path(__file__).parents[1] / "quantize.py"
_MODEL = "model.safetensors"
_BETWEEN_LOOKS = 0.02


@dataclass
class Watched:
    """What was seen of a run: seconds in all and of the processor, times of its writes (by the clock),
    blocks on disk."""

    seconds: float = 0.0
    used: float = 0.0
    killed: bool = False
    blocks: int = 0
    writes: tuple[float, ...] = ()
    ended: float = 0.0

    @property
    def lost(self) -> float:
        """Seconds from the last write to the end."""
        return self.ended - self.writes[-1] if self.writes else self.seconds

    @property
    def longest(self) -> float:
        """The longest time between two writes."""
        return max((b - a for a, b in zip(self.writes, self.writes[1:], strict=False)), default=0.0)


def watch(command: list[str], output: Path, log: IO[bytes], kill_at: float | None = None) -> Watched:
    """Run a command until it ends, or is killed with all its processes after so many seconds of processor.

    Raises:
        SystemExit: if it fails.
    """
    seen: set[float] = set()
    blocks, used = 0, 0.0
    begun = time.time()
    process = subprocess.Popen(
        [*command, "--output", str(output)], stdout=log, stderr=log, start_new_session=True
    )
    while process.poll() is None:
        used = max(used, _used(process.pid))
        if kill_at is not None and used >= kill_at:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            break
        found = _journal(output)
        seen |= found.keys()
        blocks = max(blocks, sum(found.values()))
        time.sleep(_BETWEEN_LOOKS)
    ended = time.time()
    if process.returncode not in (0, -signal.SIGKILL):
        raise SystemExit(f"{' '.join(command)} ended with {process.returncode}: see {log.name}")
    killed = process.returncode != 0
    if killed:
        seen |= (found := _journal(output)).keys()
        blocks = sum(found.values())
    return Watched(ended - begun, used, killed, blocks, tuple(sorted(seen)), ended)


def _used(process: int) -> float:
    """Seconds of processor time that a process has used so far; 0 if it is gone."""
    try:
        fields = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return 0.0
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def _journal(output: Path) -> dict[float, bool]:
    """When each file of the journals was written → whether it is a finished block of the run itself.

    `midway-…` are states of what a block is still learning. Files and folders may go while this looks."""
    found = {}
    work = output / ".work"
    # os.walk passes over a folder that is gone; Path.rglob raises.
    for file in (Path(folder, name) for folder, _, names in os.walk(work) for name in names):
        if file.suffix == ".json" or file.name.startswith("midway-"):
            with suppress(FileNotFoundError):
                found[file.stat().st_mtime] = file.name.startswith("block-") and file.parent == work
    return found


def kills(command: list[str], folder: Path, count: int, seed: int) -> tuple[list[dict[str, str]], bool]:
    """The rows of the table, and whether all bytes were the same.

    Args:
        command: the run, but for its output folder.
        folder: for all output.
        count: how many runs are killed.
        seed: of the moments.
    """
    moments = random.Random(seed)
    with open(folder / "log.txt", "wb") as log:
        whole = watch(command, folder / "whole", log)
        wanted = digest(folder / "whole" / _MODEL)
        print(f"whole run: {whole.seconds:.1f} s, {whole.used:.1f} s of processor, {whole.blocks} blocks")
        print(f"longest time between two writes: {whole.longest:.1f} s", flush=True)
        rows = []
        for number in range(count):
            output = folder / "killed"
            first = Watched()
            while not first.killed:  # a run may be faster than the first was
                shutil.rmtree(output, ignore_errors=True)
                first = watch(command, output, log, moments.uniform(0, whole.used))
            second = watch([*command, "--resume"], output, log)
            same = digest(output / _MODEL) == wanted
            rows.append(
                {
                    "kill": str(number + 1),
                    "after": f"{first.seconds:.1f} s",
                    "processor": f"{first.used:.1f} s",
                    "blocks on disk": f"{first.blocks} of {whole.blocks}",
                    "lost": f"{first.lost:.1f} s",
                    "resumed in": f"{second.seconds:.1f} s",
                    "in all": f"{first.seconds + second.seconds - whole.seconds:+.1f} s",
                    "bytes": "same" if same else "OTHER",
                }
            )
            print(markdown_table(list(rows[-1]), rows[-1:]).splitlines()[-1], flush=True)
    return rows, all(row["bytes"] == "same" for row in rows)


def main(arguments: list[str] | None = None) -> int:
    """Kill, resume, print the table; 1 if any bytes differ."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--plugin", required=True)
    parser.add_argument("--recipe", help="default: the plugin's")
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE")
    parser.add_argument("--output", type=Path, default=Path("runs/bench-kill"))
    given = parser.parse_args(arguments)
    shutil.rmtree(given.output, ignore_errors=True)
    given.output.mkdir(parents=True)
    command = [sys.executable, str(_QUANTIZE), "--plugin", given.plugin]
    command += ["--recipe", given.recipe] if given.recipe else []
    command += [f"--set={each}" for each in given.set]
    rows, same = kills(command, given.output, given.kills, given.seed)
    print(markdown_table(list(rows[0]), rows) if rows else "")
    return 0 if same else 1


if __name__ == "__main__":
    sys.exit(main())
