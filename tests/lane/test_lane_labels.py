"""Labels of CULane and TuSimple: found by path, and one sentence for each thing that may be wrong."""

import gzip
import json

import numpy as np
import pytest

from ptq_lane.frames import Frames
from ptq_lane.labels import read_labels
from ptq_lane.lanes import Frame
from ptq_lane.lines_txt import read_lines_txt, write_lines_txt
from ptqcore import DataError

KEY = "task.labels"
LANE = "100.5 590 120 580 140.25 570\n"
SAMPLES = [160, 170, 180, 700]


def frames_of(*names, size=(1640, 590)):
    def read(index):
        raise AssertionError("labels must not read pictures")

    return Frames(names, Frame(*size), read)


def write(path, text):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


def tusimple(path, *labels):
    lines = [{"raw_file": file, "lanes": lanes, "h_samples": SAMPLES} for file, lanes in labels]
    text = "".join(json.dumps(line) + "\n" for line in lines)
    path.write_bytes(gzip.compress(text.encode()) if path.suffix == ".gz" else text.encode())
    return path


def message(source, frames):
    with pytest.raises(DataError) as caught:
        read_labels(str(source), frames, KEY)
    text = str(caught.value)
    assert text.startswith(f"{KEY} {str(source)!r}")
    assert "\n" not in text
    return text


def first_point(labels, index):
    return labels.lanes[index].lanes[0][0].tolist()


def test_lines_beside_the_pictures(tmp_path):
    write(tmp_path / "driver_1/a.MP4/00000.lines.txt", LANE + "\n" + LANE)
    write(tmp_path / "driver_1/b.MP4/00000.lines.txt", "7 500\n")
    write(tmp_path / "driver_1/b.MP4/00030.lines.txt", "")
    names = [
        f"driver_1/{name}.jpg" for name in ("a.MP4/00000", "a.MP4/00030", "b.MP4/00000", "b.MP4/00030")
    ]
    found = read_labels(str(tmp_path), frames_of(*names), KEY).lanes
    assert found[0] is not None
    assert [lane.tolist() for lane in found[0].lanes] == [[[100.5, 590], [120, 580], [140.25, 570]]] * 2
    assert found[0].x is None
    assert found[1] is None
    assert found[2] is not None
    assert [lane.tolist() for lane in found[2].lanes] == [[[7, 500]]]
    assert found[3] is not None
    assert found[3].lanes == []


@pytest.mark.parametrize(
    ("picture", "label"),
    [
        ("00000.png", "00000"),
        ("a.MP4/00000.jpg", "driver_1/a.MP4/00000"),
        ("driver_1/a.MP4/00000.jpg", "a.MP4/00000"),
        ("driver_1/a.MP4/00000.jpg", "00000"),
        ("000000", "000000"),
    ],
)
def test_labels_apart_from_the_pictures(tmp_path, picture, label):
    write(tmp_path / f"{label}.lines.txt", LANE)
    assert first_point(read_labels(str(tmp_path), frames_of(picture), KEY), 0) == [100.5, 590]


def test_the_number_of_a_picture_alone_is_not_enough_in_another_folder(tmp_path):
    write(tmp_path / "b.MP4/00000.lines.txt", LANE)
    text = message(tmp_path, frames_of("a.MP4/00000.jpg", "a.MP4/00030.jpg"))
    assert "none of the 2 images" in text
    assert "'a.MP4/00000.jpg'" in text
    assert "'b.MP4/00000'" in text


def test_labels_that_fit_twice_are_named(tmp_path):
    write(tmp_path / "a/0.lines.txt", LANE)
    write(tmp_path / "b/0.lines.txt", LANE)
    assert "both 'a/0' and 'b/0' fit the picture '0'" in message(tmp_path, frames_of("0.jpg"))
    (tmp_path / "c").mkdir()
    write(tmp_path / "c/0.lines.txt", LANE)
    assert "'0' fits two pictures, 'x/0' and 'y/0'" in message(
        tmp_path / "c", frames_of("x/0.jpg", "y/0.jpg")
    )


def test_the_same_path_goes_first(tmp_path):
    write(tmp_path / "0.lines.txt", LANE)
    found = read_labels(str(tmp_path), frames_of("0.jpg", "small/0.jpg"), KEY).lanes
    assert [one is None for one in found] == [False, True]


@pytest.mark.parametrize(
    ("line", "fault"),
    [
        ("1 2 3", "has 3 numbers"),
        ("1 two", "could not convert string to float: 'two'"),
        ("1 nan", "holds a value that is not finite"),
    ],
)
def test_a_malformed_line_is_named(tmp_path, line, fault):
    write(tmp_path / "00000.lines.txt", LANE + line)
    text = message(tmp_path, frames_of("00000.jpg"))
    assert "'00000.lines.txt', line 2" in text
    assert fault in text


def test_categories_lie_in_the_folder_of_the_labels_or_beside_it(tmp_path):
    write(tmp_path / "labels/driver_1/a.MP4/00000.lines.txt", LANE)
    write(tmp_path / "list/test_split/test0_normal.txt", "/driver_1/a.MP4/00000.jpg\n")
    write(tmp_path / "list/test_split/test7_cross.txt", "driver_1/a.MP4/00030.jpg\ndriver_1/c.MP4/0.jpg\n")
    names = [f"driver_1/a.MP4/{number}.jpg" for number in ("00000", "00030", "00060")]
    for folder in (tmp_path, tmp_path / "labels"):
        labels = read_labels(str(folder), frames_of(*names), KEY)
        assert labels.categories == ["normal", "cross", None]


