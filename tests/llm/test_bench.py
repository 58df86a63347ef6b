"""The bench: every figure is that of an ordinary run, nothing is done twice, nothing stops the others."""

import csv
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace

import pytest
import tiny_lm
import torch
from safetensors.torch import load_file, save_file

import ptqcore
from ptq_llm import bench_cell, bench_table
from ptq_llm.bench import Bench, make_jobs, run
from ptq_llm.bench_cell import carry_out
from ptq_llm.bench_job import Cost, Verdict
from ptq_llm.bench_table import Row
from ptq_llm.metrics import Judge
from ptqcore import find_recipe
from ptqcore.rounding import Round

RECIPES = ("w8a8", "w4a16")
METRICS = ("perplexity", "kl_divergence", "top1_agreement")


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """Two models, two texts, and the changes that make a recipe small."""
    base = tmp_path_factory.mktemp("world")
    small = [
        "export=[]",
        "steps=[round]",
        "task.window=32",
        "task.max_windows=3",
        "task.calibration_window=32",
    ]
    small += ["task.calibration_samples=4", f"task.calibration={base / 'calibration.txt'}"]
    for index, name in enumerate(("a.txt", "b.txt", "calibration.txt")):
        tiny_lm.write_text(base / name, 200, seed=index)
    return SimpleNamespace(
        models=[str(tiny_lm.save(base / kind, kind, num_hidden_layers=2)) for kind in ("llama", "qwen3")],
        texts=[str(base / "a.txt"), str(base / "b.txt")],
        overrides=small,
        calibration=base / "calibration.txt",
    )


def bench_of(world, output, **changes):
    recipes = [find_recipe(name, "llm", world.overrides) for name in RECIPES]
    return replace(Bench(recipes, world.models, world.texts, [], output), **changes)


@pytest.fixture(scope="module")
def finished(world, tmp_path_factory):
    """A finished bench, which is only read: its folder, its rows, and the jobs that it had."""
    output = tmp_path_factory.mktemp("bench")
    bench = bench_of(world, output)
    return SimpleNamespace(
        output=output, rows=run(bench, False, carry_out), jobs=make_jobs(bench, False), bench=bench
    )


@pytest.fixture
def own(finished, world, tmp_path):
    """A copy of the finished bench that may be changed."""
    shutil.copytree(finished.output, tmp_path / "bench")
    return bench_of(world, tmp_path / "bench")


class Watch:
    """Counts the blocks that are rounded and the times that a model is measured."""

    def __init__(self, monkeypatch):
        self.blocks: list[str] = []
        self.measured: list[str] = []
        self.interrupt_at = 0
        rounded, measured = Round.block, Judge.measure

        def block(step, block, calibration):
            self.blocks.append(block.path)
            if len(self.blocks) == self.interrupt_at:
                raise KeyboardInterrupt
            return rounded(step, block, calibration)

        def measure(judge, model, label, *rest):
            self.measured.append(label)
            return measured(judge, model, label, *rest)

        monkeypatch.setattr(Round, "block", block)
        monkeypatch.setattr(Judge, "measure", measure)


@pytest.fixture
def watch(monkeypatch):
    return Watch(monkeypatch)


def figures(rows):
    """What does not differ from time to time."""
    return [(row.recipe, row.model, row.text, row.verdict, row.cost.size_after_bytes) for row in rows]


# What the figures are


def test_there_is_a_row_for_every_recipe_model_and_text(finished):
    assert [(row.model, row.recipe, row.text) for row in finished.rows] == [
        (model, recipe, text)
        for model in ("llama", "qwen3")
        for recipe in RECIPES
        for text in ("a.txt", "b.txt")
    ]
    assert not any(row.reason for row in finished.rows)


