"""Labels, pictures, checkpoints and artifacts of lane detectors that somebody broke on purpose."""

import gzip
import json
import struct
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import ptq_lane
from ptq_lane import detectors
from ptq_lane.frames import Frames, read_frames
from ptq_lane.labels import read_labels
from ptq_lane.lanes import Frame
from ptqcore import DataError, ModelError, PtqError, artifact, stated_size

NAME = "clips/0/20.jpg"
FRAMES = Frames([NAME], Frame(1280, 720), lambda _: np.zeros((720, 1280, 3), np.uint8))
LABEL = {"raw_file": NAME, "lanes": [[-2, 632, 600.5], [900, 910, 920]], "h_samples": [240, 400, 710]}


def sentence(source: Path) -> str:
    with pytest.raises(DataError) as caught:
        read_labels(str(source), FRAMES, "task.labels")
    found = str(caught.value)
    assert found.startswith(f"task.labels {str(source)!r}")
    assert "\n" not in found
    return found


# Labels


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("[" * 5000, "line 1 is no JSON object"),
        ("[" * 200 + "]" * 200, "line 1 is no JSON object"),
        (json.dumps(LABEL | {"lanes": [["9" * 5000]]}), "lane 1 must be a list of numbers in pixels"),
        (json.dumps(LABEL).replace("632", "9" * 5000), "line 1 is no JSON object"),
        (json.dumps(LABEL | {"lanes": [[10**400, 1, 1]]}), "lane 1 must be a list of numbers in pixels"),
        (
            json.dumps(LABEL | {"lanes": [[float("nan"), 1, 1]]}),
            "lane 1 must be a list of numbers in pixels",
        ),
        (json.dumps(LABEL | {"lanes": [[1e300, 1, 1]]}), "lane 1 must be a list of numbers in pixels"),
        (
            json.dumps(LABEL | {"h_samples": [-1e300] * 3}),
            "'h_samples' must be a list of numbers in pixels",
        ),
        (json.dumps(LABEL | {"lanes": {}}), "'lanes' a list of lists of x"),
        (json.dumps(LABEL | {"raw_file": ["a"]}), "'raw_file' must be a path"),
        (json.dumps(LABEL | {"raw_file": "../../etc/passwd"}), "has labels for none of the 1 images"),
        (" " * (2**20 + 1), "line 1 is longer than any label"),
    ],
)
def test_labels_of_tusimple(tmp_path, text, expected):
    (tmp_path / "labels.json").write_text(text)
    assert expected in sentence(tmp_path / "labels.json")


def test_a_compressed_label_file_is_not_unpacked_without_end(tmp_path):
    file = tmp_path / "labels.json.gz"
    file.write_bytes(gzip.compress(b" " * 2**22))
    assert "line 1 is longer than any label, or the file than labels are" in sentence(file)
    file.write_bytes(gzip.compress((b" " * 1000 + b"\n") * 80_000))
    assert "is longer than any label, or the file than labels are" in sentence(file)
    file.write_bytes(gzip.compress(json.dumps(LABEL).encode())[:-9])
    assert "cannot be read: " in sentence(file)


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (b"\xff\xfe", "cannot be read: "),
        (b"1 2 3", "has 3 numbers"),
        (b"nan 1", "holds a value that is not finite"),
        (b"1e999 1", "holds a value that is not finite"),
        (b"1e300 1", "far outside the image"),
        (b"x y", "could not convert string to float"),
        (b"1 " * (2**19 + 1), "it may have 1048576 at most"),
    ],
)
def test_labels_of_culane(tmp_path, content, expected):
    (tmp_path / "clips/0").mkdir(parents=True)
    (tmp_path / "clips/0/20.lines.txt").write_bytes(content)
    assert expected in sentence(tmp_path)


def test_a_label_without_an_end_is_not_waited_for(tmp_path):
    (tmp_path / "clips/0").mkdir(parents=True)
    (tmp_path / "clips/0/20.lines.txt").symlink_to("/dev/zero")
    assert "'20.lines.txt' is no plain file" in sentence(tmp_path)


@given(content=st.binary(max_size=200), name=st.sampled_from(["l.json", "l.json.gz", "20.lines.txt"]))
@settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_bytes_are_labels_or_a_sentence(tmp_path, content, name):
    (tmp_path / name).write_bytes(content)
    try:
        read_labels(str(tmp_path if name.endswith(".txt") else tmp_path / name), FRAMES, "task.labels")
    except DataError:
        pass
    finally:
        (tmp_path / name).unlink()


# Pictures


def encoded(suffix: str) -> bytes:
    pixels = np.random.default_rng(0).integers(0, 256, (6, 11, 3), dtype=np.uint8)
    return cv2.imencode(suffix, pixels)[1].tobytes()


@pytest.mark.parametrize("suffix", [".png", ".jpg", ".bmp", ".webp", ".ppm"])
def test_the_size_that_a_picture_states(suffix):
    whole = encoded(suffix)
    assert stated_size(whole) == (11, 6)
    for length in range(0, len(whole), 7):
        assert stated_size(whole[:length]) in (None, (11, 6))


@given(
    st.sampled_from([b"\xff\xd8", b"\x89PNG", b"BM", b"RIFF\x00\x00\x00\x00WEBPVP8X", b"P6 ", b""]),
    st.binary(),
)
def test_any_bytes_state_a_size_or_none(start, rest):
    found = stated_size(start + rest)
    assert found is None or all(side >= 0 for side in found)


