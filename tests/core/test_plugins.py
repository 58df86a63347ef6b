"""Plugins: how they are found, whose name wins, and the promises that `check_plugin` holds them to."""

import importlib
import itertools
import sys
from decimal import Decimal
from fractions import Fraction
from pathlib import Path

import pytest
import torch
from fake_distribution import write_distribution
from torch import nn

import ptqcore.artifact
import ptqcore.testing
from ptqcore import Plugin, Step, Task
from ptqcore.errors import ArtifactError, PluginError, RecipeError
from ptqcore.observers import MinMax
from ptqcore.plugin import CORE, Installed, Registry, discover
from ptqcore.rounding import Round
from ptqcore.summary import describe_plugins
from ptqcore.testing import check_plugin

GOOD = (
    "from ptqcore import Plugin\nplugin = Plugin(name={name!r}, steps={{'stretch': 'decimal:Decimal'}})\n"
)


def registry_of(*plugins: Plugin) -> Registry:
    return Registry([Installed(plugin.name, f"ptq-{plugin.name}", "1.0", plugin) for plugin in plugins])


def line(text: str, start: str) -> str:
    """The only line that starts so."""
    (found,) = [each for each in text.splitlines() if each.startswith(start)]
    return found


# Found by entry points


@pytest.fixture
def install(tmp_path, monkeypatch):
    """Put a hand-written distribution on the path; its modules are forgotten afterwards."""
    before = set(sys.modules)
    site = tmp_path / "site"
    site.mkdir()

    def add(name: str, entry: str, code: str, target: str | None = None) -> None:
        write_distribution(site, name, entry, code, target=target)
        monkeypatch.syspath_prepend(site)

    yield add
    for name in set(sys.modules) - before:
        if getattr(sys.modules[name], "__file__", None) and Path(sys.modules[name].__file__).parent == site:
            del sys.modules[name]


def found(name: str) -> list[Installed]:
    return [entry for entry in discover().installed if entry.name == name]


def test_an_installed_plugin_is_found_with_its_distribution_and_version(install):
    install("ptq-guest", "guest", GOOD.format(name="guest"))
    (entry,) = found("guest")
    assert (entry.distribution, entry.version, entry.reason) == ("ptq-guest", "0.1", "")
    assert discover().plugin("guest").steps == {"stretch": "decimal:Decimal"}
    assert discover().versions()["guest"] == "0.1"


@pytest.mark.parametrize(
    ("code", "target", "reason"),
    [
        ("raise RuntimeError('the licence\\nhas expired')", None, "RuntimeError: the licence has expired"),
        ("import no_such_package_at_all", None, "ModuleNotFoundError: No module named 'no_such_package"),
        ("def (", None, "SyntaxError: invalid syntax"),
        ("import sys\nsys.exit('good bye')", None, "SystemExit: good bye"),
        ("", None, "AttributeError: module 'ptq_guest' has no attribute 'plugin'"),
        ("plugin = {'name': 'guest'}", None, "ptq_guest:plugin is a dict, not a ptqcore.Plugin"),
        ("", "ptq_guest", "ptq_guest is a module, not a ptqcore.Plugin"),
        (
            GOOD.format(name="other"),
            None,
            "its entry point is named 'guest' but the plugin 'other'",
        ),
        (
            "from ptqcore import Plugin\nplugin = Plugin(name='guest', recipes='json/no_recipes')",
            None,
            "plugin 'guest' declares recipes in 'json/no_recipes', which is no folder",
        ),
        (
            "from ptqcore import Plugin\nplugin = Plugin(name='guest', recipes='no_package_here/recipes')",
            None,
            "no_package_here",
        ),
    ],
    ids=[
        "raises",
        "needs a missing package",
        "is not Python",
        "exits",
        "has no such attribute",
        "is a dict",
        "is a module",
        "has another name",
        "has no folder of recipes",
        "has its recipes in no package",
    ],
)
def test_a_plugin_that_cannot_be_used_is_listed_with_the_reason(install, code, target, reason):
    install("ptq-guest", "guest", code, target)
    install("ptq-neighbour", "neighbour", GOOD.format(name="neighbour"))
    listed = describe_plugins(discover())
    broken = line(listed, "guest ")
    assert broken.startswith("guest (ptq-guest 0.1): BROKEN: ")
    assert reason in broken
    assert line(listed, "neighbour ") == "neighbour (ptq-neighbour 0.1): steps stretch"
    assert discover().find("steps", "stretch", "neighbour") is Decimal
    with pytest.raises(PluginError, match=r"'guest' \(ptq-guest 0\.1\) could not be loaded: ") as caught:
        discover().plugin("guest")
    assert reason in str(caught.value)


