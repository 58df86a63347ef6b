"""Everything that decides the result of a run, in plain text or as a digest."""

import hashlib
import json
import platform
from collections.abc import Mapping
from typing import Any

import numpy
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten

from ptqcore.on_disk import pieces
from ptqcore.tensor_file import tensor_bytes
from ptqcore.version import __version__

DIGEST = "sha256:"
_MOST_SHOWN = 40


def versions(plugins: dict[str, str]) -> dict[str, str]:
    """Versions of what computes: Python, torch, numpy, the core, and the plugins given (name → version)."""
    core = {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "numpy": numpy.__version__,
        "ptqcore": __version__,
    }
    return core | {f"plugin {name}": version for name, version in plugins.items()}


def fingerprint(
    recipe: dict[str, Any], used: dict[str, str], model: nn.Module, samples: Any
) -> dict[str, str]:
    """Name → value of each key of the recipe and of each version, the number of threads (sums are taken in
    another order with another one), and digests of the model's tensors and of the calibration samples."""
    keys = {f"recipe key {key!r}": json.dumps(value) for key, value in _flat(recipe).items()}
    return (
        keys
        | {f"version of {name}": version for name, version in used.items()}
        | {"number of threads": str(torch.get_num_threads())}
        | {
            "model": DIGEST + digest_of(dict(model.state_dict())),
            "calibration data": DIGEST + digest_of(list(samples)),
        }
    )


def differences(earlier: Mapping[str, Any], now: Mapping[str, str]) -> list[str]:
    """What differs between two fingerprints, each with both values unless they are digests."""
    names = sorted(earlier.keys() | now.keys())
    return [
        _difference(name, earlier.get(name, "none"), now.get(name, "none"))
        for name in names
        if earlier.get(name) != now.get(name)
    ]


def _difference(name: str, earlier: Any, now: str) -> str:
    if now.startswith(DIGEST):
        return name
    return f"{name} ({str(earlier)[:_MOST_SHOWN]}, now {now[:_MOST_SHOWN]})"


def _flat(value: Any, place: str = "") -> dict[str, Any]:
    """The leaves of nested dicts and lists by their keys, joined by dots."""
    if isinstance(value, dict) and value:
        items = list(value.items())
    elif isinstance(value, list) and value:
        items = list(enumerate(value))
    else:
        return {place: value}
    return {
        name: leaf
        for key, each in items
        for name, leaf in _flat(each, f"{place}.{key}" if place else str(key)).items()
    }


def digest_of(value: Any) -> str:
    """SHA-256 of nested tuples, lists and dicts of tensors and plain values."""
    leaves, structure = tree_flatten(value)
    total = hashlib.sha256(str(structure).encode())
    for leaf in leaves:
        if isinstance(leaf, Tensor):
            total.update(f"{leaf.dtype}{tuple(leaf.shape)}".encode())
            for piece in pieces(leaf):
                total.update(tensor_bytes(piece))
        else:
            total.update(repr(leaf).encode())
    return total.hexdigest()