def test_the_figures_on_the_first_text_are_those_of_the_runs_metrics_file(finished):
    for job in finished.jobs:
        metrics = json.loads((Path(job.folder) / "metrics.json").read_text())
        (row,) = [
            r for r in finished.rows if (r.recipe, r.text) == (job.recipe, "a.txt") and r.model in job.model
        ]
        assert (row.verdict.before, row.verdict.after) == (metrics["before"], metrics["after"])
        assert row.cost.size_before_bytes == metrics["size_bytes"]["before"]
        assert row.cost.size_after_bytes == metrics["size_bytes"]["after"]
        assert row.cost.peak_memory_bytes == metrics["peak_memory_bytes"]
        assert 0 < row.cost.seconds < metrics["seconds"]


@pytest.mark.parametrize("recipe", RECIPES)
def test_the_figures_on_another_text_are_those_of_an_ordinary_run_on_it(finished, world, tmp_path, recipe):
    changes = [*world.overrides, f"task.model={world.models[1]}", f"task.text={world.texts[1]}"]
    record = ptqcore.quantize(find_recipe(recipe, "llm", changes), "llm", tmp_path / "out")
    (row,) = [r for r in finished.rows if (r.recipe, r.model, r.text) == (recipe, "qwen3", "b.txt")]
    assert row.verdict == Verdict(record.before, record.after)


def test_tokens_per_second_are_calibration_tokens_by_the_seconds_of_the_blocks():
    blocks = [SimpleNamespace(peak_memory_bytes=peak) for peak in (5, 9)]
    phases = {"load the model": 4.0, "calibration samples": 16.0, "metrics before": 1.0}
    phases |= {"quantize blocks": 2.0, "metrics after": 8.0}
    sizes = {"before": 100, "after": 30}
    record = SimpleNamespace(
        phases=phases, blocks=blocks, seconds=32.0, peak_memory_bytes=7, size_bytes=sizes
    )
    assert bench_cell._cost(record, 128) == Cost(64.0, 32.0 - 25.0, 9, 100, 30)
    resumed = SimpleNamespace(**vars(record) | {"seconds": 3.0})
    assert bench_cell._cost(resumed, 128).seconds == 31.0 - 25.0


def test_each_model_is_measured_once_in_full_precision_and_quantized_once_by_each_recipe(
    world, tmp_path, watch
):
    run(bench_of(world, tmp_path / "out"), False, carry_out)
    assert len(watch.blocks) == 2 * len(RECIPES) * len(world.models)
    full = [label for label in watch.measured if label == "measuring full precision"]
    assert len(full) == len(world.models) * len(world.texts)
    assert len(watch.measured) - len(full) == len(RECIPES) * len(world.models) * len(world.texts)


def test_what_the_model_writes_is_written_once_for_all_recipes(world, tmp_path, monkeypatch):
    changes = [*world.overrides, "task.calibration=self"]
    recipes = [find_recipe(name, "llm", changes) for name in RECIPES]
    counted, write = [], bench_cell.text.write
    monkeypatch.setattr(bench_cell.text, "write", lambda *args: counted.append(args) or write(*args))
    bench = Bench(recipes, world.models[:1], ["self"], [], tmp_path)
    rows = run(bench, False, carry_out)
    assert len(counted) == 1
    assert [row.reason for row in rows] == ["", ""]
    assert rows[0].cost.tokens_per_second > 0


# Interrupted and resumed


def test_an_interrupted_bench_goes_on_where_it_stopped(finished, world, tmp_path, watch):
    """In the second block of the second run."""
    bench = bench_of(world, tmp_path / "out")
    watch.interrupt_at = 4
    with pytest.raises(KeyboardInterrupt):
        run(bench, False, carry_out)
    assert len((bench.output / "bench.csv").read_text().splitlines()) == 1 + len(world.texts)
    kept = {file: file.stat().st_mtime_ns for file in (bench.output / "cells").iterdir()}
    watch.interrupt_at = 0
    rows = run(bench, True, carry_out)
    assert watch.blocks[4:6] == ["model.layers.1", "model.layers.0"]
    assert len(watch.blocks) == 4 + 1 + 2 + 2
    assert figures(rows) == figures(finished.rows)
    assert all(file.stat().st_mtime_ns == when for file, when in kept.items())


