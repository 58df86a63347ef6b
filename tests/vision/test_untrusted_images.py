"""Pictures, arrays, labels and artifacts of ptq-vision that somebody broke on purpose."""

import io
import json
import struct
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from ptq_vision.classification import Classification
from ptq_vision.images import ImageSet, read_images
from ptq_vision.labels import classes_of
from ptq_vision.openmmlab.description import parse
from ptq_vision.openmmlab.task_detection import _read_annotations
from ptqcore import DataError, ModelError, PtqError, artifact, load

IMAGES = np.zeros((4, 3, 8, 8), np.uint8)


# Arrays


def sentence(file: Path) -> str:
    with pytest.raises(DataError) as caught:
        read_images(str(file), "task.images")
    found = str(caught.value)
    assert found.startswith(f"task.images {str(file)!r}")
    assert "\n" not in found
    return found


def archive(folder: Path, record: bytes, kind: int = zipfile.ZIP_STORED) -> Path:
    file = folder / "images.npz"
    with zipfile.ZipFile(file, "w", kind) as written:
        written.writestr("images.npy", record)
    return file


def array(shape: str, data: bytes = b"", dtype: str = "|u1") -> bytes:
    """An .npy record whose header is what we like."""
    header = f"{{'descr': {dtype!r}, 'fortran_order': False, 'shape': {shape}}}".encode()
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(header)) + header + data


@pytest.mark.parametrize(
    ("record", "expected"),
    [
        (array("(4, 3, 1000000, 1000000)"), "'images.npy' needs 12000000000000 bytes, but has"),
        (array("(-1, 3, 8, 8)"), "cannot be read as an .npz file|it must be [n, 3, height, width] uint8"),
        (array("__import__('os').abort()"), "cannot be read as an .npz file of plain arrays: "),
        (array("(1, 3, 8, 8)", bytes(192), "|O"), "cannot be read as an .npz file of plain arrays: "),
        (array("()", b"\0"), "it must be [n, 3, height, width] uint8"),
        (b"\x93NUMPY\x09\x09", "cannot be read as an .npz file of plain arrays: "),
        (b"", "cannot be read as an .npz file of plain arrays: "),
    ],
)
def test_arrays_that_claim_what_they_do_not_hold(tmp_path, record, expected):
    found = sentence(archive(tmp_path, record))
    assert any(part in found for part in expected.split("|")), found


def test_an_archive_bomb_is_not_unpacked(tmp_path):
    file = archive(tmp_path, array("(1, 3, 10000, 10000)", bytes(3 * 10**8)), zipfile.ZIP_DEFLATED)
    assert file.stat().st_size < 10**6
    assert "bytes unpacked, too many" in sentence(file)


def test_labels_of_no_dimension(tmp_path):
    np.savez(tmp_path / "images.npz", images=IMAGES, labels=np.int64(3))
    assert "'labels' is [] int64, it must hold one integer entry per image" in sentence(
        tmp_path / "images.npz"
    )


@given(place=st.floats(0, 1), piece=st.binary(min_size=1, max_size=8))
@settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_change_of_an_archive_is_read_or_a_sentence(tmp_path, place, piece):
    written = io.BytesIO()
    np.savez_compressed(written, images=IMAGES, labels=np.arange(4))
    whole = written.getvalue()
    at = int(place * (len(whole) - 1))
    (tmp_path / "images.npz").write_bytes(whole[:at] + piece + whole[at + len(piece) :])
    try:
        read_images(str(tmp_path / "images.npz"), "task.images")
    except DataError:
        return


# Pictures


def test_a_picture_that_claims_more_than_its_bytes_hold(tmp_path):
    Image.new("RGB", (8, 8)).save(tmp_path / "a.bmp")
    whole = bytearray((tmp_path / "a.bmp").read_bytes())
    whole[18:26] = struct.pack("<ii", 9000, 9000)
    (tmp_path / "a.bmp").write_bytes(whole)
    images = read_images(str(tmp_path), "task.images")
    with pytest.raises(
        DataError, match=r"'a.bmp' cannot be read, .*: it claims 9000x9000 pixels, in 246 bytes"
    ):
        images.read(0)


def test_a_canvas_is_not_made_before_its_size_is_known(tmp_path):
    Image.new("RGB", (8, 8)).save(tmp_path / "a.webp", lossless=True)
    whole = bytearray((tmp_path / "a.webp").read_bytes())
    (bits,) = struct.unpack_from("<I", whole, 21)
    struct.pack_into("<I", whole, 21, bits | 0xFFFFFFF)
    (tmp_path / "a.webp").write_bytes(whole)
    images = read_images(str(tmp_path), "task.images")
    with pytest.raises(DataError, match="it claims 16384x16384 pixels, in"):
        images.read(0)


@given(content=st.binary(max_size=200), suffix=st.sampled_from([".png", ".jpg", ".bmp", ".webp", ".ppm"]))
@settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_bytes_are_no_picture(tmp_path, content, suffix):
    file = tmp_path / f"a{suffix}"
    file.write_bytes(content)
    images = read_images(str(tmp_path), "task.images")
    try:
        images.read(0)
    except DataError:
        pass
    finally:
        file.unlink()


# Labels


