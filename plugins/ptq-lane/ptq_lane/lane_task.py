"""The task `lanes`: a lane detector, judged by the lanes that it finds."""

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from pydantic import Field, field_validator, model_validator
from torch import Tensor, nn

from ptq_lane import detectors, figures, pictures
from ptq_lane.adapter import Adapter
from ptq_lane.deployed import ASSETS
from ptq_lane.distortion import default_cap, lane_distortion
from ptq_lane.lanes import Lanes
from ptq_lane.metrics.scores import Scores
from ptq_lane.preprocess import Preprocess
from ptq_lane.selection import Sensitivity, sensitivities
from ptq_lane.split_heads import find_splits, split
from ptqcore import Curves, DataError, ModelError, Task, TaskOptions, read_json, track
from ptqcore import Pictures as PictureRows

_COUNT = 64
_JUDGED = 128


class LaneOptions(TaskOptions):
    """Keys of `task` for lane detectors."""

    family: str = Field(
        default="row-anchor",
        description=f"{', '.join(detectors.FAMILIES)}, or an import path package.module:Adapter",
    )
    variant: str | None = Field(default=None, description="of the family lstr: tusimple or culane")
    model: str | None = Field(
        default=None,
        description="import path package.module:attribute of a network, or a config of OpenMMLab: a .py "
        "file, mmseg:NAME or mmdet:NAME; null: the family's own",
    )
    checkpoint: str | None = Field(
        default=None,
        description="file of weights (.safetensors, .pth); null: those that come with the model",
    )
    images: str | None = Field(
        default=None, description="folder of pictures, or a video; null: rendered scenes"
    )
    labels: str | None = Field(
        default=None,
        description="folder of .lines.txt (CULane), or a label file of TuSimple (.json); null: unknown",
    )
    calibration: int | str = Field(
        default=_COUNT,
        description="how many of the images calibrate (every n-th, held out from evaluation), or a folder "
        "or video",
    )
    max_images: int | None = Field(
        default=None, ge=1, description=f"images evaluated at most; null: all, or {_JUDGED} rendered ones"
    )
    preprocess: Preprocess = Field(default=Preprocess(), description="defaults: what the detector wants")
    batch: int = Field(default=16, ge=1, description="images evaluated at once")

    @model_validator(mode="before")
    @classmethod
    def _fill_in(cls, data: Any) -> Any:
        """How the detector wants its images, where the user does not say."""
        if not isinstance(data, dict):
            return data
        given = data.get("preprocess") or {}
        keys = (data.get("family", cls.model_fields["family"].default), data.get("variant"))
        if not isinstance(given, dict) or not all(isinstance(key, str | None) for key in keys):
            return data
        wanted = detectors.find(*keys, data.get("model")).preprocess.model_dump()
        return data | {"preprocess": wanted | given}

    @field_validator("calibration", mode="before")
    @classmethod
    def _calibration(cls, value: Any) -> Any:
        if not isinstance(value, str) and (type(value) is not int or value < 1):
            raise ValueError(f"calibration {value!r}: give a number of images, a folder or a video")
        return value


@dataclass
class Found:
    """What one model finds: lanes, and their distortion in pixels, image by image; errors of the groups."""

    lanes: list[Lanes] = field(default_factory=list)
    distortion: list[float] = field(default_factory=list)
    groups: dict[str, Sensitivity] = field(default_factory=dict)


