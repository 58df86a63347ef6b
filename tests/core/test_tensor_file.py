"""Safetensors files as `ptqcore` writes them: byte for byte those of the library."""

from pathlib import Path

import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import Tensor

from ptqcore.tensor_file import tensor_file
from ptqcore.tensor_types import TYPES

# The library for torch cannot write this one.
_WRITTEN = [dtype for name, dtype in TYPES.items() if name not in ("F8_E8M0",)]

_names = st.text(min_size=1, max_size=8)
_tensors = st.dictionaries(
    _names.filter(lambda name: name != "__metadata__"),
    st.tuples(st.sampled_from(_WRITTEN), st.lists(st.integers(0, 4), max_size=3), st.booleans()),
    max_size=6,
)


def _made(dtype: torch.dtype, shape: list[int], transposed: bool, seed: int) -> Tensor:
    numbers = torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * 3
    numbers = numbers.abs().to(dtype) if not dtype.is_complex else numbers.to(dtype)
    return numbers.transpose(0, -1) if transposed and shape else numbers


@given(_tensors, st.none() | st.dictionaries(_names, st.text(max_size=8), max_size=1))
def test_the_bytes_are_those_of_the_library(
    tmp_path_factory, entries: dict[str, tuple[torch.dtype, list[int], bool]], metadata: dict | None
) -> None:
    assume(entries or metadata != {})  # there the library writes no JSON
    tensors = {name: _made(*entry, seed) for seed, (name, entry) in enumerate(entries.items())}
    file: Path = tmp_path_factory.mktemp("file") / "model.safetensors"
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, file, metadata)
    assert b"".join(tensor_file(tensors, metadata)) == file.read_bytes()


def test_metadata_are_in_order() -> None:
    """The library has them in another one each time."""
    one, other = ({"b": "1", "a": "2"}, {"a": "2", "b": "1"})
    assert b"".join(tensor_file({}, one)) == b"".join(tensor_file({}, other))
