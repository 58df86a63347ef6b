"""The steps of a recipe over a loaded model: every block is handed to every step, in order."""

from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path

from torch import Tensor

from ptqcore import audit, files, finite
from ptqcore.activation_audit import CountClipped, between_record, input_records
from ptqcore.allocator import give_freed_memory_back
from ptqcore.biases import round_biases
from ptqcore.blame import blaming
from ptqcore.blocks import Block
from ptqcore.calibration import Calibration
from ptqcore.dataflow import inside
from ptqcore.distributed import Share, on_this_machine
from ptqcore.edges import ActivationQuantizers, TensorFunction
from ptqcore.journal import BlockResult, Journal
from ptqcore.memory_left import free_memory
from ptqcore.meter import Meter
from ptqcore.midway import Midway
from ptqcore.modules import QuantModule
from ptqcore.observers import Observer
from ptqcore.placement import Edge
from ptqcore.plan import Plan
from ptqcore.preparation import Prepared, check_exports
from ptqcore.progress import track
from ptqcore.report.record import BlockRecord, RunRecord
from ptqcore.seeding import seed
from ptqcore.spans import SpanWalk
from ptqcore.step import Step
from ptqcore.store import ACTIVATIONS, Store
from ptqcore.task import Task
from ptqcore.timesteps import Moment, at
from ptqcore.walk import BlockIO, Walk


