"""Reads AWQ checkpoints (GEMM packing) with numpy alone, from the definition of the format.

It shares no code with the export and none with torch: an error in the packing cannot cancel out.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np

from ptq_llm.unpack import Array, TensorFile, unpack_codes, whole

_COLUMN_AT = (0, 4, 1, 5, 2, 6, 3, 7)  # output column j of eight is nibble _COLUMN_AT[j] of their word


@dataclass(frozen=True)
class Layout:
    """How config.json says that a weight is stored."""

    group_size: int

    @classmethod
    def find(cls, config: dict[str, Any], name: str) -> "Layout | None":
        """The layout of the linear layer `name` under a `quantization_config`; None if left alone.

        As in vLLM, layers whose name contains an entry of `modules_to_not_convert` are left alone.
        """
        if any(part in name for part in config["modules_to_not_convert"]):
            return None
        whole(config, "bits", 4, 4)
        return cls(whole(config, "group_size", 1, 2**31))

    def tensors(self) -> set[str]:
        """Names, after the layer's, of the tensors that hold its weight."""
        return {"qweight", "qzeros", "scales"}


def read_weight(file: TensorFile, name: str, layout: Layout, shape: tuple[int, int]) -> Array:
    """Weight [out, in] of the layer `name`: (code − zero point) · scale, exact in float32.

    Raises:
        ExportError: if a tensor is missing or has another shape.
    """
    out, columns = shape
    groups = columns // layout.group_size
    codes = _unpack(file.numbers(f"{name}.qweight", (columns, out // 8)), out)
    zeros = _unpack(file.numbers(f"{name}.qzeros", (groups, out // 8)), out)
    scales = file.numbers(f"{name}.scales", (groups, out))
    steps = codes.reshape(groups, layout.group_size, out) - zeros[:, None]
    values: Array = (steps * scales[:, None]).reshape(columns, out)
    return values.T


def _unpack(words: Array, out: int) -> Array:
    """Float32 codes [rows, out] of words [rows, out/8]."""
    nibbles = unpack_codes(words, 4, out).reshape(len(words), -1, 8)
    return nibbles[..., _COLUMN_AT].reshape(len(words), out).astype(np.float32)