def test_of_two_distributions_with_one_name_one_is_used_and_the_other_listed_as_broken(install):
    install("ptq-first", "guest", GOOD.format(name="guest"))
    install("ptq-second", "guest", GOOD.format(name="guest"))
    used, refused = found("guest")
    assert (used.distribution, used.reason) == ("ptq-first", "")
    assert (refused.distribution, refused.plugin) == ("ptq-second", None)
    assert refused.reason == "the name 'guest' is already taken by ptq-first"
    assert discover().plugin("guest") is used.plugin
    assert discover().versions()["guest"] == used.version


def test_a_broken_distribution_does_not_take_a_name_from_a_working_one(install):
    install("ptq-first", "guest", "raise RuntimeError('broken')")
    install("ptq-second", "guest", GOOD.format(name="guest"))
    assert discover().plugin("guest").steps == {"stretch": "decimal:Decimal"}
    reasons = {entry.distribution: entry.reason for entry in found("guest")}
    assert reasons["ptq-second"] == ""
    assert "RuntimeError: broken" in reasons["ptq-first"]


def test_no_plugin_can_call_itself_the_core(install):
    install("ptq-usurper", CORE, GOOD.format(name=CORE))
    (entry,) = found(CORE)
    assert entry.plugin is None
    assert entry.reason == "the name 'core' is already taken by the core"
    assert discover().find("steps", "core:round", "llm") is Round
    with pytest.raises(RecipeError, match="'core:stretch' is unknown"):
        discover().find("steps", "core:stretch", CORE)


def test_listing_plugins_imports_none_of_their_classes(install):
    install(
        "ptq-guest",
        "guest",
        "from ptqcore import Plugin\nplugin = Plugin(name='guest', tasks={'idle': 'no_such_module:Task'})",
    )
    assert line(describe_plugins(discover()), "guest ") == "guest (ptq-guest 0.1): tasks idle"
    with pytest.raises(PluginError, match="'guest' cannot import no_such_module:Task: ModuleNotFoundError"):
        discover().find("tasks", "idle", "guest")


@pytest.mark.parametrize(
    "code", ["raise ValueError('not today')", "import sys\nsys.exit(3)"], ids=["raises", "exits"]
)
def test_a_class_whose_module_cannot_be_imported_is_one_sentence(install, code):
    install("ptq-moody", "moody", code)
    registry = registry_of(Plugin("guest", steps={"stretch": "ptq_moody:Stretch"}))
    with pytest.raises(PluginError, match="plugin 'guest' cannot import ptq_moody:Stretch: "):
        registry.find("steps", "stretch", "guest")


# Whose name wins


def test_a_plugins_own_name_comes_before_the_cores():
    registry = registry_of(Plugin("guest", steps={"round": "decimal:Decimal"}))
    assert registry.find("steps", "round", "guest") is Decimal


def test_the_cores_name_comes_before_another_plugins():
    registry = registry_of(Plugin("guest", steps={"round": "decimal:Decimal"}), Plugin("asking"))
    assert registry.find("steps", "round", "asking") is Round


def test_a_name_that_one_other_plugin_brings_is_found_there():
    registry = registry_of(Plugin("guest", steps={"stretch": "decimal:Decimal"}), Plugin("asking"))
    assert registry.find("steps", "stretch", "asking") is Decimal


