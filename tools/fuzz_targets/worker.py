"""The process that reads: one target, changed inputs one after the other, a line of JSON for what it finds.

A reader that takes too long ends the process, with the stack of every thread on standard error; what it
was reading is then still in its folder.
"""

import faulthandler
import json
import os
import random
import resource
import shutil
import sys
import time
import traceback
from collections import Counter
from pathlib import Path
from typing import Any

from fuzz_targets import find_target
from fuzz_targets.memory import ALWAYS, Peak
from fuzz_targets.mutations import mutate
from ptqcore import PtqError

ADDRESS_SPACE = 8 * 2**30  # bytes above the start: a mad reader must not take the machine with it
_EVERY = 2.0  # seconds between reports
_WARM = 3


def work(
    name: str, seed: int, first: int, executions: int, seconds: float, limit: float, folder: Path
) -> None:
    """Run a target.

    Args:
        name: of the target.
        seed: of all changes; with the number of the execution it decides one input.
        first: number of the first execution.
        executions: how many at most.
        seconds: for how long at most.
        limit: seconds that one execution may take.
        folder: `seed` and `case` are made in it.
    """
    target = find_target(name)
    good, case = folder / "seed", folder / "case"
    if not good.exists():
        good.mkdir(parents=True)
        target.seed(good)
    files = {
        path.relative_to(good): path.read_bytes() for path in sorted(good.rglob("*")) if path.is_file()
    }
    for _ in range(_WARM):
        _write(case, files)
        outcome, details = _read(target.read, case)
        if outcome not in ("read", "refused") or (target.whole and outcome != "read"):
            sys.exit(f"{outcome}: {details}")
    _bound_address_space()
    tally: Counter[str] = Counter()
    peak, started, said = Peak(), time.monotonic(), 0.0
    for number in range(first, first + executions):
        dice = random.Random(f"{seed} {name} {number}")
        changed = _changed(files, dice)
        _write(case, changed)
        target.mend(case)
        size = sum(map(len, changed.values()))
        (folder / "number").write_text(str(number))
        faulthandler.dump_traceback_later(limit, exit=True)
        peak.start()
        outcome, details = _read(target.read, case)
        taken = peak.taken()
        faulthandler.cancel_dump_traceback_later()
        if taken > 2 * size + ALWAYS:
            outcome = "allocation"
            details = f"{taken / 2**20:.0f} MiB for a file of {size} bytes; {details}"
        tally[outcome] += 1
        if outcome not in ("read", "refused"):
            kept = folder / f"case-{number}"  # the next case takes the place of this one
            case.rename(kept)
            _say(found=outcome, number=number, details=details, kept=str(kept))
        now = time.monotonic() - started
        if now - said > _EVERY or now > seconds:
            said = now
            _say(done=number + 1 - first, tally=tally, seconds=now)
        if now > seconds:
            break
    _say(done=number + 1 - first, tally=tally, seconds=time.monotonic() - started)


def _changed(files: dict[Path, bytes], dice: random.Random) -> dict[Path, bytes]:
    """The files of a valid input, one or two of them changed."""
    changed = dict(files)
    for path in dice.choices(list(files), k=dice.choice((1, 1, 2))):
        changed[path] = mutate(changed[path], path.name, dice)
    return changed


def _write(folder: Path, files: dict[Path, bytes]) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    for path, content in files.items():
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_bytes(content)


def _read(read: Any, case: Path) -> tuple[str, str]:
    """How reading a case ended, and more about that."""
    try:
        read(case)
    except PtqError as error:
        text = str(error)
        return ("refused", text) if text and "\n" not in text else ("no sentence", repr(text))
    except BaseException:
        return "crash", traceback.format_exc()
    return "read", ""


def _bound_address_space() -> None:
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    most = pages * os.sysconf("SC_PAGE_SIZE") + ADDRESS_SPACE
    resource.setrlimit(resource.RLIMIT_AS, (most, most))


def _say(**facts: Any) -> None:
    print("@" + json.dumps(facts), file=sys.__stdout__, flush=True)
