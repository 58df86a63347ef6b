"""Stand-ins for two operators of torchvision, so that timm can be imported beside any build of torch.

A torchvision built for another torch (a CUDA build beside a CPU one) fails at import with `operator
torchvision::nms does not exist`, though timm's classifiers never call an operator. Only after that
very failure are `nms` and `qnms` defined here; a torchvision that works is left alone.
"""

import sys
from importlib import import_module

import torch
from torch import Tensor


def make_importable() -> None:
    """Import torchvision; where only its operators are missing, define them and try once more.

    Raises:
        ImportError: if torchvision is not installed.
        RuntimeError: if it fails for another reason.
    """
    try:
        import_module("torchvision")
    except RuntimeError as error:
        if "torchvision::nms" not in str(error):
            raise
        for name in [name for name in sys.modules if name.partition(".")[0] == "torchvision"]:
            del sys.modules[name]
        _define()
        import_module("torchvision")


def nms(boxes: Tensor, scores: Tensor, iou_threshold: float) -> Tensor:
    """Greedy non-maximum suppression: indices of the kept boxes, best score first.

    boxes: [n, 4] as x1, y1, x2, y2; scores: [n].
    """
    areas = (boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1])
    left = scores.argsort(descending=True, stable=True)
    kept = []
    while len(left):
        best, left = left[0], left[1:]
        kept.append(best)
        low = torch.maximum(boxes[best, :2], boxes[left, :2])
        high = torch.minimum(boxes[best, 2:], boxes[left, 2:])
        overlap = (high - low).clamp(min=0).prod(dim=1)
        left = left[overlap / (areas[best] + areas[left] - overlap) <= iou_threshold]
    return torch.stack(kept) if kept else torch.empty(0, dtype=torch.int64)


def _define() -> None:
    for name in ("nms", "qnms"):
        torch.library.define(
            f"torchvision::{name}", "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor"
        )
    torch.library.impl("torchvision::nms", "CPU", nms)
