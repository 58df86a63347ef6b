"""From a recipe to objects: everything named is found and validated before anything is computed."""

from collections.abc import Iterable
from dataclasses import dataclass, replace
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any, cast, get_args

from pydantic import BaseModel

from ptqcore.blame import blaming
from ptqcore.errors import PluginError, RecipeError
from ptqcore.export.base import Exporter
from ptqcore.observers import Observer
from ptqcore.observers.per_timestep import PerTimestep
from ptqcore.plugin import CORE, Registry, discover
from ptqcore.recipe import Entry, Recipe, TensorQuant, read_recipe, validate
from ptqcore.rounding import Round
from ptqcore.step import Context, Stage, Step, StepOptions, shares_samples
from ptqcore.task import Task, TaskOptions

_DOES = {
    "transform": "changes weights in full precision",
    "range": "chooses the ranges of weights",
    "quantize": "quantizes the weights",
    "correct": "corrects what quantization did",
}


@dataclass(frozen=True)
class Plan:
    """A recipe with all its names resolved and all its options validated."""

    recipe: Recipe
    plugin: str
    task_class: type[Task]
    task_owner: str
    task_options: TaskOptions
    step_classes: list[tuple[type[Step], StepOptions]]
    exporters: list[Exporter]
    registry: Registry

    @property
    def resolved(self) -> Recipe:
        """The recipe with every option of its task and steps written out."""
        task = {"kind": self.recipe.task.kind, **self.task_options.model_dump(mode="json")}
        steps = [
            {"name": entry.name, "options": options.model_dump(mode="json")}
            for entry, (_, options) in zip(self.recipe.steps, self.step_classes, strict=True)
        ]
        quant = self.recipe.quant.model_dump()
        for key in ("weights", "activations"):
            used: TensorQuant | None = getattr(self.recipe.quant, key)
            if used is not None:
                options = self.observer(used).options.model_dump(mode="json")
                quant[key]["observer"] = {"name": used.observer.name, "options": options}
        changed = {"task": task, "quant": quant, "steps": steps}
        return Recipe.model_validate(self.recipe.model_dump() | changed)

    @property
    def needing_all_samples(self) -> list[str]:
        """The names of the steps for which every process must have all samples."""
        return [kind.name for kind, _ in self.step_classes if not shares_samples(kind)]

    @property
    def baseline(self) -> "Plan":
        """The same with rounding to nearest as the only step, and nothing exported."""
        changed = {"steps": [Entry(name=f"{CORE}:{Round.name}")], "export": []}
        recipe = self.recipe.model_copy(update=changed)
        return replace(self, recipe=recipe, step_classes=[(Round, Round.Options())], exporters=[])

    def task(self, workspace: Path) -> Task:
        """The task of this run."""
        return self.task_class(self.task_options, self.recipe.seed, workspace)

    def steps(self, context: Context) -> list[Step]:
        """The steps of this run, in order.

        Raises:
            BugError: if one cannot be made.
        """
        made = []
        for entry, (kind, options) in zip(self.recipe.steps, self.step_classes, strict=True):
            owner = self.registry.owner("steps", entry.name, self.plugin)
            origin = f"step {entry.name.rpartition(':')[2]!r} of plugin {owner!r}"
            with blaming(origin, "to begin"):
                made.append(kind(options, context))
            made[-1].origin = origin
        return made

    def observer(self, quant: TensorQuant) -> Observer:
        """A new observer as a `TensorQuant` names it."""
        return make_observer(self.registry, self.plugin, quant)


def make_plan(recipe: Recipe, plugin: str, registry: Registry) -> Plan:
    """Resolve a recipe; the names of `plugin` come first.

    Raises:
        RecipeError: if a name is unknown or an option is wrong.
        PluginError: if the plugin, or one that the recipe needs, is missing or broken.
        ExportError: if a format cannot express the recipe.
    """
    if plugin != CORE:
        registry.plugin(plugin)
    task_class = _find(registry, "tasks", recipe.task.kind, plugin, Task)
    task_options = _options(task_class, recipe.task.options, "task")
    steps = []
    for index, entry in enumerate(recipe.steps):
        step_class = _find(registry, "steps", entry.name, plugin, Step)
        steps.append((step_class, _options(step_class, entry.options, f"steps.{index}.{entry.name}")))
    for key in ("weights", "activations"):
        if (quant := getattr(recipe.quant, key)) is not None:
            make_observer(registry, plugin, quant, f"quant.{key}.observer")
    _check_order([step_class for step_class, _ in steps])
    exporters = [_exporter(registry, plugin, entry, recipe) for entry in recipe.export]
    owner = registry.owner("tasks", recipe.task.kind, plugin)
    return Plan(recipe, plugin, task_class, owner, task_options, steps, exporters, registry)


