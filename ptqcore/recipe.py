"""The order form: recipes as validated YAML, with overrides from the command line."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any, Literal, Self, TypeVar

import yaml
from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    GetJsonSchemaHandler,
    ValidationError,
    field_validator,
    model_validator,
)
from pydantic.json_schema import JsonSchemaValue
from pydantic_core import CoreSchema

from ptqcore.errors import RecipeError, nearest
from ptqcore.reading import read_bytes
from ptqcore.spec import QuantSpec
from ptqcore.yaml_text import parse_yaml

M = TypeVar("M", bound=BaseModel)

_MOST_BYTES = 2**17
_MOST_SHOWN = 200


class Entry(BaseModel):
    """A name with options, written `name` or `{name: {option: value}}`."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str
    options: dict[str, Any] = {}

    @classmethod
    def __get_pydantic_json_schema__(
        cls, core_schema: CoreSchema, handler: GetJsonSchemaHandler
    ) -> JsonSchemaValue:
        """The short forms too, for editors."""
        one_key = {
            "type": "object",
            "minProperties": 1,
            "maxProperties": 1,
            "additionalProperties": {"type": ["object", "null"]},
        }
        return {"anyOf": [{"type": "string"}, one_key, handler(core_schema)]}

    @model_validator(mode="before")
    @classmethod
    def _short_forms(cls, value: Any) -> Any:
        if isinstance(value, str):
            return {"name": value}
        if isinstance(value, dict) and len(value) == 1 and "name" not in value:
            ((name, options),) = value.items()
            return {"name": name, "options": options or {}}
        return value


class TensorQuant(QuantSpec):
    """How a kind of tensor is quantized: its grid, and the observer that finds the range.

    `observer` is written `name` or `{name: {option: value}}`.
    """

    observer: Entry = Entry(name="minmax")

    @property
    def spec(self) -> QuantSpec:
        """The grid alone."""
        return QuantSpec(**self.model_dump(exclude={"observer"}))


class QuantSection(BaseModel):
    """`quant`: the grids of weights and activations, and the layers left alone.

    scope says which activations are quantized: the inputs of the quantized layers, or every tensor of
    the dataflow that an integer engine needs on a grid (sums, concatenations and pooling included).
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    weights: TensorQuant
    activations: TensorQuant | None = None
    scope: Literal["layers", "dataflow"] = "layers"
    first_last_bits: int | None = Field(
        default=None, ge=2, le=8, description="bits of the first and last layers, if not the others'"
    )
    ignore: list[str] = Field(default=[], description="globs of module paths left in full precision")
    min_tokens: int | None = Field(
        default=None,
        ge=0,
        description="calibration tokens that every linear layer must see, where a step learns from them; "
        "null: as the task says",
    )

    @model_validator(mode="after")
    def _possible(self) -> Self:
        if self.weights.dynamic or self.weights.granularity == "token":
            raise ValueError("weights.dynamic true: weights are constant, set it to false")
        activations = self.activations
        if activations is None:
            return self
        if activations.granularity == "channel":
            raise ValueError(
                "activations.granularity channel: integer products need one activation scale per "
                "row, use token (dynamic) or tensor"
            )
        if activations.granularity == "group" and not activations.dynamic:
            raise ValueError("activations.granularity group with dynamic false: set dynamic to true")
        if self.scope == "dataflow" and (activations.dynamic or activations.granularity != "tensor"):
            raise ValueError(
                "scope dataflow with dynamic activations: engines need static ranges per tensor, set "
                "activations.dynamic to false and activations.granularity to tensor, or scope to layers"
            )
        return self


class TaskSection(BaseModel):
    """`task`: the kind of task; the other keys are that task's own options."""

    model_config = ConfigDict(frozen=True, extra="allow")

    kind: str

    @property
    def options(self) -> dict[str, Any]:
        """Everything but `kind`, to be validated by the task."""
        return dict(self.model_extra or {})


class EvaluateSection(BaseModel):
    """`evaluate`: what the result is compared with, beside full precision."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    baseline: bool = Field(
        default=False,
        description="also measure the model rounded to nearest: the same grids, no other step",
    )


class Recipe(BaseModel):
    """One run: what is quantized, how, in which steps, and what is written."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")
    description: str = ""
    seed: int = Field(default=0, ge=0, lt=2**32)
    task: TaskSection
    quant: QuantSection
    blocks: str | None = Field(
        default=None,
        description="glob of the blocks' paths, if the map's are not wanted; network-wise: the whole "
        "model is one block",
    )
    memory_gib: float | None = Field(
        default=None,
        gt=0,
        description="cached activations kept in memory, more is memory-mapped; null: half of what is free",
    )
    steps: list[Entry] = Field(min_length=1)
    evaluate: EvaluateSection = EvaluateSection()
    export: list[Entry] = []

    @field_validator("export")
    @classmethod
    def _once(cls, value: list[Entry]) -> list[Entry]:
        names = [entry.name for entry in value]
        if len(set(names)) < len(names):
            raise ValueError("export names a format twice")
        return value

    def to_yaml(self) -> str:
        """The resolved recipe, every default written out."""
        return yaml.safe_dump(self.model_dump(), sort_keys=False)