def test_a_finished_bench_does_nothing_when_resumed(finished, own, watch, capsys):
    assert run(own, True, carry_out) == finished.rows
    assert (watch.blocks, watch.measured) == ([], [])
    assert "4 of 4 runs are finished already" in capsys.readouterr().err


def test_without_resume_everything_is_done_again(own, watch):
    run(replace(own, models=own.models[:1]), False, carry_out)
    assert len(watch.blocks) == 4
    assert watch.measured.count("measuring full precision") == 0  # what that predicts has not changed


def test_another_text_is_judged_on_the_artifacts_that_are_there(world, own, watch, tmp_path):
    more = str(tiny_lm.write_text(tmp_path / "c.txt", 200, seed=7))
    rows = run(replace(own, texts=[*own.texts, more]), True, carry_out)
    assert [row.text for row in rows[:3]] == ["a.txt", "b.txt", "c.txt"]
    assert watch.blocks == []
    assert len(watch.measured) == len(world.models) * (1 + len(RECIPES))


def test_a_text_that_has_changed_is_judged_again(finished, world, own, watch, tmp_path):
    changed = tmp_path / "b.txt"
    tiny_lm.write_text(changed, 200, seed=8)
    rows = run(replace(own, texts=[own.texts[0], str(changed)]), True, carry_out)
    assert watch.blocks == []
    for row, before in zip(rows, finished.rows, strict=True):
        assert (row.verdict == before.verdict) == (row.text == "a.txt")


@pytest.mark.parametrize("change", ["quant.weights.observer=mse", "task.calibration_samples=3", "seed=1"])
def test_a_recipe_that_has_changed_is_run_again(world, own, watch, change):
    recipes = [find_recipe("w8a8", "llm", [*world.overrides, change]), own.recipes[1]]
    run(replace(own, recipes=recipes, models=own.models[:1]), True, carry_out)
    assert len(watch.blocks) == 2


def test_a_model_that_has_changed_is_run_again(world, own, watch, tmp_path):
    folder = shutil.copytree(world.models[0], tmp_path / "llama")
    tensors = load_file(folder / "model.safetensors")
    tensors["model.layers.0.mlp.up_proj.weight"][0, 0] += 1
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    run(replace(own, models=[str(folder)], recipes=own.recipes[:1]), True, carry_out)
    assert len(watch.blocks) == 2


def test_a_calibration_text_that_has_changed_is_another_run(world, own, watch, tmp_path):
    other = tiny_lm.write_text(tmp_path / "calibration.txt", 200, seed=9)
    recipe = find_recipe("w8a8", "llm", [*world.overrides, f"task.calibration={other}"])
    run(replace(own, models=own.models[:1], recipes=[recipe]), True, carry_out)
    assert len(watch.blocks) == 2


# What fails


def test_a_text_that_is_too_short_is_a_row_with_the_reason_and_the_others_have_their_figures(
    finished, world, tmp_path, watch
):
    short = tmp_path / "short.txt"
    short.write_text("abc")
    bench = bench_of(world, tmp_path / "out", texts=[str(short), *world.texts], models=world.models[:1])
    rows = run(bench, False, carry_out)
    assert [bool(row.reason) for row in rows] == [True, False, False] * 2
    assert rows[0].reason == (
        f"task.text '{short}' holds 3 tokens, fewer than one window of 32: "
        "give a longer text, or a smaller window"
    )
    assert figures(row for row in rows if not row.reason) == figures(finished.rows[:4])
    assert len(watch.blocks) == 4
    tiny_lm.write_text(short, 100)
    mended = run(bench, True, carry_out)
    assert not any(row.reason for row in mended)
    assert len(watch.blocks) == 4


