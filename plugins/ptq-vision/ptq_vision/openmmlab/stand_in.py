"""A stand-in for `mmcv._ext`, the compiled operations of mmcv, where only `mmcv-lite` is installed.

PyPI has no wheel of mmcv with operations, and `mmcv-lite` lacks the module that mmdet and mmseg
import. Their convolutional networks never call it, and decoding boxes needs no more than `nms`.
"""

import sys
from collections.abc import Callable
from importlib.machinery import ModuleSpec
from importlib.util import find_spec
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from ptqcore import ModelError

NAME = "mmcv._ext"


def install() -> None:
    """Make `import mmcv._ext` work; the real operations are used where they are installed."""
    if NAME in sys.modules or find_spec(NAME) is not None:
        return
    sys.modules[NAME] = _Operations()
    print("mmcv has no compiled operations here: nms runs in Python, others are refused", file=sys.stderr)


def nms(boxes: Tensor, scores: Tensor, iou_threshold: float, offset: int) -> Tensor:
    """Indices of the kept boxes, best score first; none overlaps a better one by more than the threshold.

    Args:
        boxes: [n, 4] as left, top, right, bottom.
        scores: [n].
        iou_threshold: largest intersection over union of two kept boxes.
        offset: 1 where right and bottom are the last pixel inside, 0 where they are the border.
    """
    order = scores.argsort(descending=True, stable=True)
    ranked = boxes[order]
    areas = (ranked[:, 2:] - ranked[:, :2] + offset).prod(1)
    alive = torch.ones(len(ranked), dtype=torch.bool, device=boxes.device)
    for best in range(len(ranked)):
        if alive[best]:
            rest = slice(best + 1, None)
            low = torch.maximum(ranked[best, :2], ranked[rest, :2])
            high = torch.minimum(ranked[best, 2:], ranked[rest, 2:])
            shared = (high - low + offset).clamp(min=0).prod(1)
            alive[rest] &= shared <= iou_threshold * (areas[best] + areas[rest] - shared)
    return order[alive]


class _Operations(ModuleType):
    """The module itself: every operation but `nms` is a function that refuses to run."""

    nms = staticmethod(nms)

    def __init__(self) -> None:
        super().__init__(NAME, __doc__)
        # mmcv and torch look modules up by their spec; without one they raise.
        self.__spec__ = ModuleSpec(NAME, None, origin="ptq-vision")

    def __getattr__(self, name: str) -> Callable[..., Any]:
        if name.startswith("__"):
            raise AttributeError(name)

        def refuse(*args: Any, **kwargs: Any) -> None:
            raise ModelError(
                f"the model needs mmcv's compiled operation {name!r}, which mmcv-lite lacks: build mmcv "
                "from source, with MMCV_WITH_OPS=1 pip install --no-build-isolation 'mmcv==2.1.0'"
            )

        return refuse
