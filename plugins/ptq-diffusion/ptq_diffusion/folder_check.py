"""What a folder of a pipeline says that it holds, checked before diffusers reads it.

diffusers imports what an index names, and runs Python files that lie in the folder where it is told to.
"""

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
    """The components of a pipeline, all of them of classes that are installed, right inside the folder.

    Raises:
        OSError: if the index cannot be read.
        ValueError: naming what is wrong.
    """
    index = read_json(folder / INDEX)
    if not isinstance(index, Mapping):
        raise ValueError(f"{INDEX} holds no JSON object")
    kind = index.get("_class_name")
    if not isinstance(kind, str) or not isinstance(getattr(diffusers, kind, None), type):
        raise ValueError(f"{INDEX} has _class_name {kind!r:.200}, which is no pipeline of diffusers")
    components = {name: value for name, value in index.items() if not name.startswith("_")}
    for name, value in components.items():
        if isinstance(value, list):
            _check_component(name, value)
    return list(components)


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
    if Path(name).name != name or "\\" in name:
        raise ValueError(f"{INDEX} has the component {name!r}: they lie right inside the folder")
    if value == [None, None]:
        return
    if len(value) != 2 or not all(isinstance(one, str) and one.isidentifier() for one in value):
        raise ValueError(f"{INDEX} has {name} {value!r:.200}: it must be a library and a class")
    if value[0] not in LOADABLE_CLASSES and not hasattr(diffusers.pipelines, value[0]):
        raise ValueError(
            f"{INDEX} takes {name} from {value[0]!r}, which is none of the libraries "
            f"{', '.join(LOADABLE_CLASSES)}: code beside a model is never run"
        )
