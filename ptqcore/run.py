"""The corridor: a recipe goes in, an artifact with its exports, metrics and report comes out."""

import json
import traceback
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path

import torch
from torch import nn

from ptqcore import artifact, distributed, files, finite
from ptqcore.attachments import describe_attachments
from ptqcore.blame import blaming, enough_memory
from ptqcore.dataflow import tensors_in
from ptqcore.errors import (
    ArtifactError,
    BugError,
    DataError,
    DistributedError,
    ExportError,
    ModelError,
    PtqError,
)
from ptqcore.export.base import Exporter
from ptqcore.fingerprint import differences, fingerprint, versions
from ptqcore.journal import Journal
from ptqcore.meter import Meter
from ptqcore.modules import state_bytes
from ptqcore.on_disk import is_on_disk
from ptqcore.plan import Plan, make_plan
from ptqcore.plugin import Registry, discover
from ptqcore.preparation import prepare
from ptqcore.progress import say
from ptqcore.quantization import Quantization
from ptqcore.recipe import Recipe
from ptqcore.report.page import render
from ptqcore.report.record import ExportRecord, RunRecord
from ptqcore.restoring import restored
from ptqcore.seeding import put_back, seed
from ptqcore.tables import table_sizes
from ptqcore.task import Judged, Task
from ptqcore.version import __version__

EXPORTS = "exports"
WORK = ".work"
TRACEBACK = "traceback.txt"
FILES = ("metrics.json", "recipe.yaml", "report.html")


def quantize(
    recipe: Recipe, plugin: str, output: Path, resume: bool = False, registry: Registry | None = None
) -> RunRecord:
    """Run a recipe from end to end and write everything into `output`.

    An artifact that is already in `output` is replaced when the new one is whole, not before.

    Args:
        recipe: the validated recipe.
        plugin: the plugin whose names come first.
        output: folder for the artifact, exports, metrics and report.
        resume: whether to go on after the last finished block of an interrupted run.
        registry: the plugins, if not those that are installed.

    Returns:
        The record that `metrics.json` and `report.html` are written from. Where several processes do the
        run together, the first alone measures, exports and writes: the others return without metrics, once
        the artifact is there.

    Raises:
        PtqError: one sentence for the user; finished blocks stay in the journal.
    """
    plan = make_plan(recipe, plugin, registry or discover())
    distributed.join()
    with _workspace(output, resume) as work, put_back():
        with _traced(work), enough_memory("the run"):
            run = _Run(plan, output, work, resume)
            run.load()
            run.baseline()
            run.walk()
            if distributed.is_first():
                run.finish()
        if distributed.is_first():
            files.move_into(work / "artifact", output, artifact.MANIFEST_FILE, instead_of=[EXPORTS])
            files.remove(work)
    distributed.wait()
    return run.record


@contextmanager
def _workspace(output: Path, resume: bool) -> Iterator[Path]:
    """A folder for what is only needed meanwhile: that of the first process, or one inside it."""
    if not distributed.is_first():
        distributed.wait()
        yield files.folder(output / WORK / f"process-{distributed.rank()}", empty=not resume)
        return
    files.check_writable(output)
    _refuse_foreign(output)
    with files.locked(output):
        work = files.folder(output / WORK, empty=not resume)
        distributed.wait()
        yield work


@contextmanager
def _traced(work: Path) -> Iterator[None]:
    """Write where a plugin's code failed into a file, for its author, and say which."""
    try:
        yield
    except BugError as error:
        if error.__cause__ is None:
            raise
        text = "".join(traceback.format_exception(error.__cause__))
        files.write_text(work / TRACEBACK, text)
        raise BugError(f"{error} (its traceback is in {work / TRACEBACK})") from error.__cause__


def _refuse_foreign(output: Path) -> None:
    """Never replace files that no earlier run wrote.

    Raises:
        ArtifactError: naming the first of them.
    """
    if (output / artifact.MANIFEST_FILE).exists() or (output / WORK).exists():
        return
    for name in (artifact.ASSETS_FOLDER, EXPORTS, artifact.MODEL_FILE, *FILES):
        if (output / name).exists():
            raise ArtifactError(
                f"output folder {output} holds {name!r} but no artifact that it belongs to: "
                "choose another --output"
            )