class LaneTask(Task):
    """A network that takes images [n, 3, h, w], and an adapter that reads what it returns as lanes."""

    name = "lanes"
    Options = LaneOptions
    options: LaneOptions
    learning: Sequence[Curves] = ()
    """What steps of this plugin have to show of what they learned."""

    @property
    def cap(self) -> float:
        """Of the Lane Distortion Score, in pixels."""
        return default_cap(self.adapter.frame)

    @property
    def groups(self) -> dict[str, Sensitivity]:
        """The errors of each group of outputs of the model that was judged last."""
        return self._found[self.judged].groups

    def load_model(self) -> nn.Module:
        """The detector; pictures are listed and labels read too: what is wrong is known before the work."""
        options = self.options
        self._detector = detectors.find(options.family, options.variant, options.model)
        checkpoint = None if options.checkpoint is None else Path(options.checkpoint).expanduser()
        model = self._detector.load(checkpoint)
        self._choose_images()
        self.adapter: Adapter = self._detector.adapter(self.pictures.frame)
        first = self._calibration[:1]
        detectors.check(self.adapter, self._outputs(model, first), 1)
        self._splits = find_splits(model, self.adapter, partial(self._outputs, model, first))
        split(model, self._splits)
        self._found: dict[str, Found] = {}
        return model

    def samples(self, model: nn.Module) -> list[Tensor]:
        """Calibration images, one a sample: [1, 3, h, w]."""
        return [image[None] for image in self._calibration]

    def evaluate(self, model: nn.Module) -> dict[str, float]:
        """`lds`, the mean Lane Distortion Score in pixels, and the scores of `metrics.scores`."""
        found = Found()
        exact = self._found.setdefault("full precision", found)
        scores = Scores(self.adapter.frame)
        for numbers, outputs in self._batches(model):
            lanes = self.adapter.decode(outputs)
            if self.judged != "full precision":
                self._measure(found, numbers, outputs)
            else:
                self._exact.append(outputs)
            for number, image in zip(numbers, lanes, strict=True):
                reference = exact.lanes[len(found.lanes)] if found is not exact else image
                found.lanes.append(image)
                found.distortion.append(lane_distortion(reference, image, self.cap))
                label, category = self.pictures.label(number), self.pictures.category(number)
                scores.add(image, label, reference, category)
        self._check_any(found)
        self._found[self.judged] = found
        return {"lds": float(np.mean(found.distortion))} | scores.result()

    def figures(self) -> Sequence[Curves | PictureRows]:
        """Lanes drawn on images, the distortion of every image, the groups, and what was learned."""
        return figures.all_figures(self.pictures, self.evaluated, self._found, self.learning)

    def save_assets(self, folder: Path) -> None:
        """What makes the structure and reads its outputs: family, variant, network and preprocessing."""
        frame = self.adapter.frame
        described = {
            "family": self._detector.family,
            "variant": self._detector.variant,
            "model": self._detector.model,
            "splits": self._splits,
            "preprocess": self.options.preprocess.model_dump(mode="json"),
            "frame": {"width": frame.width, "height": frame.height},
        }
        (folder / ASSETS).write_text(json.dumps(described, indent=2) + "\n", encoding="utf-8")

    @classmethod
    def build(cls, folder: Path) -> nn.Module:
        """The structure that `save_assets` described."""
        try:
            described = read_json(folder / ASSETS)
            splits = dict(described["splits"])
        except (OSError, ValueError, TypeError, KeyError) as error:
            raise ModelError(f"{folder / ASSETS} does not describe a lane detector: {error}") from error
        model = detectors.find_saved(described, folder / ASSETS).structure()
        split(model, splits)
        return model

    def _choose_images(self) -> None:
        """Set `pictures`, `evaluated` (numbers among them) and the calibration images."""
        options = self.options
        if options.images is None:
            if options.labels is not None:
                raise DataError(
                    f"task.labels {options.labels!r} belongs to images of yours: set task.images"
                )
            count = options.max_images or _JUDGED
            self.pictures = pictures.rendered(count, self._detector.size, self.seed, series=0)
        else:
            self.pictures = pictures.given(options.images, options.labels)
        taken: set[int] = set()
        read, numbers = self._calibration_source()
        if read is self.pictures.read:
            taken = set(numbers)
        self._calibration = [options.preprocess.prepare(read(number)) for number in numbers]
        left = [number for number in range(len(self.pictures)) if number not in taken]
        wanted = min(options.max_images or len(left), len(left))
        self.evaluated = [left[int(place)] for place in np.linspace(0, len(left) - 1, wanted).round()]

    def _calibration_source(self) -> tuple[Any, list[int]]:
        """What reads the pictures that calibrate, and their numbers."""
        wanted = self.options.calibration
        if isinstance(wanted, str):
            frames = pictures.calibration_folder(wanted, self.pictures.frame)
            return frames.read, list(range(len(frames)))
        if self.options.images is None:
            scenes = pictures.rendered(wanted, self._detector.size, self.seed, series=1)
            return scenes.read, list(range(wanted))
        total = len(self.pictures)
        if wanted >= total:
            raise DataError(
                f"task.calibration is {wanted}, but task.images {self.options.images!r} holds {total}, and "
                "some must be left to evaluate: set a smaller number, or a folder of other pictures"
            )
        return self.pictures.read, list(range(0, total, total // wanted))[:wanted]

    def _batches(self, model: nn.Module) -> Iterator[tuple[list[int], Any]]:
        """Numbers of evaluated pictures, and the model's outputs for them."""
        if self.judged == "full precision":
            self._exact: list[Any] = []
        size = self.options.batch
        starts = range(0, len(self.evaluated), size)
        for start in track(starts, f"finding lanes ({self.judged})"):
            numbers = self.evaluated[start : start + size]
            images = [self.options.preprocess.prepare(self.pictures.read(number)) for number in numbers]
            yield numbers, self._outputs(model, images)

    def _measure(self, found: Found, numbers: list[int], outputs: Any) -> None:
        """Add the errors of the groups in one batch, by the number of its images."""
        place = len(found.lanes)
        exact = self._exact[place // self.options.batch]
        lanes = self._found["full precision"].lanes[place : place + len(numbers)]
        share = len(numbers) / len(self.evaluated)
        for name, one in sensitivities(self.adapter, exact, outputs, lanes, self.cap).items():
            before = found.groups.get(name, Sensitivity(0.0, 0.0))
            square = before.rms**2 + share * one.rms**2
            found.groups[name] = Sensitivity(square**0.5, before.distortion + share * one.distortion)

    @torch.no_grad()
    def _outputs(self, model: nn.Module, images: list[Tensor]) -> Any:
        try:
            return model(torch.stack(images))
        except (RuntimeError, ValueError, TypeError, AssertionError) as error:
            reason = " ".join(str(error).split())[:300]
            raise ModelError(
                f"the network of task.family {self.options.family!r} does not take images of shape "
                f"{list(images[0].shape)}, set task.preprocess.size: {reason}"
            ) from error

    def _check_any(self, found: Found) -> None:
        if self.judged == "full precision" and not any(len(lanes) for lanes in found.lanes):
            raise DataError(
                f"the detector finds no lane on any of {len(found.lanes)} images in full precision: check "
                "that task.preprocess, task.checkpoint and task.images belong together"
            )
