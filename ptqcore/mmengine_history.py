"""What checkpoints of training frameworks hold beside tensors, read without running any of it."""

from typing import Any

import numpy as np


class _Ignored:
    """Takes the place of what a checkpoint holds about its training: created, filled, never used."""

    def __init__(self, *args: Any) -> None:
        pass


def training_history() -> list[Any]:
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
