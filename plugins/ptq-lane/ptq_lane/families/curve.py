"""Detectors that give a cubic Bezier curve for every column: BezierLaneNet (arXiv 2203.02431)."""

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from ptq_lane.adapter import Adapter
from ptq_lane.families.groups import named_groups
from ptq_lane.lanes import Frame, Lanes

_HEADS = ("existence", "points")


class Curve(Adapter):
    """Outputs: a dict of `existence`, logits [n, columns]; `points` [n, 8, columns], the control points
    x0, y0, … x3, y3 of each curve, 0 to 1 across the width and the height of the image.

    The slot of a lane is the index of its column.
    """

    name = "curve"
    confidence_heads = frozenset({"existence"})
    warm_start = 0.3  # measured, see the README: no other family gains by one

    def __init__(
        self, frame: Frame, threshold: float = 0.5, window: int = 5, most: int | None = 4, samples: int = 50
    ) -> None:
        """Args:
        frame: the images that lanes are to be given in.
        threshold: a column has a lane if its probability exceeds this.
        window: a column has a lane if it is the most probable of so many around it, an odd number
            (BezierLaneNet: 9 of 40 or more columns).
        most: at most so many lanes are found, the most probable; None: any number.
        samples: points of a curve, joined by straight lines.
        """
        super().__init__(frame)
        self.threshold = threshold
        self.window = window
        self.most = most
        self._bernstein = bernstein(samples)

    def heads(self, outputs: Any) -> dict[str, Tensor]:
        return named_groups(outputs, self.name, _HEADS)

    def confidence(self, outputs: Any) -> dict[str, Tensor]:
        probability = self.heads(outputs)["existence"].sigmoid()
        near = F.max_pool1d(probability, self.window, 1, self.window // 2)
        return {"existence": near, "points": near[:, None]}

    def geometry(self, outputs: Any) -> tuple[Tensor, Tensor]:
        heads = self.heads(outputs)
        x, within = self._at_rows(heads["points"].transpose(1, 2))
        return x, heads["existence"].sigmoid()[:, :, None] * within

    @torch.no_grad()
    def decode(self, outputs: Any) -> list[Lanes]:
        """Sigmoid, threshold, the most probable column of each window, and x of its curve at the rows."""
        heads = self.heads(outputs)
        probability = heads["existence"].sigmoid()
        _, largest = F.max_pool1d(probability, self.window, 1, self.window // 2, return_indices=True)
        peaks = (largest == torch.arange(probability.shape[1])) & (probability > self.threshold)
        found = []
        for points, score, peak in zip(heads["points"], probability, peaks, strict=True):
            columns = peak.nonzero()[:, 0]
            order = score[columns].argsort(descending=True, stable=True)[: self.most]
            columns = columns[order].sort().values
            x, within = self._at_rows(points.T[columns])
            x = x.double().masked_fill(~within, torch.nan)
            found.append(Lanes(self.frame.rows, x.numpy(), columns.numpy()))
        return found

    def _at_rows(self, points: Tensor) -> tuple[Tensor, Tensor]:
        """x at the rows of the frame, in its pixels, and which rows the curve has; points: [..., 8]."""
        size = points.new_tensor((self.frame.width, self.frame.height))
        curve = self._bernstein.to(points) @ points.unflatten(-1, (4, 2)) * size - 0.5
        y, order = curve[..., 1].sort(-1)
        x = curve[..., 0].gather(-1, order)
        rows = torch.from_numpy(self.frame.rows).to(y).expand(*y.shape[:-1], -1).contiguous()
        upper = torch.searchsorted(y.detach(), rows).clamp(1, y.shape[-1] - 1)
        lower = upper - 1
        span = (y.gather(-1, upper) - y.gather(-1, lower)).clamp(min=torch.finfo(y.dtype).tiny)
        share = ((rows - y.gather(-1, lower)) / span).clamp(0, 1)
        at = torch.lerp(x.gather(-1, lower), x.gather(-1, upper), share)
        return at, (rows >= y[..., :1]) & (rows <= y[..., -1:])


def bernstein(samples: int) -> Tensor:
    """What each of the four control points of a cubic Bezier curve adds to its samples [samples, 4]."""
    t = torch.linspace(0, 1, samples, dtype=torch.float64)[:, None]
    return torch.cat([(1 - t) ** 3, 3 * t * (1 - t) ** 2, 3 * t**2 * (1 - t), t**3], dim=1)