def test_without_lists_there_are_no_categories(tmp_path):
    write(tmp_path / "0.lines.txt", LANE)
    assert read_labels(str(tmp_path), frames_of("0.jpg"), KEY).categories == [None]


@pytest.mark.parametrize("name", ["label.json", "label.json.gz"])
@pytest.mark.parametrize("folder", ["", "clips/", "data/clips/"])
def test_labels_of_tusimple(tmp_path, name, folder):
    source = tusimple(
        tmp_path / name,
        ("clips/0530/2_0/20.jpg", [[-2, 600, 610.5, 620], [-2, -2, -2, -2]]),
        ("clips/0530/1_0/20.jpg", []),
    )
    clips = ("1_0/20.jpg", "2_0/20.png", "3_0/20.jpg")
    frames = frames_of(*(f"{folder}0530/{clip}" for clip in clips), size=(1280, 720))
    found = read_labels(str(source), frames, KEY).lanes
    assert found[0] is not None
    assert found[0].lanes == []
    assert found[0].x.shape == (0, 4)
    assert found[1] is not None
    assert [lane.tolist() for lane in found[1].lanes] == [[[600, 170], [610.5, 180], [620, 700]]]
    assert found[1].x.tolist() == [[-2, 600, 610.5, 620], [-2, -2, -2, -2]]
    assert found[1].rows.tolist() == SAMPLES
    assert found[2] is None


@pytest.mark.parametrize(
    ("text", "fault"),
    [
        ("", "is empty"),
        ("not json\n", "line 1 is no JSON object"),
        ("[1, 2]\n", "line 1 is no JSON object"),
        ('{"raw_file": "a.jpg", "lanes": []}', "line 1 has no 'h_samples'"),
        ('{"raw_file": 3, "lanes": [], "h_samples": []}', "'raw_file' must be a path"),
        ('{"raw_file": "a.jpg", "lanes": [["x"]], "h_samples": [1]}', "lane 1 must be a list of numbers"),
        ('{"raw_file": "a.jpg", "lanes": [[NaN]], "h_samples": [1]}', "lane 1 must be a list of numbers"),
        ('{"raw_file": "a.jpg", "lanes": [], "h_samples": 7}', "'h_samples' must be a list of numbers"),
        (
            '\n{"raw_file": "a.jpg", "lanes": [[1, 2], [3]], "h_samples": [1, 2]}',
            "line 2: lane 2 has 1 points",
        ),
        (
            '{"raw_file": "a.jpg", "lanes": [], "h_samples": []}\n' * 2,
            "line 2: picture 'a.jpg' has a label",
        ),
    ],
)
def test_a_malformed_label_of_tusimple_is_named(tmp_path, text, fault):
    write(tmp_path / "label.json", text)
    assert fault in message(tmp_path / "label.json", frames_of("a.jpg"))


def test_a_damaged_gzip_file(tmp_path):
    source = tusimple(tmp_path / "label.json.gz", ("a.jpg", []))
    source.write_bytes(source.read_bytes()[:-12])
    assert "cannot be read" in message(source, frames_of("a.jpg"))
    source.write_bytes(b"no gzip")
    assert "cannot be read" in message(source, frames_of("a.jpg"))


def test_nothing_there(tmp_path):
    assert "does not exist: give a folder" in message(tmp_path / "nowhere", frames_of("a.jpg"))
    assert "holds no label: it needs files ending in .lines.txt" in message(tmp_path, frames_of("a.jpg"))
    write(tmp_path / "labels.csv", "")
    assert "ends neither in .json nor in .json.gz" in message(tmp_path / "labels.csv", frames_of("a.jpg"))


@pytest.mark.parametrize("size", [(192, 96), (820, 295), (1280, 500)])
def test_labels_of_larger_images(tmp_path, size):
    write(tmp_path / "0.lines.txt", LANE)
    text = message(tmp_path, frames_of("0.jpg", size=size))
    assert "'0.jpg' passes (100.5, 590), far outside the image of {}x{}".format(*size) in text


def test_labels_of_images_half_as_large(tmp_path):
    write(tmp_path / "0.lines.txt", LANE)
    assert "upper left quarter" in message(tmp_path, frames_of("0.jpg", size=(3280, 1182)))


def test_lanes_may_end_somewhat_outside(tmp_path):
    write(tmp_path / "0.lines.txt", "-600 590 100 400\n2300 590 1200 300\n")
    labels = read_labels(str(tmp_path), frames_of("0.jpg"), KEY)
    assert first_point(labels, 0) == [-600, 590]


def test_lines_are_written_from_the_bottom_up_and_read_back(tmp_path):
    lanes = [
        np.array([[140.25, 570.0], [120, 580], [100.5, 590]]),
        np.zeros((0, 2)),
        np.array([[7.0, 9.0]]),
    ]
    path = tmp_path / "0.lines.txt"
    write_lines_txt(lanes, path)
    assert path.read_text() == LANE + "7 9\n"
    read = read_lines_txt(path, "label")
    assert [lane.tolist() for lane in read] == [lanes[0][::-1].tolist(), [[7, 9]]]
    write_lines_txt([], path)
    assert path.read_text() == ""
