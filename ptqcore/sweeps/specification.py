"""The file of a sweep: which recipes, on which models, with which seeds."""

import re
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, ValidationInfo, field_validator

from ptqcore.recipe import Entry, read_mapping, validate

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


def read_sweep(path: Path) -> Sweep:
    """Read and validate the file of a sweep.

    Raises:
        RecipeError: if it is missing or not YAML, or a key or value is wrong.
    """
    return validate(Sweep, read_mapping(path, "sweep"), kind="sweep")
