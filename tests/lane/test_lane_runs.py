"""Whole runs of the task `lanes` on a stranger's network and family, and sentences for what goes wrong."""

import json

import cv2
import numpy as np
import pytest
import torch
import yaml
from torch import nn
from toy_lanes import FRAME, Toy, ToyNet, write_pictures

import ptq_lane
import ptqcore
from ptq_lane import Lanes
from ptq_lane.lane_task import LaneOptions, LaneTask
from ptq_lane.lines_txt import write_lines_txt
from ptq_lane.preprocess import Preprocess
from ptqcore import DataError

TOY = ["task.family=toy_lanes:Toy", "task.model=toy_lanes:ToyNet", "task.calibration=12", "export=[]"]


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    """Forty small pictures."""
    folder = tmp_path_factory.mktemp("images")
    write_pictures(folder, 40)
    return folder


def quantize(ptq, folder, images, *settings, recipe="w4a4"):
    sets = [part for one in (*TOY, f"task.images={images}", *settings) for part in ("--set", one)]
    return ptq("quantize", "--plugin", "lane", "--recipe", recipe, "--output", folder, *sets)


@pytest.fixture(scope="module")
def finished(tmp_path_factory, images):
    """A run of selective focus, with a baseline."""
    folder = tmp_path_factory.mktemp("runs") / "one"
    recipe = ptqcore.find_recipe(
        "w4a4",
        "lane",
        [
            *TOY,
            f"task.images={images}",
            "evaluate.baseline=true",
            "steps=[focus-ranges, {selective-focus: {iterations: 60, batch: 8, pixels: 1.0}}]",
            "steps.1.selective-focus.held_out=0.25",
            "steps.1.selective-focus.judged=4",
        ],
    )
    return folder, ptqcore.quantize(recipe, "lane", folder)


def test_the_run_is_judged_by_its_lanes(finished):
    _, record = finished
    metrics = record.metrics()
    assert metrics["before"] == {"lds": 0, "agreement_f1@0.5": 100}
    for key in ("baseline", "after"):
        assert metrics[key].keys() == {"lds", "agreement_f1@0.5"}
        assert 0 < metrics[key]["lds"] < 2


def test_the_report_shows_lanes_groups_and_what_was_learned(finished):
    folder, _ = finished
    page = (folder / "report.html").read_text()
    for heading in ("Lanes", "Lane Distortion Score", "Groups of outputs", "Sensitivity of the groups"):
        assert heading in page
    assert "Held-out Lane Distortion Score" in page


def test_the_artifact_computes_the_same_lanes(finished, images):
    folder, record = finished
    (assets,) = folder.rglob("detector.json")
    described = json.loads(assets.read_text())
    assert described["frame"] == {"width": 64, "height": 32}
    recipe = yaml.safe_load((folder / "recipe.yaml").read_text())
    options = {key: value for key, value in recipe["task"].items() if key != "kind"}
    task = LaneTask(LaneOptions.model_validate(options), 0, folder)
    task.evaluate(task.load_model())
    task.judged = "quantized"
    assert task.evaluate(ptqcore.load(folder)) == record.metrics()["after"]


def test_a_finished_detector_takes_images(finished, images):
    detector = ptq_lane.load(finished[0])
    picture = cv2.imread(str(images / "00.png"))[:, :, ::-1]
    lanes = detector([picture, picture])
    assert len(lanes) == 2
    assert len(lanes[0]) >= 1
    assert np.array_equal(lanes[0].x, lanes[1].x, equal_nan=True)
    with pytest.raises(DataError, match=r"an image is \[16, 64, 3\], but lanes are found on 64x32"):
        detector([picture[:16]])


def test_calibration_images_are_held_out_from_evaluation(images, tmp_path):
    options = LaneOptions.model_validate(
        {"family": "toy_lanes:Toy", "model": "toy_lanes:ToyNet", "images": str(images), "calibration": 10}
    )
    task = LaneTask(options, 0, tmp_path)
    task.load_model()
    assert len(task.evaluated) == 30
    assert not {0, 4, 8, 36} & set(task.evaluated)


def test_sensitivity_is_a_table_of_pixels(ptq, tmp_path, images):
    sets = [part for one in (*TOY, f"task.images={images}") for part in ("--set", one)]
    code, out, _ = ptq("lane", "sensitivity", *sets, "--output", tmp_path, "--set", "quant.weights.bits=4")
    assert code == 0
    assert "pixels per unit" in out
    lines = (tmp_path / "sensitivity.csv").read_text().splitlines()
    groups = {line.split(",")[0]: [float(cell) for cell in line.split(",")[1:]] for line in lines[1:]}
    assert set(groups) == {"score", "x", "slope", "ignored"}
    assert groups["ignored"][1:] == [0, 0, 0]
    assert groups["x"][1] > 0
    assert sum(row[2] for row in groups.values()) == pytest.approx(1)


