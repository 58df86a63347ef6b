"""What a detector found, and COCO's figure of how good it is."""

import contextlib
import io
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ptq_vision.openmmlab.preprocessing import Prepared
from ptqcore import DataError, ModelError

CONFIDENT = 0.3
_MOST_COUNTED = 100


@dataclass(frozen=True)
class Boxes:
    """What a detector found in one image.

    Attributes:
        corners: [n, 4], left, top, right and bottom in pixels of the original image.
        scores: [n].
        labels: [n], indices of classes.
    """

    corners: Tensor
    scores: Tensor
    labels: Tensor

    def confident(self) -> "Boxes":
        """The boxes of score 0.3 or more; of each class the best 100: COCO counts no more in an image."""
        best = self.scores.argsort(descending=True, stable=True)
        best = best[self.scores[best] >= CONFIDENT]
        labels = self.labels[best]
        better = (labels[:, None] == labels).tril(-1).sum(1)
        kept = best[better < _MOST_COUNTED]
        return Boxes(self.corners[kept], self.scores[kept], self.labels[kept])


@torch.no_grad()
def detect(network: nn.Module, prepared: Prepared) -> Boxes:
    """The boxes that a network finds in one image; a `Network`, or a quantized one."""
    return decode(network, network(prepared.image), prepared)


@torch.no_grad()
def decode(network: nn.Module, outputs: Sequence[Tensor], prepared: Prepared) -> Boxes:
    """The boxes that the head's raw outputs mean, decoded and suppressed by mmdet's own head.

    Args:
        network: a `Network` around a detector; its head and test configuration are used, no layer.
        outputs: what the network, or an engine in its place, returned for one image; boxes that are not
            finite are left out.
        prepared: that image.
    """
    head: Any = network.get_submodule("model.bbox_head")
    shape = tuple(prepared.image.shape[2:])
    meta = {
        "img_shape": shape,
        "pad_shape": shape,
        "batch_input_shape": shape,
        "ori_shape": prepared.original,
        "scale_factor": prepared.scale,
    }
    (found,) = head.predict_by_feat(*_by_kind(head, outputs), batch_img_metas=[meta], rescale=True)
    finite = found.bboxes.isfinite().all(1) & found.scores.isfinite()
    return Boxes(found.bboxes[finite].float(), found.scores[finite].float(), found.labels[finite])


def average_precision(truth: dict[str, Any], found: dict[int, Boxes], categories: Sequence[int]) -> float:
    """COCO's mean average precision in percent, over IoU 0.50 to 0.95 and the categories that occur.

    Args:
        truth: annotations in the structure of a COCO file.
        found: image id → boxes; only these images count.
        categories: the category id of each label.

    Raises:
        DataError: if the annotations hold no box in these images.
    """
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval

    results = [
        {
            "image_id": image,
            "category_id": categories[label],
            "bbox": _left_top_width_height(box),
            "score": score,
        }
        for image, boxes in found.items()
        for box, score, label in zip(
            boxes.corners.tolist(), boxes.scores.tolist(), boxes.labels.tolist(), strict=True
        )
    ]
    with contextlib.redirect_stdout(io.StringIO()):
        reference = COCO()
        reference.dataset = truth
        reference.createIndex()
        if not any(reference.imgToAnns[image] for image in found):
            raise DataError("the annotations hold no box in the images that are evaluated")
        if not results:
            return 0.0
        evaluation = COCOeval(reference, reference.loadRes(results), "bbox")
        evaluation.params.imgIds = sorted(found)
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    return 100 * max(float(evaluation.stats[0]), 0.0)


def as_truth(found: dict[int, Boxes], classes: int) -> dict[str, Any]:
    """Boxes as annotations in the structure of a COCO file; the category of a label is its index plus 1."""
    annotations: list[dict[str, Any]] = []
    for image, boxes in found.items():
        for box, label in zip(boxes.corners.tolist(), boxes.labels.tolist(), strict=True):
            left, top, width, height = _left_top_width_height(box)
            annotations.append(
                {
                    "id": len(annotations) + 1,
                    "image_id": image,
                    "category_id": label + 1,
                    "bbox": [left, top, width, height],
                    "area": width * height,
                    "iscrowd": 0,
                }
            )
    return {
        "images": [{"id": image} for image in found],
        "categories": [{"id": index + 1} for index in range(classes)],
        "annotations": annotations,
    }


def _by_kind(head: Any, outputs: Sequence[Tensor]) -> list[list[Tensor]]:
    """The flat outputs as the head returned them: for each kind, the tensors of all levels."""
    levels = getattr(getattr(head, "prior_generator", None), "num_levels", 1)
    if len(outputs) % levels:
        raise ModelError(
            f"the head returns {len(outputs)} tensors for {levels} levels: it is not supported"
        )
    return [list(outputs[start : start + levels]) for start in range(0, len(outputs), levels)]


def _left_top_width_height(box: list[float]) -> list[float]:
    left, top, right, bottom = box
    return [left, top, right - left, bottom - top]