def test_a_model_that_cannot_be_quantized_fails_alone(finished, world, tmp_path):
    broken = shutil.copytree(world.models[0], tmp_path / "broken")
    tensors = load_file(broken / "model.safetensors")
    tensors["model.norm.weight"][0] = torch.nan
    save_file(tensors, broken / "model.safetensors", metadata={"format": "pt"})
    models = [str(broken), world.models[0]]
    rows = run(bench_of(world, tmp_path / "out", models=models), False, carry_out)
    assert all("'model.norm.weight' of the model holds NaN" in row.reason for row in rows[:4])
    assert all(row.cost is None for row in rows[:4])
    assert figures(rows[4:]) == figures(finished.rows[:4])


# Processes


def one_cell(world, output):
    return bench_of(world, output, models=world.models[:1], texts=world.texts[:1])


def test_a_run_in_a_process_of_its_own_gives_the_same_figures(finished, world, tmp_path, capfd):
    bench = replace(
        one_cell(world, tmp_path / "out"), recipes=[find_recipe("w8a8", "llm", world.overrides)]
    )
    rows = run(bench, False)
    assert figures(rows) == figures(finished.rows[:1])
    assert rows[0].cost.peak_memory_bytes > 2**20
    assert "measuring full precision: 3 done" in capfd.readouterr().err


def test_a_process_that_dies_is_a_row_with_what_it_said_last(world, tmp_path, monkeypatch, capfd):
    code = "import os, sys; print('Killed by a test', file=sys.stderr, flush=True); os.kill(os.getpid(), 9)"
    fake = tmp_path / "python"
    fake.write_text(f"#!{sys.executable}\n{code}\n")
    fake.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(fake))
    rows = run(one_cell(world, tmp_path / "out"), False)
    assert [row.reason for row in rows] == ["its process was ended by signal 9: Killed by a test"] * 2


def test_a_run_does_not_outlive_a_bench_that_is_killed(world, tmp_path):
    """It waits for a text that never ends."""
    os.mkfifo(tmp_path / "endless.txt")
    job, _ = make_jobs(one_cell(world, tmp_path), False)
    sections = job.sections | {
        "task": job.sections["task"] | {"calibration": str(tmp_path / "endless.txt")}
    }
    (tmp_path / "job.json").write_text(replace(job, sections=sections).to_json())
    code = (
        "import sys; from ptq_llm.bench import in_own_process; from ptq_llm.bench_job import Job\n"
        "in_own_process(Job.from_json(open(sys.argv[1]).read()))"
    )
    bench = subprocess.Popen([sys.executable, "-c", code, tmp_path / "job.json"], stderr=subprocess.DEVNULL)
    end = wait_for(lambda: opened_by_a_reader(tmp_path / "endless.txt"))
    (child,) = children_of(bench.pid)
    assert Path(f"/proc/{child}/exe").exists()
    bench.send_signal(signal.SIGKILL)
    bench.wait()
    assert wait_for(lambda: not Path(f"/proc/{child}/exe").exists())
    os.close(end)


def opened_by_a_reader(fifo):
    """Its other end, once somebody reads."""
    try:
        return os.open(fifo, os.O_WRONLY | os.O_NONBLOCK)
    except OSError:
        return None


def children_of(pid):
    return Path(f"/proc/{pid}/task/{pid}/children").read_text().split()


def wait_for(condition, seconds=60):
    """What the condition gives as soon as it gives something."""
    for _ in range(seconds * 10):
        if found := condition():
            return found
        time.sleep(0.1)
    raise AssertionError("waited in vain")


# The tables


def test_the_csv_file_has_every_digit(finished):
    with open(finished.output / "bench.csv", newline="") as file:
        lines = list(csv.DictReader(file))
    assert list(lines[0]) == [
        *("recipe", "model", "text"),
        *("perplexity_before", "perplexity_after", "kl_divergence", "top1_agreement"),
        *("tokens_per_second", "seconds", "peak_memory_bytes", "size_before_bytes", "size_after_bytes"),
        "reason",
    ]
    for line, row in zip(lines, finished.rows, strict=True):
        assert (line["recipe"], line["model"], line["text"]) == (row.recipe, row.model, row.text)
        assert float(line["perplexity_before"]) == row.verdict.before["perplexity"]
        assert float(line["perplexity_after"]) == row.verdict.after["perplexity"]
        assert float(line["kl_divergence"]) == row.verdict.after["kl_divergence"]
        assert int(line["size_after_bytes"]) == row.cost.size_after_bytes
        assert line["reason"] == ""


