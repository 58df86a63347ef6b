"""tools/fuzz.py: what it calls a failure, what it keeps of one, and that a seed gives the same inputs."""

import json
import os
import random
import re
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import pytest

from ptqcore import PtqError

TOOLS = Path(__file__).parents[2] / "tools"
sys.path.append(str(TOOLS))

core = import_module("fuzz_targets.core")
mutations = import_module("fuzz_targets.mutations")
memory = import_module("fuzz_targets.memory")

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="memory is measured as Linux says it")

PLANTED = """
import os, time
from fuzz_targets.target import Target
from ptqcore import DataError

def seed(folder):
    (folder / "a.json").write_text('{"a": [1, 2, 3]}')

def whole(folder):
    return (folder / "a.json").read_bytes() == b'{"a": [1, 2, 3]}'

def good(folder):
    if not whole(folder):
        raise DataError("not that")

def crash(folder):
    return whole(folder) or {}["nothing"]

def silent(folder):
    if not whole(folder):
        raise DataError("")

def hang(folder):
    return whole(folder) or time.sleep(60)

def die(folder):
    return whole(folder) or os.abort()

def allocate(folder):
    return whole(folder) or len(b"x" * 2**28)

def reserve(folder):
    return whole(folder) or len(bytearray(2**28))

READERS = (good, crash, silent, hang, die, allocate, reserve)
TARGETS = [Target(read.__name__, seed, read) for read in READERS]
"""
RUN = """
import sys
sys.path[:0] = [{tools!r}, {here!r}]
import fuzz, fuzz_targets, planted
sys.modules["fuzz_targets.planted"] = planted
fuzz_targets.ROOMS = ("planted",)
fuzz.main()
"""


@pytest.fixture
def fuzz(tmp_path):
    """Run the tool over planted readers: exit code and output."""
    (tmp_path / "planted.py").write_text(PLANTED)
    (tmp_path / "run.py").write_text(RUN.format(tools=str(TOOLS), here=str(tmp_path)))

    def fuzz(*arguments: str) -> tuple[int, str]:
        command = [
            sys.executable,
            str(tmp_path / "run.py"),
            "--failures",
            str(tmp_path / "kept"),
            *arguments,
        ]
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=100)
        return done.returncode, done.stdout + done.stderr

    return fuzz


KINDS = {
    "crash": "crash",
    "silent": "no sentence",
    "hang": "hang",
    "die": "death (code -6)",
    "allocate": "allocation",
    "reserve": "allocation",
}


def test_what_goes_wrong_is_kept_and_can_be_run_again(fuzz, tmp_path):
    code, output = fuzz("--executions", "14", "--limit", "1")
    assert code == 1
    assert re.search(r"good +2 executions in .* 2 refused, +0 read, failures none", output), output
    kept = {folder.name.rpartition("-")[0]: folder for folder in sorted((tmp_path / "kept").iterdir())}
    assert kept.keys() == KINDS.keys(), output
    for reader, kind in KINDS.items():
        what, again, *_ = (kept[reader] / "what.txt").read_text().splitlines()
        number = kept[reader].name.rpartition("-")[2]
        assert what == kind
        assert again == f"python tools/fuzz.py --reader {reader} --seed 0 --first {number} --executions 1"
    found = (kept["crash"] / "input/a.json").read_bytes()
    assert fuzz(*(kept["crash"] / "what.txt").read_text().splitlines()[1].split()[2:])[0] == 1
    assert (kept["crash"] / "input/a.json").read_bytes() == found


def test_readers_that_only_refuse_are_no_failures(fuzz, tmp_path):
    code, output = fuzz("--reader", "good", "--executions", "50")
    assert (code, "1 failures" in output) == (0, False), output
    assert not (tmp_path / "kept").exists()


def test_an_unknown_reader_is_an_error(fuzz):
    code, output = fuzz("--reader", "nothing")
    assert code == 1
    assert "no reader 'nothing'; known: good, crash" in output


# Targets and changes


@pytest.mark.parametrize("target", core.TARGETS, ids=lambda target: target.name)
def test_every_target_reads_its_own_input(tmp_path, target):
    target.seed(tmp_path)
    target.mend(tmp_path)
    target.read(tmp_path)
    for file in tmp_path.rglob("*"):
        if file.is_file():
            file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    with pytest.raises(PtqError):  # so it does read
        target.read(tmp_path)


@pytest.mark.parametrize("name", ["a.json", "a.yaml", "a.bin", "a.safetensors", "a.pth", "a.npz", "a.onnx"])
def test_the_same_dice_make_the_same_changes(name):
    content = json.dumps({"a": [1, 2.5, "x"], "b": {"c": None}}).encode()
    found = [mutations.mutate(content, name, random.Random(number)) for number in range(200)]
    assert found == [mutations.mutate(content, name, random.Random(number)) for number in range(200)]
    assert len(set(found)) > 100


def test_checksums_are_right_again(tmp_path):
    core.write_artifact(tmp_path)
    model = tmp_path / "model.safetensors"
    model.write_bytes(model.read_bytes()[:-4] + b"\0\0\0\0")
    core.mend_artifact(tmp_path)
    core.read_artifact(tmp_path)


def test_memory_is_measured():
    peak = memory.Peak()
    peak.start()
    assert peak.taken() < 2**24
    large = b"x" * 2**27
    assert peak.taken() >= len(large)
