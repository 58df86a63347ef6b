"""The task `segmentation`: the class of every pixel."""

from dataclasses import replace
from typing import Any

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn
from torch.nn.functional import interpolate

from ptq_vision import labels, metrics
from ptq_vision.image_task import ImageOptions, ImageTask
from ptq_vision.images import ImageSet
from ptq_vision.source import Source
from ptqcore import DataError, ModelError

_WHOLE = {"size": None, "crop": 1.0}


class SegmentationOptions(ImageOptions):
    """Keys of `task` for segmentation; `labels` is a folder of label maps."""

    model: str = Field(default="espnet", description=ImageOptions.model_fields["model"].description)
    ignore_label: int = Field(
        default=255, description="label of pixels that don't count; default: the model's"
    )

    @classmethod
    def with_defaults(cls, data: dict[str, Any], source: Source) -> dict[str, Any]:
        if isinstance(source.preprocess.size, int):  # a classifier's square; the whole picture instead
            source = replace(source, preprocess=source.preprocess.model_copy(update=_WHOLE))
        return {"ignore_label": source.ignore_label} | super().with_defaults(data, source)

    @model_validator(mode="after")
    def _whole_pictures(self) -> "SegmentationOptions":
        size = self.preprocess.size
        if isinstance(size, int) or (size is not None and self.preprocess.crop != 1):
            raise ValueError(
                "preprocess.size and crop: label maps show the whole picture, so size must be "
                "[height, width] or null, and crop 1"
            )
        return self


class Segmentation(ImageTask):
    """Metrics in percent: miou, dice and pixel_accuracy over the pixels of all pictures (where label
    maps are known), and agreement: pixels of the same class as in full precision.

    Logits are resized (bilinear) to the label map; agreement is at the model's own resolution.
    """

    name = "segmentation"
    Options = SegmentationOptions
    options: SegmentationOptions

    def read_labels(self, images: ImageSet) -> None:
        """Find the label maps, if there are any."""
        self._label_map = labels.maps_of(images, self.options.labels)
        self._reference: dict[int, Tensor] = {}

    def evaluate(self, model: nn.Module) -> dict[str, float]:
        """See the class."""
        quantized = bool(self._reference)
        label = "measuring the quantized model" if quantized else "measuring full precision"
        counts = torch.zeros(self.classes, self.classes, dtype=torch.int64)
        same = pixels = 0
        for index, logits in self.outputs(model, label):
            if logits.ndim != 3:
                raise ModelError(
                    f"task.model {self.options.model!r} returns {list(logits.shape)} values for a picture, "
                    "a segmentation network [classes, height, width]: is it one for classification?"
                )
            found = logits.argmax(0).to(torch.int16)
            reference = (
                self._reference.setdefault(index, found) if not quantized else self._reference[index]
            )
            same += int((found == reference).sum())
            pixels += found.numel()
            if self._label_map is not None:
                counts += self._compare(index, logits)
        figures = metrics.segmentation_scores(counts, self.options.ignore_label)
        return (figures if self._label_map is not None else {}) | {
            "agreement": metrics.percent(same, pixels)
        }

    def _compare(self, index: int, logits: Tensor) -> Tensor:
        """The confusion matrix of one picture; logits: [classes, h, w]."""
        assert self._label_map is not None
        wanted = torch.from_numpy(self._label_map(index))
        wrong = (wanted != self.options.ignore_label) & ((wanted < 0) | (wanted >= self.classes))
        if wrong.any():
            raise DataError(
                f"task.labels: the map of {self.images.names[index]!r} holds {int(wanted[wrong][0])}, "
                f"but the model has the classes 0 to {self.classes - 1}: if it stands for void, set "
                "task.ignore_label to it"
            )
        if logits.shape[1:] != wanted.shape:
            logits = interpolate(logits[None], wanted.shape, mode="bilinear", align_corners=False)[0]
        return metrics.confusion(wanted, logits.argmax(0), self.classes, self.options.ignore_label)
