"""A model of mmseg or mmdet as plain data: what an artifact keeps of it, and what is built from that."""

import json
import re
from dataclasses import asdict, dataclass
from typing import Any

from ptqcore import ModelError, parse_json

SCOPES = ("mmseg", "mmdet")
_PACKAGES = (*SCOPES, "mmpretrain")
_TYPE = re.compile(rf"(({'|'.join(_PACKAGES)})\.(?=[A-Z]))?[A-Za-z_]\w*")
_SYNCHRONIZED = {"SyncBN": "BN", "MMSyncBN": "BN"}
_TRAINING_ONLY = ("train_cfg", "auxiliary_head", "batch_augments")


@dataclass(frozen=True)
class Description:
    """A model as plain data: enough to build its structure, and to prepare images for it.

    Attributes:
        scope: the library it belongs to, `mmseg` or `mmdet`.
        model: the `model` section of its config without what only training needs.
        pipeline: the steps of the test pipeline that change the size of an image.
    """

    scope: str
    model: dict[str, Any]
    pipeline: list[dict[str, Any]]


def describe(description: Description) -> str:
    """A description as JSON text; tuples are written as `{"tuple": [...]}`.

    Raises:
        ModelError: if it holds what JSON cannot.
    """
    try:
        text = json.dumps(_tagged(asdict(description)), indent=1)
    except (TypeError, ValueError) as error:
        raise ModelError(f"the config cannot be kept as JSON: {line(error)}") from error
    if parse(text) != description:
        raise ModelError("the config cannot be kept as JSON: a dictionary has keys that are not strings")
    return text + "\n"


def parse(text: str) -> Description:
    """The inverse of `describe`.

    Raises:
        ModelError: if the text is no description.
    """
    try:
        found = Description(**_untagged(parse_json(text)))
        if found.scope not in SCOPES:
            raise ValueError(f"its scope is {found.scope!r}")
        if not isinstance(found.model, dict) or not isinstance(found.pipeline, list):
            raise ValueError("its model is no mapping, or its pipeline no list")
        return Description(found.scope, for_inference(found.model), found.pipeline)
    except (TypeError, ValueError, AttributeError) as error:
        raise ModelError(f"not the description of a model: {line(error)}") from error


def for_inference(section: Any) -> Any:
    """A copy without what only training needs, downloads, or synchronizes processes."""
    if isinstance(section, list | tuple):
        return type(section)(for_inference(item) for item in section)
    if not isinstance(section, dict):
        return section if _is_plain(section) else _type_name(section)
    kept: dict[str, Any] = {}
    for key, value in section.items():
        downloads = key == "pretrained" or (key == "init_cfg" and "Pretrained" in str(value))
        if key in _TRAINING_ONLY:
            kept[key] = None
        elif not downloads:
            kept[key] = _type_name(value) if key == "type" else for_inference(value)
    return kept


def check_types(section: Any) -> None:
    """Allow only types that are names of registered classes: registries import any other dotted name.

    Raises:
        ModelError: if there is another one.
    """
    if isinstance(section, list | tuple):
        for item in section:
            check_types(item)
    elif isinstance(section, dict):
        name = section.get("type", "none")
        if not isinstance(name, str) or not _TYPE.fullmatch(name):
            raise ModelError(f"the model's description has the type {name!r}, which no registry knows")
        for value in section.values():
            check_types(value)


def line(error: Exception) -> str:
    """An error of another library on one line."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= 300 else text[:297] + "..."


def _is_plain(value: Any) -> bool:
    return value is None or isinstance(value, str | int | float)


def _type_name(value: Any) -> str:
    """`mmdet.models.detectors.RTMDet`, or the class, as the registries know it: `mmdet.RTMDet`."""
    name = value if isinstance(value, str) else f"{value.__module__}.{value.__qualname__}"
    parts = name.split(".")
    short = f"{parts[0]}.{parts[-1]}" if parts[0] in _PACKAGES else parts[-1]
    return _SYNCHRONIZED.get(short, short)


def _tagged(value: Any) -> Any:
    if isinstance(value, tuple):
        return {"tuple": [_tagged(item) for item in value]}
    if isinstance(value, list):
        return [_tagged(item) for item in value]
    return {key: _tagged(item) for key, item in value.items()} if isinstance(value, dict) else value


def _untagged(value: Any) -> Any:
    if isinstance(value, list):
        return [_untagged(item) for item in value]
    if not isinstance(value, dict):
        return value
    if value.keys() == {"tuple"}:
        return tuple(_untagged(item) for item in value["tuple"])
    return {key: _untagged(item) for key, item in value.items()}
