"""Runs of the plugins killed by the system at random moments, and resumed, as tools/bench/kill.py does."""

import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
sys.path.append(str(ROOT / "tools" / "bench"))

import kill  # noqa: E402

LANES = [
    "steps.1.selective-focus.iterations=12",
    "task.calibration=6",
    "task.max_images=4",
    "evaluate.baseline=false",
]
DENOISING = [
    "task.calibration_samples=4",
    "task.samples=4",
    "task.steps=3",
    "steps.1.tiar.iterations=10",
    "steps.2.brecq.iterations=3",
]


def language(folder):
    tiny_lm = pytest.importorskip("tiny_lm")
    tiny_lm.save(folder / "model")
    tiny_lm.write_text(folder / "text.txt", 400)
    texts = [f"task.{key}={folder / 'text.txt'}" for key in ("text", "calibration")]
    sizes = ["task.window=16", "task.calibration_window=16", "task.max_windows=3"]
    return [f"task.model={folder / 'model'}", *texts, *sizes, "quant.weights.group_size=16"]


@pytest.mark.parametrize("plugin", ["lane", "diffusion", "llm"])
def test_killed_runs_are_resumed_to_the_same_bytes(plugin, tmp_path, capsys):
    pytest.importorskip(f"ptq_{plugin}")
    changes = {"lane": LANES, "diffusion": DENOISING}.get(plugin) or language(tmp_path)
    command = ["--plugin", plugin, "--kills", "1", "--output", str(tmp_path / "out")]
    command += [f"--set={change}" for change in changes]
    assert kill.main([*command, *(["--recipe", "w4a16"] if plugin == "llm" else [])]) == 0
    rows = [line for line in capsys.readouterr().out.splitlines() if line.endswith("| same |")]
    assert len(rows) == 2  # as they come, and in the table


def test_other_bytes_are_seen(tmp_path, capsys, monkeypatch):
    script = tmp_path / "run.py"
    script.write_text(
        "import pathlib, sys, time\n"
        "out = pathlib.Path(sys.argv[sys.argv.index('--output') + 1])\n"
        "out.mkdir(exist_ok=True)\n"
        "while time.process_time() < 1: pass\n"
        "(out / 'model.safetensors').write_text(str('--resume' in sys.argv))\n"
    )
    monkeypatch.setattr(kill, "_QUANTIZE", script)
    assert kill.main(["--plugin", "lane", "--kills", "1", "--output", str(tmp_path / "out")]) == 1
    assert "| OTHER |" in capsys.readouterr().out


def test_a_run_that_fails_stops_it_all(tmp_path):
    with pytest.raises(SystemExit, match=r"ended with 2: see .*log\.txt"):
        kill.main(["--plugin", "nobody", "--kills", "1", "--output", str(tmp_path / "out")])
    assert "plugin 'nobody' is not installed" in (tmp_path / "out/log.txt").read_text()