def _check_order(steps: list[type[Step]]) -> None:
    """Refuse steps in an order that makes no sense.

    Raises:
        RecipeError: naming the two steps.
    """
    staged = [step for step in steps if step.stage is not None]
    order = get_args(Stage)
    for before, after in pairwise(staged):
        places = order.index(before.stage), order.index(after.stage)
        if places[0] > places[1]:
            raise RecipeError(
                f"recipe key 'steps': {after.name} ({_DOES[order[places[1]]]}) behind {before.name} "
                f"({_DOES[order[places[0]]]}) makes no sense: put it before"
            )
        if before.stage == after.stage == "quantize" and not before.partial:
            raise RecipeError(
                f"recipe key 'steps': {before.name} and {after.name} both quantize the weights: keep one"
            )
    if staged and len(staged) == len(steps) and all(step.stage != "quantize" for step in staged):
        raise RecipeError(
            "recipe key 'steps': no step quantizes the weights: add one that does, for example round"
        )


def find_recipe(name: str | None, plugin: str, overrides: Iterable[str] = ()) -> Recipe:
    """A recipe as it would run: overrides applied, every default written out, every name checked.

    Args:
        name: one of the plugin's recipes, or a YAML file; None for its default.
        plugin: an installed plugin, whose names come first.
        overrides: `KEY=VALUE` each.

    Raises:
        PtqError: if there is no such recipe or plugin, or a key, a value or a name is wrong.
    """
    registry = discover()
    recipe = read_recipe(registry.recipe_file(name, plugin), overrides)
    return make_plan(recipe, plugin, registry).resolved


def make_observer(registry: Registry, plugin: str, quant: TensorQuant, place: str = "observer") -> Observer:
    """A new observer as a `TensorQuant` names it; one for each timestep where its grid has such ranges.

    Raises:
        RecipeError: if the name is unknown or an option is wrong.
    """
    entry = quant.observer
    observer_class = _find(registry, "observers", entry.name, plugin, Observer)
    options = _options(observer_class, entry.options, f"{place}.{entry.name}")
    make = partial(observer_class, **options.model_dump())
    return make(quant.spec) if quant.timesteps is None else PerTimestep(quant.spec, make)


def _exporter(registry: Registry, plugin: str, entry: Entry, recipe: Recipe) -> Exporter:
    exporter: Exporter = _find(registry, "exporters", entry.name, plugin, Exporter)()
    if entry.options:
        raise RecipeError(f"recipe key 'export.{entry.name}' takes no options, but has {entry.options}")
    exporter.check(recipe.quant)
    return exporter


def _find(registry: Registry, kind: str, name: str, plugin: str, base: type) -> Any:
    found = registry.find(kind, name, plugin)
    if not (isinstance(found, type) and issubclass(found, base)):
        raise PluginError(f"{kind[:-1]} {name!r} is {found!r}, not a subclass of ptqcore.{base.__name__}")
    return found


def _options(owner: Any, options: dict[str, Any], place: str) -> Any:
    return validate(cast(type[BaseModel], owner.Options), options, place)


def recipe_schema(registry: Registry) -> dict[str, Any]:
    """JSON schema of recipes, the `task` section with the options of every installed task."""
    schema = Recipe.model_json_schema()
    schema["required"].remove("name")  # a file's own name is its default
    sections = []
    for plugin, name in registry.names("tasks"):
        options = registry.find("tasks", f"{plugin}:{name}", plugin).Options.model_json_schema()
        schema["$defs"] |= options.pop("$defs", {})
        kind = {"enum": [name, f"{plugin}:{name}"]}
        options["properties"] = {"kind": kind} | options.get("properties", {})
        sections.append(options | {"title": f"{plugin}:{name}", "required": ["kind"]})
    if sections:
        schema["properties"]["task"] = {"anyOf": sections}
    return schema
