"""Safetensors files written tensor by tensor: the bytes of the library, which wants all tensors at once.

The format is described in `tensor_header`; as the library does it, tensors of long types come first, then
names decide, and spaces fill up the header to a multiple of 8.
"""

import json
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from ptqcore.on_disk import pieces
from ptqcore.tensor_types import NAMES

_ALIGNMENT = 8
_ORDER = list(NAMES)


def tensor_file(tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> Iterator[Any]:
    """The bytes of a safetensors file, in pieces; of tensors that lie on disk, one at a time is in memory.

    Args:
        tensors: by name.
        metadata: texts by name, for the header.
    """
    order = sorted(tensors, key=lambda name: (_ORDER.index(tensors[name].dtype), name))
    header: dict[str, Any] = {}
    if metadata is not None:
        header["__metadata__"] = dict(sorted(metadata.items()))
    end = 0
    for name in order:
        tensor = tensors[name]
        start, end = end, end + tensor.nbytes
        dtype = NAMES[tensor.dtype]
        header[name] = {"dtype": dtype, "shape": list(tensor.shape), "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % _ALIGNMENT)
    yield len(text).to_bytes(8, "little")
    yield text
    for name in order:
        yield from map(tensor_bytes, pieces(tensors[name]))


def tensor_bytes(tensor: Tensor) -> memoryview:
    """The bytes of a tensor, in the order of its elements; without a copy where it is contiguous."""
    values = tensor.detach().cpu().contiguous()
    flat = values.as_strided((values.numel(),), (1,))  # of one element, any stride is contiguous
    return flat.view(torch.uint8).numpy().data
