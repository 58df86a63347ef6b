"""Recipes: what is read, what an override changes, and the one sentence that says what is wrong."""

import pytest
import yaml
from pydantic import BaseModel, ConfigDict

from ptqcore.errors import RecipeError, nearest
from ptqcore.recipe import Entry, Recipe, TensorQuant, apply_override, read_recipe, validate
from ptqcore.spec import QuantSpec

BASE = """
description: a small run
task:
  kind: toy
  samples: 16
quant:
  weights: {bits: 4, granularity: group, group_size: 32, symmetric: false, observer: {mse: {norm: 2.0}}}
  activations: {granularity: token, dynamic: true}
  ignore: ["*.head"]
steps:
  - smooth
  - gptq: {damp: 0.01}
export: [safetensors]
"""


@pytest.fixture
def recipe_file(tmp_path):
    path = tmp_path / "small-run.yaml"
    path.write_text(BASE, encoding="utf-8")
    return path


def error_of(path, *overrides):
    """The message of a recipe that must be refused: one line."""
    with pytest.raises(RecipeError) as caught:
        read_recipe(path, overrides)
    message = str(caught.value)
    assert "\n" not in message
    return message


# Reading


def test_a_recipe_is_read_with_its_defaults(recipe_file):
    recipe = read_recipe(recipe_file)
    assert recipe.name == "small-run"
    assert recipe.seed == 0
    assert recipe.blocks is None
    assert recipe.task.kind == "toy"
    assert recipe.task.options == {"samples": 16}
    assert recipe.quant.weights.spec == QuantSpec(
        bits=4, granularity="group", group_size=32, symmetric=False
    )
    assert recipe.quant.weights.observer == Entry(name="mse", options={"norm": 2.0})
    assert recipe.quant.activations.spec == QuantSpec(granularity="token", dynamic=True)
    assert recipe.quant.activations.observer == Entry(name="minmax")
    assert recipe.quant.ignore == ["*.head"]
    assert recipe.steps == [Entry(name="smooth"), Entry(name="gptq", options={"damp": 0.01})]
    assert recipe.export == [Entry(name="safetensors")]


def test_a_name_in_the_file_wins_over_the_file_name(recipe_file):
    recipe_file.write_text(BASE + "name: other.name-2\n", encoding="utf-8")
    assert read_recipe(recipe_file).name == "other.name-2"


@pytest.mark.parametrize(
    "written", ["gptq", {"gptq": None}, {"gptq": {}}, {"name": "gptq"}, {"name": "gptq", "options": {}}]
)
def test_an_entry_can_be_written_short_or_long(written):
    assert Entry.model_validate(written) == Entry(name="gptq", options={})


def test_spec_of_a_tensor_is_its_grid_without_the_observer():
    spec = TensorQuant(bits=3, granularity="channel", observer="mse").spec
    assert type(spec) is QuantSpec
    assert spec == QuantSpec(bits=3, granularity="channel")


@pytest.mark.parametrize(
    "overrides",
    [
        [],
        ["seed=7", "blocks=layers.*", "task.label='on'", "task.number='1e3'", "task.nested={a: [1, null]}"],
        ["quant.activations=null", "export=[{json: {indent: 2}}]", "name=other"],
        ["task.limit=.inf"],
        ["steps.1.gptq.limit=-.inf"],
        ["task.since=2024-05-17"],
    ],
)
def test_yaml_round_trip_keeps_the_recipe(recipe_file, tmp_path, overrides):
    recipe = read_recipe(recipe_file, overrides)
    again = tmp_path / "again.yaml"
    again.write_text(recipe.to_yaml(), encoding="utf-8")
    assert read_recipe(again) == recipe


def test_yaml_of_a_recipe_writes_every_default_out(recipe_file):
    data = yaml.safe_load(read_recipe(recipe_file).to_yaml())
    assert data["name"] == "small-run"
    assert data["seed"] == 0
    assert data["blocks"] is None
    assert data["quant"]["weights"]["dynamic"] is False
    assert data["quant"]["activations"]["bits"] == 8
    assert data["task"] == {"kind": "toy", "samples": 16}