def test_a_name_that_several_others_bring_must_be_written_with_its_plugin():
    registry = registry_of(
        Plugin("one", steps={"stretch": "decimal:Decimal"}),
        Plugin("two", steps={"stretch": "fractions:Fraction"}),
        Plugin("asking"),
    )
    with pytest.raises(RecipeError) as caught:
        registry.find("steps", "stretch", "asking")
    assert str(caught.value) == (
        "step 'stretch' is brought by several plugins: write one:stretch or two:stretch"
    )
    assert registry.find("steps", "two:stretch", "asking") is Fraction
    assert registry.find("steps", "one:stretch", "two") is Decimal
    assert registry.find("steps", "stretch", "two") is Fraction


def test_kinds_of_names_do_not_mix():
    registry = registry_of(Plugin("guest", steps={"stretch": "decimal:Decimal"}))
    with pytest.raises(RecipeError, match="observer 'stretch' is unknown"):
        registry.find("observers", "stretch", "guest")


@pytest.mark.parametrize("name", ["strech", "guest:strech", "core:stretch"])
def test_an_unknown_name_comes_with_the_nearest_known_one(name):
    registry = registry_of(Plugin("guest", steps={"stretch": "decimal:Decimal"}))
    with pytest.raises(RecipeError) as caught:
        registry.find("steps", name, "guest")
    assert str(caught.value) == f"step {name!r} is unknown; did you mean 'stretch'?"


def test_a_name_of_a_plugin_that_is_not_installed_says_how_to_get_it():
    with pytest.raises(PluginError) as caught:
        registry_of(Plugin("guest")).find("steps", "absent:stretch", "guest")
    message = str(caught.value)
    assert message.startswith("plugin 'absent' is not installed")
    assert "pip install ptq-absent" in message


def test_names_of_a_broken_plugin_are_not_found_but_explained():
    registry = Registry([Installed("guest", "ptq-guest", "1.0", None, "ValueError: no")])
    with pytest.raises(
        PluginError, match=r"'guest' \(ptq-guest 1\.0\) could not be loaded: ValueError: no"
    ):
        registry.find("steps", "guest:stretch", "asking")
    assert registry.versions() == {}


def test_a_task_is_not_found_for_a_plugin_that_is_not_installed():
    with pytest.raises(PluginError, match="plugin 'absent' is not installed"):
        registry_of(Plugin("guest")).task("regression", "absent")


# Recipe files


@pytest.fixture
def recipes(tmp_path, monkeypatch):
    """A registry with the plugin `guest`, whose package has the recipes `one` and `two`."""
    folder = tmp_path / "ptq_recipe_box" / "shelf"
    folder.mkdir(parents=True)
    (folder.parent / "__init__.py").touch()
    for name in ("one.yaml", "two.yaml", "notes.txt"):
        (folder / name).touch()
    monkeypatch.syspath_prepend(tmp_path)
    yield registry_of(
        Plugin("guest", recipes="ptq_recipe_box/shelf", default_recipe="two"),
        Plugin("bare"),
    )
    sys.modules.pop("ptq_recipe_box", None)


def test_a_recipe_is_found_by_name_and_the_default_without_one(recipes):
    assert recipes.recipe_file("one", "guest").name == "one.yaml"
    assert recipes.recipe_file(None, "guest").name == "two.yaml"
    assert list(recipes.plugin("guest").recipe_files) == ["one", "two"]


@pytest.mark.parametrize("name", ["somewhere/mine.yaml", "one.yml"])
def test_a_recipe_with_the_ending_of_yaml_is_a_path(recipes, name):
    assert recipes.recipe_file(name, "guest") == Path(name)


