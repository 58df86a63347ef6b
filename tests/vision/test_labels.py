"""Classes from tables and folders, and label maps."""

import numpy as np
import pytest
from PIL import Image

from ptq_vision.images import ImageSet
from ptq_vision.labels import check_range, classes_of, maps_of
from ptqcore import DataError

NAMES = ["a.png", "b/c.png", "d.png"]
IMAGES = ImageSet(NAMES, lambda index: np.zeros((2, 3, 3), np.uint8))


def with_labels(labels):
    return ImageSet(NAMES, IMAGES.read, np.array(labels))


def table(tmp_path, text):
    (tmp_path / "labels.csv").write_text(text)
    return str(tmp_path / "labels.csv")


@pytest.mark.parametrize(
    "text",
    [
        "file,class\nd.png,7\na.png,5\nb/c.png,6\n",
        "name,class,file\nx,7,d.png\ny,5,a.png\nz,6,b/c.png\n",
        "picture,number\nd.png,7\na.png,5\nb/c.png,6\n",
        "d.png,7\n\na.png,5\nb/c.png,6\n",
        "\ufefffile,class\nd.png, 7\na.png,5\nb/c.png,6\n",
        "file,class,name\nd.png,7,x\na.png,5,y\nb/c.png,6,z\n",
    ],
)
def test_a_table_names_files_and_classes(tmp_path, text):
    assert classes_of(IMAGES, table(tmp_path, text)).tolist() == [5, 6, 7]


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("", "is empty: it needs the columns file and class"),
        ("a.png,5\nx.png,6\n", "line 2: there is no picture 'x.png' in task.images: give paths below"),
        ("a.png,5\na.png,5\n", "line 2: picture 'a.png' has a label already: keep one"),
        ("file,class\na.png,five\n", "line 2: the class of 'a.png' is 'five': it must be an integer"),
        ("file,class\na.png\n", "line 2 has 1 columns: it needs a file and a class"),
        ("a.png,5\nd.png,6\n", "has no line for picture 'b/c.png' of task.images: add one"),
    ],
)
def test_wrong_tables(tmp_path, text, sentence):
    with pytest.raises(DataError) as caught:
        classes_of(IMAGES, table(tmp_path, text))
    assert str(caught.value).startswith(f"task.labels '{tmp_path}/labels.csv'")
    assert sentence in str(caught.value)


def test_a_missing_table():
    with pytest.raises(DataError, match=r"'no.csv' cannot be read as a CSV file: No such file"):
        classes_of(IMAGES, "no.csv")


def test_class_folders_are_numbered_in_alphabetical_order():
    images = ImageSet(["cat/1.png", "cat/2.png", "bird/1.png"], IMAGES.read)
    assert classes_of(images, "folders").tolist() == [1, 1, 0]


def test_class_folders_that_are_numbers_are_the_classes():
    images = ImageSet(["10/1.png", "9/2.png", "0003/1.png"], IMAGES.read)
    assert classes_of(images, "folders").tolist() == [10, 9, 3]


def test_a_picture_outside_class_folders():
    with pytest.raises(DataError, match=r"'a.png' lies in no class folder"):
        classes_of(IMAGES, "folders")


def test_labels_that_came_with_the_pictures():
    assert classes_of(with_labels([3, 1, 2]), None).tolist() == [3, 1, 2]
    assert classes_of(IMAGES, None) is None
    with pytest.raises(DataError, match="'labels' have 3 dimensions, classes have one"):
        classes_of(with_labels(np.zeros((3, 2, 2), int)), None)


def test_classes_that_the_model_has_not():
    check_range(np.array([0, 9]), 10, str)
    for wrong in (10, -1):
        with pytest.raises(
            DataError, match=f"picture '1' is of class {wrong}, but the model has the classes"
        ):
            check_range(np.array([3, wrong]), 10, str)


# Label maps


def maps(tmp_path, names=("a.png", "b/c.png", "d.png"), palette=False):
    for number, name in enumerate(names):
        path = tmp_path / "maps" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        picture = Image.fromarray(np.array([[number, 255, 1]], dtype=np.uint8))
        if palette:
            picture.putpalette([7, 8, 9] * 256)
        picture.save(path)
    return str(tmp_path / "maps")


@pytest.mark.parametrize("palette", [False, True])
def test_a_map_is_found_by_the_name_without_its_ending(tmp_path, palette):
    images = ImageSet(["a.jpg", "b/c.png", "d.webp"], IMAGES.read)
    read = maps_of(images, maps(tmp_path, palette=palette))
    assert read(2).tolist() == [[2, 255, 1]]
    assert read(0).dtype == np.int64


def test_maps_that_came_with_the_pictures():
    assert maps_of(with_labels(np.arange(12).reshape(3, 2, 2)), None)(1).tolist() == [[4, 5], [6, 7]]
    assert maps_of(IMAGES, None) is None
    with pytest.raises(DataError, match=r"'labels' have 1 dimensions, label maps are \[n, height, width\]"):
        maps_of(with_labels([1, 2, 3]), None)


def test_a_missing_map_or_folder(tmp_path):
    with pytest.raises(DataError, match=r"has no b/c.png for picture 'b/c.png': add it"):
        maps_of(IMAGES, maps(tmp_path, ["a.png"]))
    with pytest.raises(DataError, match=r"task.labels '/no' is no folder: give the folder"):
        maps_of(IMAGES, "/no")


def test_a_coloured_map(tmp_path):
    folder = maps(tmp_path)
    Image.new("RGB", (2, 2)).save(tmp_path / "maps" / "a.png")
    with pytest.raises(DataError, match=r"'a.png' is a colour picture: save class numbers as a grey"):
        maps_of(IMAGES, folder)(0)