def row(**changes):
    before = {"perplexity": 20.0, "kl_divergence": 0.0, "top1_agreement": 1.0}
    after = {"perplexity": 23.456789, "kl_divergence": 0.123456789, "top1_agreement": 0.9}
    fields = {"recipe": "w4", "model": "m|1", "text": "a.txt", "verdict": Verdict(before, after)}
    fields["cost"] = Cost(1234.567, 65.4321, 1_500_000_000, 540_000_000, 104_000_000)
    return Row(**fields | changes)


def test_the_markdown_table_has_five_digits_and_sizes_for_people():
    lines = bench_table.to_markdown([row()]).splitlines()
    assert lines[0] == (
        "| recipe | model | text | perplexity before | perplexity after | KL divergence | top-1 agreement "
        "| tokens/s | seconds | peak memory (GB) | size before (MB) | size after (MB) |"
    )
    assert lines[1] == f"|{' --- |' * 3}{' --: |' * 9}"
    assert lines[2] == (
        r"| w4 | m\|1 | a.txt | 20 | 23.457 | 0.12346 | 0.9 | 1234.6 | 65.432 | 1.5 | 540 | 104 |"
    )
    assert lines[4].startswith("- Perplexity")


def test_a_failed_row_has_its_reason_in_every_table():
    failed = row(recipe="w2", verdict=Verdict(reason="out of memory"), cost=None)
    rows = [row(), failed]
    lines = bench_table.to_markdown(rows).splitlines()
    assert lines[0].endswith("| failed because |")
    assert lines[3] == rf"| w2 | m\|1 | a.txt |{'  |' * 9} out of memory |"
    assert bench_table.to_csv(rows).splitlines()[2] == "w2,m|1,a.txt,,,,,,,,,,out of memory"
    page = bench_table.to_html(rows)
    assert "out of memory" in page
    assert len(re.findall("<title>[^<]*w2", page)) == 0  # nothing to draw


def test_metrics_that_only_some_recipes_have_are_columns():
    """As those of a quantized key-value cache."""
    decoded = row().verdict.after | {"decode_perplexity": 24.5}
    columns, cells = bench_table.table([row(), row(verdict=Verdict(row().verdict.before, decoded))])
    assert columns[6:8] == ["top1_agreement", "decode_perplexity"]
    assert [cell["decode_perplexity"] for cell in cells] == [None, 24.5]


def test_zero_shot_tasks_are_columns_before_and_after():
    tasks = {"piqa": Verdict({"acc": 0.7}, {"acc": 0.6}), "arc": Verdict(reason="no data")}
    (cells,) = bench_table.table([row(tasks=tasks)])[1]
    assert (cells["piqa_acc_before"], cells["piqa_acc_after"]) == (0.7, 0.6)
    assert cells["reason"] == "arc: no data"


def test_the_page_has_the_table_and_bars_for_full_precision_and_every_recipe(finished):
    page = (finished.output / "bench.html").read_text()
    assert "2 recipes, 2 models, 2 texts" in page
    assert not re.search(r"https?://|src=|url\(", page)
    perplexities, divergences = re.findall("<svg.*?</svg>", page, re.DOTALL)
    for row in finished.rows:
        place = f"{row.model} · {row.text}"
        assert f"<title>full precision, {place}: {row.verdict.before['perplexity']:.4g}" in perplexities
        assert f"<title>{row.recipe}, {place}: {row.verdict.after['perplexity']:.4g}" in perplexities
        assert f"<title>{row.recipe}, {place}: " in divergences
    assert "full precision" not in divergences


