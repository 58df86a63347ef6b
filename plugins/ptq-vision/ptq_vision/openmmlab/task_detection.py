"""The task `detection`: a one-stage detector of mmdet, images, and how well it still finds things."""

import json
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import torch
from pydantic import Field
from torch import Tensor, nn

from ptq_vision.images import read_images, spread
from ptq_vision.openmmlab import description, evaluation, loading
from ptq_vision.openmmlab.evaluation import Boxes
from ptq_vision.openmmlab.preprocessing import Preprocessing
from ptq_vision.openmmlab.wrap import Network
from ptqcore import (
    ArtifactError,
    DataError,
    ModelError,
    Task,
    TaskOptions,
    read_bytes,
    read_json,
    track,
)

MODEL_FILE = "model.json"
PREPROCESSING_FILE = "preprocessing.json"
_MOST_FROM_A_FOLDER = 1024
_FARTHEST = 1e9  # pixels
_MOST_ANNOTATIONS = 2**30  # bytes: those of COCO's training images have 450 MB
_COCO = {
    "images": ("id", "file_name"),
    "annotations": ("id", "image_id", "category_id", "bbox", "area", "iscrowd"),
    "categories": ("id",),
}


class DetectionOptions(TaskOptions):
    """Keys of `task` for detectors; images pass the model one at a time."""

    model: str = Field(
        default="mmdet:rtmdet_tiny_8xb32-300e_coco",
        description="config file of mmdet, or mmdet:NAME for a config that it ships",
    )
    checkpoint: str | None = Field(default=None, description="weights (.pth); null for random ones")
    images: str = Field(description="folder of images to evaluate on")
    labels: str | None = Field(
        default=None, description="annotations of the images, a COCO file; null for none"
    )
    max_images: int | None = Field(default=100, ge=1, description="images evaluated at most; null for all")
    calibration: Annotated[int, Field(ge=1)] | str = Field(
        default=16,
        description="how many of the images calibrate (evenly spaced, and held out from evaluation), or a "
        f"folder (at most {_MOST_FROM_A_FOLDER} of it)",
    )
    size: int | None = Field(
        default=None, ge=32, description="side of the input; null for the config's own size"
    )


