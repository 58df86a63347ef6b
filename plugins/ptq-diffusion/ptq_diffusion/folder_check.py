"""What a folder of a pipeline says that it holds, checked before diffusers reads it.

diffusers imports what an index names, and runs Python files that lie in the folder where it is told to.
"""

import inspect
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import diffusers
from diffusers.pipelines.pipeline_loading_utils import LOADABLE_CLASSES

from ptqcore import Weights, check_config, read_json, read_weights

INDEX = "model_index.json"
_CONFIGS = ("config.json", "scheduler_config.json", "preprocessor_config.json")
_NONE = Weights(0, 0, 0)


def check_pipeline(folder: Path) -> Weights:
    """The weights of a pipeline's components; see `check_index` and `check_component`.

    Raises:
        OSError: if a file cannot be read.
        ValueError: naming what is wrong.
    """
    return sum((check_component(folder / name) for name in check_index(folder)), _NONE)


def check_index(folder: Path) -> list[str]:
    """The components that a pipeline takes, all of them of libraries that are known or imported already.

    Raises:
        OSError: if the index cannot be read.
        ValueError: naming what is wrong.
    """
    index = read_json(folder / INDEX)
    if not isinstance(index, Mapping):
        raise ValueError(f"{INDEX} does not hold a JSON object")
    name = index.get("_class_name")
    kind: Any = getattr(diffusers, name, None) if isinstance(name, str) else None
    if not isinstance(kind, type):
        raise ValueError(f"{INDEX} has _class_name {name!r:.200}, which is no pipeline of diffusers")
    taken = inspect.signature(kind).parameters.keys() & index.keys()
    for component in sorted(taken):
        if isinstance(index[component], list):
            _check_component(component, index[component])
    return sorted(taken)


def check_component(folder: Path) -> Weights:
    """The weights of one component; its configuration has no larger sizes than these have room for.

    Raises:
        OSError: if a file cannot be read.
        ValueError: naming what is wrong.
    """
    if not folder.is_dir():
        return _NONE
    weights = read_weights(folder)
    for name in _CONFIGS:
        if (folder / name).is_file():
            try:
                check_config(read_json(folder / name), weights.size)
            except ValueError as error:
                raise ValueError(f"{folder.name}/{name}: {error}") from None
    return weights


def _check_component(name: str, value: list[Any]) -> None:
    if value == [None, None]:
        return
    if len(value) != 2 or not all(isinstance(one, str) for one in value) or not value[1].isidentifier():
        raise ValueError(f"{INDEX} has {name} {value!r:.200}: it must be a library and a class")
    library = value[0]
    imported = library in sys.modules and library.partition(".")[0] not in sys.stdlib_module_names
    if library not in LOADABLE_CLASSES and not hasattr(diffusers.pipelines, library) and not imported:
        raise ValueError(
            f"{INDEX} takes {name} from {library!r}, which nobody has imported: code that a pipeline names "
            f"is never run; if you trust it, import {library} before you load"
        )
