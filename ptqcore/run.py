"""The corridor: a recipe goes in, an artifact with its exports, metrics and report comes out."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

from ptqcore import artifact, audit, files
from ptqcore.activation_audit import CountClipped, between_record, input_records
from ptqcore.attachments import describe_attachments
from ptqcore.biases import round_biases
from ptqcore.calibration import Calibration
from ptqcore.dataflow import inside, tensors_in
from ptqcore.edges import ActivationQuantizers, TensorFunction
from ptqcore.errors import ArtifactError, DataError, ExportError
from ptqcore.export.base import Exporter
from ptqcore.fingerprint import fingerprint, versions
from ptqcore.journal import BlockResult, Journal
from ptqcore.meter import Meter
from ptqcore.modules import QuantModule, state_bytes
from ptqcore.placement import Edge
from ptqcore.plan import Plan, make_plan
from ptqcore.plugin import Registry, discover
from ptqcore.preparation import check_exports, prepare
from ptqcore.progress import track
from ptqcore.recipe import Recipe
from ptqcore.report.page import render
from ptqcore.report.record import BlockRecord, ExportRecord, RunRecord
from ptqcore.spans import SpanWalk
from ptqcore.step import Step
from ptqcore.store import Store, half_of_memory
from ptqcore.task import Task
from ptqcore.timesteps import Moment, at
from ptqcore.version import __version__
from ptqcore.walk import BlockIO, Walk

EXPORTS = "exports"
WORK = ".work"
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
        The record that `metrics.json` and `report.html` are written from.

    Raises:
        PtqError: one sentence for the user; finished blocks stay in the journal.
    """
    plan = make_plan(recipe, plugin, registry or discover())
    files.check_writable(output)
    _refuse_foreign(output)
    with files.locked(output), torch.random.fork_rng(devices=[]):
        torch.manual_seed(recipe.seed)
        work = files.folder(output / WORK, empty=not resume)
        run = _Run(plan, output, work, resume)
        run.load()
        run.walk()
        run.finish()
        files.remove(output / EXPORTS)  # formats of an earlier artifact that this one has not
        files.move_into(work / "artifact", output, last=artifact.MANIFEST_FILE)
        files.remove(work)
    return run.record


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
        self.task: Task = plan.task(files.folder(work / "task"))
        recipe = plan.recipe
        self.record = RunRecord(
            plugin=plan.plugin,
            recipe=recipe.name,
            description=recipe.description,
            recipe_yaml=plan.resolved.to_yaml(),
            versions=versions(plan.registry.versions()),
            seed=recipe.seed,
        )

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Time a part of the run for the report."""
        with self.meter.measure() as measurement:
            yield
        self.record.phases[name] = measurement.seconds

    def load(self) -> None:
        """Load the model and its data, find the blocks, and measure the full-precision model."""
        task = self.task
        with self.phase("load the model"):
            model = task.load_model().eval().requires_grad_(False)
            audit.check_finite(model)
            self.record.size_bytes["before"] = state_bytes(model)
        with self.phase("calibration samples"):
            samples = task.samples(model)
            if not len(samples):
                raise DataError("the task gave no calibration samples: give it at least one")
            self._masks = [task.mask(sample) for sample in samples]
        with self.phase("trace"):
            self.prepared = prepare(self.plan, task, model, samples)
            self.record.map = self.prepared.map()
        with self.phase("metrics before"):
            self.record.before = task.evaluate(model)

    def walk(self) -> None:
        """Hand every block to every step, in order; what an earlier run finished is taken from disk."""
        model, context, samples = self.prepared.model, self.prepared.context, self.prepared.samples
        marks = fingerprint(self.record.recipe_yaml, self.record.versions, model, samples)
        journal = Journal(self.work, marks, self.resume, self.plan.registry.attachment)
        steps = self.plan.steps(context)
        with self.phase("prepare"):
            for step in steps:
                step.prepare(model, self.prepared.flow, partial(self.task.forward, model, samples[0]))
        check_exports(self.plan, self.prepared, steps)
        quantizers = ActivationQuantizers({edge: q.spec for edge, q in context.grids.edges.items()})
        with self.phase("capture"):
            walk = self._start_walk(quantizers, any(step.needs_exact for step in steps))
        spans = SpanWalk(walk, steps, journal, quantizers, self._quantize_block)
        for result in track(spans, "quantizing blocks"):
            self.record.blocks.append(result.block)
            self.record.layers.extend(result.layers)
            self.record.activations.extend(result.activations)
        self.record.phases["quantize blocks"] = sum(block.seconds for block in self.record.blocks)
        for step in steps:
            step.finish(model)
        audit.check_done(walk.blocks, context)
        self.record.coverage = audit.check_coverage(walk.blocks, context, self.task.least_coverage)
        self.record.skipped = audit.left_alone(model, context)
        for edge in quantizers.drop_unreached():
            self.record.skipped[str(edge)] = "activation that no calibration sample reached"
        if quantizers.names:
            layers = {
                path: layer for path, layer in model.named_modules() if isinstance(layer, QuantModule)
            }
            round_biases(layers, self.prepared.flow, quantizers)
            quantizers.attach(model)
        if self.prepared.timesteps is not None and context.grids.by_timestep:
            self.prepared.timesteps.attach(model)

    def _start_walk(self, quantizers: ActivationQuantizers, exact: bool) -> Walk:
        """Record what flows between the blocks; edges between them are calibrated on the way."""
        model, blocks, grids = self.prepared.model, self.prepared.blocks, self.prepared.context.grids
        moments = self._moments()

        def calibrate(edge: Edge, tensors: list[Tensor]) -> TensorFunction:
            observer = self.plan.observer(grids.edges[edge])
            for tensor, moment in zip(tensors, moments, strict=True):
                with at(moment):
                    observer.update(tensor)
            quantizers[edge].set_range(*observer.range())
            self.record.activations.append(between_record(edge, quantizers[edge], tensors, moments))
            return quantizers[edge].forward

        between = {
            edge: calibrate
            for edge in grids.edges
            if not any(inside(edge.site.owner, block.path) for block in blocks)
        }
        forward = partial(self.task.forward, model)
        budget = self.plan.recipe.memory_gib
        size = half_of_memory() if budget is None else round(budget * 2**30)
        store = Store(size, self.work)
        return Walk(blocks, self.prepared.samples, forward, between, exact, store, moments)

    def _moments(self) -> list[Moment | None]:
        """The timestep that each calibration sample is of."""
        samples, timesteps = self.prepared.samples, self.prepared.timesteps
        if timesteps is None:
            return [None] * len(samples)
        return [timesteps.moment(self.task.timestep(sample)) for sample in samples]  # type: ignore[arg-type]

    def _quantize_block(
        self,
        io: BlockIO,
        steps: list[Step],
        quantizers: ActivationQuantizers,
        exact: list[list[Tensor]] | None,
    ) -> tuple[BlockResult, list[list[Tensor]]]:
        """Run the steps on one block; its figures, and what flows into the next."""
        block = io.block
        originals = block.layers()
        with self.meter.measure() as measurement:
            calibration = Calibration(
                block, io, self.prepared.context.grids, self.plan.observer, exact, self._masks
            )
            targets = calibration.targets
            if not all(step.data_free for step in steps):
                audit.check_reached(block, calibration, self.prepared.context, self.task.min_tokens)
            for step in steps:
                step.transform(block, calibration)
            for step in steps:
                step.before(block, calibration)
            calibration.quantize_edges(quantizers)
            for step in steps:
                step.block(block, calibration)
            counted = CountClipped(calibration.quantizers)
            io.functions = counted.functions()
            outputs = io.run_tensors()
            error = audit.relative_error(outputs, targets, block.path)
            layers = audit.layer_records(block, originals, calibration)
            for layer in block.quantized_layers().values():
                layer.release()
        figures = BlockRecord(
            block.path,
            error,
            measurement.seconds,
            measurement.peak_memory_bytes,
            audit.thinned(calibration.losses),
        )
        activations = [*counted.records(block.path), *input_records(block)]
        return BlockResult(figures, layers, activations), outputs

    def finish(self) -> None:
        """Measure the quantized model, and write everything into the staging folder."""
        model, record = self.prepared.model, self.record
        staging = files.folder(self.work / "artifact", empty=True)
        with self.phase("metrics after"):
            record.after = self.task.evaluate(model)
            record.figures = self.task.figures()
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
        with files.writing(assets):
            self.task.save_assets(assets)
        folded = dict(self.prepared.folding.folded)
        artifact.save(model, staging, self.plan.task_owner, self.task.name, __version__, folded)
        self.record.size_bytes["after"] = (staging / artifact.MODEL_FILE).stat().st_size
        find = self.plan.registry.attachment
        restored = artifact.restore(staging, lambda _: self.task.build(assets), find)
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
        with files.writing(folder):
            exporter.export(model, self.task, self.prepared.samples, folder)
        found = exporter.verify(model, self.task, self.prepared.samples, folder)
        difference = found.largest_difference
        if difference != 0:
            raise ExportError(
                f"{exporter.name}: the weights read back from its files differ by up to {difference:.3g}"
            )
        final = self.output.resolve() / EXPORTS / exporter.name
        return ExportRecord(str(final), True, difference, found.engines, found.notes)