def test_yaml_does_not_contain_what_the_recipe_does_not_know(recipe_file):
    assert set(yaml.safe_load(read_recipe(recipe_file).to_yaml())) == set(Recipe.model_fields)


# Overrides


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("a.b=2", {"a": {"b": 2}, "list": [{"x": 1}, "name"]}),
        ("a.b=2.5", {"a": {"b": 2.5}, "list": [{"x": 1}, "name"]}),
        ("a.b=true", {"a": {"b": True}, "list": [{"x": 1}, "name"]}),
        ("a.b=text", {"a": {"b": "text"}, "list": [{"x": 1}, "name"]}),
        ("a.b='2'", {"a": {"b": "2"}, "list": [{"x": 1}, "name"]}),
        ("a.b=null", {"a": {"b": None}, "list": [{"x": 1}, "name"]}),
        ("a.b=", {"a": {"b": None}, "list": [{"x": 1}, "name"]}),
        ("a.b=c=d", {"a": {"b": "c=d"}, "list": [{"x": 1}, "name"]}),
        ("a.b=[1, x]", {"a": {"b": [1, "x"]}, "list": [{"x": 1}, "name"]}),
        ("a={c: 3}", {"a": {"c": 3}, "list": [{"x": 1}, "name"]}),
        ("a.new.deep=4", {"a": {"b": 1, "new": {"deep": 4}}, "list": [{"x": 1}, "name"]}),
        ("fresh.key=5", {"a": {"b": 1}, "list": [{"x": 1}, "name"], "fresh": {"key": 5}}),
        ("list.0.x=6", {"a": {"b": 1}, "list": [{"x": 6}, "name"]}),
        ("list.0=y", {"a": {"b": 1}, "list": ["y", "name"]}),
        ("list.1.name.damp=7", {"a": {"b": 1}, "list": [{"x": 1}, {"name": {"damp": 7}}]}),
    ],
)
def test_an_override_sets_one_value(override, expected):
    data = {"a": {"b": 1}, "list": [{"x": 1}, "name"]}
    apply_override(data, override)
    assert data == expected


def test_an_override_fills_a_section_that_is_null():
    data = {"a": None}
    apply_override(data, "a.b=1")
    assert data == {"a": {"b": 1}}


def test_overrides_apply_in_order(recipe_file):
    assert read_recipe(recipe_file, ["seed=1", "seed=2"]).seed == 2


def test_overrides_reach_options_of_steps_and_tasks(recipe_file):
    recipe = read_recipe(
        recipe_file,
        ["steps.0.smooth.alpha=0.5", "steps.1.gptq.damp=0.1", "task.samples=8", "quant.weights.bits=3"],
    )
    assert recipe.steps == [
        Entry(name="smooth", options={"alpha": 0.5}),
        Entry(name="gptq", options={"damp": 0.1}),
    ]
    assert recipe.task.options == {"samples": 8}
    assert recipe.quant.weights.bits == 3


def test_an_override_can_switch_activations_off_and_on(recipe_file):
    assert read_recipe(recipe_file, ["quant.activations=null"]).quant.activations is None
    both = ["quant.activations=null", "quant.activations.bits=6"]
    assert read_recipe(recipe_file, both).quant.activations == TensorQuant(bits=6)


@pytest.mark.parametrize(
    ("override", "named"),
    [
        ("quant.weights.bits", "'quant.weights.bits' is not of the form KEY=VALUE"),
        ("=4", "'=4' is not of the form KEY=VALUE"),
        ("a..b=4", "'a..b=4' is not of the form KEY=VALUE"),
        ("seed={", "--set seed: the value '{' is not valid YAML"),
        ("task.samples.x=1", "--set task.samples.x: 'samples' is 16 and has no keys below it"),
        ("steps.2=awq", "--set steps.2: '2' is not an index of a list of 2 entries"),
        ("steps.gptq.damp=1", "--set steps.gptq.damp: 'gptq' is not an index of a list of 2 entries"),
        ("steps.-1=awq", "--set steps.-1: '-1' is not an index of a list of 2 entries"),
        ("steps.²=awq", "--set steps.²: '²' is not an index of a list of 2 entries"),
        ("seed=2024-13-45", "--set seed: the value '2024-13-45' is not valid YAML"),
    ],
)
def test_an_override_that_cannot_be_applied_says_why(recipe_file, override, named):
    assert named in error_of(recipe_file, override)