@pytest.mark.parametrize(
    ("name", "plugin", "message"),
    [
        ("tow", "guest", "recipe 'tow' of plugin 'guest' is unknown; did you mean 'two'?"),
        ("xxx", "guest", "recipe 'xxx' of plugin 'guest' is unknown; known: one, two"),
        ("one", "bare", "recipe 'one' of plugin 'bare' is unknown"),
        (None, "bare", "plugin 'bare' has no default recipe: name one with --recipe"),
    ],
)
def test_a_recipe_that_is_not_there_is_one_sentence(recipes, name, plugin, message):
    with pytest.raises(RecipeError) as caught:
        recipes.recipe_file(name, plugin)
    assert str(caught.value) == message


def test_a_recipe_file_needs_an_installed_plugin_too(recipes):
    with pytest.raises(PluginError, match="'gues' is not installed; did you mean 'guest'"):
        recipes.recipe_file("mine.yaml", "gues")


# Commands

COMMANDS = "from ptqcore import Plugin\nplugin = Plugin(name='guest', commands='ptq_guest_tools:app')"


@pytest.fixture
def tools(install, tmp_path):
    """Install the plugin `guest`, whose commands have this source."""

    def write(code: str) -> None:
        install("ptq-guest", "guest", COMMANDS)
        (tmp_path / "site" / "ptq_guest_tools.py").write_text(code, encoding="utf-8")

    return write


def test_a_plugins_command_is_called_below_its_name(tools, ptq):
    """Also where it is the only one, which typer would call without its name."""
    tools(
        "import typer\n"
        "app = typer.Typer()\n"
        "@app.command()\n"
        "def greet(name: str, loud: bool = False):\n"
        "    print(name.upper() if loud else name)\n"
    )
    assert ptq("guest", "greet", "Ada", "--loud") == (0, "ADA\n", "")
    code, out, err = ptq("guest", "greet", "--quiet")
    assert (code, out) == (2, "")
    assert "ptq guest greet [OPTIONS]" in err
    assert "No such option" in err
    assert ptq("guest", "gret", "Ada")[0] == 2


@pytest.mark.parametrize("arguments", [["--help"], ["plugins"]])
def test_commands_are_listed_without_importing_them(tools, ptq, arguments):
    tools("raise RuntimeError('imported')")
    code, out, _ = ptq(*arguments)
    assert code == 0
    if arguments == ["plugins"]:
        assert line(out, "guest ") == "guest (ptq-guest 0.1): commands ptq guest"
    else:
        assert "Commands of the plugin guest." in out
        assert "Commands of the plugin vision." not in out


@pytest.mark.parametrize(
    ("code", "reason"),
    [
        ("raise RuntimeError('not today')", "cannot import ptq_guest_tools:app: RuntimeError: not today"),
        ("import sys\nsys.exit(3)", "cannot import ptq_guest_tools:app: SystemExit: 3"),
        ("import no_such_package_at_all", "No module named 'no_such_package_at_all'"),
        ("", "AttributeError: module 'ptq_guest_tools' has no attribute 'app'"),
        ("app = print", "as its commands, which is a builtin_function_or_method, not a typer.Typer"),
    ],
    ids=["raises", "exits", "needs a missing package", "has no app", "is no app"],
)
def test_commands_that_cannot_be_used_are_one_sentence_and_leave_the_others_alone(tools, ptq, code, reason):
    tools(code)
    status, out, err = ptq("guest", "greet")
    assert (status, out) == (2, "")
    assert err.startswith("error: plugin 'guest' ")
    assert reason in err
    assert err.count("\n") == 1
    assert ptq("recipe", "list", "--plugin", "llm")[0] == 0


def test_commands_of_a_plugin_that_could_not_be_loaded_are_explained(install, ptq):
    install("ptq-guest", "guest", "raise RuntimeError('it expired')")
    assert ptq("guest", "greet") == (
        2,
        "",
        "error: plugin 'guest' (ptq-guest 0.1) could not be loaded: RuntimeError: it expired\n",
    )
    assert "guest" not in ptq("--help")[1]


