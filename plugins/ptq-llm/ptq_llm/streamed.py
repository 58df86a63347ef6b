"""Models whose weights stay in their folder: they may be larger than memory."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ptq_llm.unify import needs_unifying
from ptqcore import (
    ModelError,
    PtqError,
    as_type,
    free_memory,
    one_line,
    read_weights,
    tensors_on_disk,
    without_memory,
)


def is_too_large(folder: Path, dtype: torch.dtype) -> bool:
    """Whether the weights in a folder would take more than half of the free memory.

    False where they cannot be read, which loading says better.
    """
    try:
        numbers = read_weights(folder).numbers
    except (OSError, ValueError):
        return False
    return numbers * dtype.itemsize > free_memory() // 2


def stream_folder(folder: Path, config: Any, dtype: torch.dtype, kind: Any) -> Any:
    """A model of transformers in evaluation mode, its large weights on disk.

    Args:
        folder: with safetensors files, whose tensors have the names of the model's (or these behind the
            prefix of its base model).
        config: of transformers.
        dtype: of the weights when they are read.
        kind: the class of transformers that makes it.

    Raises:
        ModelError: if a weight is missing or of another shape, or is none of a linear layer.
    """
    label = f"task.model {str(folder)!r}"
    try:
        weights = read_weights(folder)
        stored: dict[str, Tensor] = {}
        for file in sorted(folder.glob("*.safetensors")):
            stored |= tensors_on_disk(file)
        with weights.limit(label), without_memory():
            model = kind.from_config(config, dtype=dtype)
        _put(model, stored)
        model.tie_weights()
    except PtqError:
        raise
    except Exception as error:
        raise ModelError(f"{label}: its weights cannot be read from disk: {one_line(error)}") from error
    missing = [name for name, tensor in model.state_dict().items() if tensor.is_meta]
    if missing:
        raise ModelError(
            f"{label}: {len(missing)} tensors are missing under their names in the model, the first is "
            f"{missing[0]}; if the checkpoint has others, set task.stream to false"
        )
    if path := needs_unifying(model):
        raise ModelError(
            f"{label}: {path} is no linear layer, and cannot be made one while its weights lie on disk: "
            "set task.stream to false"
        )
    return model.eval().requires_grad_(False)


def _put(model: Any, stored: dict[str, Tensor]) -> None:
    """Give a model its weights, by names with or without the prefix of the base model.

    Raises:
        ValueError: if one has another shape.
    """
    prefix = f"{model.base_model_prefix}."
    found = {}
    for name, own in model.state_dict().items():
        tensor = stored.get(name)
        if tensor is None:
            tensor = stored.get(name.removeprefix(prefix) if name.startswith(prefix) else prefix + name)
        if tensor is None:
            continue
        if tensor.shape != own.shape:
            shapes = f"{list(tensor.shape)} in the file, not {list(own.shape)}"
            raise ValueError(f"tensor {name} has shape {shapes}")
        found[name] = nn.Parameter(as_type(tensor, own.dtype), requires_grad=False)
    model.load_state_dict(found, strict=False, assign=True)
