"""Checkpoints of mmengine, read without running anything that is stored in them."""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ptq_vision import checkpoints

_TRAINING_ONLY = "auxiliary_head."


class _Ignored:
    """Takes the place of what a checkpoint holds about its training: created, filled, never used."""

    def __init__(self, *args: Any) -> None:
        pass


def read(checkpoint: str) -> dict[str, Tensor]:
    """The tensors of a checkpoint that inference needs, by name.

    Raises:
        ModelError: if the file cannot be read, or holds no state dict.
    """
    with torch.serialization.safe_globals(harmless()):
        return for_inference(checkpoints.read(Path(checkpoint).expanduser()))


def for_inference(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """A state dict without auxiliary heads, which only training uses."""
    return {name: tensor for name, tensor in state.items() if not name.startswith(_TRAINING_ONLY)}


def harmless() -> list[Any]:
    """What checkpoints of mmengine hold beside tensors, for `torch.serialization.safe_globals`.

    That is the history of the training, as arrays of numpy. The histories themselves, and `getattr`,
    with which older versions stored their functions, are read into objects that do nothing.
    """
    core = getattr(np, "_core", None) or np.core
    numbers = [getattr(np.dtypes, name) for name in dir(np.dtypes) if name.endswith("DType")]
    functions = [
        (function, f"numpy.{home}.multiarray.{function.__name__}")
        for function in (core.multiarray._reconstruct, core.multiarray.scalar)
        for home in ("_core", "core")
    ]
    ignored = [
        (_Ignored, "mmengine.logging.history_buffer.HistoryBuffer"),
        (_Ignored, "builtins.getattr"),
    ]
    return [np.ndarray, np.dtype, *numbers, *functions, *ignored]
