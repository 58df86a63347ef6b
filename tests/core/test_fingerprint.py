"""Digests of tensors: by their values, not by how they lie in memory."""

import pytest
import torch
from torch import Tensor

from ptqcore import digest_of

_ONE = torch.tensor([2.5])


@pytest.mark.parametrize(
    "tensor",
    [torch.tensor(2.5).expand(1), torch.tensor([2.5, 1.0])[::2], torch.tensor([0.0, 2.5])[1:].expand(1)],
)
def test_one_element_has_the_digest_of_its_value_whatever_its_stride(tensor: Tensor) -> None:
    assert digest_of(tensor) == digest_of(_ONE)


def test_an_expanded_or_transposed_tensor_has_the_digest_of_its_copy() -> None:
    row = torch.arange(3.0)
    assert digest_of(row.expand(2, 3)) == digest_of(row.repeat(2, 1))
    square = torch.arange(4.0).reshape(2, 2)
    assert digest_of(square.T) == digest_of(square.T.clone(memory_format=torch.contiguous_format))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.int64, torch.bool])
def test_tensors_of_any_type_and_empty_ones_have_digests(dtype: torch.dtype) -> None:
    assert digest_of(torch.ones(1, dtype=dtype)) != digest_of(torch.zeros(1, dtype=dtype))
    assert digest_of(torch.ones(0, dtype=dtype)) != digest_of(torch.ones(0, 2, dtype=dtype))


def test_values_shapes_and_types_make_a_difference() -> None:
    digests = {digest_of(one) for one in (_ONE, _ONE + 1, _ONE.reshape(1, 1), _ONE.double())}
    assert len(digests) == 4
