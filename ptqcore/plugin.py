"""The door: what a plugin brings, and how plugins are found."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from importlib import import_module
from importlib.metadata import EntryPoint, entry_points
from importlib.resources import files
from pathlib import Path
from typing import Any

from ptqcore.errors import PluginError, RecipeError, nearest
from ptqcore.requirement import unmet
from ptqcore.version import __version__

GROUP = "ptqcore.plugins"
CORE = "core"
KINDS = ("tasks", "steps", "observers", "exporters", "attachments")


@dataclass(frozen=True)
class Plugin:
    """What a distribution brings to ptqcore. Point an entry point of the group `ptqcore.plugins` at one.

    Classes are named by import path (`package.module:Class`), so that listing a plugin imports none
    of them. `recipes` is a folder of YAML files inside a package (`package/folder`);
    `default_recipe` is the one that runs when no recipe is named. `commands` is a typer app, named by
    import path too (`package.module:app`): its commands are called `ptq NAME …`, where NAME is the
    plugin's, unless the core has a command of that name.
    """

    name: str
    tasks: Mapping[str, str] = field(default_factory=dict)
    steps: Mapping[str, str] = field(default_factory=dict)
    observers: Mapping[str, str] = field(default_factory=dict)
    exporters: Mapping[str, str] = field(default_factory=dict)
    attachments: Mapping[str, str] = field(default_factory=dict)
    recipes: str | None = None
    default_recipe: str | None = None
    commands: str | None = None

    @cached_property
    def recipe_files(self) -> dict[str, Path]:
        """Recipe name → file.

        Raises:
            PluginError: if the declared folder does not exist.
        """
        if self.recipes is None:
            return {}
        package, _, folder = self.recipes.partition("/")
        path = Path(str(files(package))) / folder
        if not path.is_dir():
            raise PluginError(
                f"plugin {self.name!r} declares recipes in {self.recipes!r}, which is no folder"
            )
        return {file.stem: file for file in sorted(path.glob("*.yaml"))}


@dataclass(frozen=True)
class Installed:
    """A plugin as found: either `plugin` is there, or `reason` says why it could not be loaded."""

    name: str
    distribution: str
    version: str
    plugin: Plugin | None = None
    reason: str = ""


BUILT_IN = Plugin(
    name=CORE,
    steps={
        "equalize": "ptqcore.equalization:Equalize",
        "split-concatenations": "ptqcore.split_concatenations:SplitConcatenations",
        "round": "ptqcore.rounding:Round",
        "adaround": "ptqcore.adaround:AdaRound",
        "brecq": "ptqcore.learned_rounding:BRECQ",
        "qdrop": "ptqcore.learned_rounding:QDrop",
        "bias-correction": "ptqcore.bias_correction:BiasCorrection",
    },
    exporters={"onnx-qdq": "ptqcore.export.onnx:OnnxQDQ"},
    observers={
        "minmax": "ptqcore.observers:MinMax",
        "moving-average": "ptqcore.observers:MovingAverage",
        "percentile": "ptqcore.observers:Percentile",
        "mse": "ptqcore.observers:MSE",
    },
)


class Registry:
    """The installed plugins, and everything that they bring, by name.

    A name is looked up in the asking plugin first, then in the core, then in all others; a name
    that several others bring is written `plugin:name`.
    """

    def __init__(self, installed: list[Installed]) -> None:
        self.installed = installed
        self._plugins = {CORE: BUILT_IN} | {
            entry.name: entry.plugin for entry in installed if entry.plugin is not None
        }

    def names(self, kind: str) -> list[tuple[str, str]]:
        """All (plugin, name) of a kind, one of `KINDS`."""
        return [(plugin, name) for plugin, entry in self._plugins.items() for name in getattr(entry, kind)]

    def versions(self) -> dict[str, str]:
        """Name → version of the plugins that could be loaded."""
        return {entry.name: entry.version for entry in self.installed if entry.plugin is not None}

    def plugin(self, name: str) -> Plugin:
        """The plugin of that name.

        Raises:
            PluginError: if it is not installed, or could not be loaded.
        """
        for entry in self.installed:
            if entry.name == name and entry.plugin is not None:
                return entry.plugin
        for entry in self.installed:
            if entry.name == name:
                raise PluginError(
                    f"plugin {name!r} ({entry.distribution} {entry.version}) could not be loaded: "
                    f"{entry.reason}"
                )
        known = [entry.name for entry in self.installed if entry.plugin]
        hint = nearest(name, known) if known else "; no plugin is"
        raise PluginError(f"plugin {name!r} is not installed{hint} (to add it: pip install ptq-{name})")

    def find(self, kind: str, name: str, asking: str) -> Any:
        """The class behind a name.

        Args:
            kind: one of `KINDS`.
            name: `name` or `plugin:name`.
            asking: the plugin whose own names come first.

        Raises:
            RecipeError: if no plugin, or more than one, brings the name.
            PluginError: if the asking or named plugin is not installed, or the class cannot be imported.
        """
        bare = name.rpartition(":")[2]
        owner = self.owner(kind, name, asking)
        return resolve(getattr(self._plugins[owner], kind)[bare], owner)

    def owner(self, kind: str, name: str, asking: str) -> str:
        """The plugin behind a name; arguments and errors as of `find`."""
        stated, colon, bare = name.rpartition(":")
        needed = stated if colon else asking
        if needed != CORE:
            self.plugin(needed)
        owners = [stated] if colon else self._owners(kind, bare, asking)
        if len(owners) > 1:
            choices = " or ".join(f"{plugin}:{bare}" for plugin in owners)
            raise RecipeError(f"{kind[:-1]} {bare!r} is brought by several plugins: write {choices}")
        if not owners or bare not in getattr(self._plugins[owners[0]], kind):
            known = {n for plugin in self._plugins.values() for n in getattr(plugin, kind)}
            raise RecipeError(f"{kind[:-1]} {name!r} is unknown{nearest(bare, known)}")
        return owners[0]

    def _owners(self, kind: str, name: str, asking: str) -> list[str]:
        owners = [plugin for plugin, entry in self._plugins.items() if name in getattr(entry, kind)]
        for first in (asking, CORE):
            if first in owners:
                return [first]
        return owners

    @property
    def task(self) -> Callable[[str, str], Any]:
        """`task(name, asking)`: the task class of that name."""
        return partial(self.find, "tasks")

    def attachment(self, name: str) -> Any:
        """The attachment class of that name, `plugin:name`."""
        return self.find("attachments", name, CORE)

    def recipe_file(self, name: str | None, plugin: str) -> Path:
        """The file of a recipe: a path ending in .yaml or .yml, or the name of one of the plugin's.

        Raises:
            RecipeError: if there is none of that name.
        """
        owner = BUILT_IN if plugin == CORE else self.plugin(plugin)
        if name is not None and is_file_name(name):
            return Path(name)
        wanted = name or owner.default_recipe
        if wanted is None:
            raise RecipeError(f"plugin {plugin!r} has no default recipe: name one with --recipe")
        if wanted not in owner.recipe_files:
            raise RecipeError(
                f"recipe {wanted!r} of plugin {plugin!r} is unknown{nearest(wanted, owner.recipe_files)}"
            )
        return owner.recipe_files[wanted]

    def recipe_owner(self, name: str) -> str:
        """The plugin that has a recipe of that name; the core for a file.

        Raises:
            RecipeError: if none, or more than one, has it.
        """
        if is_file_name(name):
            return CORE
        owners = [plugin for plugin, entry in self._plugins.items() if name in entry.recipe_files]
        if len(owners) > 1:
            raise RecipeError(f"recipe {name!r} is brought by {' and '.join(owners)}: add --plugin")
        if not owners:
            known = {n for plugin in self._plugins.values() for n in plugin.recipe_files}
            raise RecipeError(f"recipe {name!r} is unknown{nearest(name, known)}")
        return owners[0]


def is_file_name(recipe: str) -> bool:
    """Whether a recipe is named by its file."""
    return Path(recipe).suffix in (".yaml", ".yml")


def resolve(target: str, plugin: str) -> Any:
    """Import `package.module:Class`.

    Raises:
        PluginError: naming the plugin and the reason, if that fails.
    """
    module, _, attribute = target.partition(":")
    try:
        return getattr(import_module(module), attribute)
    except (Exception, SystemExit) as error:
        raise PluginError(f"plugin {plugin!r} cannot import {target}: {_reason(error)}") from error


def discover() -> Registry:
    """Find the installed plugins; one that cannot be loaded is kept with the reason, never fatal."""
    loaded = [_load(entry) for entry in sorted(entry_points(group=GROUP), key=lambda e: (e.name, e.value))]
    taken = {CORE: "the core"}
    installed = []
    for found in sorted(loaded, key=lambda found: (found.name, found.plugin is None)):
        if found.name in taken:
            reason = found.reason or f"the name {found.name!r} is already taken by {taken[found.name]}"
            found = replace(found, plugin=None, reason=reason)
        elif found.plugin is not None:
            taken[found.name] = found.distribution
        installed.append(found)
    return Registry(installed)


def _load(entry: EntryPoint) -> Installed:
    distribution = entry.dist.name if entry.dist else "unknown"
    version = entry.dist.version if entry.dist else "unknown"
    broken = partial(Installed, entry.name, distribution, version, None)
    needed = unmet((entry.dist.requires or []) if entry.dist else [], __version__)
    if needed is not None:
        return broken(
            f"it is made for ptqcore {needed}, and this is {__version__}: install the {distribution} that "
            "goes with it"
        )
    try:
        plugin = entry.load()
    except (Exception, SystemExit) as error:
        return broken(_reason(error))
    if not isinstance(plugin, Plugin):
        return broken(f"{entry.value} is a {type(plugin).__name__}, not a ptqcore.Plugin")
    if plugin.name != entry.name:
        return broken(f"its entry point is named {entry.name!r} but the plugin {plugin.name!r}")
    try:
        _ = plugin.recipe_files
    except Exception as error:
        return broken(_reason(error))
    return Installed(entry.name, distribution, version, plugin)


def _reason(error: BaseException) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())
