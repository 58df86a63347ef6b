"""Digests of everything that decides the result of a run."""

import hashlib
import platform
from typing import Any

import numpy
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten

from ptqcore.version import __version__


def versions(plugins: dict[str, str]) -> dict[str, str]:
    """Versions of what computes: Python, torch, numpy, the core, and the plugins given (name → version)."""
    core = {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "numpy": numpy.__version__,
        "ptqcore": __version__,
    }
    return core | {f"plugin {name}": version for name, version in plugins.items()}


def fingerprint(recipe: str, used: dict[str, str], model: nn.Module, samples: Any) -> dict[str, str]:
    """Name → digest of the recipe, the versions, the model's tensors and the calibration samples."""
    return {
        "recipe": hashlib.sha256(recipe.encode()).hexdigest(),
        "versions": hashlib.sha256(repr(sorted(used.items())).encode()).hexdigest(),
        "model": digest_of(dict(model.state_dict())),
        "calibration data": digest_of(list(samples)),
    }


def digest_of(value: Any) -> str:
    """SHA-256 of nested tuples, lists and dicts of tensors and plain values."""
    leaves, structure = tree_flatten(value)
    total = hashlib.sha256(str(structure).encode())
    for leaf in leaves:
        if isinstance(leaf, Tensor):
            total.update(f"{leaf.dtype}{tuple(leaf.shape)}".encode())
            values = leaf.detach().cpu().contiguous()
            flat = values.as_strided((values.numel(),), (1,))  # of one element, any stride is contiguous
            total.update(flat.view(torch.uint8).numpy().data)
        else:
            total.update(repr(leaf).encode())
    return total.hexdigest()
