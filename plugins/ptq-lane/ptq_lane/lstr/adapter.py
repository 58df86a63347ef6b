"""LSTR's outputs as lanes: one candidate curve a query (Liu et al., arXiv 2011.04233)."""

from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from ptq_lane.adapter import Adapter
from ptq_lane.lanes import Frame, Lanes
from ptq_lane.lstr.variants import find_variant

_LANE = 1
_FEWEST_ROWS = 2


class LSTRAdapter(Adapter):
    """Reads a dict of `class` [n, q, classes], `bounds` [n, q, 2], `shared` [n, 1 or q, 4] and `specific`
    [n, q, 2]; slots are the queries."""

    name: ClassVar[str] = "lstr"
    confidence_heads: ClassVar[frozenset[str]] = frozenset({"class"})

    def __init__(self, frame: Frame, variant: str = "tusimple") -> None:
        """Args:
            frame: the images that lanes are to be given in.
            variant: "tusimple": a lane lies between its bounds; "culane": below the second, and inside
                the image.

        Raises:
            ModelError: if there is no such variant.
        """
        super().__init__(frame)
        self.variant = find_variant(variant)

    def heads(self, outputs: Any) -> dict[str, Tensor]:
        return {name: outputs[name] for name in ("class", "bounds", "shared", "specific")}

    def confidence(self, outputs: Any) -> dict[str, Tensor]:
        """P(lane) of each query; what all lanes share counts as much as the surest of them."""
        lane = outputs["class"].softmax(-1)[..., _LANE : _LANE + 1]
        shared = lane.amax(1, keepdim=True)
        return {"class": lane, "bounds": lane, "shared": shared, "specific": lane}

    @torch.no_grad()
    def decode(self, outputs: Any) -> list[Lanes]:
        """Queries whose likeliest class is lane, at the rows within their bounds."""
        doubles = {name: head.double() for name, head in self.heads(outputs).items()}
        rows = self._rows(doubles["bounds"])
        x = self._curves(doubles, rows)
        present = self._present(doubles["bounds"], rows) & x.isfinite()
        if not self.variant.lowest_bound:
            present &= (x >= 0) & (x <= self.frame.width - 1)
            present &= present.sum(-1, keepdim=True) >= _FEWEST_ROWS
        x = x.masked_fill(~present, np.nan)
        kept = (doubles["class"].argmax(-1) == _LANE) & present.any(-1)
        return [
            Lanes(self.frame.rows, image[lanes].cpu().numpy(), lanes.nonzero()[:, 0].cpu().numpy())
            for image, lanes in zip(x, kept, strict=True)
        ]

    def geometry(self, outputs: Any) -> tuple[Tensor, Tensor]:
        """Every query's curve; what counts is P(lane) at the rows within its bounds."""
        heads = self.heads(outputs)
        rows = self._rows(heads["bounds"])
        weights = self.confidence(outputs)["specific"] * self._present(heads["bounds"], rows)
        return self._curves(heads, rows), weights

    def _rows(self, like: Tensor) -> Tensor:
        """The rows of the frame [rows] in image heights."""
        return torch.from_numpy(self.frame.rows / self.frame.height).to(like)

    def _present(self, bounds: Tensor, rows: Tensor) -> Tensor:
        """Whether each row lies within the bounds [n, q, 2] of a lane: [n, q, rows]."""
        first, second = bounds[..., :1], bounds[..., 1:]
        if self.variant.lowest_bound:
            return (rows >= first) & (rows <= second)
        return rows >= second

    def _curves(self, heads: dict[str, Tensor], rows: Tensor) -> Tensor:
        """x [n, q, rows] in pixels at rows [rows]."""
        k, f, m, n = heads["shared"][..., None].unbind(-2)
        b, c = heads["specific"][..., None].unbind(-2)
        above = _apart(rows - f, 0.5 / self.frame.height)
        return (k / above**2 + m / above + n + b * rows - c) * self.frame.width


def _apart(distance: Tensor, least: float) -> Tensor:
    """Distances to the horizon, where curves have a pole, kept `least` away from it on their side."""
    near = torch.where(distance < 0, -least, least).to(distance)
    return torch.where(distance.abs() < least, near, distance)