def test_a_png_with_a_part_longer_than_the_file_is_not_decoded(tmp_path):
    whole = bytearray(encoded(".png"))
    whole[33:37] = struct.pack(">I", 2**32 - 1)
    (tmp_path / "a.png").write_bytes(whole)
    assert stated_size(bytes(whole)) is None
    with pytest.raises(DataError, match="it is cut off, damaged, or no picture at all"):
        read_frames(str(tmp_path), "task.images")


def test_a_picture_that_claims_more_than_its_bytes_hold(tmp_path):
    whole = bytearray(encoded(".png"))
    whole[16:24] = struct.pack(">II", 40000, 40000)
    (tmp_path / "a.png").write_bytes(whole)
    with pytest.raises(
        DataError, match=r"picture 'a.png' cannot be read, .*: it claims 40000x40000 pixels, in"
    ):
        read_frames(str(tmp_path), "task.images")


@given(
    place=st.floats(0, 1),
    piece=st.binary(min_size=1, max_size=4),
    suffix=st.sampled_from([".png", ".jpg", ".bmp"]),
)
@settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_change_of_a_picture_is_read_or_a_sentence(tmp_path, place, piece, suffix):
    whole = encoded(suffix)
    at = int(place * (len(whole) - 1))
    file = tmp_path / f"a{suffix}"
    file.write_bytes(whole[:at] + piece + whole[at + len(piece) :])
    try:
        read_frames(str(tmp_path), "task.images")
    except DataError:
        pass
    finally:
        file.unlink()


# Checkpoints


@pytest.mark.parametrize(
    ("family", "state", "expected"),
    [
        ("lstr", {"class_embed.weight": torch.zeros(())}, "tells 0 classes apart"),
        (
            "lstr",
            {"class_embed.weight": torch.zeros(2, 32), "a.in_proj_weight": torch.zeros(())},
            "does not fit",
        ),
        (
            "lstr",
            {"class_embed.weight": torch.zeros(2, 32), "a.in_proj_weight": torch.zeros(2)},
            "does not fit",
        ),
        (
            "lstr",
            {"class_embed.weight": torch.zeros(2, 2), "a.in_proj_b.in_proj_c": torch.zeros(3)},
            "not fit",
        ),
        (
            "lstr",
            {"class_embed.weight": torch.zeros(2), "specific_embed.layers.2.b": torch.zeros(())},
            "not fit",
        ),
        ("curve", {"a": torch.zeros(1).expand(10**9)}, "is larger than the file"),
    ],
)
def test_checkpoints_of_other_shapes(ptq, tmp_path, family, state, expected):
    file, output = tmp_path / "weights.pth", tmp_path / "out"
    torch.save(state, file)
    output.mkdir()
    (output / "manifest.json").write_text("an earlier result")
    sets = [f"--set=task.family={family}", f"--set=task.checkpoint={file}", "--set=export=[]"]
    code, _, stderr = ptq("quantize", "--plugin", "lane", *sets, "--output", output)
    (line,) = (line for line in stderr.splitlines() if line.startswith("error: "))
    assert code == 2
    assert f"task.checkpoint {str(file)!r}" in line
    assert expected in line
    assert (output / "manifest.json").read_text() == "an earlier result"


# Artifacts


@pytest.fixture
def detector(tmp_path):
    """An artifact of a network of its own, and a function that changes what describes it."""
    folder = tmp_path / "artifact"
    (folder / "assets").mkdir(parents=True)
    found = detectors.find("curve")
    described = {"family": "curve", "variant": None, "model": None, "splits": {}}
    described |= {
        "preprocess": found.preprocess.model_dump(mode="json"),
        "frame": {"width": 160, "height": 96},
    }

    def change(**changes: object) -> Path:
        (folder / "assets/detector.json").write_text(json.dumps(described | changes))
        return folder

    change()
    artifact.save(found.structure(), folder, "lane", "lanes", "0")
    return change


def test_a_good_artifact_is_loaded(detector):
    assert ptq_lane.load(detector()).adapter.frame == Frame(160, 96)


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"model": "os:abort"}, "names the code 'os:abort', which nobody has imported"),
        ({"model": "antigravity:fly"}, "names the code 'antigravity:fly', which nobody has imported"),
        ({"family": "torch:save"}, "must be a subclass of ptq_lane.Adapter"),
        (
            {"family": "evil:Adapter"},
            "names the code 'evil:Adapter', which nobody has imported: if you trust it",
        ),
        ({"family": ["curve"]}, "does not describe a lane detector"),
        ({"family": "lines"}, "task.family 'lines' is unknown"),
        ({"splits": {"nothing": [[0], [1]]}}, "does not fit its model"),
        ({"splits": 3}, "does not describe a lane detector"),
        (
            {"frame": {"width": 10**9, "height": 96}},
            "its frame is 1000000000x96: sides are 1 to 65536 pixels",
        ),
        ({"frame": {"width": "a", "height": 96}}, "its frame is 'a'x96"),
        ({"preprocess": {"size": [0, {}]}}, "holds no lane detector: "),
        ({"preprocess": {"mean": [float("inf")] * 3}}, "holds no lane detector: "),
    ],
)
def test_artifacts_that_describe_something_else(detector, changes, expected):
    with pytest.raises(PtqError) as caught:
        ptq_lane.load(detector(**changes))
    assert expected in str(caught.value)


def test_code_beside_an_artifact_is_not_run(detector, tmp_path, monkeypatch):
    (tmp_path / "evil.py").write_text("raise SystemExit('run')")
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(ModelError, match="names the code 'evil:Net', which nobody has imported"):
        ptq_lane.load(detector(model="evil:Net"))
