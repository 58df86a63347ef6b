"""The bench: recipes × models × texts, every recipe on every model quantized once and judged on all texts.

OUTPUT/bench.md, bench.csv, bench.html   the table, written again after every run
OUTPUT/runs/RECIPE-MODEL-DIGEST/         the artifact and the report of each run
OUTPUT/cells/DIGEST.json                 what is known already: `Cost` of a run, `Verdict` on a text or task
OUTPUT/shared/                           what full precision writes and predicts, for all runs of a model

The digests are of everything that decides a figure: the recipe, the files of the model, of the
calibration text and of the text or task, and the versions of the packages that compute.
"""

import hashlib
import json
import platform
import re
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from importlib.metadata import version
from os import environ
from pathlib import Path
from typing import Any

from ptq_llm import models, zero_shot
from ptq_llm.bench_job import Exam, Job, Kind
from ptq_llm.bench_table import Row, make_rows, write_tables
from ptq_llm.causal_lm import SELF, options_of
from ptqcore import ArtifactError, DataError, Recipe, RecipeError, digest_files, say, track

_PACKAGES = ("ptqcore", "ptq-llm", "torch", "transformers")
_OWN_KEYS = {"task.model": "--model", "task.text": "--text", "task.shared": "--output"}
_LONGEST_REASON = 300


@dataclass(frozen=True)
class Bench:
    """What is compared: resolved recipes; models and texts as recipes name them; YAML files of zero-shot
    tasks; and the folder for everything."""

    recipes: Sequence[Recipe]
    models: Sequence[str]
    texts: Sequence[str]
    tasks: Sequence[str]
    output: Path


def refuse_own_keys(overrides: Sequence[str]) -> None:
    """Refuse `KEY=VALUE` of keys that the bench sets itself.

    Raises:
        RecipeError: naming the option to use.
    """
    for override in overrides:
        key = override.partition("=")[0]
        if key in _OWN_KEYS:
            raise RecipeError(f"--set {key}: the bench sets it itself, use {_OWN_KEYS[key]}")


def run(bench: Bench, resume: bool, execute: Callable[[Job], None] | None = None) -> list[Row]:
    """Carry out what is not known yet, and write the tables.

    Args:
        bench: what is compared.
        resume: whether to keep what an earlier bench in the same folder found, if nothing that decides it
            has changed, and to go on with an interrupted run. What failed is tried again.
        execute: carries out a job; by default in a process of its own, whose peak memory is the run's.

    Returns:
        A row for each recipe, model and text. What failed has a reason, and did not stop the others.

    Raises:
        PtqError: before anything runs, if a file cannot be read or the folder not be written.
    """
    jobs = make_jobs(bench, resume)
    _make_folders(bench.output)
    for job in jobs:
        job.forget(failures_only=resume)
    pending = [job for job in jobs if job.read_cost() is None or job.open_exams()]
    if len(pending) < len(jobs):
        say(f"bench: {len(jobs) - len(pending)} of {len(jobs)} runs are finished already")
    for job in track(pending, "bench"):
        say(f"bench: {job.recipe} on {job.model}")
        (execute or in_own_process)(job)
        write_tables(make_rows(jobs), bench.output)
    rows = make_rows(jobs)
    write_tables(rows, bench.output)
    return rows


def _make_folders(output: Path) -> None:
    try:
        for name in ("cells", "shared", "runs"):
            (output / name).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ArtifactError(f"cannot write {output}: {error.strerror}; choose another --output") from error


def make_jobs(bench: Bench, resume: bool) -> list[Job]:
    """A job for each model and recipe.

    Raises:
        PtqError: if a file cannot be read, or a recipe is not one for language models.
    """
    _check_distinct(bench)
    exams: dict[tuple[Kind, str], str]
    exams = {("text", text): _text_identity(text, "--text") for text in bench.texts}
    exams |= {("task", task): zero_shot.identity(task) for task in bench.tasks}
    return [
        _job(bench, recipe, model, [identity, _versions()], exams, resume)
        for model, identity in {model: _model_identity(model) for model in bench.models}.items()
        for recipe in bench.recipes
    ]


def _check_distinct(bench: Bench) -> None:
    """Refuse what would give two rows with the same name."""
    named = {
        "--recipe": [recipe.name for recipe in bench.recipes],
        "--model": bench.models,
        "--text": bench.texts,
        "--tasks": bench.tasks,
    }
    for option, names in named.items():
        twice = next((name for name in names if list(names).count(name) > 1), None)
        if twice is not None:
            raise RecipeError(f"{option} {twice!r} is given twice: name each once, and recipes differently")


def _job(
    bench: Bench,
    recipe: Recipe,
    model: str,
    common: list[Any],
    exams: Mapping[tuple[Kind, str], str],
    resume: bool,
) -> Job:
    options_of(recipe)
    sections = recipe.model_dump(mode="json")
    decides = {
        key: value for key, value in sections["task"].items() if key not in ("model", "text", "shared")
    }
    calibration = _text_identity(decides["calibration"], "task.calibration")
    mark = _digest(sections | {"task": decides}, calibration, *common)
    sections["task"] |= {"model": model, "shared": str(bench.output / "shared")}
    cells = bench.output / "cells"
    readable = re.sub(r"[^A-Za-z0-9._-]+", "-", f"{recipe.name}-{Path(model).stem}")
    return Job(
        recipe=recipe.name,
        model=model,
        sections=sections,
        folder=str(bench.output / "runs" / f"{readable}-{mark[:8]}"),
        cost=str(cells / f"{mark}.json"),
        exams=[
            Exam(kind, source, str(cells / f"{_digest(mark, kind, identity)}.json"))
            for (kind, source), identity in exams.items()
        ],
        resume=resume,
    )


def _text_identity(text: str, key: str) -> str:
    if text == SELF:
        return SELF
    try:
        return digest_files([Path(text).expanduser()])
    except OSError as error:
        raise DataError(f"{key} {text!r} cannot be read: {error.strerror}") from error


def _model_identity(model: str) -> str:
    """Of the model's files: weights, configuration, tokenizer."""
    path = models.locate(model)
    files = [path] if path.is_file() else sorted(file for file in path.iterdir() if file.is_file())
    return digest_files(files)


def _versions() -> dict[str, str]:
    return {"python": platform.python_version()} | {name: version(name) for name in _PACKAGES}


def _digest(*parts: Any) -> str:
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:20]


def in_own_process(job: Job) -> None:
    """Carry out a job in another process of the same Python, which ends when this one does.

    What it says is passed on. Where it ends before its work does, what it said last is the reason.
    """
    command = [sys.executable, "-P", "-m", "ptq_llm.bench_cell"]
    quiet = environ | {"TQDM_MININTERVAL": "10"}  # the bars of lm-eval become lines here
    pipe = subprocess.PIPE
    last = ""
    with subprocess.Popen(
        command, stdin=pipe, stderr=pipe, text=True, encoding="utf-8", errors="replace", env=quiet
    ) as process:
        assert process.stdin is not None
        assert process.stderr is not None
        with suppress(BrokenPipeError):  # it may have died by now
            process.stdin.write(job.to_json() + "\n")
            process.stdin.flush()
        for line in process.stderr:
            say(line.rstrip())
            last = line.strip() or last
        code = process.wait()
    if code:
        ended = f"was ended by signal {-code}" if code < 0 else f"ended with exit code {code}"
        job.fail(f"its process {ended}: {last or 'it said nothing'}"[:_LONGEST_REASON])
    job.fail("its process ended without a verdict")
