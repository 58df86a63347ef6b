"""Two processes of `torchrun` against one, on whole runs."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import processes
import pytest
from tiny_task import weights_of

SCRIPT = Path(processes.__file__)
EXACT = ["dataflow", "layers", "experts", "stranger"]
LEARNED = ["adaround", "brecq", "qdrop"]


def launch(folder, *cases, **environment):
    """Run cases in two processes; exit code and standard error."""
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2"]
    done = subprocess.run(
        [*command, str(SCRIPT), str(folder), *cases],
        env=os.environ | {"OMP_NUM_THREADS": "1"} | environment,
        capture_output=True,
        text=True,
        timeout=120,
    )
    return done.returncode, done.stderr


def said(errors):
    """What processes said themselves, not torchrun of them."""
    return [line for line in errors.splitlines() if line.startswith("error: ")]


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Folders of the runs of one process and of two, and what these said."""
    one, two = tmp_path_factory.mktemp("one"), tmp_path_factory.mktemp("two")
    processes.main(one, *EXACT, *LEARNED)
    code, errors = launch(two, *EXACT, *LEARNED, "killed")
    assert code == 0, errors
    return one, two, errors


@pytest.mark.parametrize("case", EXACT)
def test_the_bytes_and_figures_are_those_of_one_process(runs, case):
    one, two, _ = runs
    assert weights_of(two / case) == weights_of(one / case)
    assert (two / f"{case}.json").read_text() == (one / f"{case}.json").read_text()


@pytest.mark.parametrize("case", LEARNED)
def test_what_is_learned_is_as_good(runs, case):
    one, two, _ = runs
    found, wanted = (json.loads((folder / f"{case}.json").read_text())[0] for folder in (two, one))
    assert sum(found) == pytest.approx(sum(wanted), rel=0.01)


def test_the_first_process_alone_writes_and_speaks(runs):
    _, two, errors = runs
    for case in EXACT:
        assert not (two / case / ".work").exists()
        assert not (two / case / ".lock").exists()
    assert errors.count("quantizing blocks: 3 done") == len(EXACT) - 1 + len(LEARNED) + 1
    assert errors.count("quantizing blocks: 2 done") == 1  # the experts
    assert errors.count("2 processes: every one computes all calibration samples, for scaled;") == 1


def test_an_error_of_one_process_ends_all(tmp_path):
    code, errors = launch(tmp_path, "missing")
    assert code != 0
    assert said(errors) == ["error: process 2 of 2: the disk of this machine holds no samples"]
    assert re.search(r"rank\s*: 1 .*\n\s*exitcode\s*: 2 ", errors)


def test_a_killed_run_goes_on_to_the_same_bytes_and_an_error_of_all_is_one_sentence(runs, tmp_path):
    _, whole, _ = runs
    code, _ = launch(tmp_path, "killed", DIES="1")
    assert code != 0
    journal = tmp_path / "killed/.work"
    assert (journal / "block-0000.json").exists()
    assert not (journal / "block-0001.json").exists()
    assert (journal / "midway-0001-0000.safetensors").exists()
    code, errors = launch(tmp_path, "killed", "too few")
    assert weights_of(tmp_path / "killed") == weights_of(whole / "killed")
    assert code != 0
    assert re.search(r"exitcode\s*: 2 ", errors)
    sentence = "2 processes cannot share 1 calibration samples: start at most 1"
    assert 1 <= len(said(errors)) <= 2
    assert all(sentence in line for line in said(errors))