def test_a_folder_of_culane_gives_f1_by_category(ptq, tmp_path):
    """Every third of twelve pictures calibrates; the labels are where the network finds its lanes."""
    data, night = tmp_path / "data", [1, 2, 4]
    pictures, lists = data / "driver_1" / "a.MP4", data / "list" / "test_split"
    for folder in (pictures, lists):
        folder.mkdir(parents=True)
    write_pictures(pictures, 12)
    for number in range(12):
        image = cv2.imread(str(pictures / f"{number:02}.png"))[:, :, ::-1]
        with torch.no_grad():
            (lanes,) = Toy(FRAME).decode(ToyNet()(Preprocess().prepare(image)[None]))
        labelled = lanes.points() if number in night else []
        write_lines_txt(labelled, pictures / f"{number:02}.lines.txt")
    names = {"test8_night": night, "test7_cross": [5, 7, 8, 10, 11]}
    for name, numbers in names.items():
        (lists / f"{name}.txt").write_text("".join(f"/driver_1/a.MP4/{one:02}.jpg\n" for one in numbers))
    settings = (f"task.labels={data}", "task.calibration=4")
    code, _, err = quantize(ptq, tmp_path / "run", data, *settings, recipe="w8a8-minmax")
    assert code == 0, err
    before = json.loads((tmp_path / "run" / "metrics.json").read_text())["before"]
    assert before["f1@0.5/night"] == 100
    assert before["fp/cross"] == 2 * 5
    assert before["f1@0.5"] == pytest.approx(100 * 2 * 6 / (2 * 6 + 10))
    page = (tmp_path / "run" / "report.html").read_text()
    assert "f1@0.5/night" in page
    assert "fp/cross" in page


# What goes wrong


class Empty(Toy):
    def decode(self, outputs):
        return []


class Copies(Toy):
    def heads(self, outputs):
        return {"all": outputs * 2}


class OtherRows(Toy):
    def decode(self, outputs):
        return [Lanes(np.arange(3.0), np.zeros((0, 3))) for _ in outputs]


class Blind(ToyNet):
    def __init__(self):
        super().__init__()
        nn.init.constant_(self.head.bias, -50.0)


HERE = __name__


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        (["task.family=rowanchor"], "task.family 'rowanchor' is unknown; did you mean 'row-anchor'"),
        (["task.family=toy_lanes:FRAME"], "must be a subclass of ptq_lane.Adapter"),
        (["task.variant=culane"], "task.variant 'culane' is of the family lstr"),
        ([f"task.family={HERE}:Empty"], "decode() of Empty gives 0 entries for 1 images"),
        ([f"task.family={HERE}:Copies"], "heads() of the adapter Copies returns 'all' as a copy"),
        ([f"task.family={HERE}:OtherRows"], "decode() of OtherRows gives lanes at other rows"),
        ([f"task.model={HERE}:Blind"], "finds no lane on any of 28 images"),
        (["task.calibration=40"], "task.calibration is 40, but task.images"),
        (["task.preprocess.size=[64, 64]"], "does not take images of shape [3, 64, 64]"),
        (["blocks=null"], "set the recipe key 'blocks' to network-wise"),
    ],
)
def test_what_goes_wrong_is_one_sentence(ptq, tmp_path, images, settings, sentence):
    code, _, err = quantize(ptq, tmp_path / "run", images, *settings)
    assert code == 2
    assert sentence in " ".join(err.split())
    assert "Traceback" not in err
    assert not (tmp_path / "run" / "manifest.json").exists()


def test_images_of_other_sizes_are_named(ptq, tmp_path, images):
    other = tmp_path / "mixed"
    other.mkdir()
    for number, size in enumerate([(64, 32), (64, 32), (32, 32)]):
        cv2.imwrite(str(other / f"{number}.png"), np.zeros((*size[::-1], 3), np.uint8))
    code, _, err = quantize(ptq, tmp_path / "run", other, "task.calibration=1")
    assert code == 2
    assert "picture '2.png' is 32x32, but the first, '0.png', is 64x32" in " ".join(err.split())


def test_a_checkpoint_of_another_family_is_named(ptq, tmp_path):
    from ptq_lane import detectors

    file = tmp_path / "curve.pt"
    torch.save(detectors.find("curve").structure().state_dict(), file)
    sets = ("--set", "task.family=keypoint", "--set", f"task.checkpoint={file}")
    code, _, err = ptq("quantize", "--plugin", "lane", "--output", tmp_path / "run", *sets)
    assert code == 2
    assert "is one of the family 'curve', not of 'keypoint'" in " ".join(err.split())


def test_the_step_is_for_lanes_alone(ptq, tmp_path):
    sets = (
        "--set",
        "steps=[lane:selective-focus]",
        "--set",
        "blocks=network-wise",
        "--set",
        "task.calibration=2",
    )
    code, _, err = ptq(
        "quantize", "--plugin", "vision", "--recipe", "w8a8", "--output", tmp_path / "run", *sets
    )
    assert code == 2
    assert "selective-focus is made for tasks of the kind lanes" in " ".join(err.split())
