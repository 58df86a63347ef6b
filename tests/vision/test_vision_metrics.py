"""Figures against closed forms and explicit loops."""

from collections import OrderedDict

import pytest
import torch

from ptq_vision import metrics


def test_top_k_counts_labels_among_the_k_best():
    logits = torch.tensor([[3.0, 2, 1], [1, 3, 2], [3, 1, 2]])
    labels = torch.tensor([0, 2, 1])
    assert metrics.top_k(logits, labels, 1) == pytest.approx(100 / 3)
    assert metrics.top_k(logits, labels, 2) == pytest.approx(200 / 3)
    assert metrics.top_k(logits, labels, 5) == 100


def test_agreement_is_the_share_of_equal_entries():
    assert metrics.agreement(torch.tensor([1, 2, 3, 4]), torch.tensor([1, 2, 4, 3])) == 50


@pytest.mark.parametrize("factor", [1.0, 1.5, 0.0, -1.0])
def test_the_error_of_scaled_logits_is_the_squared_deviation_of_the_factor(factor):
    logits = torch.randn(5, 7, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    assert metrics.relative_error(factor * logits, logits) == pytest.approx((factor - 1) ** 2, abs=1e-12)


def test_confusion_equals_an_explicit_loop():
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(0, 5, (6, 9), generator=generator)
    found = torch.randint(0, 4, (6, 9), generator=generator)
    expected = torch.zeros(4, 4, dtype=torch.int64)
    for label, prediction in zip(labels.flatten(), found.flatten(), strict=True):
        if label != 4:
            expected[label, prediction] += 1
    assert torch.equal(metrics.confusion(labels, found, 4, ignore_label=4), expected)


def scores(counts, ignore_label=255):
    return metrics.segmentation_scores(torch.tensor(counts), ignore_label)


def test_a_perfect_prediction_scores_100():
    assert scores([[4, 0], [0, 6]]) == {"miou": 100, "dice": 100, "pixel_accuracy": 100}


def test_scores_of_two_classes():
    """Class 0: 3 of 4 found, 1 too many: 3/5 and 6/8. Class 1: 5 of 6 found, 1 too many: 5/7 and 10/12."""
    found = scores([[3, 1], [1, 5]])
    assert found["miou"] == pytest.approx(100 * (3 / 5 + 5 / 7) / 2)
    assert found["dice"] == pytest.approx(100 * (6 / 8 + 10 / 12) / 2)
    assert found["pixel_accuracy"] == pytest.approx(80)


def test_a_class_that_is_nowhere_is_left_out():
    assert scores([[4, 0, 0], [0, 6, 0], [0, 0, 0]])["miou"] == 100


def test_a_class_that_is_only_predicted_counts_as_wrong():
    assert scores([[4, 0, 0], [0, 5, 1], [0, 0, 0]])["miou"] == pytest.approx(100 * (1 + 5 / 6 + 0) / 3)


def test_void_predicted_by_the_model_is_wrong_but_no_class():
    found = scores([[4, 0, 0], [0, 5, 1], [0, 0, 0]], ignore_label=2)
    assert found["miou"] == pytest.approx(100 * (1 + 5 / 6) / 2)
    assert found["pixel_accuracy"] == pytest.approx(90)


def test_no_pixel_scores_nothing():
    assert scores([[0, 0], [0, 0]]) == {"miou": 0, "dice": 0, "pixel_accuracy": 0}


@pytest.mark.parametrize(
    "wrap", [lambda x: x, lambda x: (x, 1), lambda x: [[x]], lambda x: {"a": None, "b": x}]
)
def test_the_first_tensor_of_an_output(wrap):
    tensor = torch.ones(2)
    assert metrics.first_tensor(wrap(tensor)) is tensor


def test_outputs_without_a_tensor():
    assert metrics.first_tensor(OrderedDict(a="text", b=[3])) is None
    assert metrics.first_tensor(3.0) is None
