"""The command line: what it prints, what it imports, and the one sentence when something is wrong."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

import ptqcore
from ptqcore.plan import make_plan
from ptqcore.plugin import discover
from ptqcore.recipe import Recipe, read_recipe

LLM_RECIPES = ["fp8", "kv4", "w2a16", "w3a16", "w4a16", "w4a4", "w4a8", "w6a6", "w8a8"]


def fresh(code: str, *arguments: str) -> str:
    """Standard output of a fresh interpreter that must succeed."""
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-P", "-c", code, *arguments]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout


# What is imported, and when

IMPORTED = "print(json.dumps(sorted({name.partition('.')[0] for name in sys.modules})))"


def imported_by(code: str, *arguments: str) -> set[str]:
    """Top-level packages that a fresh interpreter has imported after running `code`."""
    return set(json.loads(fresh(f"import json, sys\n{code}\n{IMPORTED}", *arguments).splitlines()[-1]))


def test_importing_the_package_is_light():
    packages = imported_by("import ptqcore")
    assert "ptqcore" in packages
    assert packages.isdisjoint({"torch", "numpy", "transformers", "ptq_llm", "pydantic", "typer"})


def test_importing_all_of_the_core_imports_no_plugin():
    packages = imported_by("from ptqcore import *")
    assert "torch" in packages
    assert packages.isdisjoint({"transformers", "ptq_llm", "gguf"})


@pytest.mark.parametrize(
    "arguments",
    [
        ["--help"],
        ["quantize", "--help"],
        ["map", "--help"],
        ["sweep", "--help"],
        ["llm", "--help"],
        ["llm", "bench", "--help"],
        ["plugins"],
        ["recipe", "list", "--plugin", "llm"],
    ],
)
def test_what_computes_nothing_does_not_wait_for_torch(arguments):
    code = (
        "from ptqcore.cli import main\ntry:\n    main()\nexcept SystemExit as end:\n    assert not end.code"
    )
    packages = imported_by(code, *arguments)
    assert "ptqcore" in packages
    assert packages.isdisjoint({"torch", "transformers"})


def test_the_installed_command_is_the_command_line():
    command = Path(sys.executable).with_name("ptq")
    done = subprocess.run([command, "--help"], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0
    assert "quantize" in done.stdout


# The public names


@pytest.mark.parametrize("name", ptqcore.__all__)
def test_every_public_name_resolves_to_what_is_called_so(name):
    value = getattr(ptqcore, name)
    assert name == "__version__" or value.__name__.rpartition(".")[2] == name


def test_type_checkers_see_every_public_name_and_none_that_is_not_there():
    source = Path(ptqcore.__file__).read_text(encoding="utf-8")
    typed = re.findall(r"^    from ptqcore[\w.]* import (\w+) as (\w+)$", source, re.MULTILINE)
    assert all(name == alias for name, alias in typed)
    assert {name for name, _ in typed} >= set(ptqcore.__all__) - {"__version__"}
    assert all(hasattr(ptqcore, name) for name, _ in typed)


def test_a_name_that_is_not_public_is_an_attribute_error():
    with pytest.raises(AttributeError, match="module 'ptqcore' has no attribute 'quantise'"):
        _ = ptqcore.quantise


# What is printed


def test_help_names_every_command(ptq):
    code, out, _ = ptq("--help")
    assert code == 0
    for command in ("quantize", "sweep", "map", "plugins", "recipe"):
        assert command in out


def test_plugins_lists_the_core_and_what_the_language_model_plugin_brings(ptq):
    code, out, _ = ptq("plugins")
    assert code == 0
    lines = out.splitlines()
    steps = "equalize, split-concatenations, round, adaround, brecq, qdrop, bias-correction"
    assert lines[0].startswith(f"core: steps {steps}; ")
    (llm,) = [line for line in lines if line.startswith("llm ")]
    assert llm.startswith(f"llm (ptq-llm {discover().versions()['llm']}): tasks causal-lm, text-encoder; ")
    assert llm.endswith(f"recipes {', '.join(LLM_RECIPES)}")


def test_recipe_list_names_every_recipe_with_its_description(ptq):
    code, out, _ = ptq("recipe", "list", "--plugin", "llm")
    assert code == 0
    lines = dict(line.split(": ", 1) for line in out.splitlines())
    assert [name.removesuffix(" (default)") for name in lines] == [f"llm {name}" for name in LLM_RECIPES]
    assert [name for name in lines if name.endswith("(default)")] == ["llm w4a16 (default)"]
    assert all(lines.values())


def test_recipe_schema_is_json_that_describes_recipes(ptq):
    code, out, _ = ptq("recipe", "schema")
    assert code == 0
    schema = json.loads(out)
    assert set(schema["properties"]) == set(Recipe.model_fields)
    assert schema["additionalProperties"] is False
    assert {"task", "quant", "steps"} <= set(schema["required"])


@pytest.mark.parametrize("name", LLM_RECIPES)
def test_recipe_show_prints_the_recipe_as_it_would_run(ptq, tmp_path, name):
    code, out, _ = ptq("recipe", "show", name, "--plugin", "llm")
    assert code == 0
    shown = tmp_path / "shown.yaml"
    shown.write_text(out, encoding="utf-8")
    registry = discover()
    planned = make_plan(read_recipe(registry.recipe_file(name, "llm")), "llm", registry)
    assert read_recipe(shown) == planned.resolved
    assert planned.task_options.model_dump(mode="json").items() <= yaml.safe_load(out)["task"].items()
    assert ptq("recipe", "show", str(shown)) == (0, out, "")


def test_recipe_show_applies_overrides(ptq):
    code, out, _ = ptq("recipe", "show", "w4a16", "--set", "quant.weights.bits=3", "--set", "seed=5")
    assert code == 0
    assert yaml.safe_load(out)["quant"]["weights"]["bits"] == 3
    assert yaml.safe_load(out)["seed"] == 5


def test_find_recipe_gives_a_recipe_as_it_would_run():
    registry = discover()
    read = read_recipe(registry.recipe_file("w8a8", "llm"), ["seed=5"])
    assert ptqcore.find_recipe("w8a8", "llm", ["seed=5"]) == make_plan(read, "llm", registry).resolved
    assert ptqcore.find_recipe(None, "llm").name == "w4a16"


# What is wrong

SHOW = ("recipe", "show", "w4a16", "--set")


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["quantize", "--plugin", "lm"], "plugin 'lm' is not installed; did you mean 'llm'?"),
        (["recipe", "list", "--plugin", "speech"], "plugin 'speech' is not installed"),
        (["map", "--plugin", "lm"], "plugin 'lm' is not installed; did you mean 'llm'?"),
        (["map", "--plugin", "llm", "--set", "quant.weights.bts=4"], "'quant.weights.bts' is unknown"),
        (["map", "--plugin", "llm", "--set", "task.model=no-such"], "no-such"),
        (
            ["map", "--plugin", "llm", "--json", "no-such-folder/map.json"],
            "cannot write no-such-folder/map.json: no-such-folder is not a folder",
        ),
        (["map", "--plugin", "llm", "--html", "."], "cannot write .: it is a folder"),
        (
            ["recipe", "show", "w4a61"],
            "recipe 'w4a61' is unknown; did you mean 'w4a16'?",
        ),
        (["quantize", "--plugin", "llm", "--recipe", "no.yaml"], "recipe no.yaml cannot be read: "),
        ([*SHOW, "quant.weights.bts=4"], "'quant.weights.bts' is unknown; did you mean 'bits'?"),
        ([*SHOW, "qant.weights.bits=4"], "recipe key 'qant' is unknown; did you mean 'quant'?"),
        ([*SHOW, "quant.weights.bits=9"], "recipe key 'quant.weights.bits' is 9: "),
        ([*SHOW, "task.modle=x"], "recipe key 'task.modle' is unknown; did you mean 'model'?"),
        ([*SHOW, "task.kind=causal"], "task 'causal' is unknown; did you mean 'causal-lm'?"),
        ([*SHOW, "steps=[rond]"], "step 'rond' is unknown; did you mean 'round'?"),
        ([*SHOW, "steps=[{round: {speed: 2}}]"], "recipe key 'steps.0.round.speed' is unknown"),
        ([*SHOW, "steps=[]"], "recipe key 'steps' is []: "),
        ([*SHOW, "quant.weights.observer=minmx"], "observer 'minmx' is unknown; did you mean 'minmax'?"),
        ([*SHOW, "quant.weights.observer={mse: {nrm: 2}}"], "observer.mse.nrm' is unknown"),
        ([*SHOW, "quant.weights.observer={}"], "observer"),
        ([*SHOW, "quant.weights.observer={mse: {}, minmax: {}}"], "observer"),
        ([*SHOW, "export=[compressed]"], "exporter 'compressed' is unknown"),
        ([*SHOW, "bits"], "--set 'bits' is not of the form KEY=VALUE"),
        (
            [*SHOW, "quant.weights.bits.x=1"],
            "--set quant.weights.bits.x: 'bits' is 4 and has no keys below it",
        ),
    ],
    ids=lambda value: " ".join(value[-2:]) if isinstance(value, list) else "",
)
def test_what_the_user_can_mend_is_one_sentence_and_exit_code_2(ptq, arguments, sentence):
    code, out, err = ptq(*arguments)
    assert code == 2
    assert out == ""
    assert err.startswith("error: ")
    assert err.count("\n") == 1
    assert sentence in err


@pytest.mark.parametrize(
    "arguments",
    [["quantise"], ["quantize"], ["quantize", "--plugin"], ["recipe", "show"], ["--speed", "2"]],
)
def test_a_usage_error_exits_with_code_2(ptq, arguments):
    code, out, err = ptq(*arguments)
    assert code == 2
    assert out == ""
    assert "Error" in err
    assert "Traceback" not in err


def test_a_refused_recipe_leaves_nothing_behind(ptq, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    code, _, _ = ptq("quantize", "--plugin", "llm", "--set", "steps=[rond]")
    assert code == 2
    assert list(tmp_path.iterdir()) == []


def test_an_interrupted_run_says_how_to_go_on(ptq, monkeypatch):
    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("ptqcore.run.quantize", interrupted)
    code, _, err = ptq("quantize", "--plugin", "llm")
    assert code == 130
    assert err == "interrupted; run the same command with --resume to go on\n"
