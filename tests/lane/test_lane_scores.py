"""The figures of a run, and which of them there are."""

import numpy as np
import pytest

from ptq_lane.labels import Label
from ptq_lane.lanes import Frame, Lanes
from ptq_lane.metrics.culane import Counts
from ptq_lane.metrics.scores import Scores

FRAME = Frame(1280, 720)
ROWS = np.arange(160.0, 720, 10)
LABELLED = {"f1@0.3", "f1@0.5", "f1@0.75", "ego_f1@0.5", "agreement_f1@0.5"}


def upright(*places, slots=None):
    x = np.tile(np.array(places, dtype=float).reshape(-1, 1), (1, len(FRAME.rows)))
    x[:, FRAME.rows < 160] = np.nan
    return Lanes(FRAME.rows, x, slots)


def label(*places, tusimple=True):
    x = np.tile(np.array(places, dtype=float).reshape(-1, 1), (1, len(ROWS)))
    points = [np.stack([lane, ROWS], axis=1) for lane in x]
    return Label(points, x, ROWS) if tusimple else Label(points)


def test_a_perfect_run():
    scores = Scores(FRAME)
    scores.add(upright(100, 500, 900), label(100, 500, 900), upright(100, 500, 900))
    expected = dict.fromkeys(LABELLED, 100) | {"tusimple_accuracy": 100, "tusimple_fp": 0, "tusimple_fn": 0}
    assert scores.result() == expected


def test_counts_of_all_images_are_summed():
    scores = Scores(FRAME)
    scores.add(upright(100, 500, 900), label(100, 500, 900), upright(100, 500))
    scores.add(upright(500), label(300, 900), upright(500, 900))
    figures = scores.result()
    assert figures["f1@0.5"] == pytest.approx(100 * 2 * 3 / (2 * 3 + 1 + 2))
    assert figures["ego_f1@0.5"] == pytest.approx(100 * 2 * 2 / (2 * 2 + 1 + 2))
    assert figures["agreement_f1@0.5"] == pytest.approx(100 * 2 * 3 / (2 * 3 + 1 + 1))
    assert figures["tusimple_accuracy"] == pytest.approx(50)
    assert figures["tusimple_fp"] == pytest.approx(0.5)
    assert figures["tusimple_fn"] == pytest.approx(0.5)


def test_thresholds_tell_near_from_far():
    scores = Scores(FRAME)
    # Bands of 23 or 24 pixels: 9 apart leave an intersection over union of about 0.44.
    scores.add(upright(500), label(509), upright(500))
    figures = scores.result()
    assert (figures["f1@0.3"], figures["f1@0.5"], figures["f1@0.75"]) == (100, 0, 0)


def test_without_labels_there_is_agreement_alone():
    scores = Scores(FRAME)
    scores.add(upright(500), None, upright(500, 900))
    assert scores.result() == {"agreement_f1@0.5": pytest.approx(100 * 2 / 3)}
    assert scores.categories() == {}


def test_images_without_labels_do_not_count_against_labels():
    scores = Scores(FRAME)
    scores.add(upright(500), label(500, tusimple=False), upright(500))
    scores.add(upright(100), None, upright(100))
    assert scores.result() == dict.fromkeys(LABELLED, 100)


def test_an_image_labelled_as_empty_counts():
    scores = Scores(FRAME)
    scores.add(upright(500), label(tusimple=False), upright(500))
    assert scores.result()["f1@0.5"] == 0


def test_lanes_without_points_are_no_lanes_and_points_beside_the_image_are_absent():
    found = upright(500, -40)
    absent = Lanes(FRAME.rows, np.vstack([found.x, np.full((1, len(FRAME.rows)), np.nan)]))
    scores = Scores(FRAME)
    scores.add(absent, label(500), absent)
    figures = scores.result()
    assert figures["tusimple_accuracy"] == 100
    assert figures["tusimple_fp"] == 0
    # The lane beside the image is one that was found and is not labelled.
    assert figures["f1@0.5"] == pytest.approx(100 * 2 / 3)


def test_a_model_agrees_with_itself_whatever_it_finds():
    scores = Scores(FRAME)
    x = np.stack([upright(500).x[0], upright(-900).x[0], np.where(FRAME.rows == 300, 200, np.nan)])
    for found in (Lanes(FRAME.rows, x), upright()):
        scores.add(found, None, Lanes(found.rows, found.x.copy()))
    assert scores.result() == {"agreement_f1@0.5": 100}


def test_categories_have_counts_and_a_total():
    scores = Scores(FRAME)
    scores.add(upright(500), label(500), upright(500), category="curve")
    scores.add(upright(500, 700), label(), upright(500), category="cross")
    scores.add(upright(), label(300), upright(500))
    assert scores.categories() == {
        "cross": Counts(0, 2, 0),
        "curve": Counts(1, 0, 0),
        "other": Counts(0, 0, 1),
        "total": Counts(1, 2, 1),
    }
    by_category = {key: value for key, value in scores.result().items() if "/" in key}
    assert by_category == {"f1@0.5/curve": 100, "f1@0.5/other": 0, "fp/cross": 2}