def test_names_are_short_as_long_as_they_tell_apart():
    found = bench_table.short_names(["x/a.txt", "y/a.txt", "x/b.txt", "tasks/piqa.yaml", "smollm2-135m"])
    assert list(found.values()) == ["x/a.txt", "y/a.txt", "b.txt", "piqa", "smollm2-135m"]


def test_a_table_of_nothing_is_a_table(tmp_path):
    bench_table.write_tables([], tmp_path)
    assert {file.name for file in tmp_path.iterdir()} == {"bench.md", "bench.csv", "bench.html"}


# The command


@pytest.fixture
def ptq(monkeypatch, ptq):
    """Run `ptq llm bench`, jobs in this process."""
    monkeypatch.setattr("ptq_llm.bench.in_own_process", carry_out)
    return partial(ptq, "llm", "bench")


def arguments(world, output, *more):
    changes = [part for change in world.overrides for part in ("--set", change)]
    named = ["--recipe", "w8a8", "--model", world.models[0], "--text", world.texts[0]]
    return [*named, *changes, "--output", output, *more]


def test_the_command_prints_the_table_and_where_it_is(ptq, world, finished, tmp_path):
    code, out, _ = ptq(*arguments(world, tmp_path / "out"))
    assert code == 0
    assert out.startswith("| recipe | model | text |")
    assert "| w8a8 | llama | a.txt |" in out
    assert f"table: {tmp_path / 'out' / 'bench.md'}" in out
    assert (tmp_path / "out" / "bench.html").is_file()


def test_the_command_exits_with_1_if_a_row_failed(ptq, world, tmp_path):
    (tmp_path / "short.txt").write_text("abc")
    code, out, err = ptq(*arguments(world, tmp_path / "out", "--text", tmp_path / "short.txt"))
    assert code == 1
    assert "holds 3 tokens" in out
    assert "error" not in err


def test_an_interrupted_command_says_how_to_go_on(ptq, world, tmp_path, watch):
    watch.interrupt_at = 1
    code, _, err = ptq(*arguments(world, tmp_path / "out"))
    assert code == 130
    assert err.endswith("interrupted; run the same command with --resume to go on\n")
    watch.interrupt_at = 0
    assert ptq(*arguments(world, tmp_path / "out", "--resume"))[0] == 0


@pytest.mark.parametrize(
    ("more", "sentence"),
    [
        (["--recipe", "w4a61"], "recipe 'w4a61' of plugin 'llm' is unknown"),
        (["--set", "quant.weights.bts=4"], "'quant.weights.bts' is unknown; did you mean 'bits'?"),
        (["--set", "task.model=x"], "--set task.model: the bench sets it itself, use --model"),
        (["--set", "task.text=x"], "--set task.text: the bench sets it itself, use --text"),
        (["--model", "no-such"], "task.model 'no-such' does not exist"),
        (["--text", "no-such.txt"], "--text 'no-such.txt' cannot be read: No such file"),
        (["--set", "task.calibration=no-such.txt"], "task.calibration 'no-such.txt' cannot be read"),
        (["--recipe", "w8a8"], "--recipe 'w8a8' is given twice"),
        (["--output", "/dev/null/out"], "cannot write /dev/null/out: Not a directory"),
    ],
)
def test_what_is_wrong_from_the_start_is_one_sentence_and_nothing_runs(
    ptq, world, tmp_path, more, sentence
):
    code, out, err = ptq(*arguments(world, tmp_path / "out", *more))
    assert (code, out) == (2, "")
    assert err.startswith("error: ")
    assert sentence in err
    assert err.count("\n") == 1
    assert not (tmp_path / "out").exists()


# Zero-shot tasks

TASK = """
task: opposites
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
output_type: multiple_choice
test_split: test
doc_to_text: "{{{{question}}}}"
doc_to_target: "{{{{answer}}}}"
doc_to_choice: "{{{{choices}}}}"
metric_list: [{{metric: acc}}]
"""


