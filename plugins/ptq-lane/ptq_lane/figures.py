"""What a run on lanes shows: lanes on images, the distortion of each image, the groups of outputs."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import cv2
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ptq_lane.lanes import Numbers
from ptq_lane.pictures import Pictures
from ptqcore import Curves
from ptqcore import Pictures as PictureRows

if TYPE_CHECKING:
    from ptq_lane.lane_task import Found

_SHOWN = 6
_WIDTH = 256
_COLOURS = {"label": (255, 255, 255), "full precision": (90, 220, 120), "naive baseline": (255, 170, 60)}
_OURS = (70, 170, 255)


def all_figures(
    pictures: Pictures, evaluated: Sequence[int], found: Mapping[str, "Found"], learning: Sequence[Curves]
) -> list[Curves | PictureRows]:
    """The figures of a run.

    Args:
        pictures: the images.
        evaluated: the numbers of those that were judged.
        found: what each model finds on them.
        learning: what steps have to show.
    """
    judged = {name: one for name, one in found.items() if name != "full precision"}
    figures: list[Curves | PictureRows] = [_overlays(pictures, evaluated, found)]
    if judged:
        figures += [_distortion(judged), *_groups(judged)]
    return [*figures, *learning]


def _overlays(pictures: Pictures, evaluated: Sequence[int], found: Mapping[str, "Found"]) -> PictureRows:
    """Those images on which the last model's lanes differ most, and some in between."""
    distortion = np.array(list(found.values())[-1].distortion)
    worst_first = np.argsort(-distortion, kind="stable")
    chosen = worst_first[np.linspace(0, len(worst_first) - 1, min(_SHOWN, len(worst_first))).astype(int)]
    rows: dict[str, list[Tensor]] = {}
    for place in dict.fromkeys(chosen.tolist()):
        number = evaluated[place]
        image = pictures.read(number)
        label = pictures.label(number)
        if label is not None:
            rows.setdefault("label", []).append(_drawn(image, list(label.lanes), "label"))
        for name, one in found.items():
            rows.setdefault(name, []).append(_drawn(image, one.lanes[place].points(), name))
    note = "From the image whose lanes differ most from those in full precision to that with the least."
    return PictureRows("Lanes", rows, note)


def _drawn(image: NDArray[np.uint8], lanes: Sequence[Numbers], name: str) -> Tensor:
    """An image [3, h, w] of 0 to 1 with lines on it, small enough for a report."""
    scale = _WIDTH / image.shape[1]
    canvas = cv2.resize(image, (_WIDTH, round(image.shape[0] * scale)))
    for points in lanes:
        line = np.round((points + 0.5) * scale - 0.5).astype(np.int32)
        cv2.polylines(canvas, [line[:, None]], False, _COLOURS.get(name, _OURS), 2, cv2.LINE_AA)
    return torch.from_numpy(canvas).permute(2, 0, 1).float() / 255


def _distortion(judged: Mapping[str, "Found"]) -> Curves:
    """The score of every image, sorted for each model."""
    series = {name: sorted(one.distortion, reverse=True) for name, one in judged.items()}
    note = "10 pixels in images 1640 wide are the edge of a match at an intersection over union of 0.5."
    count = len(next(iter(series.values())))
    return Curves(
        "Lane Distortion Score", range(1, count + 1), series, "image, worst first", "pixels", note
    )


def _groups(judged: Mapping[str, "Found"]) -> list[Curves]:
    """Pixels of lane that the errors of each group alone cost."""
    names = list(next(iter(judged.values())).groups)
    if len(names) < 2:
        return []
    series = {model: [one.groups[name].distortion for name in names] for model, one in judged.items()}
    order = ", ".join(f"{number} {name}" for number, name in enumerate(names, 1))
    title, note = "Groups of outputs", f"The distortion where one group alone is quantized: {order}."
    return [Curves(title, range(1, len(names) + 1), series, "group", "pixels", note)]