def read_recipe(path: Path, overrides: Iterable[str] = ()) -> Recipe:
    """Read and validate a recipe file, with `KEY=VALUE` overrides applied first.

    Raises:
        RecipeError: if the file is missing or not YAML, or a key or value is wrong.
    """
    data = read_mapping(path)
    data.setdefault("name", path.stem)
    for override in overrides:
        apply_override(data, override)
    return validate(Recipe, data)


def read_mapping(path: Path, kind: str = "recipe") -> dict[str, Any]:
    """What a YAML file holds; `kind` is what to call it in errors.

    Raises:
        RecipeError: if the file is missing, not YAML, or no mapping.
    """
    try:
        text = read_bytes(path, _MOST_BYTES).decode("utf-8")
    except (OSError, ValueError) as error:
        raise RecipeError(f"{kind} {path} cannot be read: {error}") from error
    try:
        data = parse_yaml(text)
    except ValueError as error:
        raise RecipeError(f"{kind} {path} is not valid YAML: {error}") from error
    if not isinstance(data, dict):
        raise RecipeError(f"{kind} {path} must be a mapping of keys, not {type(data).__name__}")
    return data


def apply_override(data: dict[str, Any], override: str) -> None:
    """Apply one `a.b=value` to nested mappings and lists; the value is read as YAML.

    Raises:
        RecipeError: if the text has no `=`, or the path runs through something that has no keys.
    """
    key, separator, text = override.partition("=")
    parts = key.split(".")
    if not separator or not all(parts):
        raise RecipeError(
            f"--set {override!r} is not of the form KEY=VALUE, for example quant.weights.bits=4"
        )
    try:
        value = parse_yaml(text)
    except ValueError as error:
        raise RecipeError(f"--set {key}: the value {text!r} is not valid YAML") from error
    *path, last = parts
    at: Any = data
    for part in path:
        at = _descend(at, part, key)
    if isinstance(at, list):
        at[_index(at, last, key)] = value
    else:
        at[last] = value


def _descend(at: Any, part: str, key: str) -> Any:
    """The mapping or list below `part`, made where nothing is yet."""
    slot: Any = _index(at, part, key) if isinstance(at, list) else part
    if isinstance(at, dict) and at.get(slot) is None:
        at[slot] = {}
    if isinstance(at[slot], str):
        at[slot] = {at[slot]: {}}
    if not isinstance(at[slot], dict | list):
        raise RecipeError(f"--set {key}: {part!r} is {at[slot]!r} and has no keys below it")
    return at[slot]


def _index(at: list[Any], part: str, key: str) -> int:
    if not part.isdecimal() or int(part) >= len(at):
        raise RecipeError(f"--set {key}: {part!r} is not an index of a list of {len(at)} entries")
    return int(part)


def validate(model: type[M], data: Any, prefix: str = "", kind: str = "recipe") -> M:
    """Validate `data`; the first thing wrong becomes one sentence.

    Args:
        model: the pydantic model.
        data: what was read.
        prefix: the place of `data` in the recipe, for example `task`.
        kind: what to call the file that it is from.

    Raises:
        RecipeError: naming the key, the value, what was expected and the nearest valid key.
    """
    try:
        return model.model_validate(data)
    except ValidationError as error:
        raise RecipeError(f"{kind} key {_sentence(model, error, prefix)}") from None


def _sentence(model: type[BaseModel], error: ValidationError, prefix: str) -> str:
    # A key that is not known explains more than the missing ones that it was meant to be.
    problems = sorted(error.errors(), key=lambda e: e["type"] != "extra_forbidden")
    problem = problems[0]
    location = [str(part) for part in problem["loc"]]
    key = ".".join(([prefix] if prefix else []) + location)
    if problem["type"] == "extra_forbidden":
        known = _fields(model, location[:-1])
        return f"{key!r} is unknown{nearest(location[-1], known)}"
    if problem["type"] == "missing":
        return f"{key!r} is missing: {problem['msg'].lower()}"
    message = problem["msg"].removeprefix("Value error, ")
    if problem["type"] == "value_error":
        return f"{key or 'quant'!r} is not possible: {message}"
    return f"{key!r} is {_shown(problem['input'])}: {message[0].lower()}{message[1:]}"


def _shown(value: Any) -> str:
    try:
        text = repr(value)
    except ValueError:  # Python writes no number of more than 4300 digits
        return "a number of thousands of digits"
    return text if len(text) <= _MOST_SHOWN else text[: _MOST_SHOWN - 3] + "..."


def _fields(model: type[BaseModel], path: list[str]) -> list[str]:
    """Names of the fields at a path inside nested models."""
    current: Any = model
    for part in path:
        if part.isdecimal():  # an index of a list, whose entries are described by its type
            continue
        field = current.model_fields.get(part) if hasattr(current, "model_fields") else None
        kinds = [] if field is None else [field.annotation, *getattr(field.annotation, "__args__", ())]
        current = next((kind for kind in kinds if hasattr(kind, "model_fields")), None)
        if current is None:
            return []
    return list(current.model_fields)
