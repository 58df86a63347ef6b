"""The published LSTR on real roads; needs the folder of data that PTQ_LANE_DATA names."""

import os
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch

from ptq_lane.detectors import find
from ptq_lane.lanes import Frame

DATA = os.environ.get("PTQ_LANE_DATA")
pytestmark = pytest.mark.skipif(DATA is None, reason="PTQ_LANE_DATA names no folder of real data")
FOLDER = Path(DATA or ".")
DETECTOR = find("lstr", "tusimple")


@pytest.fixture(scope="module")
def network():
    return DETECTOR.load(FOLDER / "lstr_tusimple.pkl")


def lanes_of(network, path):
    image = np.ascontiguousarray(cv2.imread(str(path))[:, :, ::-1])
    with torch.no_grad():
        outputs = network(DETECTOR.preprocess.prepare(image)[None])
    (lanes,) = DETECTOR.adapter(Frame(image.shape[1], image.shape[0])).decode(outputs)
    return lanes


def distances(points, mask):
    """From each point to the nearest pixel of the mask in its row; infinite in rows without."""
    columns = [np.nonzero(mask[int(y)])[0] for _, y in points]
    return np.array(
        [np.abs(c - x).min() if len(c) else np.inf for c, (x, _) in zip(columns, points, strict=True)]
    )


@pytest.mark.parametrize("name", [f"{index:04}" for index in range(6)])
def test_training_images_show_their_lanes(network, name):
    """Every labelled line is found by one lane, most of its rows within 10 pixels, half of what
    TuSimple allows, of the labelled pixels."""
    lanes = lanes_of(network, FOLDER / "tusimple" / f"{name}.png")
    instances = cv2.imread(str(FOLDER / "tusimple" / f"{name}_instance.png"), cv2.IMREAD_GRAYSCALE)
    labels = [label for label in np.unique(instances) if label]
    medians = np.array(
        [
            [np.median(distances(points, instances == label)) for label in labels]
            for points in lanes.points()
        ]
    )
    assert sorted(medians.argmin(axis=1)) == list(range(len(labels)))
    assert medians.min(axis=1).max() < 10


def test_images_of_other_roads_have_lanes_of_the_ego_lane(network):
    for index in range(4):
        lanes = lanes_of(network, FOLDER / "tusimple" / f"loose_{index}.jpg")
        assert {0, 5} <= set(lanes.slots)
        row = 60  # of 72: y = 600
        right, left = (lanes.x[list(lanes.slots).index(slot), row] for slot in (0, 5))
        assert left < 640 < right
