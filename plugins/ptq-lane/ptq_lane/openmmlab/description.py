"""The network of an OpenMMLab config as plain data, which an artifact keeps instead of the program."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ptqcore import ModelError, one_line

SCOPES = ("mmseg", "mmdet")
_SYNCHRONIZED = {"SyncBN": "BN", "MMSyncBN": "BN"}
_AROUND_THE_NETWORK = ("train_cfg", "test_cfg", "auxiliary_head", "data_preprocessor")
_READ_FILES = ("pretrained", "checkpoint_path")


@dataclass(frozen=True)
class Description:
    """scope: the library, `mmseg` or `mmdet`. model: the section `model` of a config without what stands
    around the network: training, post-process, preparation of images."""

    scope: str
    model: dict[str, Any]

    def to_json(self) -> dict[str, Any]:
        """What JSON can hold; tuples are `{"tuple": [...]}`.

        Raises:
            ModelError: if the model holds what JSON cannot.
        """
        return {"scope": self.scope, "model": _tagged(self.model)}

    @classmethod
    def from_json(cls, described: Mapping[str, Any], source: str) -> "Description":
        """The inverse of `to_json`.

        Args:
            described: what a file holds.
            source: its name, for errors.

        Raises:
            ModelError: if it describes no model.
        """
        try:
            found = cls(described["scope"], for_inference(_untagged(described["model"])))
            if found.scope not in SCOPES or not isinstance(found.model, dict):
                raise ValueError(f"its scope is {found.scope!r:.40}")
        except (AttributeError, TypeError, ValueError, LookupError, RecursionError) as error:
            raise ModelError(f"{source} describes no OpenMMLab model: {one_line(error)}") from error
        return found


def for_inference(section: Any) -> Any:
    """A copy without what stands around the network, reads other files, or synchronizes processes."""
    if isinstance(section, list | tuple):
        return type(section)(for_inference(item) for item in section)
    if not isinstance(section, Mapping):
        return (
            section if section is None or isinstance(section, str | int | float) else _registered(section)
        )
    kept: dict[str, Any] = {}
    for key, value in section.items():
        if key in _AROUND_THE_NETWORK:
            kept[key] = None
        elif key == "type":
            kept[key] = _registered(value)
        elif key not in _READ_FILES and not (key == "init_cfg" and "Pretrained" in str(value)):
            kept[key] = for_inference(value)
    return kept


def types(section: Any) -> set[str]:
    """The names of all classes that a model is made of.

    Raises:
        ModelError: if one is no name, or the model switches to another registry.
    """
    if isinstance(section, list | tuple):
        return set().union(*map(types, section))
    if not isinstance(section, dict):
        return set()
    name = section.get("type", "")
    if not isinstance(name, str) or "_scope_" in section:
        raise ModelError(f"the model's description has the type {name!r:.60}, or a key '_scope_'")
    return types(list(section.values())) | ({name} if name else set())


def _registered(value: Any) -> str:
    """`mmseg.models.backbones.STDCNet`, or the class, as registries know it: `mmseg.STDCNet`."""
    name = value if isinstance(value, str) else f"{value.__module__}.{value.__qualname__}"
    parts = name.split(".")
    short = f"{parts[0]}.{parts[-1]}" if parts[0] in SCOPES else parts[-1]
    return _SYNCHRONIZED.get(short, short)


def _tagged(value: Any) -> Any:
    if isinstance(value, tuple):
        return {"tuple": [_tagged(item) for item in value]}
    if isinstance(value, list):
        return [_tagged(item) for item in value]
    if not isinstance(value, dict):
        return value
    if any(not isinstance(key, str) for key in value):
        raise ModelError("the config cannot be kept as JSON: a dictionary has keys that are not strings")
    return {key: _tagged(item) for key, item in value.items()}


def _untagged(value: Any) -> Any:
    if isinstance(value, list):
        return [_untagged(item) for item in value]
    if not isinstance(value, dict):
        return value
    if value.keys() == {"tuple"}:
        return tuple(_untagged(item) for item in value["tuple"])
    return {key: _untagged(item) for key, item in value.items()}
