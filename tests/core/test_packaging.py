"""What the wheels hold, as a user installs them."""

import json
import os
import subprocess
import sys
import zipfile
from email.parser import Parser
from pathlib import Path

import jsonschema
import pytest
import yaml

REPOSITORY = Path(__file__).parents[2]
PLUGINS = ("diffusion", "lane", "llm", "vision")
ALLOWED = {"torch", "numpy", "safetensors", "pydantic", "pyyaml", "jinja2", "rich", "typer"}


@pytest.fixture(scope="module")
def wheels(tmp_path_factory):
    folder = tmp_path_factory.mktemp("wheels")
    build = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation"]
    plugins = [REPOSITORY / "plugins" / f"ptq-{name}" for name in PLUGINS]
    subprocess.run([*build, "--wheel-dir", folder, REPOSITORY, *plugins], check=True)
    return {wheel.name.split("-")[0]: wheel for wheel in folder.glob("*.whl")}


def names_in(wheel):
    return set(zipfile.ZipFile(wheel).namelist())


def test_the_core_depends_on_few_packages(wheels):
    (metadata,) = (name for name in names_in(wheels["ptqcore"]) if name.endswith("METADATA"))
    headers = Parser().parsestr(zipfile.ZipFile(wheels["ptqcore"]).read(metadata).decode())
    needed = [line for line in headers.get_all("Requires-Dist") if "extra ==" not in line]
    assert {line.split(">")[0].strip().lower() for line in needed} == ALLOWED


def test_the_core_wheel_holds_the_template_of_the_report(wheels):
    assert "ptqcore/report/page.html.j2" in names_in(wheels["ptqcore"])


@pytest.mark.parametrize("plugin", PLUGINS)
def test_recipes_are_packed_from_configs(wheels, plugin):
    wheel = zipfile.ZipFile(wheels[f"ptq_{plugin}"])
    recipes = sorted((REPOSITORY / "configs" / plugin).glob("*.yaml"))
    assert recipes
    for recipe in recipes:
        assert wheel.read(f"ptq_{plugin}/recipes/{recipe.name}") == recipe.read_bytes()


@pytest.mark.parametrize("plugin", PLUGINS)
def test_an_installed_wheel_lists_its_recipes(wheels, tmp_path, plugin):
    target = tmp_path / "site"
    install = [
        sys.executable,
        "-m",
        "pip",
        "install",
        "--quiet",
        "--no-deps",
        "--no-index",
        "--target",
        target,
    ]
    subprocess.run([*install, wheels[f"ptq_{plugin}"]], check=True)
    code = (
        "from ptqcore.plugin import discover; import json;"
        f"files = discover().plugin({plugin!r}).recipe_files;"
        "print(json.dumps({name: str(file) for name, file in files.items()}))"
    )
    environment = os.environ | {"PYTHONPATH": str(target)}
    out = subprocess.run(
        [sys.executable, "-P", "-c", code], env=environment, check=True, capture_output=True, text=True
    )
    files = json.loads(out.stdout)
    assert set(files) == {file.stem for file in (REPOSITORY / "configs" / plugin).glob("*.yaml")}
    assert all(Path(file).is_relative_to(target) for file in files.values())


def test_shipped_recipes_follow_the_printed_schema():
    command = [sys.executable, "-P", "-c", "from ptqcore.cli import main; main()", "recipe", "schema"]
    schema = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    for file in (REPOSITORY / "configs").glob("*/*.yaml"):
        recipe = yaml.safe_load(file.read_text())
        jsonschema.validate(recipe, schema)
        with pytest.raises(jsonschema.ValidationError):
            jsonschema.validate(recipe | {"stesp": []}, schema)
        with pytest.raises(jsonschema.ValidationError):
            jsonschema.validate(recipe | {"task": {"kind": "causal-lm", "modle": "x"}}, schema)