@pytest.fixture
def task(tmp_path):
    """A multiple-choice task, whose choices are one token each."""
    lines = [
        {"question": f"{letter}b", "choices": ["c", "d", "e"], "answer": i % 3}
        for i, letter in enumerate("abcdefgh")
    ]
    (tmp_path / "data.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (tmp_path / "opposites.yaml").write_text(TASK.format(data=tmp_path / "data.jsonl"))
    return tmp_path / "opposites.yaml"


needs_lm_eval = pytest.mark.skipif(find_spec("lm_eval") is None, reason="lm-eval is not installed")


@pytest.mark.skipif(find_spec("lm_eval") is not None, reason="lm-eval is installed")
def test_tasks_without_lm_eval_are_one_sentence(ptq, world, task, tmp_path):
    code, _, err = ptq(*arguments(world, tmp_path / "out", "--tasks", task))
    assert code == 2
    assert err == "error: --tasks needs lm-eval, which is not installed: pip install 'ptq-llm[eval]'\n"


@needs_lm_eval
def test_a_task_from_local_files_is_judged_before_and_after(world, task, tmp_path):
    bench = bench_of(
        world, tmp_path / "out", models=world.models[:1], texts=world.texts[:1], tasks=[str(task)]
    )
    rows = run(bench, False, carry_out)
    assert not any(row.reason for row in rows)
    jobs = make_jobs(bench, False)
    for row, job in zip(rows, jobs, strict=True):
        assert row.tasks["opposites"].before == {"acc": accuracy(tiny_lm.build(num_hidden_layers=2), task)}
        assert row.tasks["opposites"].after == {"acc": accuracy(ptqcore.load(job.folder), task)}
    again = run(bench, True, carry_out)
    assert again == rows


def accuracy(model, task):
    """Share of the questions whose most likely next letter is the answer."""
    tokenizer = tiny_lm.tokenizer()
    right = []
    for line in (task.parent / "data.jsonl").read_text().splitlines():
        document = json.loads(line)
        choices = [tokenizer(f" {choice}")["input_ids"] for choice in document["choices"]]
        question = tokenizer(document["question"])["input_ids"]
        scores = []
        for choice in choices:
            with torch.no_grad():
                logits = model(input_ids=torch.tensor([question + choice])).logits[0].log_softmax(-1)
            places = range(len(question) - 1, len(question) + len(choice) - 1)
            scores.append(
                sum(float(logits[place, token]) for place, token in zip(places, choice, strict=True))
            )
        right.append(scores.index(max(scores)) == document["answer"])
    return sum(right) / len(right)


@needs_lm_eval
@pytest.mark.parametrize(
    ("old", "new", "sentence"),
    [
        ("dataset_path: json", "dataset_path: allenai/ai2_arc", "takes its data from 'allenai/ai2_arc'"),
        ("data.jsonl", "none.jsonl", "none.jsonl' does not exist"),
        ("task: opposites", "group: opposites", "has no key task that names it"),
        ("task: opposites", "task: [", "cannot be read"),
    ],
)
def test_a_task_that_would_download_or_is_incomplete_is_refused(
    ptq, world, task, tmp_path, old, new, sentence
):
    task.write_text(task.read_text().replace(old, new))
    code, _, err = ptq(*arguments(world, tmp_path / "out", "--tasks", task))
    assert code == 2
    assert err.startswith("error: --tasks ")
    assert sentence in err


@needs_lm_eval
def test_a_task_that_lm_eval_cannot_run_is_a_reason(world, task, tmp_path):
    task.write_text(task.read_text().replace("test_split: test", "test_split: exam"))
    bench = bench_of(
        world, tmp_path / "out", models=world.models[:1], texts=world.texts[:1], tasks=[str(task)]
    )
    (row, _) = run(bench, False, carry_out)
    assert row.reason.startswith(f"opposites: --tasks '{task}' cannot be run by lm-eval: ")
    assert row.verdict.after
