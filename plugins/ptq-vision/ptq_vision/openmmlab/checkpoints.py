"""Checkpoints of mmengine, read without running anything that is stored in them."""

from pathlib import Path

from torch import Tensor

from ptqcore import read_checkpoint, training_history

_TRAINING_ONLY = "auxiliary_head."


def read(checkpoint: str) -> dict[str, Tensor]:
    """The tensors of a checkpoint that inference needs, by name.

    Raises:
        ModelError: if the file cannot be read, or holds no state dict.
    """
    return for_inference(read_checkpoint(Path(checkpoint).expanduser(), harmless=training_history()))


def for_inference(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """A state dict without auxiliary heads, which only training uses."""
    return {name: tensor for name, tensor in state.items() if not name.startswith(_TRAINING_ONLY)}