# What is wrong


@pytest.mark.parametrize(
    ("override", "key", "suggestion"),
    [
        ("sed=1", "sed", "seed"),
        ("quant.wieghts={}", "quant.wieghts", "weights"),
        ("quant.weights.bit=4", "quant.weights.bit", "bits"),
        ("quant.weights.groupsize=4", "quant.weights.groupsize", "group_size"),
        ("quant.activations.granularty=token", "quant.activations.granularty", "granularity"),
        ("steps.1={name: gptq, optoins: {}}", "steps.1.optoins", "options"),
    ],
)
def test_an_unknown_key_is_named_with_the_nearest_known_one(recipe_file, override, key, suggestion):
    message = error_of(recipe_file, override)
    assert message == f"recipe key {key!r} is unknown; did you mean {suggestion!r}?"


def test_an_unknown_key_unlike_all_others_lists_what_is_known(recipe_file):
    message = error_of(recipe_file, "quant.zzz=1")
    known = "activations, first_last_bits, ignore, min_tokens, scope, weights"
    assert message == f"recipe key 'quant.zzz' is unknown; known: {known}"


def test_a_misspelt_key_is_reported_rather_than_the_one_it_was_meant_to_be(recipe_file):
    recipe_file.write_text(BASE.replace("weights:", "weigths:"), encoding="utf-8")
    assert "'quant.weigths' is unknown; did you mean 'weights'?" in error_of(recipe_file)


@pytest.mark.parametrize("section", ["task", "quant", "steps"])
def test_a_missing_section_is_named(recipe_file, section):
    data = yaml.safe_load(BASE)
    del data[section]
    recipe_file.write_text(yaml.safe_dump(data), encoding="utf-8")
    assert error_of(recipe_file).startswith(f"recipe key {section!r} is missing")


@pytest.mark.parametrize(
    ("override", "start", "reason"),
    [
        ("quant.weights.bits=9", "recipe key 'quant.weights.bits' is 9", "less than or equal to 8"),
        ("quant.weights.bits=1", "recipe key 'quant.weights.bits' is 1", "greater than or equal to 2"),
        ("quant.weights.bits=four", "recipe key 'quant.weights.bits' is 'four'", "valid integer"),
        (
            "quant.weights.group_size=0",
            "recipe key 'quant.weights.group_size' is 0",
            "greater than or equal to 1",
        ),
        (
            "quant.weights.dtype=int4",
            "recipe key 'quant.weights.dtype' is 'int4'",
            "'int', 'e4m3' or 'e5m2'",
        ),
        ("quant.weights.symmetric=[]", "recipe key 'quant.weights.symmetric' is []", "boolean"),
        ("quant.weights.observer=3", "recipe key 'quant.weights.observer' is 3", ""),
        ("quant.weights.observer={mse: 2}", "recipe key 'quant.weights.observer", ""),
        ("quant.ignore=head", "recipe key 'quant.ignore' is 'head'", "list"),
        ("quant.ignore=[1]", "recipe key 'quant.ignore.0' is 1", "string"),
        ("quant.activations=8", "recipe key 'quant.activations' is 8", ""),
        ("quant=4", "recipe key 'quant' is 4", ""),
        ("seed=-1", "recipe key 'seed' is -1", "greater than or equal to 0"),
        ("seed=4294967296", "recipe key 'seed' is 4294967296", "less than 4294967296"),
        ("steps=[]", "recipe key 'steps' is []", "at least 1 item"),
        ("steps=gptq", "recipe key 'steps' is 'gptq'", "list"),
        ("name='two words'", "recipe key 'name' is 'two words'", ""),
        ("name=../up", "recipe key 'name' is '../up'", ""),
        ("task.kind=3", "recipe key 'task.kind' is 3", "string"),
        ("export=[a, b, {a: {x: 1}}]", "recipe key 'export' is not possible", "twice"),
    ],
)
def test_a_wrong_value_is_named_with_its_key_and_the_reason(recipe_file, override, start, reason):
    message = error_of(recipe_file, override)
    assert message.startswith(start)
    assert reason in message


