"""Fréchet distance between two sets of features."""

import torch
from torch import Tensor

from ptqcore import DataError


def frechet_distance(first: Tensor, second: Tensor) -> float:
    """How far two sets of features lie apart, each taken as a Gaussian.

        |m1 - m2|² + trace(C1 + C2 - 2 (C1^½ C2 C1^½)^½)

    with means m and unbiased covariances C (Dowson & Landau, Journal of Multivariate Analysis 12, 1982;
    on Inception features: Heusel et al., NeurIPS 2017). The trace of the last root is computed as the sum
    of the singular values of C1^½ C2^½, which loses no digits where covariances are singular. All in
    float64, nothing added to the covariances. Few rows bias the estimate upwards, so compare only distances
    between sets of equal sizes.

    Args:
        first: features [n, width], n of at least 2.
        second: features [m, width], m of at least 2.

    Raises:
        DataError: fewer than 2 rows, different widths, or values that are not finite.
    """
    first, second = _checked(first), _checked(second)
    if first.shape[1] != second.shape[1]:
        raise DataError(f"features must have one width; got {first.shape[1]} and {second.shape[1]}")
    first_covariance, second_covariance = _covariance(first), _covariance(second)
    means = (first.mean(0) - second.mean(0)).square().sum()
    traces = first_covariance.trace() + second_covariance.trace()
    overlap = torch.linalg.svdvals(_root(first_covariance) @ _root(second_covariance)).sum()
    return float((means + traces - 2 * overlap).clamp(min=0))


def _checked(features: Tensor) -> Tensor:
    if features.ndim != 2 or len(features) < 2:
        raise DataError(
            "features must be [rows, width] with at least 2 rows, for one has no covariance; "
            f"got {list(features.shape)}"
        )
    if not features.isfinite().all():
        raise DataError("features must be finite; got NaN or infinity")
    return features.double()


def _covariance(features: Tensor) -> Tensor:
    centred = features - features.mean(0)
    return centred.T @ centred / (len(features) - 1)


def _root(covariance: Tensor) -> Tensor:
    """The symmetric square root; eigenvalues that rounding made negative count as 0."""
    values, vectors = torch.linalg.eigh(covariance)
    return (vectors * values.clamp(min=0).sqrt()) @ vectors.T
