"""What a sweep runs: a YAML file of recipes, models and seeds, and every run of their product."""

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Annotated, Any

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationInfo, field_validator

from ptqcore.errors import PtqError, RecipeError
from ptqcore.plan import make_plan
from ptqcore.plugin import Registry
from ptqcore.recipe import Entry, Recipe, read_mapping, read_recipe, validate

_Seed = Annotated[int, Field(ge=0, lt=2**32)]


class Sweep(BaseModel):
    """Every recipe on every model with every seed.

    plugin: whose names come first. recipes: as `ptq quantize --recipe`. models: a name with the recipe
    keys that make it, written `{name: {key: value}}`; none: the recipes' own. set: recipe keys for all
    runs; those of a model come after them. seeds: none: the recipes' own.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    plugin: str
    recipes: list[str] = Field(min_length=1)
    models: list[Entry] = []
    set: dict[str, Any] = {}
    seeds: list[_Seed] = []

    @field_validator("recipes", "models", "seeds")
    @classmethod
    def _once(cls, value: list[Any]) -> list[Any]:
        names = [each.name if isinstance(each, Entry) else each for each in value]
        twice = next((name for name in names if names.count(name) > 1), None)
        if twice is not None:
            raise ValueError(f"{twice!r} is there twice, name each once")
        return value

    @field_validator("models")
    @classmethod
    def _named(cls, value: list[Entry]) -> list[Entry]:
        for model in value:
            if not re.search("[A-Za-z0-9]", model.name):
                raise ValueError(f"folders are named after models, give {model.name!r} letters or digits")
        return value

    @field_validator("seeds")
    @classmethod
    def _alone(cls, value: list[int], others: ValidationInfo) -> list[int]:
        keys = [others.data.get("set", {}), *(model.options for model in others.data.get("models", []))]
        if value and any("seed" in each for each in keys):
            raise ValueError("the recipe key seed is set too, keep one of them")
        return value


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


def read_sweep(path: Path) -> Sweep:
    """Read and validate the file of a sweep.

    Raises:
        RecipeError: if it is missing or not YAML, or a key or value is wrong.
    """
    return validate(Sweep, read_mapping(path, "sweep"), kind="sweep")


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