class Quantization:
    """A prepared model on its way to a quantized one, changed in place."""

    def __init__(
        self, plan: Plan, task: Task, prepared: Prepared, record: RunRecord, meter: Meter, folder: Path
    ) -> None:
        """Args:
        plan: whose steps are walked, and whose formats must be able to hold the result.
        task: of the run.
        prepared: the model and its data.
        record: takes the figures of blocks, layers and activations, and the time of each phase.
        meter: of the run.
        folder: for activations that memory has no room for.
        """
        self.plan, self.task, self.prepared = plan, task, prepared
        self.record, self.meter, self.folder = record, meter, folder
        self._share = Share.of(len(prepared.samples), not plan.needing_all_samples)
        self._samples = [prepared.samples[number] for number in self._share.numbers]
        self._masks = [task.mask(sample) for sample in self._samples]

    def run(self, journal: Journal, label: str) -> None:
        """Walk once over all blocks.

        Args:
            journal: takes finished blocks; those that an earlier run finished are taken from it.
            label: what progress is shown as.

        Raises:
            PtqError: if a step, or a format, refuses the model.
        """
        model, samples = self.prepared.model, self.prepared.samples
        context = replace(self.prepared.context, midways=journal.midways(None))
        steps = self.plan.steps(context)
        with self.meter.phase("prepare", self.record.phases):
            self._seed("prepare")
            for step in steps:
                with blaming(step.origin, "to prepare"):
                    step.prepare(model, self.prepared.flow, partial(self.task.forward, model, samples[0]))
            self.record.map = self.prepared.map()
        check_exports(self.plan, self.prepared, steps)
        quantizers = ActivationQuantizers({edge: q.spec for edge, q in context.grids.edges.items()})
        with self.meter.phase("capture", self.record.phases):
            self._seed("capture")
            walk = self._start_walk(quantizers, any(step.needs_exact for step in steps))
        for result in track(SpanWalk(walk, steps, journal, quantizers, self._quantize_block), label):
            self.record.blocks.append(result.block)
            self.record.layers.extend(result.layers)
            self.record.activations.extend(result.activations)
        self.record.phases["quantize blocks"] = sum(block.seconds for block in self.record.blocks)
        self._seed("finish")
        for step in steps:
            with blaming(step.origin, "to finish"):
                step.finish(model)
        audit.check_done(walk.blocks, context)
        self.record.coverage = audit.check_coverage(walk.blocks, context, self.task.least_coverage)
        self.record.skipped = audit.left_alone(model, context)
        self.record.exceptions = context.grids.exceptions(layer.path for layer in self.record.layers)
        self._attach(quantizers)

    def _seed(self, part: str) -> None:
        seed(self.plan.recipe.seed, part)

    @staticmethod
    def _hand(steps: list[Step], verb: str, block: Block, calibration: Calibration) -> None:
        """Hand a block to every step in turn; none may change the shape of a layer's weight."""
        for step in steps:
            shapes = audit.weight_shapes(block)
            with blaming(step.origin, f"in block {block.path!r}"):
                getattr(step, verb)(block, calibration)
            audit.check_weight_shapes(block, shapes, step.origin)
            give_freed_memory_back()

    def _attach(self, quantizers: ActivationQuantizers) -> None:
        """Make every forward pass of the model round its activations, at its timestep."""
        model = self.prepared.model
        for edge in quantizers.drop_unreached():
            self.record.skipped[str(edge)] = "activation that no calibration sample reached"
        if quantizers.names:
            layers = {
                path: layer for path, layer in model.named_modules() if isinstance(layer, QuantModule)
            }
            round_biases(layers, self.prepared.flow, quantizers)
            quantizers.attach(model)
        grids = self.prepared.context.grids
        if self.prepared.timesteps is not None and (grids.by_timestep or grids.tables):
            self.prepared.timesteps.attach(model)

    def _start_walk(self, quantizers: ActivationQuantizers, exact: bool) -> Walk:
        """Record what flows between the blocks; edges between them are calibrated on the way."""
        model, blocks, grids = self.prepared.model, self.prepared.blocks, self.prepared.context.grids
        share, moments = self._share, self._moments()
        own = [moments[number] for number in share.numbers]

        def calibrate(edge: Edge, tensors: list[Tensor]) -> TensorFunction:
            observer = self.plan.observer(grids.edges[edge])
            found = map(partial(_condensed, observer), tensors, own)
            for tensor, moment in zip(share.in_order(found), moments, strict=True):
                with at(moment):
                    observer.update(tensor)
            low, high = observer.range()
            finite.check_range(low, high, f"the activation {edge}")
            quantizers[edge].set_range(low, high)
            self.record.activations.append(between_record(edge, quantizers[edge], tensors, own, share))
            return quantizers[edge].forward

        between = {
            edge: calibrate
            for edge in grids.edges
            if not any(inside(edge.site.owner, block.path) for block in blocks)
        }
        forward = partial(self.task.forward, model)
        budget = self.plan.recipe.memory_gib
        size = free_memory() // 2 if budget is None else round(budget * 2**30)
        for left in self.folder.glob(f"{ACTIVATIONS}*"):  # by a run that was killed
            files.remove(left)
        store = Store(size // on_this_machine(), self.folder)
        return Walk(blocks, self._samples, forward, between, exact, store, own, share)

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
        midways: Iterator[Midway],
    ) -> tuple[BlockResult, list[list[Tensor]]]:
        """Run the steps on one block; its figures, and what flows into the next."""
        block = io.block
        self._seed(f"block {block.path}")
        originals = block.layers()
        with self.meter.measure() as measurement:
            calibration = Calibration(
                block, io, self.prepared.context.grids, self.plan.observer, exact, self._masks, midways
            )
            targets = calibration.targets
            at_first = "in full precision"
            finite.check_outputs(targets, block.module, block.path, io.run_sample, at_first, self._share)
            if not all(step.data_free for step in steps):
                audit.check_reached(block, calibration, self.prepared.context, self.task.min_tokens)
            self._hand(steps, "transform", block, calibration)
            self._hand(steps, "before", block, calibration)
            calibration.quantize_edges(quantizers)
            self._hand(steps, "block", block, calibration)
            self._hand(steps, "after", block, calibration)
            layers = audit.layer_records(block, originals, calibration, self.prepared.context)
            del originals
            calibration.forget_layers()
            counted = CountClipped(calibration.quantizers)
            io.functions = counted.functions()
            who = " and ".join(step.origin for step in steps)
            with blaming(who, f"to leave block {block.path!r} in working order"):
                outputs = io.run_tensors()
            audit.check_output_shapes(outputs, targets, block.path, who)
            now = "once quantized"
            finite.check_outputs(outputs, block.module, block.path, io.run_sample, now, self._share)
            finite.check_stored(
                {f"{block.path}.{name}": one for name, one in block.module.state_dict().items()}
            )
            error = audit.relative_error(outputs, targets, block.path, self._share)
            for layer in block.quantized_layers().values():
                layer.release()
        figures = BlockRecord(
            block.path,
            error,
            measurement.seconds,
            measurement.peak_memory_bytes,
            audit.thinned(calibration.losses),
        )
        activations = [*counted.records(block.path, self._share), *input_records(block)]
        return BlockResult(figures, layers, activations), outputs


def _condensed(observer: Observer, x: Tensor, moment: Moment | None) -> Tensor:
    """What an observer wants of an activation at a timestep."""
    with at(moment):
        return observer.condensed(x)
