"""What tasks on images share: the model, the pictures, and which of them calibrate or are judged."""

import json
from abc import abstractmethod
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from pydantic import Field, field_validator, model_validator
from torch import Tensor, nn

from ptq_vision import models
from ptq_vision.images import ImageSet, read_images, spread
from ptq_vision.metrics import first_tensor
from ptq_vision.preprocess import Preprocess, native_size, prepare
from ptq_vision.rendered import rendered_images
from ptq_vision.source import Source
from ptqcore import DataError, ModelError, Task, TaskOptions, read_json, track

RENDERED = "rendered"
_COUNT = 64
_MOST_FROM_A_FOLDER = 1024
_ASSETS = "model.json"


class ImageOptions(TaskOptions):
    """Keys of `task` for images."""

    model: str = Field(
        default=models.EMBEDDED,
        description=f"{', '.join(models.NAMES)}, timm:NAME, or an import path package.module:attribute",
    )
    checkpoint: str | None = Field(
        default=None,
        description="file of weights (.safetensors, .pth); null: those that come with the model",
    )
    images: str | None = Field(
        default=None,
        description="folder of pictures, or .npz file, to evaluate on; null: rendered pictures",
    )
    labels: str | None = Field(default=None, description="what is on the pictures; null: unknown")
    calibration: int | str = Field(
        default=_COUNT,
        description="how many of the images calibrate (evenly spaced, and held out from evaluation), "
        f"or a folder or .npz file (at most {_MOST_FROM_A_FOLDER} of it), or rendered",
    )
    max_images: int | None = Field(default=None, ge=1, description="images evaluated at most; null for all")
    preprocess: Preprocess = Field(default=Preprocess(), description="defaults: what the model wants")
    batch: int = Field(default=32, ge=1, description="images evaluated at once")

    @model_validator(mode="before")
    @classmethod
    def _fill_in(cls, data: Any) -> Any:
        """Defaults that depend on the model."""
        model = data.get("model", cls.model_fields["model"].default) if isinstance(data, dict) else None
        return cls.with_defaults(data, models.find(model)) if isinstance(model, str) else data

    @classmethod
    def with_defaults(cls, data: dict[str, Any], source: Source) -> dict[str, Any]:
        """What the user gave, and what the model says where the user did not."""
        given = data.get("preprocess") or {}
        if isinstance(given, dict):
            given = source.preprocess.model_dump() | given
        return data | {"preprocess": given}

    @field_validator("calibration", mode="before")
    @classmethod
    def _calibration(cls, value: Any) -> Any:
        if not isinstance(value, str) and (type(value) is not int or value < 1):
            raise ValueError(f"calibration {value!r}: give a number of images, a folder, or {RENDERED!r}")
        return value


class ImageTask(Task):
    """A network that takes one tensor of images [n, 3, h, w]."""

    Options = ImageOptions
    options: ImageOptions

    def load_model(self) -> nn.Module:
        """The model; pictures are listed and labels read too: what is wrong is known before the work."""
        model = models.load(self.options.model, self.options.checkpoint)
        self._choose_images()
        self.classes = self._output(model, [self._calibration[0]]).shape[1]
        self.read_labels(self.images)
        return model

    def samples(self, model: nn.Module) -> list[Tensor]:
        """Calibration images, one a sample: [1, 3, h, w]."""
        return [image[None] for image in self._calibration]

    @abstractmethod
    def read_labels(self, images: ImageSet) -> None:
        """Read or find the labels; `self.classes` is known."""

    def outputs(self, model: nn.Module, label: str) -> Iterator[tuple[int, Tensor]]:
        """The number of each evaluated picture among `self.images`, and the model's output [classes, …]."""
        waiting: dict[int, Tensor] = {}
        for index in track(self.evaluated, label):
            image = prepare(self.images.read(index), self.options.preprocess)
            other_shape = any(image.shape != one.shape for one in waiting.values())
            if len(waiting) == self.options.batch or other_shape:
                yield from self._run(model, waiting)
                waiting = {}
            waiting[index] = image
        yield from self._run(model, waiting)

    def save_assets(self, folder: Path) -> None:
        """What makes the structure: the model's name, its number of classes, and files that it needs."""
        source = models.find(self.options.model)
        described = {
            "model": source.name,
            "classes": self.classes,
            "preprocess": self.options.preprocess.model_dump(mode="json"),
        }
        (folder / _ASSETS).write_text(json.dumps(described, indent=2) + "\n", encoding="utf-8")
        for name, text in source.files.items():
            (folder / name).write_text(text, encoding="utf-8")

    @classmethod
    def build(cls, folder: Path) -> nn.Module:
        """The structure that `save_assets` described."""
        try:
            described = read_json(folder / _ASSETS)
            name, classes = str(described["model"]), int(described["classes"])
        except (OSError, ValueError, TypeError, KeyError, OverflowError) as error:
            raise ModelError(f"{folder / _ASSETS} does not describe a model: {error}") from error
        return models.build(models.find_saved(name, folder), classes)

    def _choose_images(self) -> None:
        """Set `images`, `evaluated` (numbers among them) and the calibration images."""
        options = self.options
        size = native_size(options.preprocess)
        if options.images is None:
            self.images = rendered_images(options.max_images or _COUNT, *size, seed=self.seed)
        else:
            self.images = read_images(options.images, "task.images")
        source, numbers = self._calibration_source(size)
        self._calibration = [prepare(source.read(number), options.preprocess) for number in numbers]
        taken = set(numbers) if source is self.images else set()
        left = [number for number in range(len(self.images)) if number not in taken]
        kept = spread(len(left), options.max_images or len(left))
        self.evaluated = [left[place] for place in kept]

    def _calibration_source(self, size: tuple[int, int]) -> tuple[ImageSet, list[int]]:
        """The pictures that calibrate: a set, and numbers among it."""
        wanted = self.options.calibration
        if isinstance(wanted, str) and wanted != RENDERED:
            found = read_images(wanted, "task.calibration")
            return found, spread(len(found), _MOST_FROM_A_FOLDER)
        if isinstance(wanted, str) or self.options.images is None:
            count = _COUNT if isinstance(wanted, str) else wanted
            return rendered_images(count, *size, seed=self.seed, series=1), list(range(count))
        if wanted >= len(self.images):
            raise DataError(
                f"task.calibration is {wanted}, but task.images {self.options.images!r} holds "
                f"{len(self.images)}, and some must be left to evaluate: set a smaller number, a folder "
                f"of other pictures, or {RENDERED!r}"
            )
        return self.images, spread(len(self.images), wanted)

    def _run(self, model: nn.Module, images: dict[int, Tensor]) -> Iterator[tuple[int, Tensor]]:
        if images:
            yield from zip(images, self._output(model, list(images.values())), strict=True)

    @torch.no_grad()
    def _output(self, model: nn.Module, images: list[Tensor]) -> Tensor:
        """The model's output [n, classes, …] for images of one shape."""
        try:
            output = first_tensor(model(torch.stack(images)))
        except (RuntimeError, ValueError, TypeError, AssertionError) as error:
            reason = " ".join(str(error).split())[:300]
            raise ModelError(
                f"task.model {self.options.model!r} does not take images of shape "
                f"{list(images[0].shape)}, set task.preprocess.size: {reason}"
            ) from error
        if output is None or output.ndim < 2 or len(output) != len(images):
            shape = "nothing that is a tensor" if output is None else f"a tensor {list(output.shape)}"
            raise ModelError(
                f"task.model {self.options.model!r} returns {shape} for {len(images)} images: it must be "
                "[images, classes, ...]"
            )
        return output.float()
