"""What checkpoints of mmengine hold beside tensors, read without running any of it."""

from typing import Any

import numpy as np


class _Ignored:
    """Takes the place of what a checkpoint holds about its training: created, filled, never used."""

    def __init__(self, *args: Any) -> None:
        pass


def _arrays() -> list[Any]:
    """Arrays of numpy, by their names in versions 1 and 2."""
    core = getattr(np, "_core", None) or np.core
    numbers = [getattr(np.dtypes, name) for name in dir(np.dtypes) if name.endswith("DType")]
    functions = [
        (function, f"numpy.{home}.multiarray.{function.__name__}")
        for function in (core.multiarray._reconstruct, core.multiarray.scalar)
        for home in ("_core", "core")
    ]
    return [np.ndarray, np.dtype, *numbers, *functions]


HARMLESS = [
    *_arrays(),
    (_Ignored, "mmengine.logging.history_buffer.HistoryBuffer"),
    (_Ignored, "builtins.getattr"),  # with which histories of older versions stored their functions
]
"""For `torch.serialization.safe_globals`."""
