"""The handshake: what a plugin promises, checked in the plugin's own test suite."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch

from ptqcore import artifact, grid
from ptqcore.attachments import Attachment
from ptqcore.errors import PluginError
from ptqcore.export.base import Exporter
from ptqcore.observers import Observer
from ptqcore.plan import make_plan
from ptqcore.plugin import KINDS, Plugin, Registry, discover, resolve
from ptqcore.plugin_commands import load_commands
from ptqcore.recipe import read_recipe
from ptqcore.run import quantize
from ptqcore.spec import QuantSpec
from ptqcore.step import Step
from ptqcore.task import Task

_BASES: dict[str, type] = {
    "tasks": Task,
    "steps": Step,
    "observers": Observer,
    "exporters": Exporter,
    "attachments": Attachment,
}


def check_plugin(name: str, folder: Path, overrides: Iterable[str] = ()) -> list[str]:
    """Check an installed plugin against the contract of the core.

    It must load; its classes must import, derive from the right base, and carry the name that they
    are listed under; its observers must give ranges of the right shape that contain 0; its commands
    must be a typer app; its recipes must be valid; its default recipe must run from end to end, twice
    with the same bytes, and its artifact must load back.

    Args:
        name: the plugin's name.
        folder: an empty folder for the two runs.
        overrides: `KEY=VALUE` changes that make the default recipe small enough for a test.

    Returns:
        What was checked, a line each.

    Raises:
        PluginError: one sentence that names the promise that is not kept.
        PtqError: if the default recipe does not run.
    """
    registry = discover()
    plugin = registry.plugin(name)
    done = [f"plugin {name!r} loads"]
    done += _check_classes(plugin)
    if plugin.commands is not None:
        names = ", ".join(load_commands(plugin).commands)
        done.append(f"commands of ptq {name}: {names}")
    for recipe, file in plugin.recipe_files.items():
        make_plan(read_recipe(file), name, registry)
        done.append(f"recipe {recipe!r} is valid")
    if plugin.default_recipe is not None:
        done += _check_run(name, registry, folder, list(overrides))
    return done


def _check_classes(plugin: Plugin) -> list[str]:
    done = []
    for kind in KINDS:
        for name, target in getattr(plugin, kind).items():
            found = resolve(target, plugin.name)
            base = _BASES[kind]
            if not (isinstance(found, type) and issubclass(found, base)):
                raise PluginError(f"{target} is listed under {kind} but is no subclass of {base.__name__}")
            listed: Any = found
            own = getattr(listed, "name", None)
            expected = f"{plugin.name}:{name}" if kind == "attachments" else name
            if own != expected:
                raise PluginError(f"{target} is listed as {expected!r} but its name is {own!r}")
            if issubclass(found, Observer):
                _check_observer(found)
            done.append(f"{kind[:-1]} {name!r} keeps its contract")
    return done


def _check_observer(kind: type[Observer]) -> None:
    generator = torch.Generator().manual_seed(0)
    first, second = torch.randn(6, 10, generator=generator), torch.randn(6, 10, generator=generator)
    for spec in (
        QuantSpec(granularity="tensor"),
        QuantSpec(granularity="channel", symmetric=False),
        QuantSpec(bits=4, granularity="group", group_size=4),
    ):
        observer, other = kind(spec), kind(spec)
        observer.update(first)
        other.update(second)
        observer.merge(other)
        low, high = observer.range()
        layout = grid.layout_shape((6, 10), spec)
        for end, tensor in (("low", low), ("high", high)):
            if tuple(tensor.shape) != layout:
                raise PluginError(
                    f"observer {kind.name!r} gives a {end} end of shape {tuple(tensor.shape)} for a range "
                    f"per {spec.granularity}; expected {layout}"
                )
        if not bool((low <= 0).all() and (high >= 0).all()):
            raise PluginError(f"observer {kind.name!r} gives a range that does not contain 0")
        whole, condensed = kind(spec), kind(spec)
        whole.update(first)
        condensed.update(condensed.condensed(first))
        if not all(map(torch.equal, whole.range(), condensed.range())):
            raise PluginError(
                f"observer {kind.name!r} finds another range in what `condensed` leaves of a tensor: leave "
                "out that method, or let it keep all that `update` reads"
            )


def _check_run(name: str, registry: Registry, folder: Path, overrides: list[str]) -> list[str]:
    recipe = read_recipe(registry.recipe_file(None, name), overrides)
    records = [quantize(recipe, name, folder / run, registry=registry) for run in ("first", "second")]
    before, after = records[0].before, records[0].after
    if before.keys() != after.keys():
        raise PluginError(
            f"task {recipe.task.kind!r} names its metrics {sorted(before)} before but {sorted(after)} "
            "after quantization: they must be the same"
        )
    first, second = (artifact.read_manifest(folder / run).sha256 for run in ("first", "second"))
    if first != second:
        raise PluginError(
            f"recipe {recipe.name!r} gave other bytes in a second run: seed all that is random"
        )
    artifact.load(folder / "first")
    return [f"recipe {recipe.name!r} runs, twice with the same bytes, and its artifact loads back"]
