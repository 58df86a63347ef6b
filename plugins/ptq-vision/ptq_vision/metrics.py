"""Figures by which classifiers and segmentation networks are judged: pure functions of tensors."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor


def first_tensor(output: Any) -> Tensor | None:
    """The first tensor of a model's output: itself, or the first in nested tuples, lists and mappings."""
    if isinstance(output, Tensor):
        return output
    parts = output.values() if isinstance(output, Mapping) else output
    if not isinstance(output, Mapping | tuple | list):
        return None
    return next((found for part in parts if (found := first_tensor(part)) is not None), None)


def top_k(logits: Tensor, labels: Tensor, k: int) -> float:
    """Percent of rows whose label is among the k largest logits; logits: [n, classes], labels: [n]."""
    best = logits.topk(min(k, logits.shape[1]), dim=1).indices
    return percent(int((best == labels[:, None]).any(1).sum()), len(labels))


def agreement(found: Tensor, reference: Tensor) -> float:
    """Percent of equal entries of two integer tensors of the same shape."""
    return percent(int((found == reference).sum()), found.numel())


def relative_error(found: Tensor, reference: Tensor) -> float:
    """Sum of the squared differences over the sum of the squared reference, in double precision."""
    reference = reference.double()
    return float((found.double() - reference).square().sum() / reference.square().sum())


def confusion(labels: Tensor, found: Tensor, classes: int, ignore_label: int) -> Tensor:
    """Counts [classes, classes] of pixels by label (rows) and prediction (columns), void left out."""
    counted = labels != ignore_label
    pairs = labels[counted] * classes + found[counted]
    return torch.bincount(pairs, minlength=classes**2).view(classes, classes)


def segmentation_scores(counts: Tensor, ignore_label: int) -> dict[str, float]:
    """miou, dice and pixel_accuracy in percent, of a confusion matrix [classes, classes].

    miou: mean over classes of |label and prediction| / |label or prediction|;
    dice: mean over classes of 2 |label and prediction| / (|label| + |prediction|);
    classes that are in no label and no prediction are left out of the means, and so is a class that
    stands for void: to predict it is merely wrong. All are 0 if no pixel counts.
    """
    counts = counts.double()
    right, labelled, predicted = counts.diag(), counts.sum(1), counts.sum(0)
    scored = labelled + predicted > 0
    if 0 <= ignore_label < len(counts):
        scored[ignore_label] = False
    right, sizes = right[scored], (labelled + predicted)[scored]
    return {
        "miou": _mean_percent(right / (sizes - right)),
        "dice": _mean_percent(2 * right / sizes),
        "pixel_accuracy": percent(float(right.sum()), float(labelled.sum())),
    }


def percent(part: float, whole: float) -> float:
    """100 part / whole, and 0 of nothing."""
    return 100 * part / whole if whole else 0.0


def _mean_percent(shares: Tensor) -> float:
    return 100 * float(shares.mean()) if len(shares) else 0.0
