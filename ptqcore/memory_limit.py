"""A limit on the memory of tensors, for building what a file from a stranger describes."""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

from ptqcore.errors import ModelError

ALWAYS = 64 * 2**20  # bytes that nobody is refused


@contextmanager
def limited_memory(stored: int, tensors: int, label: str) -> Iterator[None]:
    """Refuse, before it is allocated, what a model of so many stored numbers does not need.

    A model is made in floating point before its stored tensors take their place, some of it twice: it may
    take 64 MiB and four times the bytes of its numbers in float32, and 20 000 operations and 200 for each
    tensor.

    Args:
        stored: numbers that the file holds, packed ones counted one by one.
        tensors: how many tensors it holds.
        label: begins the error.

    Raises:
        ModelError: if it takes more.
    """
    with _Limit(ALWAYS + 16 * stored, 20_000 + 200 * tensors, label):
        yield


class _Limit(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts the bytes of every new tensor, by what the operation would give on the meta device."""

    def __init__(self, most_bytes: int, most_operations: int, label: str) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._bytes, self._operations, self._label = most_bytes, most_operations, label

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        self._operations -= 1
        if self._operations < 0:
            raise ModelError(f"{self._label} describes far more layers than it holds tensors for")
        if not func.is_view and not func._schema.is_mutable:
            self._bytes -= _new_bytes(func, args, kwargs)
            if self._bytes < 0:
                raise ModelError(f"{self._label} describes far larger layers than it holds numbers for")
        return func(*args, **kwargs)


def _new_bytes(func: Any, args: Any, kwargs: dict[str, Any]) -> int:
    """Bytes that an operation allocates."""
    given, named = tree_map(_outline, (args, kwargs))
    tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
    if named.get("device") is not None:
        if torch.device(named["device"]).type == "meta":
            return 0
    elif any(tensor.is_meta for tensor in tensors):
        return 0
    if "device" in named:
        named["device"] = torch.device("meta")
    elif not tensors:
        return 0
    try:
        made = func(*given, **named)
    except (RuntimeError, NotImplementedError, TypeError):  # what it gives depends on values
        return 0
    return sum(
        math.prod(leaf.shape) * leaf.element_size()
        for leaf in tree_leaves(made)
        if isinstance(leaf, Tensor)
    )


def _outline(leaf: Any) -> Any:
    if not isinstance(leaf, Tensor) or leaf.is_meta:
        return leaf
    return torch.empty_strided(leaf.shape, leaf.stride(), dtype=leaf.dtype, device="meta")