class Detection(Task):
    """Metrics: output_error, the relative squared error of the head's raw outputs against full
    precision; in percent, COCO's mean average precision with the annotations as the truth (map, where
    they are known), and with the full-precision model's boxes of score 0.3 or more (agreement_map,
    unless it finds none, as a model with random weights does).
    """

    name = "detection"
    Options = DetectionOptions
    options: DetectionOptions

    def load_model(self) -> nn.Module:
        """The model; images are listed and annotations read too: what is wrong is known before the work."""
        options = self.options
        self._description = loading.read(options.model)
        if loading.kind(self._description) != "detection":
            raise ModelError(f"task.model {options.model!r} is a segmentor: use the task segmentation")
        size = None if options.size is None else (options.size, options.size)
        self._prepare = Preprocessing.of(self._description, size)
        self._reference: dict[int, Boxes] | None = None
        self._exact: dict[int, Tensor] = {}
        self._choose_images()
        self._network = Network(loading.load(self._description, options.checkpoint, self.seed))
        head: Any = self._network.get_submodule("model.bbox_head")
        self._classes: int = head.num_classes
        self._categories = self._match_categories()
        return self._network

    def samples(self, model: nn.Module) -> list[Tensor]:
        """Calibration images [1, 3, h, w]."""
        return [self._prepare(self._others.read(number)).image for number in self._calibration]

    def evaluate(self, model: nn.Module) -> dict[str, float]:
        """See the class."""
        first = self._reference is None
        found: dict[int, Boxes] = {}
        error = energy = 0.0
        for number in track(
            self._evaluated, "measuring full precision" if first else "measuring the quantized model"
        ):
            prepared, image = self._prepare(self._images.read(number)), self._ids[number]
            with torch.no_grad():
                outputs = model(prepared.image)
            found[image] = evaluation.decode(model, outputs, prepared)
            flat = torch.cat([output.flatten() for output in outputs])
            exact = self._exact.setdefault(image, flat)
            error += float((flat - exact).square().sum())
            energy += float(exact.square().sum())
        if self._reference is None:
            self._reference = {image: boxes.confident() for image, boxes in found.items()}
        metrics = {"output_error": error / energy if energy else error}
        if any(len(boxes.scores) for boxes in self._reference.values()):
            agreed = evaluation.as_truth(self._reference, self._classes)
            every = range(1, self._classes + 1)
            metrics["agreement_map"] = evaluation.average_precision(agreed, found, every)
        if self._truth is not None:
            metrics["map"] = evaluation.average_precision(self._truth, found, self._categories)
        return metrics

    def save_assets(self, folder: Path) -> None:
        """The model's structure, and how images are prepared for it."""
        (folder / MODEL_FILE).write_text(description.describe(self._description), encoding="utf-8")
        prepared = json.dumps(asdict(self._prepare), indent=1)
        (folder / PREPROCESSING_FILE).write_text(prepared + "\n", encoding="utf-8")

    @classmethod
    def build(cls, folder: Path) -> nn.Module:
        """The structure that `save_assets` described."""
        try:
            text = read_bytes(folder / MODEL_FILE).decode("utf-8")
        except (OSError, ValueError) as error:
            raise ArtifactError(f"{folder}/{MODEL_FILE} cannot be read: {error}") from None
        return Network(loading.build(description.parse(text)))

    def _choose_images(self) -> None:
        """Set `_images`, and the numbers among them that are evaluated and that calibrate."""
        options = self.options
        self._images = self._others = read_images(options.images, "task.images")
        self._truth = None if options.labels is None else _read_annotations(options.labels)
        self._ids = self._image_ids()
        known = sorted(self._ids)
        if isinstance(options.calibration, str):
            self._others = read_images(options.calibration, "task.calibration")
            self._calibration = spread(len(self._others), _MOST_FROM_A_FOLDER)
            left = known
        elif options.calibration < len(known):
            self._calibration = [known[place] for place in spread(len(known), options.calibration)]
            left = sorted(set(known) - set(self._calibration))
        else:
            raise DataError(
                f"task.calibration is {options.calibration}, but task.images {options.images!r} holds "
                f"{len(known)}, and some must be left to evaluate: set a smaller number, or a folder"
            )
        self._evaluated = [left[place] for place in spread(len(left), options.max_images or len(left))]

    def _image_ids(self) -> dict[int, int]:
        """Number of an image → its id in the annotations, for those that these name."""
        numbers = {name: number for number, name in enumerate(self._images.names)}
        if self._truth is None:
            return {number: number + 1 for number in numbers.values()}
        named = {entry["file_name"]: entry["id"] for entry in self._truth["images"]}
        missing = sorted(named.keys() - numbers.keys())
        if missing or not named:
            example = f"the first is {missing[0]!r}" if missing else "the annotations name none"
            raise DataError(
                f"task.images {self.options.images!r} lacks {len(missing)} of the {len(named)} images that "
                f"task.labels names: {example}"
            )
        return {numbers[name]: image for name, image in named.items()}

    def _match_categories(self) -> list[int]:
        """The category id of each label: as the annotations list them, in the order of their ids."""
        if self._truth is None:
            return []
        ids = sorted(category["id"] for category in self._truth["categories"])
        if len(ids) != self._classes:
            raise DataError(
                f"task.labels {self.options.labels!r} has {len(ids)} categories, but the model knows "
                f"{self._classes} classes"
            )
        return ids


def _read_annotations(path: str) -> dict[str, Any]:
    try:
        truth = read_json(Path(path).expanduser(), _MOST_ANNOTATIONS)
        for section, keys in _COCO.items():
            for entry in truth[section]:
                missing = [key for key in keys if key not in entry]
                if missing:
                    raise DataError(f"task.labels {path!r}: an entry of {section!r} has no {missing[0]!r}")
                _check_entry(entry)
    except (OSError, ValueError, TypeError, LookupError) as error:
        raise DataError(
            f"task.labels {path!r} cannot be read as a COCO file: {description.line(error)}"
        ) from error
    return truth


def _check_entry(entry: dict[str, Any]) -> None:
    """Raises ValueError unless ids are whole numbers, names are texts and boxes are four finite numbers."""
    if not isinstance(entry, dict):
        raise ValueError(f"an entry is {entry!r:.100}")
    for key, value in entry.items():
        wrong = key.endswith("id") and type(value) is not int
        wrong |= key == "file_name" and not isinstance(value, str)
        if key == "bbox":
            numbers = isinstance(value, list) and all(type(one) in (int, float) for one in value)
            wrong |= not numbers or len(value) != 4 or not all(abs(one) < _FARTHEST for one in value)
        if wrong:
            raise ValueError(f"{key} is {value!r:.100}")
