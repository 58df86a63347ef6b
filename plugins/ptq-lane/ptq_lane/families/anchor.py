"""Detectors that describe lanes against straight lines: LaneATT (Tabelini et al., arXiv 2010.12035)."""

from typing import Any

import numpy as np
import torch
from torch import Tensor

from ptq_lane.adapter import Adapter
from ptq_lane.anchor_lines import AnchorLines, road_anchors
from ptq_lane.families.groups import named_groups
from ptq_lane.lanes import Frame, Lanes
from ptqcore import ModelError

_HEADS = ("class", "length", "offsets")


class Anchor(Adapter):
    """Outputs: a dict of `class`, logits [n, anchors, 2], background first; `length` [n, anchors], in rows;
    `offsets` [n, anchors, rows] from the anchor to the lane, in pixels of the network, bottom row first.

    The slot of a lane is the index of its anchor.
    """

    name = "anchor"
    confidence_heads = frozenset({"class"})

    def __init__(
        self,
        frame: Frame,
        anchors: AnchorLines | None = None,
        threshold: float = 0.5,
        distance: float = 15.0,
        most: int = 4,
    ) -> None:
        """Args:
        frame: the images that lanes are to be given in.
        anchors: those of the network; default: of the small one that we ship.
        threshold: an anchor is a candidate if its probability exceeds this.
        distance: a candidate nearer than this to a more probable one is dropped: mean distance in the rows
            that both have, in pixels of the network (LaneATT: 50 in images 640 wide).
        most: at most so many lanes are found (LaneATT on CULane: 4).
        """
        super().__init__(frame)
        self.anchors = anchors or road_anchors()
        self.threshold = threshold
        self.distance = distance
        self.most = most
        self._x = torch.from_numpy(self.anchors.x(self.anchors.rows)).float()
        self._first = torch.from_numpy(self.anchors.first)[:, None]
        self._index = torch.arange(self.anchors.count)
        self._read = _Reading(self.anchors, frame)

    def heads(self, outputs: Any) -> dict[str, Tensor]:
        heads = named_groups(outputs, self.name, _HEADS)
        if heads["offsets"].shape[1:] != self._x.shape:
            raise ModelError(
                f"offsets of shape {list(heads['offsets'].shape)} do not fit {len(self.anchors)} anchors "
                f"with {self.anchors.count} rows: give the adapter the anchors of the network"
            )
        return heads

    def confidence(self, outputs: Any) -> dict[str, Tensor]:
        lane = self._probability(self.heads(outputs))
        return {"class": lane[:, :, None], "length": lane, "offsets": lane[:, :, None]}

    def geometry(self, outputs: Any) -> tuple[Tensor, Tensor]:
        heads = self.heads(outputs)
        x = self._lines(heads)
        _, present = self._extent(heads, x)
        at, within = self._read(x, present)
        return at, self._probability(heads)[:, :, None] * within

    @torch.no_grad()
    def decode(self, outputs: Any) -> list[Lanes]:
        """Softmax, threshold, the most probable of neighbouring candidates; a lane has the rows from its
        anchor's start to the rounded length, and those below the start until it leaves the image."""
        heads = self.heads(outputs)
        x = self._lines(heads)
        described, present = self._extent(heads, x)
        at, within = self._read(x, present)
        at = at.double().masked_fill(~within, torch.nan)
        probability = self._probability(heads)
        found = []
        for image in range(len(x)):
            kept = torch.tensor(
                self._pick(probability[image], x[image], described[image]), dtype=torch.long
            )
            found.append(Lanes(self.frame.rows, at[image, kept].numpy(), kept.numpy()))
        return found

    def _probability(self, heads: dict[str, Tensor]) -> Tensor:
        return heads["class"].softmax(2)[:, :, 1]

    def _lines(self, heads: dict[str, Tensor]) -> Tensor:
        """x of every anchor's lane [n, anchors, rows], in pixels of the network, bottom row first."""
        return self._x + heads["offsets"]

    def _extent(self, heads: dict[str, Tensor], x: Tensor) -> tuple[Tensor, Tensor]:
        """Which rows are described, start to length, and which the lane has [n, anchors, rows]."""
        last = self._first + heads["length"].detach()[:, :, None].round() - 1
        below = self._index < self._first
        inside = (x >= 0) & (x <= self.anchors.width - 1) | ~below
        leads_down = inside.flip(2).cumprod(2).flip(2).bool()
        until_last = self._index <= last
        return until_last & ~below, until_last & leads_down

    def _pick(self, probability: Tensor, x: Tensor, described: Tensor) -> list[int]:
        """The anchors of the lanes of one image, most probable first; probability: [anchors]."""
        kept: list[int] = []
        for anchor in probability.argsort(descending=True, stable=True).tolist():
            if len(kept) == self.most or not probability[anchor] > self.threshold:
                break
            both = described[anchor] & described[kept]
            apart = ((x[anchor] - x[kept]).abs() * both).sum(1) / both.sum(1)
            if described[anchor].sum() > 1 and not bool((apart < self.distance).any()):
                kept.append(anchor)
        return kept


class _Reading:
    """Reads lines given at the rows of anchors at the rows of a frame, by straight lines in between."""

    def __init__(self, anchors: AnchorLines, frame: Frame) -> None:
        y = (frame.rows + 0.5) * anchors.height / frame.height - 0.5
        position = (anchors.height - 1 - y) / anchors.step
        lower = np.floor(position).clip(0, anchors.count - 1)
        upper = np.ceil(position).clip(0, anchors.count - 1)
        self._lower, self._upper = torch.from_numpy(lower).long(), torch.from_numpy(upper).long()
        self._share = torch.from_numpy(position - lower).float()
        self._within = torch.from_numpy((position >= 0) & (position <= anchors.count - 1))
        self._scale = frame.width / anchors.width

    def __call__(self, x: Tensor, present: Tensor) -> tuple[Tensor, Tensor]:
        """x, present: [..., rows of the anchors] to [..., rows of the frame]; x in pixels of the frame."""
        x = torch.lerp(x[..., self._lower], x[..., self._upper], self._share)
        present = present[..., self._lower] & present[..., self._upper] & self._within
        return (x + 0.5) * self._scale - 0.5, present