def test_a_plugin_without_commands_says_how_it_is_used(ptq):
    sentence = "plugin 'vision' brings no commands: use it with ptq quantize --plugin vision"
    assert ptq("vision", "bench") == (2, "", f"error: {sentence}\n")


def test_a_plugin_cannot_take_the_name_of_a_core_command(install, ptq):
    install(
        "ptq-map", "map", "from ptqcore import Plugin\nplugin = Plugin(name='map', commands='nowhere:app')"
    )
    code, out, _ = ptq("map", "--help")
    assert code == 0
    assert "what is quantized" in out
    assert "Commands of the plugin map." not in ptq("--help")[1]


# What `check_plugin` refuses

RECIPE = """
task: {kind: idle}
quant:
  weights: {bits: 4, granularity: channel, observer: wide}
steps: [settle]
"""


class Idle(Task):
    name = "idle"

    def load_model(self):
        torch.manual_seed(self.seed)
        return self.build(Path())

    def samples(self, model):
        return [torch.randn(3, 8, generator=torch.Generator().manual_seed(self.seed))]

    def evaluate(self, model):
        return {"sum": float(sum(parameter.sum() for parameter in model.state_dict().values()))}

    def save_assets(self, folder):
        pass

    @classmethod
    def build(cls, folder):
        return nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 2)).eval()


class Wide(MinMax):
    name = "wide"


class Settle(Round):
    name = "settle"


@pytest.fixture
def check(tmp_path, monkeypatch):
    """Run `check_plugin` on the plugin `guest`, with some of its parts replaced."""
    package = tmp_path / "ptq_under_check"
    package.mkdir()
    (package / "__init__.py").touch()
    monkeypatch.syspath_prepend(tmp_path)
    module = importlib.import_module(package.name)

    def run(
        task: type = Idle, step: type = Settle, observer: type = Wide, recipe: str = RECIPE
    ) -> list[str]:
        (package / "usual.yaml").write_text(recipe, encoding="utf-8")
        for name, part in (("Idle", task), ("Settle", step), ("Wide", observer)):
            monkeypatch.setattr(module, name, part, raising=False)
        registry = registry_of(
            Plugin(
                "guest",
                tasks={"idle": f"{package.name}:Idle"},
                steps={"settle": f"{package.name}:Settle"},
                observers={"wide": f"{package.name}:Wide"},
                recipes=package.name,
                default_recipe="usual",
            )
        )
        monkeypatch.setattr(ptqcore.testing, "discover", lambda: registry)
        monkeypatch.setattr(ptqcore.artifact, "discover", lambda: registry)
        return check_plugin("guest", tmp_path / "runs")

    yield run
    del sys.modules[package.name]


def test_a_plugin_that_keeps_its_promises_passes(check):
    assert check() == [
        "plugin 'guest' loads",
        "task 'idle' keeps its contract",
        "step 'settle' keeps its contract",
        "observer 'wide' keeps its contract",
        "recipe 'usual' is valid",
        "recipe 'usual' runs, twice with the same bytes, and its artifact loads back",
    ]


def test_a_class_must_carry_the_name_it_is_listed_under(check):
    with pytest.raises(PluginError, match="Settle is listed as 'settle' but its name is 'round'"):
        check(step=Round)


def test_a_class_must_have_a_name(check):
    class Nameless(Step):
        pass

    with pytest.raises(PluginError, match="Settle"):
        check(step=Nameless)


def test_a_class_must_derive_from_the_base_of_its_kind(check):
    with pytest.raises(PluginError, match="Settle is listed under steps but is no subclass of Step"):
        check(step=Wide)


def test_a_class_must_import(tmp_path, monkeypatch):
    registry = registry_of(Plugin("guest", steps={"settle": "decimal:Decimals"}))
    monkeypatch.setattr(ptqcore.testing, "discover", lambda: registry)
    with pytest.raises(PluginError, match="'guest' cannot import decimal:Decimals: AttributeError"):
        check_plugin("guest", tmp_path)