class _Run:
    """One run; its methods are called in order."""

    def __init__(self, plan: Plan, output: Path, work: Path, resume: bool) -> None:
        self.plan, self.output, self.work, self.resume = plan, output, work, resume
        self.meter = Meter()
        recipe = plan.recipe
        self.who = f"task {recipe.task.kind.rpartition(':')[2]!r} of plugin {plan.task_owner!r}"
        with blaming(self.who, "to begin"):
            self.task: Task = plan.task(files.folder(work / "task"))
        self.record = RunRecord(
            plugin=plan.plugin,
            recipe=recipe.name,
            description=recipe.description,
            recipe_yaml=plan.resolved.to_yaml(),
            versions=versions(plan.registry.versions()),
            seed=recipe.seed,
        )

    def phase(self, name: str) -> AbstractContextManager[None]:
        """Time a part of the run for the report; its random numbers are its own."""
        seed(self.plan.recipe.seed, name)
        return self.meter.phase(name, self.record.phases)

    def load(self) -> None:
        """Load the model and its data, find the blocks, and measure the full-precision model."""
        task = self.task
        with self.phase("load the model"):
            with blaming(self.who, "to load the model"):
                model = task.load_model().eval().requires_grad_(False)
            finite.check_model(model)
            self.record.size_bytes["before"] = state_bytes(model)
        with self.phase("calibration samples"):
            with blaming(self.who, "to give calibration samples"):
                samples = task.samples(model)
            finite.check_samples(samples)
            self._check_processes(len(samples))
        with self.phase("trace"):
            self.prepared = prepare(self.plan, task, model, samples)
        recipe = self.plan.resolved.model_dump(mode="json")
        self.marks = fingerprint(recipe, self.record.versions, model, samples)
        if self.plan.needing_all_samples:  # what is learned depends a little on it
            self.marks["number of processes"] = str(distributed.size())
        self._check_alike()
        self.journal = self._journal(self.output / WORK)
        with self.phase("metrics before"):
            self.record.before = self._measure("full precision")

    def baseline(self) -> None:
        """Round the model to nearest and measure that, where the recipe asks for it; afterwards the model
        is as before.

        Raises:
            ModelError: if it cannot be rounded so.
        """
        if not self.plan.recipe.evaluate.baseline:
            return
        record = RunRecord(self.plan.plugin, self.plan.recipe.name)
        folder, journal = files.folder(self.work / "baseline"), self.output / WORK / "baseline"
        try:
            with restored(self.prepared.model):
                self._quantize(
                    self.plan.baseline, record, self._journal(journal), folder, "rounding to nearest"
                )
                self.record.phases["naive baseline"] = sum(record.phases.values())
                with self.phase("metrics of the naive baseline"):
                    self.record.baseline = self._measure("naive baseline")
        except BugError:
            raise
        except PtqError as error:
            raise ModelError(
                f"the naive baseline cannot be made: {error}; to go without it, set evaluate.baseline "
                "to false"
            ) from error

    def walk(self) -> None:
        """Hand every block to every step, in order; what an earlier run finished is taken from disk."""
        self._quantize(self.plan, self.record, self.journal, self.work, "quantizing blocks")

    def _quantize(self, plan: Plan, record: RunRecord, journal: Journal, folder: Path, label: str) -> None:
        Quantization(plan, self.task, self.prepared, record, self.meter, folder).run(journal, label)

    def _journal(self, folder: Path) -> Journal:
        return Journal(folder, self.marks, self.resume, self.plan.registry.attachment)

    def _check_processes(self, samples: int) -> None:
        """Say what several processes can do for the recipe.

        Raises:
            DataError: if there are more of them than calibration samples.
        """
        processes = distributed.size()
        if processes > samples:
            raise DataError(
                f"{processes} processes cannot share {samples} calibration samples: start at most "
                f"{samples} (torchrun --nproc-per-node), or use more samples"
            )
        names = self.plan.needing_all_samples
        if processes > 1 and names:
            say(
                f"{processes} processes: every one computes all calibration samples, for "
                f"{' and '.join(names)}; updates of what is learned, and layers, are divided"
            )

    def _check_alike(self) -> None:
        """Make sure that all processes do the same run.

        Raises:
            DistributedError: naming what differs.
        """
        for number, marks in enumerate(distributed.everywhere(self.marks)):
            changed = differences(self.marks, marks)
            if changed:
                raise DistributedError(
                    f"process {number + 1} has another {', another '.join(changed)}: all processes of "
                    "a run need the same data, the same packages and as many threads each"
                )

    def _measure(self, judged: Judged) -> dict[str, float]:
        """The metrics of the model as it now is; the other processes go on, and wait where they must."""
        if not distributed.is_first():
            return {}
        self.task.judged = judged
        with blaming(self.who, f"to measure the model ({judged})"):
            return self.task.evaluate(self.prepared.model)

    def finish(self) -> None:
        """Measure the quantized model, and write everything into the staging folder."""
        model, record = self.prepared.model, self.record
        staging = files.folder(self.work / "artifact", empty=True)
        with self.phase("metrics after"):
            record.after = self._measure("quantized")
            with blaming(self.who, "to give figures"):
                record.figures, record.facts = self.task.figures(), self.task.facts()
        with self.phase("save and load back"):
            self._save(model, staging)
        with self.phase("export and read back"):
            for exporter in self.plan.exporters:
                record.exports[exporter.name] = self._export(exporter, model, staging)
        record.seconds, record.peak_memory_bytes = self.meter.seconds, self.meter.peak_memory_bytes
        texts = (json.dumps(record.metrics(), indent=2) + "\n", record.recipe_yaml, render(record))
        for name, text in zip(FILES, texts, strict=True):
            files.write_text(staging / name, text)

    def _save(self, model: nn.Module, staging: Path) -> None:
        """Write the artifact, and make sure that it restores a model with the same outputs."""
        assets = files.folder(staging / artifact.ASSETS_FOLDER)
        with blaming(self.who, "to save what builds the model"), files.writing(assets):
            self.task.save_assets(assets)
        artifact.save(model, staging, self.plan.task_owner, self.task.name, __version__)
        self.record.size_bytes["after"] = (staging / artifact.MODEL_FILE).stat().st_size
        self.record.size_bytes |= table_sizes(model)
        find = self.plan.registry.attachment
        build = self.task.build
        restored = artifact.restore(staging, lambda _: build(assets), find, is_on_disk(model))
        sample = self.prepared.samples[0]
        with torch.no_grad():
            expected = tensors_in(self.task.forward(model, sample))
            found = tensors_in(self.task.forward(restored, sample))
        if not all(torch.equal(one, other) for one, other in zip(expected, found, strict=True)):
            raise ArtifactError(
                "the artifact does not restore the same outputs: the task's `build` makes another "
                "structure than `load_model`, or the model is not deterministic"
            )

    def _export(self, exporter: Exporter, model: nn.Module, staging: Path) -> ExportRecord:
        """Write one format and read it back.

        Raises:
            ExportError: if the format cannot hold the model, or what it holds differs.
        """
        attached = describe_attachments(model)
        if attached and not exporter.holds_attachments:
            raise ExportError(
                f"export {exporter.name} cannot hold {attached[0].name}, which a step that did not say so "
                f"attached to {attached[0].path}: remove the export, or that step"
            )
        folder = files.folder(staging / EXPORTS / exporter.name)
        owner = self.plan.registry.owner("exporters", exporter.name, self.plan.plugin)
        who = f"export {exporter.name!r} of plugin {owner!r}"
        with blaming(who, "to write"), files.writing(folder):
            exporter.export(model, self.task, self.prepared.samples, folder)
        with blaming(who, "to read back"):
            found = exporter.verify(model, self.task, self.prepared.samples, folder)
        difference = found.largest_difference
        if difference != 0:
            raise ExportError(
                f"{exporter.name}: the weights read back from its files differ by up to {difference:.3g}"
            )
        final = self.output.resolve() / EXPORTS / exporter.name
        return ExportRecord(str(final), True, difference, found.engines, found.notes)
