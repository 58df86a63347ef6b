"""Pictures and videos: order, colours, random access, and one sentence for each thing that may be wrong."""

import subprocess
import sys

import cv2
import numpy as np
import pytest

from ptq_lane import frames as module
from ptq_lane.frames import read_frames
from ptq_lane.lanes import Frame
from ptqcore import DataError

KEY = "task.images"


def picture(path, value=0, size=(32, 20)):
    """A picture whose red is `value`, saved without loss; size: width, height."""
    path.parent.mkdir(parents=True, exist_ok=True)
    image = np.zeros((size[1], size[0], 3), np.uint8)
    image[..., 2] = value
    assert cv2.imwrite(str(path), image)
    return path


@pytest.fixture
def video(tmp_path):
    """30 frames, a third of a second apart in brightness: frame i is 8 * i everywhere."""
    path = tmp_path / "road.avi"
    writer = cv2.VideoWriter(str(path), cv2.VideoWriter_fourcc(*"MJPG"), 10, (64, 48))
    for number in range(30):
        writer.write(np.full((48, 64, 3), 8 * number, np.uint8))
    writer.release()
    return path


def read_all(source):
    frames = read_frames(str(source), KEY)
    return [frames.read(index) for index in range(len(frames))]


def message(source):
    with pytest.raises(DataError) as caught:
        read_all(source)
    text = str(caught.value)
    assert text.startswith(f"{KEY} {str(source)!r}")
    assert "\n" not in text
    return text


def test_pictures_of_all_folders_come_in_order_and_in_rgb(tmp_path):
    for number, name in enumerate(["b/2.png", "a/1.PNG", "c.bmp", "b/.hidden.png"]):
        picture(tmp_path / name, value=number + 1)
    (tmp_path / "notes.txt").write_text("no picture")
    frames = read_frames(str(tmp_path), KEY)
    assert list(frames.names) == ["a/1.PNG", "b/2.png", "c.bmp"]
    assert len(frames) == 3
    assert frames.frame == Frame(32, 20)
    image = frames.read(1)
    assert image.dtype == np.uint8
    assert image.shape == (20, 32, 3)
    assert image[5, 5].tolist() == [1, 0, 0]


def test_grey_pictures_have_three_channels(tmp_path):
    cv2.imwrite(str(tmp_path / "grey.png"), np.full((4, 6), 77, np.uint8))
    assert (read_frames(str(tmp_path), KEY).read(0) == 77).all()


@pytest.mark.parametrize(
    ("kept", "other"),
    [
        ("driver_23_30frame/a.MP4/00000.jpg", "laneseg_label_w16/driver_23_30frame/a.MP4/00000.png"),
        ("clips/0530/1_0/20.jpg", "seg_label/0530/1_0/20.png"),
    ],
)
def test_the_label_maps_of_culane_and_tusimple_are_no_pictures_of_the_road(tmp_path, kept, other):
    picture(tmp_path / kept)
    picture(tmp_path / other)
    assert list(read_frames(str(tmp_path), KEY).names) == [kept]


def test_nothing_there(tmp_path):
    assert "does not exist: give a folder" in message(tmp_path / "nowhere")
    assert "holds no picture: it needs files ending in .jpg" in message(tmp_path)
    assert "single picture: give the folder" in message(picture(tmp_path / "one.png"))


def test_a_picture_of_another_size_is_named(tmp_path):
    picture(tmp_path / "a.png")
    picture(tmp_path / "b.png", size=(30, 20))
    text = message(tmp_path)
    assert "'b.png' is 30x20, but the first, 'a.png', is 32x20" in text


@pytest.mark.parametrize("suffix", [".jpg", ".png"])
@pytest.mark.parametrize("kept", [0, 0.02, 0.6])
def test_a_damaged_picture_is_named(tmp_path, suffix, kept):
    picture(tmp_path / f"a{suffix}")
    image = np.random.default_rng(0).integers(0, 256, (20, 32, 3), dtype=np.uint8)
    path = tmp_path / f"b{suffix}"
    cv2.imwrite(str(path), image)
    path.write_bytes(path.read_bytes()[: int(kept * path.stat().st_size)])
    assert f"'b{suffix}' cannot be read, replace or remove it" in message(tmp_path)


def test_a_picture_of_16_bits_is_refused(tmp_path):
    cv2.imwrite(str(tmp_path / "deep.png"), np.full((4, 6), 7000, np.uint16))
    assert "'deep.png' has more than 8 bits a channel" in message(tmp_path)


def test_frames_of_a_video_are_the_same_in_any_order(video, monkeypatch):
    monkeypatch.setattr(module, "_KEPT_BYTES", 3 * 64 * 48 * 3)
    frames = read_frames(str(video), KEY)
    assert len(frames) == 30
    assert frames.frame == Frame(64, 48)
    assert frames.names[7] == "000007"
    for index in [3, 4, 29, 0, 17, 16, 17, 2, 29]:
        assert abs(frames.read(index).astype(int) - 8 * index).max() <= 3


def test_what_a_caller_paints_on_a_frame_does_not_come_back(video):
    frames = read_frames(str(video), KEY)
    frames.read(5)[:] = 255
    assert frames.read(5).max() <= 43


def test_numbers_beyond_the_video_are_refused(video):
    frames = read_frames(str(video), KEY)
    with pytest.raises(IndexError):
        frames.read(30)


def test_files_that_are_no_video(tmp_path):
    junk = tmp_path / "road.mp4"
    junk.write_bytes(b"no video" * 200)
    assert "cannot be read as a video" in message(junk)


def test_a_video_that_is_cut_off(video):
    video.write_bytes(video.read_bytes()[: video.stat().st_size // 2])
    assert "of 30 frames" in message(video)


SCRIPT = """
import os, resource, sys
from ptq_lane.frames import read_frames
from ptqcore import DataError
os.cpu_count = lambda: 2
try:
    read_frames(sys.argv[1], "task.images")
except DataError as error:
    print(error, file=sys.stderr)
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
"""


def read_alone(file):
    """Read a video in a process that has no freed memory to use again: MiB that it took, what it said."""
    command = [sys.executable, "-c", SCRIPT, file]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return int(done.stdout) // 1024, done.stderr


@pytest.mark.skipif(sys.platform != "linux", reason="there is no such limit elsewhere")
def test_what_a_broken_video_claims_to_hold_is_not_allocated(video):
    """A note of 1.5 GB in a file of 40 kB: the decoder would read it into memory before it looks."""
    content = bytearray(video.read_bytes())
    place = content.index(b"INFO")
    content[place - 1] = 0xB1  # the size of the list around it
    content[place + 8 : place + 12] = (1500 * 2**20).to_bytes(4, "little")
    broken = video.with_name("broken.avi")
    broken.write_bytes(content)
    assert read_alone(broken)[0] - read_alone(video)[0] < 100


@pytest.mark.skipif(sys.platform != "linux", reason="there is no such limit elsewhere")
def test_frames_far_larger_than_their_file(tmp_path):
    """36 million pixels of black in 300 kB: OpenCV raises an error of its own where memory ends."""
    path = tmp_path / "black.avi"
    writer = cv2.VideoWriter(str(path), cv2.VideoWriter_fourcc(*"MJPG"), 10, (6000, 6000))
    writer.write(np.zeros((6000, 6000, 3), np.uint8))
    writer.release()
    assert f"task.images '{path}'" in read_alone(path)[1]
