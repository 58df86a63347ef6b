"""The Fréchet distance against closed forms."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from ptq_diffusion.frechet import frechet_distance
from ptqcore import DataError


def features_of(mean: list[float], deviations: list[float]) -> Tensor:
    """Rows whose mean is exactly this, and whose unbiased covariance is diagonal with these deviations."""
    width = len(mean)
    arms = torch.tensor(deviations, dtype=torch.float64).diag() * ((2 * width - 1) / 2) ** 0.5
    return torch.tensor(mean, dtype=torch.float64) + torch.cat((arms, -arms))


def rotation(width: int, seed: int) -> Tensor:
    """An orthogonal matrix."""
    matrix = torch.randn(width, width, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    return torch.linalg.qr(matrix).Q


def random_features(rows: int, width: int, seed: int) -> Tensor:
    return torch.randn(rows, width, generator=torch.Generator().manual_seed(seed))


def test_diagonal_gaussians_differ_by_means_and_deviations() -> None:
    first = features_of([0.0, 1.0, -2.0], [1.0, 2.0, 0.5])
    second = features_of([3.0, 1.0, -1.0], [4.0, 2.0, 1.5])
    expected = (9 + 0 + 1) + (9 + 0 + 1)
    assert frechet_distance(first, second) == pytest.approx(expected, rel=1e-12)


def test_rotating_both_sets_changes_nothing() -> None:
    first = features_of([0.0, 1.0, -2.0], [1.0, 2.0, 0.5])
    second = features_of([3.0, 1.0, -1.0], [4.0, 2.0, 1.5])
    turn = rotation(3, seed=1)
    assert frechet_distance(first @ turn, second @ turn) == pytest.approx(20, rel=1e-12)


def test_covariances_that_do_not_commute() -> None:
    """For 2 x 2 matrices the trace of (C1^½ C2 C1^½)^½ is √(trace(C1 C2) + 2 √det(C1 C2))."""
    turn = rotation(2, seed=2)
    first, second = features_of([0.0, 0.0], [3.0, 0.2]), features_of([0.0, 0.0], [2.0, 1.0]) @ turn
    one, other = (
        torch.tensor([9.0, 0.04], dtype=torch.float64).diag(),
        turn.T @ torch.tensor([4.0, 1.0], dtype=torch.float64).diag() @ turn,
    )
    overlap = ((one @ other).trace() + 2 * torch.linalg.det(one @ other).sqrt()).sqrt()
    expected = one.trace() + other.trace() - 2 * overlap
    assert frechet_distance(first, second) == pytest.approx(expected.item(), rel=1e-9)


@given(
    rows=st.integers(2, 40), width=st.integers(1, 20), shift=st.floats(-50, 50), seed=st.integers(0, 999)
)
def test_a_shifted_set_is_as_far_as_the_shift_is_long(
    rows: int, width: int, shift: float, seed: int
) -> None:
    features = random_features(rows, width, seed).double()
    assert frechet_distance(features, features + shift) == pytest.approx(
        width * shift**2, rel=1e-6, abs=1e-6
    )


@given(
    rows=st.integers(2, 40), width=st.integers(1, 20), scale=st.floats(1e-3, 1e3), seed=st.integers(0, 999)
)
def test_equal_sets_have_distance_0_even_with_fewer_rows_than_columns(
    rows: int, width: int, scale: float, seed: int
) -> None:
    features = scale * random_features(rows, width, seed).double()
    assert 0 <= frechet_distance(features, features) <= 1e-11 * scale**2 * width


@given(rows=st.integers(2, 30), width=st.integers(1, 20), seed=st.integers(0, 999))
def test_symmetric(rows: int, width: int, seed: int) -> None:
    first, second = random_features(rows, width, seed), 2 * random_features(30, width, seed + 1000) + 1
    assert frechet_distance(first, second) == pytest.approx(frechet_distance(second, first), rel=1e-6)


def test_constant_features_have_no_covariance_left() -> None:
    assert frechet_distance(torch.zeros(4, 3), torch.full((5, 3), 2.0)) == 12


def test_half_precision_features_are_measured_in_double() -> None:
    features = random_features(50, 8, seed=0).half()
    assert frechet_distance(features, features + 1) == pytest.approx(
        frechet_distance(features.double(), (features + 1).double()), rel=1e-12
    )


@pytest.mark.parametrize(
    ("first", "second", "reason"),
    [
        (torch.zeros(1, 3), torch.zeros(4, 3), "at least 2 rows"),
        (torch.zeros(4, 3), torch.zeros(0, 3), "at least 2 rows"),
        (torch.zeros(4, 3, 2), torch.zeros(4, 3), "at least 2 rows"),
        (torch.zeros(4, 3), torch.zeros(4, 2), "got 3 and 2"),
        (torch.zeros(4, 3), torch.full((4, 3), torch.nan), "finite"),
    ],
)
def test_what_cannot_be_compared_is_refused(first: Tensor, second: Tensor, reason: str) -> None:
    with pytest.raises(DataError, match=reason):
        frechet_distance(first, second)
