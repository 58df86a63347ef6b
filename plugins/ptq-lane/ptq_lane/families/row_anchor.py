"""Detectors that choose a cell in every row: Ultra Fast Lane Detection (arXiv 2004.11757, 2206.07389)."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ptq_lane.adapter import Adapter
from ptq_lane.families.groups import named_groups
from ptq_lane.lanes import Frame, Lanes, Numbers
from ptqcore import ModelError

_HEADS = ("location", "existence")
_HORIZON = 0.42
_WIDTH_OF_UFLD = 800
_FEWEST_POINTS = 3


class RowAnchor(Adapter):
    """Outputs: those of UFLDv2 for rows, or the tensor of UFLD.

    {"location", "existence"}: logits [n, cells, anchors, slots] and [n, 2, anchors, slots], absent first.
    A tensor: logits [n, cells + 1, anchors, slots], "no lane" last.
    """

    name = "row-anchor"
    confidence_heads = frozenset({"existence"})

    def __init__(
        self, frame: Frame, anchors: Sequence[float] | None = None, window: int | None = None
    ) -> None:
        """Args:
        frame: the images that lanes are to be given in.
        anchors: y of each anchor as a share of the height, in the order of the outputs; evenly from 0.42
            to 1 if not given, as UFLDv2 has them for CULane.
        window: x is the expectation over so many cells to each side of the likeliest (UFLDv2: 1), over
            all cells if not given (UFLD).
        """
        super().__init__(frame)
        self.anchors = None if anchors is None else np.asarray(anchors, dtype=np.float64)
        self.window = window

    def heads(self, outputs: Any) -> dict[str, Tensor]:
        if isinstance(outputs, Tensor):
            return {"location": outputs[:, :-1], "existence": outputs[:, -1:]}
        return named_groups(outputs, self.name, _HEADS)

    def confidence(self, outputs: Any) -> dict[str, Tensor]:
        exists = self._exists(outputs)[:, None]
        return {"location": exists, "existence": exists}

    @torch.no_grad()
    def decode(self, outputs: Any) -> list[Lanes]:
        """The expected place in every row in which a lane is likelier than none."""
        heads = self.heads(outputs)
        if isinstance(outputs, Tensor):
            present = outputs.argmax(1) < outputs.shape[1] - 1
        else:
            present = heads["existence"][:, 1] > heads["existence"][:, 0]
        x, y = self._x(outputs), self._y(outputs)
        images = zip(x.double().numpy(), present.mT.numpy(), strict=True)
        return [self._lanes(*image, y) for image in images]

    def geometry(self, outputs: Any) -> tuple[Tensor, Tensor]:
        """By straight lines between anchors; a row counts as much as a lane is likely at both of them."""
        y, rows = self._y(outputs), self.frame.rows
        order = np.argsort(y)
        next_down = np.searchsorted(y[order], rows).clip(1, len(y) - 1)
        above, below = order[next_down - 1], order[next_down]
        share = (rows - y[above]) / (y[below] - y[above])
        within = torch.from_numpy((share >= 0) & (share <= 1))
        x, exists = self._x(outputs), self._exists(outputs).mT
        x = torch.lerp(x[..., above], x[..., below], torch.from_numpy(share.clip(0, 1)).to(x))
        return x, torch.minimum(exists[..., above], exists[..., below]) * within.to(x)

    def _lanes(self, x: Numbers, present: Numbers, y: Numbers) -> Lanes:
        """The lanes of one image; x, present: [slots, anchors]."""
        slots = np.flatnonzero(present.sum(1) >= _FEWEST_POINTS)
        points = [np.stack([x[slot], y], 1)[present[slot]] for slot in slots]
        return Lanes.from_points(self.frame.rows, points, slots)

    def _exists(self, outputs: Any) -> Tensor:
        """How likely a lane is there [n, anchors, slots]."""
        if isinstance(outputs, Tensor):
            return 1 - outputs.softmax(1)[:, -1]
        return outputs["existence"].softmax(1)[:, 1]

    def _x(self, outputs: Any) -> Tensor:
        """The expected place of every slot at every anchor [n, slots, anchors] in pixels."""
        location = self.heads(outputs)["location"]
        cells = torch.arange(location.shape[1], device=location.device)[:, None, None]
        if self.window is not None:
            far = (cells - location.argmax(1, keepdim=True)).abs() > self.window
            location = location.masked_fill(far, -torch.inf)
        expected = (location.softmax(1) * cells).sum(1).mT
        width = self.frame.width / (len(cells) - 1)
        if isinstance(outputs, Tensor):
            # UFLD's cells span the 799 pixels from the first to the last of 800; their right ends count.
            return (expected + 1) * width * (_WIDTH_OF_UFLD - 1) / _WIDTH_OF_UFLD - 1
        return (expected + 0.5) * width

    def _y(self, outputs: Any) -> Numbers:
        """y of the anchors [anchors] in pixels."""
        count = self.heads(outputs)["location"].shape[2]
        anchors = np.linspace(_HORIZON, 1, count) if self.anchors is None else self.anchors
        if len(anchors) != count:
            raise ModelError(
                f"anchors: {len(anchors)} are given, but the model locates lanes in {count} rows"
            )
        return anchors * self.frame.height - (1 if isinstance(outputs, Tensor) else 0)
