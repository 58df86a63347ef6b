"""Pictures, arrays, labels and described models of ptq-vision."""

import json
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from fuzz_targets.core import mend_artifact
from fuzz_targets.target import Target
from ptq_vision.classification import Classification
from ptq_vision.images import ImageSet, read_images
from ptq_vision.labels import classes_of
from ptq_vision.openmmlab.description import Description, describe, parse
from ptq_vision.openmmlab.task_detection import _read_annotations
from ptqcore import artifact, load

SUFFIXES = ("png", "jpg", "bmp", "webp", "ppm")


def write_pictures(folder: Path) -> None:
    """One picture of every format, all of one size."""
    pixels = np.random.default_rng(0).integers(0, 256, (12, 16, 3), dtype=np.uint8)
    for suffix in SUFFIXES:
        Image.fromarray(pixels).save(folder / f"{suffix}.{suffix}")


def read_pictures(folder: Path) -> None:
    images = read_images(str(folder), "task.images")
    for number in range(len(images)):
        images.read(number)


def write_arrays(folder: Path) -> None:
    images = np.zeros((4, 3, 8, 8), np.uint8)
    np.savez_compressed(folder / "images.npz", images=images, labels=np.arange(4))


def read_arrays(folder: Path) -> None:
    images = read_images(str(folder / "images.npz"), "task.images")
    images.read(0)
    classes_of(images, None)


def write_table(folder: Path) -> None:
    (folder / "labels.csv").write_text("file,class\na.png,3\nb/c.png,12\n")


def read_table(folder: Path) -> None:
    nothing: Any = None
    classes_of(ImageSet(["a.png", "b/c.png"], nothing), str(folder / "labels.csv"))


def write_model(folder: Path) -> None:
    described = {"model": "cifar-resnet-20", "classes": 10, "preprocess": {"size": [32, 32]}}
    (folder / "assets").mkdir()
    (folder / "assets/model.json").write_text(json.dumps(described))
    artifact.save(Classification.build(folder / "assets"), folder, "vision", "classification", "0")


def write_description(folder: Path) -> None:
    head = {"type": "FCNHead", "in_channels": 8, "num_classes": 2, "norm_cfg": {"type": "BN"}}
    model = {
        "type": "EncoderDecoder",
        "backbone": {"type": "ResNetV1c", "out": (1, 2)},
        "decode_head": head,
    }
    description = Description("mmseg", model, [{"type": "Resize", "scale": (64, 32)}])
    (folder / "openmmlab.json").write_text(describe(description))


def read_description(folder: Path) -> None:
    parse((folder / "openmmlab.json").read_bytes().decode("utf-8", "replace"))


def write_annotations(folder: Path) -> None:
    box = {"id": 1, "image_id": 1, "category_id": 3, "bbox": [1, 2, 3.5, 4], "area": 14, "iscrowd": 0}
    truth = {"images": [{"id": 1, "file_name": "a.jpg"}], "annotations": [box], "categories": [{"id": 3}]}
    (folder / "coco.json").write_text(json.dumps(truth))


def read_annotations(folder: Path) -> None:
    _read_annotations(str(folder / "coco.json"))


TARGETS = (
    Target("pictures", write_pictures, read_pictures),
    Target("npz", write_arrays, read_arrays),
    Target("labels-csv", write_table, read_table),
    Target("vision-artifact", write_model, load, mend_artifact),
    Target("openmmlab-description", write_description, read_description),
    Target("coco", write_annotations, read_annotations),
)