def test_commands_must_be_a_typer_app(tmp_path, monkeypatch):
    registry = registry_of(Plugin("guest", commands="decimal:Decimal"))
    monkeypatch.setattr(ptqcore.testing, "discover", lambda: registry)
    with pytest.raises(PluginError, match=r"as its commands, which is a type, not a typer\.Typer"):
        check_plugin("guest", tmp_path)


def test_a_plugin_that_is_not_installed_or_broken_does_not_pass(tmp_path, monkeypatch):
    registry = Registry([Installed("guest", "ptq-guest", "1.0", None, "ValueError: no")])
    monkeypatch.setattr(ptqcore.testing, "discover", lambda: registry)
    with pytest.raises(PluginError, match=r"'guest' .* could not be loaded: ValueError: no"):
        check_plugin("guest", tmp_path)
    with pytest.raises(PluginError, match="'absent' is not installed"):
        check_plugin("absent", tmp_path)


def test_an_observer_must_give_a_range_of_the_layout(check):
    class OneRange(Wide):
        def range(self):
            low, high = super().range()
            return low.amin().reshape(1, 1), high.amax().reshape(1, 1)

    with pytest.raises(PluginError, match=r"'wide' gives a low end of shape \(1, 1\) .* expected \(6, 1\)"):
        check(observer=OneRange)


def test_both_ends_of_a_range_must_have_the_layout(check):
    class Flat(Wide):
        def range(self):
            low, high = super().range()
            return low, high.flatten()

    with pytest.raises(PluginError, match=r"'wide' gives a high end of shape \(1,\)"):
        check(observer=Flat)


@pytest.mark.parametrize(
    ("low", "high"), [(0.5, 2.0), (-2.0, -0.5), (float("nan"), 1.0), (-1.0, float("nan"))]
)
def test_a_range_must_contain_zero(check, low, high):
    class Fixed(Wide):
        def range(self):
            return tuple(
                torch.full_like(end, to) for end, to in zip(super().range(), (low, high), strict=True)
            )

    with pytest.raises(PluginError, match="'wide' gives a range that does not contain 0"):
        check(observer=Fixed)


def test_what_is_wanted_of_a_tensor_must_give_the_same_range(check):
    class Careless(Wide):
        def condensed(self, x):
            return x.clamp(min=0)

    with pytest.raises(PluginError, match="'wide' finds another range in what `condensed` leaves"):
        check(observer=Careless)


@pytest.mark.parametrize(
    ("recipe", "message"),
    [
        (RECIPE.replace("settle", "setle"), "step 'setle' is unknown; did you mean 'settle'"),
        (RECIPE.replace("bits", "bts"), "'quant.weights.bts' is unknown; did you mean 'bits'"),
        (RECIPE.replace("kind: idle", "kind: idle, speed: 3"), "'task.speed' is unknown"),
    ],
)
def test_recipes_must_be_valid(check, recipe, message):
    with pytest.raises(RecipeError, match=message):
        check(recipe=recipe)


def test_two_runs_must_give_the_same_bytes(check):
    runs = itertools.count()

    class Restless(Idle):
        def load_model(self):
            model = super().load_model()
            nn.init.constant_(model[0].bias, next(runs))
            return model

    with pytest.raises(PluginError, match="recipe 'usual' gave other bytes in a second run"):
        check(task=Restless)


def test_metrics_must_have_the_same_names_before_and_after(check):
    class Renaming(Idle):
        calls = 0

        def evaluate(self, model):
            self.calls += 1
            return {f"metric {self.calls}": 1.0}

    with pytest.raises(PluginError, match=r"'idle' names its metrics .*metric 1.* before but .*metric 2"):
        check(task=Renaming)


def test_the_artifact_must_fit_the_structure_that_the_task_builds(check):
    class Narrow(Idle):
        def load_model(self):
            return nn.Sequential(nn.Linear(8, 4), nn.ReLU(), nn.Linear(4, 2)).eval()

    with pytest.raises(ArtifactError, match="does not fit its model"):
        check(task=Narrow)