def labels(folder: Path, content: bytes) -> None:
    (folder / "labels.csv").write_bytes(content)
    classes_of(ImageSet(["a.png"], lambda _: IMAGES[0]), str(folder / "labels.csv"))


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (b"a.png," + b"9" * 40, "it must be an integer"),
        (b"a.png," + b"9" * 5000, "it must be an integer"),
        (b"a.png", "has 1 columns"),
        (b"\xff\xfea", "cannot be read as a CSV file"),
        (b'"' + b"x" * 200_000, "cannot be read as a CSV file"),
        (b"../../etc/passwd,1", "there is no picture '../../etc/passwd'"),
    ],
)
def test_tables_of_labels(tmp_path, content, expected):
    with pytest.raises(DataError) as caught:
        labels(tmp_path, content)
    assert expected in str(caught.value)


@given(content=st.binary(max_size=60))
@settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_bytes_are_labels_or_a_sentence(tmp_path, content):
    try:
        labels(tmp_path, content)
    except DataError:
        return


def test_folders_whose_names_are_huge_numbers_are_counted():
    images = ImageSet([f"{name}/a.png" for name in ("9" * 30, "1")], lambda _: IMAGES[0])
    assert classes_of(images, "folders").tolist() == [1, 0]


BOX = {"id": 1, "image_id": 1, "category_id": 3, "bbox": [1, 2, 3, 4], "area": 12, "iscrowd": 0}
COCO = {"images": [{"id": 1, "file_name": "a.jpg"}], "annotations": [BOX], "categories": [{"id": 3}]}


@pytest.mark.parametrize(
    ("truth", "expected"),
    [
        ([], "cannot be read as a COCO file"),
        (COCO | {"images": [3]}, "cannot be read as a COCO file"),
        (COCO | {"images": ["id file_name"]}, "an entry is 'id file_name'"),
        (COCO | {"images": [{"id": [], "file_name": "a"}]}, "id is []"),
        (COCO | {"images": [{"id": 1, "file_name": {}}]}, "file_name is {}"),
        (COCO | {"annotations": [BOX | {"bbox": [1, 2, 3]}]}, "bbox is [1, 2, 3]"),
        (COCO | {"annotations": [BOX | {"bbox": [1, 2, 3, 10**400]}]}, "bbox is [1, 2, 3, 1000"),
        (COCO | {"annotations": [BOX | {"bbox": [1, 2, 3, float("nan")]}]}, "bbox is [1, 2, 3, nan]"),
    ],
)
def test_annotations(tmp_path, truth, expected):
    (tmp_path / "coco.json").write_text(json.dumps(truth))
    with pytest.raises(DataError) as caught:
        _read_annotations(str(tmp_path / "coco.json"))
    assert expected in str(caught.value)
    (tmp_path / "coco.json").write_text(json.dumps(COCO))
    assert _read_annotations(str(tmp_path / "coco.json")) == COCO


# Artifacts


@pytest.fixture
def described(tmp_path):
    """A good artifact, and a function that changes what describes its model."""
    folder = tmp_path / "artifact"
    (folder / "assets").mkdir(parents=True)

    def describe(**changes: object) -> Path:
        entry = {"model": "cifar-resnet-20", "classes": 10} | changes
        (folder / "assets/model.json").write_text(json.dumps(entry))
        return folder

    model = Classification.build(describe() / "assets")
    artifact.save(model, folder, "vision", "classification", "0")
    return describe


def test_a_good_artifact_is_loaded(described):
    assert load(described())(torch.zeros(1, 3, 32, 32)).shape == (1, 10)


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"classes": 10**9}, "describes far larger layers than it holds numbers for"),
        ({"classes": -1}, "does not fit its model"),
        ({"classes": 1e999}, "does not describe a model"),
        ({"classes": "x"}, "does not describe a model"),
        ({"model": "os:abort"}, "names the code 'os:abort', which nobody has imported"),
        ({"model": "evil:Net"}, "names the code 'evil:Net', which nobody has imported"),
        ({"model": "timm:../evil"}, "task.model 'timm:../evil'"),
        ({"model": "../assets/model.json"}, "task.model '../assets/model.json' is unknown"),
        ({"model": "openmmlab.json"}, "openmmlab.json cannot be read"),
    ],
)
def test_artifacts_that_describe_something_else(described, changes, expected):
    with pytest.raises(PtqError) as caught:
        load(described(**changes))
    assert expected in str(caught.value)


@pytest.mark.parametrize("place", ["assets/evil.py", "evil.py"])
def test_a_program_beside_an_artifact_is_not_run(described, place):
    folder = described(model=Path(place).name if place.startswith("assets") else f"../{place}")
    (folder / place).write_text("raise SystemExit('run')")
    with pytest.raises(
        ModelError, match=r"names the program '.*evil.py' as its model: artifacts have descript"
    ):
        load(folder)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[" * 5000,
        '{"scope": "os", "model": {}, "pipeline": []}',
        '{"scope": "mmseg", "model": 3, "pipeline": []}',
        '{"scope": "mmseg", "model": {}, "pipeline": {}}',
        '{"scope": "mmseg", "model": {}, "pipeline": [], "x": 1}',
        '{"scope": "mmseg", "model": {}}',
    ],
)
def test_descriptions_that_are_none(text):
    with pytest.raises(ModelError, match="not the description of a model: "):
        parse(text)
