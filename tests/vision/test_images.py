"""Pictures from folders and arrays."""

import numpy as np
import pytest
from PIL import Image

from ptq_vision.images import read_images, spread
from ptqcore import DataError


def test_a_folder_is_read_sorted_with_its_subfolders(folder, picture):
    files = {"b.png": None, "a/2.bmp": None, "a/1.ppm": None, "c.PNG": None, ".hidden.png": None}
    path = folder(files)
    (path / "notes.txt").write_text("no picture")
    images = read_images(str(path), "task.images")
    assert images.names == ["a/1.ppm", "a/2.bmp", "b.png", "c.PNG"]
    assert np.array_equal(images.read(2), picture(seed=0))
    assert np.array_equal(images.read(0), picture(seed=2))


@pytest.mark.parametrize("suffix", ["jpg", "jpeg", "webp"])
def test_lossy_formats_are_read(folder, suffix):
    images = read_images(str(folder({f"a.{suffix}": (200, 100, 50)})), "task.images")
    assert np.abs(images.read(0).astype(int) - (200, 100, 50)).max() < 8


@pytest.mark.parametrize("mode", ["L", "P", "RGBA", "1", "CMYK"])
def test_every_kind_of_picture_becomes_red_green_and_blue(tmp_path, mode):
    Image.new("RGB", (4, 3), "white").convert(mode).save(
        tmp_path / ("a.jpg" if mode == "CMYK" else "a.png")
    )
    pixels = read_images(str(tmp_path), "task.images").read(0)
    assert pixels.shape == (3, 4, 3)
    assert pixels.min() == 255


def test_an_npz_file(tmp_path, picture):
    pixels = np.stack([picture(5, 6, seed) for seed in range(3)])
    np.savez(tmp_path / "a.npz", images=pixels.transpose(0, 3, 1, 2), labels=[4, 5, 6])
    images = read_images(str(tmp_path / "a.npz"), "task.images")
    assert len(images) == 3
    assert np.array_equal(images.read(1), pixels[1])
    assert images.labels.tolist() == [4, 5, 6]


def test_spread_takes_both_ends_and_no_number_twice():
    assert spread(10, 4) == [0, 3, 6, 9]
    assert spread(3, 5) == [0, 1, 2]
    assert len(set(spread(1000, 999))) == 999


# What is wrong is one sentence


def fails(source):
    with pytest.raises(DataError) as caught:
        read_images(str(source), "task.images").read(0)
    return str(caught.value)


def test_nothing_there(tmp_path):
    assert fails(tmp_path / "no") == (
        f"task.images '{tmp_path / 'no'}' does not exist: give a folder of pictures, or an .npz file"
    )


def test_an_empty_folder(tmp_path):
    assert "holds no picture: it needs files ending in .jpg, .jpeg, .png" in fails(tmp_path)


def test_a_single_picture(folder):
    sentence = fails(folder({"a.png": None}) / "a.png")
    assert "is a file, but not an .npz one: give the folder of the pictures" in sentence


def test_a_cut_picture(folder):
    path = folder({"a.jpg": None})
    data = (path / "a.jpg").read_bytes()
    (path / "a.jpg").write_bytes(data[: len(data) // 2])
    sentence = fails(path)
    assert sentence.startswith(f"task.images '{path}': 'a.jpg' cannot be read, replace or remove it: ")
    assert "\n" not in sentence


def test_a_picture_that_is_none(tmp_path):
    (tmp_path / "a.png").write_text("no picture")
    assert "'a.png' cannot be read, replace or remove it: cannot identify image file" in fails(tmp_path)


def test_a_picture_of_sixteen_bits(tmp_path):
    Image.fromarray(np.full((2, 2), 40000, dtype=np.uint16)).save(tmp_path / "a.png")
    assert "'a.png' has more than 8 bits a channel: convert it to 8 bits" in fails(tmp_path)


@pytest.mark.parametrize(
    ("arrays", "sentence"),
    [
        ({"pictures": np.zeros(3)}, "has no array 'images': it must be"),
        ({"images": np.zeros((2, 4, 4, 3), np.uint8)}, r"'images' is \[2, 4, 4, 3\] uint8, it must be"),
        ({"images": np.zeros((2, 3, 4, 4))}, r"'images' is \[2, 3, 4, 4\] float64"),
        ({"images": np.zeros((0, 3, 4, 4), np.uint8)}, r"'images' is \[0, 3, 4, 4\]"),
        ({"images": np.zeros((2, 3, 4, 4), np.uint8), "labels": [1]}, r"'labels' is \[1\] int64, it must"),
        ({"images": np.zeros((2, 3, 4, 4), np.uint8), "labels": [1.5, 2]}, r"'labels' is \[2\] float64"),
        ({"images": np.array([object()])}, "cannot be read as an .npz file of plain arrays"),
    ],
)
def test_wrong_arrays(tmp_path, arrays, sentence):
    np.savez(tmp_path / "a.npz", **arrays)
    with pytest.raises(DataError, match=sentence):
        read_images(str(tmp_path / "a.npz"), "task.images")


def test_an_npz_file_that_is_none(tmp_path):
    (tmp_path / "a.npz").write_bytes(b"PK\x03\x04 and nothing else")
    assert "cannot be read as an .npz file of plain arrays" in fails(tmp_path / "a.npz")
