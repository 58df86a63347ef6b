"""Calibration samples as the named tensors that an exported graph takes, and outputs by name."""

import inspect
from collections.abc import Iterable, Sequence
from typing import Any

from torch import Tensor, nn
from torch.utils._pytree import (
    MappingKey,
    SequenceKey,
    tree_flatten,
    tree_flatten_with_path,
    tree_unflatten,
)

OUTPUT = "output"
LARGEST = "largest "
"""Begins the key under which an ONNX file holds how large an open dimension may be."""


def named_inputs(model: nn.Module, sample: Any) -> dict[str, Tensor]:
    """The tensors of a sample by the names of the arguments of the model's `forward` that they are.

    Several tensors in one argument are numbered or named by their keys: `pair_0`, `pair_1`.
    """
    parameters = [name for name, one in inspect.signature(model.forward).parameters.items() if _named(one)]
    whole = isinstance(sample, dict | tuple)
    found: dict[str, Tensor] = {}
    for path, leaf in tree_flatten_with_path(sample if whole else (sample,))[0]:
        if isinstance(leaf, Tensor):
            parts = [_part(key) for key in path]
            if isinstance(path[0], SequenceKey):
                place = path[0].idx
                first = parameters[place] if place < len(parameters) else f"input_{place}"
                parts[0] = first
            found["_".join(parts)] = leaf
    return found


def _named(parameter: inspect.Parameter) -> bool:
    return parameter.kind in (parameter.POSITIONAL_ONLY, parameter.POSITIONAL_OR_KEYWORD)


def _part(key: Any) -> str:
    if isinstance(key, MappingKey):
        return str(key.key)
    return str(getattr(key, "idx", getattr(key, "name", key)))


def with_tensors(sample: Any, tensors: Iterable[Tensor]) -> Any:
    """The sample with its tensors, in order, replaced by others."""
    leaves, structure = tree_flatten(sample)
    given = iter(tensors)
    return tree_unflatten([next(given) if isinstance(leaf, Tensor) else leaf for leaf in leaves], structure)


def output_names(count: int) -> Sequence[str]:
    """`output`, or `output_0`, `output_1`, … if there are several."""
    return [OUTPUT] if count == 1 else [f"{OUTPUT}_{index}" for index in range(count)]
