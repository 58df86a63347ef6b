"""`ptq sweep` on Ray: worker processes that are killed in the middle, and the bytes of their artifacts."""

import hashlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml
from fake_distribution import write_distribution

pytest.importorskip("ray")

COMMAND = [sys.executable, "-c", "from ptqcore.cli import main; main()"]
NAMES = [f"w{bits}-{observer}" for bits in (3, 4, 6, 8) for observer in ("minmax", "mse", "percentile")]
KILLED = NAMES[4]


def recipe(name, **nap):
    bits, observer = name[1:].split("-")
    weights = {"bits": int(bits), "granularity": "channel", "observer": observer}
    steps = [{"nap": nap}, "round"] if nap else ["round"]
    return {"task": {"kind": "small"}, "quant": {"weights": weights}, "steps": steps}


def start(folder, *arguments):
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    path = (folder / "site", Path(__file__).parent, environment.get("PYTHONPATH", ""))
    environment["PYTHONPATH"] = os.pathsep.join(map(str, path)).rstrip(os.pathsep)
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen([*COMMAND, *arguments], cwd=folder, env=environment, **pipes)


def wait_for(file, process):
    """What is in a file, as soon as it is there."""
    for _ in range(3000):
        if file.exists():
            return file.read_text()
        assert process.poll() is None, process.communicate()
        time.sleep(0.1)
    raise AssertionError(f"{file} does not come")


@pytest.fixture(scope="module")
def swept(tmp_path_factory):
    """The folder of a sweep of 12 recipes, of which one lost its process behind the first block."""
    folder = tmp_path_factory.mktemp("swept")
    write_distribution(folder / "site", "ptq-small", "small", "from sweep_plugin import plugin")
    for name in NAMES:
        nap = {"file": str(folder / "pid"), "trace": str(folder / "trace")} if name == KILLED else {}
        (folder / f"{name}.yaml").write_text(yaml.safe_dump(recipe(name, **nap)))
    sweep = {"plugin": "small", "recipes": [f"{name}.yaml" for name in NAMES]}
    (folder / "sweep.yaml").write_text(yaml.safe_dump(sweep))
    process = start(folder, "sweep", "sweep.yaml", "--output", "out", "--workers", "2")
    os.kill(int(wait_for(folder / "pid", process)), signal.SIGKILL)
    out, err = process.communicate(timeout=600)
    assert process.returncode == 0, out + err
    (folder / "err.txt").write_text(err)
    return folder


def test_with_a_worker_killed_in_the_middle_all_recipes_have_results(swept):
    rows = json.loads((swept / "out" / "sweep.json").read_text())
    assert [row["name"] for row in rows] == NAMES
    assert {row["state"] for row in rows} == {"done"}
    assert all(row["metrics"]["after"]["sum"] for row in rows)
    assert f"sweep: {KILLED}: its worker process died, it goes on behind" in (swept / "err.txt").read_text()


def test_the_killed_run_went_on_behind_its_last_finished_block(swept):
    assert (swept / "trace").read_text().split() == ["0", "1", "1", "2"]


def test_artifacts_are_those_of_ptq_quantize(swept, ptq, monkeypatch):
    monkeypatch.syspath_prepend(swept / "site")
    monkeypatch.chdir(swept)
    for name in (NAMES[0], KILLED):
        assert ptq("quantize", "--plugin", "small", "--recipe", f"{name}.yaml", "--output", "one")[0] == 0
        for file in ("model.safetensors", "manifest.json", "recipe.yaml"):
            one, other = (Path(folder) / file for folder in ("one", f"out/{name}"))
            assert hashlib.sha256(one.read_bytes()).digest() == hashlib.sha256(other.read_bytes()).digest()
