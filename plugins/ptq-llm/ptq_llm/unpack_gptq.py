"""Reads GPTQ checkpoints with numpy alone, from the definition of the format.

It shares no code with the export and none with torch: an error in the packing cannot cancel out.
"""

import re
from dataclasses import dataclass
from typing import Any

import numpy as np

from ptq_llm.unpack import Array, TensorFile, unpack_codes, whole
from ptqcore import ExportError

# Paths with escaped characters and at most three wildcards, one more at the end: others may take forever
# to match.
_PATH = r"(?:\\.|[\w-]|\.(?!\*))*"
_HARMLESS = re.compile(rf"{_PATH}(?:\.\*{_PATH}){{0,3}}(?:\[\^\.\]\+)?\$?")


@dataclass(frozen=True)
class Layout:
    """How config.json says that a weight is stored; `added` is what its zero points are short of."""

    bits: int
    group_size: int
    added: int

    @classmethod
    def find(cls, config: dict[str, Any], name: str) -> "Layout | None":
        """The layout of the linear layer `name` under a `quantization_config`; None if left alone.

        As readers do, layers outside of numbered blocks are left alone, so are those that
        `modules_in_block_to_quantize` does not list, and the first pattern of `dynamic` that matches
        the start of the name counts.
        """
        listed = config.get("modules_in_block_to_quantize")
        if listed is not None and not any(name.endswith(end) for ends in listed for end in ends):
            return None
        if re.search(r"\.\d+\.", name) is None:
            return None
        values = config
        for pattern, overrides in config.get("dynamic", {}).items():
            if not _HARMLESS.fullmatch(pattern[2:]):
                raise ExportError(f"config.json has the pattern {pattern!r:.200}, which names no layers")
            if re.match(pattern[2:], name):
                if pattern.startswith("-:"):
                    return None
                values = config | overrides
                break
        added = {"gptq": 1, "gptq_v2": 0}[config["checkpoint_format"]]
        size = values.get("group_size")
        size = size if size == -1 else whole(values, "group_size", 1, 2**31)
        return cls(whole(values, "bits", 2, 8), size, added)

    def groups(self, columns: int) -> int:
        """Scales of an output of a weight of that many columns."""
        return 1 if self.group_size == -1 else columns // self.group_size

    def tensors(self) -> set[str]:
        """Names, after the layer's, of the tensors that hold its weight."""
        return {"qweight", "qzeros", "scales", "g_idx"}


def read_weight(file: TensorFile, name: str, layout: Layout, shape: tuple[int, int]) -> Array:
    """Weight [out, in] of the layer `name`: (code − zero point) · scale, exact in float32.

    Raises:
        ExportError: if a tensor is missing, has another shape, or a column is in no group.
    """
    out, columns = shape
    bits, groups = layout.bits, layout.groups(columns)
    codes = unpack_codes(file.numbers(f"{name}.qweight", (columns * bits // 32, out)).T, bits, columns)
    zeros = unpack_codes(file.numbers(f"{name}.qzeros", (groups, out * bits // 32)), bits, out)
    scales = file.numbers(f"{name}.scales", (groups, out))
    group = file.numbers(f"{name}.g_idx", (columns,))
    if group.min() < 0 or group.max() >= groups:
        raise ExportError(f"tensor {name}.g_idx names groups {group.min()} … {group.max()} of {groups}")
    zero_points = zeros.astype(np.float32) + layout.added
    values: Array = (codes.T.astype(np.float32) - zero_points[group]) * scales[group]
    return values.T
