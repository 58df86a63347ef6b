"""The runs of a sweep: every recipe on every model with every seed, planned before any is begun."""

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

import yaml

from ptqcore.errors import PtqError, RecipeError
from ptqcore.plan import make_plan
from ptqcore.plugin import Registry
from ptqcore.recipe import Entry, Recipe, read_recipe
from ptqcore.sweeps.specification import Sweep


@dataclass(frozen=True)
class Run:
    """One recipe on one model with one seed. recipe: as it runs, every default written out. model: its
    name; empty if the sweep has no models. seed: None if the sweep has no seeds."""

    recipe: Recipe
    model: str
    seed: int | None
    folder: Path

    @property
    def name(self) -> str:
        """That of its folder."""
        return self.folder.name


def make_runs(sweep: Sweep, output: Path, registry: Registry) -> list[Run]:
    """Every run of a sweep, recipes one after the other; all names and keys in them are checked.

    Raises:
        PtqError: naming the recipe and the model, if a run is not possible, or two would share a folder.
    """
    found: dict[str, tuple[Run, str]] = {}
    models: Sequence[Entry | None] = sweep.models or [None]
    seeds: Sequence[int | None] = sweep.seeds or [None]
    for recipe, model, seed in product(sweep.recipes, models, seeds):
        what = f"recipe {recipe!r}" + ("" if model is None else f" with model {model.name!r}")
        try:
            run = _make_run(sweep, output, registry, recipe, model, seed)
        except PtqError as error:
            raise RecipeError(f"{what}: {error}") from error
        other = found.setdefault(run.name.casefold(), (run, what))
        if other[0] is not run:
            raise RecipeError(
                f"{other[1]} and {what} would both be written to the folder {run.name!r}: give recipes "
                "and models other names"
            )
    return [run for run, _ in found.values()]


def _make_run(
    sweep: Sweep, output: Path, registry: Registry, name: str, model: Entry | None, seed: int | None
) -> Run:
    keys = [*_overrides(sweep.set), *_overrides(model.options if model else {})]
    keys += [] if seed is None else [f"seed={seed}"]
    recipe = read_recipe(registry.recipe_file(name, sweep.plugin), keys)
    recipe = make_plan(recipe, sweep.plugin, registry).resolved
    parts = [recipe.name, *([model.name] if model else []), *([] if seed is None else [f"s{seed}"])]
    return Run(recipe, model.name if model else "", seed, output.resolve() / _safe("-".join(parts)))


def _overrides(keys: Mapping[str, Any]) -> Iterator[str]:
    """As on the command line, where the values are YAML too."""
    for key, value in keys.items():
        yield f"{key}={yaml.safe_dump(value, default_flow_style=True)}"


def _safe(name: str) -> str:
    """A name for a folder, on any system."""
    return re.sub(r"[^A-Za-z0-9._-]+", "-", name)
