"""Weights in a folder, as their files say, and the configuration of a model, which must fit them."""

import re
from collections.abc import Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ptqcore.memory_limit import limited_memory
from ptqcore.reading import read_json
from ptqcore.tensor_header import read_tensor_header

_INDICES = "*.safetensors.index.json"
_ROOM = 2**20
_COUNTS = re.compile(r"layers|blocks|depth|block_count")
_LEAST = 64  # bytes of a layer
_LAYERS = 4096
_NO_SIZE = re.compile(r"theta|position|seed|context|window|base|m(ax|in)_(length|seq)")


@dataclass(frozen=True)
class Weights:
    """numbers: how many, in how many tensors; size: bytes of their files."""

    numbers: int
    tensors: int
    size: int

    def __add__(self, other: "Weights") -> "Weights":
        return Weights(self.numbers + other.numbers, self.tensors + other.tensors, self.size + other.size)

    def limit(self, label: str) -> AbstractContextManager[None]:
        """Where nothing may be built that has far more numbers or tensors; see `limited_memory`."""
        return limited_memory(self.numbers, self.tensors, label)


def read_weights(folder: Path) -> Weights:
    """The weights in the safetensors files right inside a folder, where all of them must lie.

    Raises:
        OSError: if a file cannot be read.
        ValueError: if one is damaged, or an index names a file elsewhere.
    """
    for index in sorted(folder.glob(_INDICES)):
        _check_index(index)
    found = Weights(0, 0, 0)
    for file in sorted(folder.glob("*.safetensors")):
        try:
            header = read_tensor_header(file)
        except ValueError as error:
            raise ValueError(f"{file.name}: {error}") from None
        numbers = sum(tensor.elements for tensor in header.values())
        found += Weights(numbers, len(header), file.stat().st_size)
    return found


def check_config(config: Any, size: int) -> None:
    """Refuse a model's configuration with sizes above a million and above the bytes of its weights, or more
    than 4096 layers that these have no room for.

    Args:
        config: of `config.json`, or of a part of the model inside it.
        size: bytes of the weights.

    Raises:
        ValueError: naming the key.
    """
    if not isinstance(config, Mapping):
        raise ValueError("the configuration is no JSON object")
    for key, value in config.items():
        if isinstance(value, Mapping):
            check_config(value, size)
            continue
        for number in value if isinstance(value, list | tuple) else [value]:
            most = max(size // _LEAST, _LAYERS) if _COUNTS.search(key) else max(size, _ROOM)
            if type(number) is int and abs(number) > most and not _NO_SIZE.search(key):
                raise ValueError(f"the configuration has {key} {number}, but the weights have {size} bytes")


def _check_index(file: Path) -> None:
    index = read_json(file)
    places = index.get("weight_map") if isinstance(index, dict) else None
    if not isinstance(places, dict):
        raise ValueError(f"{file.name} has no weight_map")
    for name in places.values():
        if not isinstance(name, str) or Path(name).name != name or "\\" in name:
            raise ValueError(f"{file.name} names {name!r}: weights lie right inside the folder")
