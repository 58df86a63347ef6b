"""Before anything is quantized: the model traced, its batch norms folded, its blocks and grids found."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from torch import Tensor, nn

from ptqcore import audit, finite
from ptqcore.blocks import Block, find_blocks
from ptqcore.dataflow import Dataflow, inside, tensors_in, trace
from ptqcore.decompositions import in_steps
from ptqcore.errors import ExportError, ModelError
from ptqcore.flowmap import Folding, map_network
from ptqcore.folding import find_norms, fold, relative_difference
from ptqcore.grids import make_grids
from ptqcore.plan import Plan, make_plan
from ptqcore.plugin import Registry
from ptqcore.recipe import Recipe
from ptqcore.report.network import FlowMap
from ptqcore.step import Context, Step
from ptqcore.task import Task
from ptqcore.timesteps import Timesteps


@dataclass
class Prepared:
    """A loaded model, its data, and how they fit together."""

    model: nn.Module
    samples: Sequence[Any]
    flow: Dataflow
    context: Context
    blocks: list[Block]
    folding: Folding
    timesteps: Timesteps | None = None

    def map(self) -> FlowMap:
        """The map of the model, as long as it is in full precision, with the grids as they now are."""
        targets = {path for block in self.blocks for path in self.context.targets(block)}
        alone = audit.left_alone(self.model, self.context)
        known = targets | self.context.grids.tables
        alone = {path: reason for path, reason in alone.items() if path not in known}
        return map_network(self.model, self.flow, self.blocks, self.context.grids, self.folding, alone)


def prepare(plan: Plan, task: Task, model: nn.Module, samples: Sequence[Any]) -> Prepared:
    """Trace a model, fold its batch norms, and find its blocks and grids.

    Args:
        plan: of the run.
        task: its task.
        model: the full-precision model, in evaluation mode; its batch norms are folded in place.
        samples: calibration samples; the first is traced.

    Raises:
        PtqError: if the recipe does not fit the model.
    """
    recipe = plan.recipe
    run: Callable[[], object] = partial(task.forward, model, samples[0])
    rounds_between = recipe.quant.scope == "dataflow" and recipe.quant.activations is not None
    flow, folding = _trace(model, in_steps(run) if rounds_between else run)
    others = (partial(task.forward, model, samples[index]) for index in range(1, len(samples)))
    excluded = audit.never_called(model, flow, others) | task.excluded(model)
    targets = audit.check_targets(model, recipe.quant, excluded)
    blocks = find_blocks(model, flow, set(targets), recipe.blocks)
    targets = {
        path: layer for path, layer in targets.items() if any(inside(path, block.path) for block in blocks)
    }
    timesteps = timesteps_of_samples(task, samples)
    grids = make_grids(
        recipe.quant, flow, set(targets), [] if timesteps is None else timesteps.values.tolist()
    )
    for exporter in plan.exporters:
        exporter.check_layers(recipe.quant, targets)
        exporter.check_model(model, task, targets)
    context = Context(recipe.quant, plan.observer, excluded, recipe.seed, grids, task)
    return Prepared(model, samples, flow, context, blocks, folding, timesteps)


def timesteps_of_samples(task: Task, samples: Sequence[Any]) -> Timesteps | None:
    """The timesteps that the calibration samples are of, where the task's models have such.

    Raises:
        ModelError: if some samples have one and others have not.
    """
    found = [task.timestep(sample) for sample in samples]
    known = [timestep for timestep in found if timestep is not None]
    if not known:
        return None
    if len(known) < len(found):
        raise ModelError("some calibration samples have a timestep and others have none")
    return Timesteps.of(known, task.timestep_argument, task.unseen_timesteps)


def check_exports(plan: Plan, prepared: Prepared, steps: Sequence[Step]) -> None:
    """Refuse formats that cannot hold what steps, now prepared, will attach, or the grids they chose.

    Raises:
        ExportError: naming the format, and the step or the layer.
    """
    context = prepared.context
    targets = (path for block in prepared.blocks for path in context.targets(block))
    weights = {path: context.grids.weights(path) for path in targets}
    for exporter in plan.exporters:
        for step in steps:
            if step.attaches and not exporter.holds_attachments:
                raise ExportError(
                    f"export {exporter.name} cannot hold what the step {step.name} attaches to the model "
                    f"({step.attaches}): remove the export, or that option of the step"
                )
        if context.grids.by_timestep and not exporter.holds_timesteps:
            raise ExportError(
                f"export {exporter.name} cannot hold a range of activations for each timestep: remove the "
                "export, or the step that gives them such ranges"
            )
        if context.grids.tables and not exporter.holds_timesteps:
            raise ExportError(
                f"export {exporter.name} cannot hold a table with a row for each timestep, as in the place "
                f"of {min(context.grids.tables)}: remove the export, or let no step make tables"
            )
        if prepared.timesteps is not None and (context.grids.by_timestep or context.grids.tables):
            exporter.check_timesteps(prepared.timesteps.unseen)
        exporter.check_grids(context.quant, weights)


def _trace(model: nn.Module, run: Callable[[], object]) -> tuple[Dataflow, Folding]:
    """The dataflow of the model once its batch norms are folded, and what became of them."""
    outputs: list[list[Tensor]] = []

    def noted() -> None:
        outputs.append(tensors_in(run()))

    flow = trace(model, noted)
    wrong = [tensor for tensor in outputs[0] if not finite.is_masked(tensor)]
    finite.check_outputs([wrong], model, "", lambda _: run(), "in full precision")
    pairs = find_norms(model, flow)
    folded = fold(model, flow, run)
    if not folded:
        return flow, Folding(pairs)
    flow = trace(model, noted)
    return flow, Folding(pairs, folded, relative_difference(*outputs))


def map_model(recipe: Recipe, plugin: str, registry: Registry) -> FlowMap:
    """The map of the model that a recipe quantizes: nothing is calibrated, measured or written.

    Raises:
        PtqError: one sentence for the user.
    """
    plan = make_plan(recipe, plugin, registry)
    with TemporaryDirectory(prefix="ptq-map-") as workspace:
        task = plan.task(Path(workspace))
        model = task.load_model().eval().requires_grad_(False)
        finite.check_model(model)
        return prepare(plan, task, model, [task.example(model)]).map()
