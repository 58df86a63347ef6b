"""Hadamard matrices of every order that models need, and fast rotations of any size."""

import pytest
import torch

from ptq_llm.hadamard import hadamard
from ptq_llm.rotation import (
    Hadamard,
    known_factors,
    multiply,
    random_orthogonal,
    random_rotation,
    rotation_that_keeps_ones,
    unknown_order,
)

POWERS = [1, 2, 4, 8, 16, 64, 256]
TIMES_FOUR = [4 * odd for odd in (*range(1, 47, 2), 49, 51, 53, 55, 57, 61, 63)]
SIZES = [1, 2, 3, 6, 7, 12, 64, 96, 140, 188, 576, 1536, 11008 // 8]


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def identity(size):
    return torch.eye(size, dtype=torch.double)


# Matrices


@pytest.mark.parametrize("order", [*POWERS, *TIMES_FOUR, 24, 88, 184, 288])
def test_rows_of_ones_and_minus_ones_are_orthogonal(order):
    matrix = hadamard(order)
    assert matrix.shape == (order, order)
    assert torch.equal(matrix.abs(), torch.ones_like(matrix))
    assert torch.equal(matrix @ matrix.T, order * identity(order))


@pytest.mark.parametrize("order", [2, 12, 28, 36, 52, 92, 156, 172])
def test_the_first_column_is_ones(order):
    assert torch.equal(hadamard(order)[:, 0], torch.ones(order, dtype=torch.double))


@pytest.mark.parametrize("power", [1, 3, 6])
def test_powers_of_two_are_sylvesters(power):
    """H[i, j] is −1 to the number of ones that i and j share in binary."""
    order = 2**power
    shared = [[(i & j).bit_count() for j in range(order)] for i in range(order)]
    assert torch.equal(hadamard(order), (-1.0) ** torch.tensor(shared, dtype=torch.double))


@pytest.mark.parametrize("order", [3, 5, 6, 10, 14, 18, 22, 1023])
def test_there_is_none_of_other_orders(order):
    assert hadamard(order) is None


def test_orders_without_a_construction_are_unknown_not_wrong():
    assert hadamard(188) is None
    assert unknown_order(188) == 47
    assert unknown_order(576) == 1


# Transforms


@pytest.mark.parametrize("sizes", [(3,), (2, 3), (4, 1, 5), (2, 3, 4)])
def test_the_fast_product_is_the_product_with_the_dense_kronecker_product(sizes):
    factors = [torch.randn(size, size, dtype=torch.double, generator=generator(size)) for size in sizes]
    dense = identity(1)
    for factor in factors:
        dense = torch.kron(dense, factor)
    x = torch.randn(2, 5, len(dense), dtype=torch.double, generator=generator())
    torch.testing.assert_close(multiply(x, factors), x @ dense)


@pytest.mark.parametrize("make", [random_rotation, rotation_that_keeps_ones])
@pytest.mark.parametrize("size", SIZES)
def test_rotations_of_all_sizes_are_orthogonal(make, size):
    rotate = make(size, generator())
    dense = rotate(identity(size))
    assert torch.allclose(dense @ dense.T, identity(size), atol=1e-12)


@pytest.mark.parametrize("size", [2, 12, 64, 140, 576, 1536])
def test_a_rotation_of_a_known_size_spreads_every_channel_evenly(size):
    dense = random_rotation(size, generator())(identity(size))
    assert torch.allclose(dense.abs(), torch.full_like(dense, size**-0.5))


@pytest.mark.parametrize("size", SIZES)
def test_the_rotation_for_layer_norms_keeps_the_vector_of_ones(size):
    rotate = rotation_that_keeps_ones(size, generator())
    ones = torch.ones(3, size, dtype=torch.double)
    assert torch.allclose(rotate(ones), ones, atol=1e-12)


@pytest.mark.parametrize("size", [64, 108, 576])
def test_the_rotation_for_layer_norms_spreads_every_channel_too(size):
    dense = rotation_that_keeps_ones(size, generator())(identity(size))
    assert float(dense.abs().max()) < 6 * size**-0.5


@pytest.mark.parametrize("size", [96, 107 * 4])
def test_seeds_decide_the_rotation(size):
    x = torch.randn(size, dtype=torch.double, generator=generator(5))
    first, again, other = (random_rotation(size, generator(seed))(x) for seed in (0, 0, 1))
    assert torch.equal(first, again)
    assert not torch.allclose(first, other)


def test_a_random_orthogonal_matrix_has_a_constant_first_column():
    matrix = random_orthogonal(7, generator())
    assert torch.allclose(matrix @ matrix.T, identity(7))
    assert torch.allclose(matrix[:, 0], torch.full((7,), 7**-0.5, dtype=torch.double))


@pytest.mark.parametrize(
    ("size", "orders"),
    [
        (96, [96]),
        (576, [36, 16]),
        (1536, [12, 128]),
        (4096, [64, 64]),
        (11008, [172, 64]),
        (13824, [108, 128]),
        (14336, [28, 16, 32]),
        (188, [4]),
    ],
)
def test_large_sizes_are_made_of_small_factors(size, orders):
    assert [len(factor) for factor in known_factors(size)] == orders


# Online


@pytest.mark.parametrize(("size", "width"), [(12, 1), (9, 4), (188, 1), (8, 16)])
def test_the_attachment_rotates_along_its_groups_only(size, width):
    made = Hadamard.random(size, width, generator())
    across = made(torch.kron(identity(size), identity(width)[:1]))[:, ::width]
    assert torch.allclose(across @ across.T, identity(size), atol=1e-12)
    x = torch.randn(3, size * width, dtype=torch.double, generator=generator(1))
    assert torch.allclose(made(x), x @ torch.kron(across, identity(width)), atol=1e-12)


@pytest.mark.parametrize("size", [12, 188, 9])
def test_settings_and_buffers_restore_the_attachment(size):
    made = Hadamard.random(size, 2, generator())
    again = Hadamard(**made.settings())
    again.load_state_dict(made.state_dict())
    x = torch.randn(3, 2 * size, generator=generator(1))
    assert torch.equal(again(x), made(x))


def test_known_matrices_are_not_stored():
    assert Hadamard.random(1536, 1, generator()).state_dict().keys() == {"signs"}


def test_the_attachment_keeps_the_dtype_and_computes_in_float32():
    made = Hadamard.random(64, 1, generator())
    x = torch.randn(5, 64, generator=generator(1)).bfloat16()
    assert torch.equal(made(x), made(x.float()).bfloat16())
