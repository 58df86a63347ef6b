"""What the process of a job does: quantize once, then judge on every text and task.

Run as `python -m ptq_llm.bench_cell`, with the job as the first line of standard input. The bench keeps
that open for as long as it lives: when it is gone, so is this process.
"""

import os
import sys
import threading
from pathlib import Path
from typing import Any

import torch

from ptq_llm import models, text, zero_shot
from ptq_llm.adviser import calibration_tokens
from ptq_llm.bench_job import Cost, Exam, Job, Verdict
from ptq_llm.causal_lm import SELF, CausalLM, options_of
from ptq_llm.models import LanguageModel
from ptqcore import DataError, PtqError, Recipe, digest_of, load, quantize

PLUGIN = "llm"


def carry_out(job: Job) -> None:
    """Do what is left of a job; what goes wrong is kept in the place of the verdict."""
    try:
        if job.read_cost() is None:
            _quantize(job)
        if job.open_exams():
            _judge(job)
    except PtqError as error:
        job.fail(str(error))


def _quantize(job: Job) -> None:
    """Run the recipe, evaluated on the first text that can be.

    Raises:
        PtqError: if the run fails for another reason than its data.
    """
    for exam in job.exams:
        if exam.kind != "text":
            continue
        recipe = _recipe(job, exam.source)
        try:
            record = quantize(recipe, PLUGIN, Path(job.folder), job.resume)
        except DataError as error:
            exam.fail(str(error))
            continue
        job.write_cost(_cost(record, _calibration_tokens(recipe)))
        exam.write(Verdict(record.before, record.after))
        return
    raise DataError("nothing was quantized, because no text could be evaluated")


def _recipe(job: Job, text: str) -> Recipe:
    return Recipe.model_validate(job.sections | {"task": job.sections["task"] | {"text": text}})


def _calibration_tokens(recipe: Recipe) -> int:
    options = options_of(recipe)
    available = None
    if options.calibration != SELF:
        tokenizer = models.outline(options.model).tokenizer
        available = len(text.read_tokens(options.calibration, "task.calibration", tokenizer))
    return calibration_tokens(options.calibration_samples, options.calibration_window, available)


def _cost(record: Any, tokens: int) -> Cost:
    """The cost of a run from its record.

    A resumed run measures its own time and memory alone; what its phases and blocks took, those from the
    journal included, is the least that it took as a whole.
    """
    phases, sizes = record.phases, record.size_bytes
    seconds = max(record.seconds, sum(phases.values()))
    others = sum(phases[name] for name in ("calibration samples", "metrics before", "metrics after"))
    peak = max(record.peak_memory_bytes, *(block.peak_memory_bytes for block in record.blocks))
    speed = tokens / phases["quantize blocks"]
    return Cost(speed, seconds - others, peak, sizes["before"], sizes["after"])


def _judge(job: Job) -> None:
    """Judge the artifact on what has no verdict, with the task's own `evaluate` and with lm-eval."""
    recipe = _recipe(job, SELF)
    options = options_of(recipe)
    full = models.load(options.model, getattr(torch, options.dtype))
    quantized = LanguageModel(load(job.folder), full.tokenizer)
    for exam in job.open_exams():
        try:
            if exam.kind == "text":
                task = CausalLM(options_of(_recipe(job, exam.source)), recipe.seed, Path(job.folder))
                task.use(full)
                verdict = Verdict(task.evaluate(full.model), task.evaluate(quantized.model))
            else:
                verdict = _judge_by_task(exam.source, full, quantized, Path(job.sections["task"]["shared"]))
            exam.write(verdict)
        except PtqError as error:
            exam.fail(str(error))


def _judge_by_task(task: str, full: LanguageModel, quantized: LanguageModel, cache: Path) -> Verdict:
    """The metrics of a zero-shot task; those of full precision are kept for the other recipes."""
    mark = digest_of([zero_shot.identity(task), dict(full.model.state_dict())])[:16]
    kept = Exam("task", task, str(cache / f"task-{mark}.json"))
    known = kept.read()
    if known is None:
        known = Verdict(before=zero_shot.evaluate(full, task, cache))
        kept.write(known)
    return Verdict(known.before, zero_shot.evaluate(quantized, task, cache))


def _end_with_the_bench() -> None:
    """Wait for the end of standard input, which the bench holds open."""
    sys.stdin.read()
    os._exit(1)


if __name__ == "__main__":
    given = Job.from_json(sys.stdin.readline())
    threading.Thread(target=_end_with_the_bench, daemon=True).start()
    try:
        carry_out(given)
    except KeyboardInterrupt:
        os._exit(130)