@pytest.mark.parametrize(
    ("overrides", "parts"),
    [
        (["quant.weights={dtype: e4m3, bits: 4}"], ["'quant.weights'", "bits 4 with dtype e4m3"]),
        (
            ["quant.weights={granularity: group}"],
            ["'quant.weights'", "granularity group without group_size"],
        ),
        (
            ["quant.weights={bits: 4, group_size: 64}"],
            ["'quant.weights'", "group_size 64", "granularity tensor"],
        ),
        (["quant.weights.dynamic=true"], ["'quant'", "weights.dynamic true"]),
        (["quant.activations={granularity: token}"], ["'quant.activations'", "token without dynamic"]),
        (["quant.activations={granularity: channel}"], ["'quant'", "activations.granularity channel"]),
        (
            ["quant.activations={granularity: group, group_size: 8}"],
            ["'quant'", "activations.granularity group with dynamic false"],
        ),
    ],
)
def test_an_impossible_combination_is_named_with_both_sides(recipe_file, overrides, parts):
    message = error_of(recipe_file, *overrides)
    assert "is not possible" in message
    assert all(part in message for part in parts)


@pytest.mark.parametrize(
    "text",
    [
        "steps: [a",
        "a: b: c",
        "\tname: x",
        "name: \x00",
        "name: !!python/object:os.system x",
        "? [a]\n: b",
        "a: 2024-13-45",
    ],
)
def test_invalid_yaml_is_one_sentence_with_the_file(recipe_file, text):
    recipe_file.write_text(text, encoding="utf-8")
    message = error_of(recipe_file)
    assert message.startswith(f"recipe {recipe_file} is not valid YAML")


@pytest.mark.parametrize(("text", "kind"), [("", "NoneType"), ("- a\n- b\n", "list"), ("just text", "str")])
def test_a_recipe_that_is_not_a_mapping_is_refused(recipe_file, text, kind):
    recipe_file.write_text(text, encoding="utf-8")
    assert error_of(recipe_file) == f"recipe {recipe_file} must be a mapping of keys, not {kind}"


def test_a_missing_file_is_named(tmp_path):
    path = tmp_path / "missing.yaml"
    assert error_of(path).startswith(f"recipe {path} cannot be read: ")


def test_a_folder_and_a_binary_file_cannot_be_read(tmp_path):
    assert "cannot be read" in error_of(tmp_path)
    binary = tmp_path / "weights.yaml"
    binary.write_bytes(b"\xff\xfe\x00\x80")
    assert "cannot be read" in error_of(binary)


def test_keys_that_are_not_text_are_refused(recipe_file):
    recipe_file.write_text(BASE + "7: seven\n", encoding="utf-8")
    assert "'7'" in error_of(recipe_file)


# Options of plugins


class ToyOptions(BaseModel):
    model_config = ConfigDict(extra="forbid")

    samples: int = 1


def test_options_are_validated_under_their_place_in_the_recipe():
    assert validate(ToyOptions, {"samples": 3}, "task").samples == 3
    with pytest.raises(RecipeError, match=r"^recipe key 'task.samples' is 'x'"):
        validate(ToyOptions, {"samples": "x"}, "task")
    with pytest.raises(
        RecipeError, match=r"^recipe key 'task.sample' is unknown; did you mean 'samples'\?$"
    ):
        validate(ToyOptions, {"sample": 3}, "task")


def test_nearest_suggests_one_name_or_lists_all():
    assert nearest("gtpq", ["awq", "gptq"]) == "; did you mean 'gptq'?"
    assert nearest("zzz", ["gptq", "awq"]) == "; known: awq, gptq"
    assert nearest("zzz", []) == ""
