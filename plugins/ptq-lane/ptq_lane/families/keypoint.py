"""Detectors that find points of lanes and where the lanes start: GANet (arXiv 2204.07335)."""

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from ptq_lane.adapter import Adapter
from ptq_lane.families.groups import named_groups
from ptq_lane.lanes import Frame, Lanes, Numbers

_HEADS = ("keypoints", "starts", "to_start", "subpixel")


class Keypoint(Adapter):
    """Outputs: a dict of `keypoints` and `starts`, logits [n, 1, h, w]; `to_start` [n, 2, h, w], (x, y)
    from a point's cell to that of its lane's start, in cells; `subpixel` [n, 2, h, w], (x, y) from the
    corner of a point's cell to the point, in cells.

    The slot of a lane is the index of the cell of its start, counted along rows.
    """

    name = "keypoint"
    confidence_heads = frozenset({"keypoints", "starts"})

    def __init__(
        self,
        frame: Frame,
        keypoint_threshold: float = 0.3,
        start_threshold: float = 0.3,
        radius: float = 4.0,
        more_than: int = 3,
    ) -> None:
        """Args:
        frame: the images that lanes are to be given in.
        keypoint_threshold, start_threshold: peaks of the two maps count if their probability exceeds these.
        radius: starts as near as this are of one lane, and so is a point to the lane whose start is as
            near as this to where the point says, in cells (GANet: 4).
        more_than: a lane has more points than this (GANet: 5, of 40 rows).
        """
        super().__init__(frame)
        self.keypoint_threshold = keypoint_threshold
        self.start_threshold = start_threshold
        self.radius = radius
        self.more_than = more_than

    def heads(self, outputs: Any) -> dict[str, Tensor]:
        return named_groups(outputs, self.name, _HEADS)

    def confidence(self, outputs: Any) -> dict[str, Tensor]:
        heads = self.heads(outputs)
        near = {name: F.max_pool2d(heads[name].sigmoid(), 3, 1, 1) for name in ("keypoints", "starts")}
        return near | dict.fromkeys(("to_start", "subpixel"), near["keypoints"])

    @torch.no_grad()
    def decode(self, outputs: Any) -> list[Lanes]:
        """Peaks of both maps, points grouped by the starts that they point to.

        Points are peaks among three cells of a row, starts among 3 x 3. A point joins the first start
        within the radius, or none. Of a lane's points in one row of cells the most probable counts.
        """
        heads = self.heads(outputs)
        points = _peaks(heads["keypoints"], (1, 3), self.keypoint_threshold)
        starts = _peaks(heads["starts"], (3, 3), self.start_threshold)
        found = []
        for image in range(len(heads["keypoints"])):
            at = {name: head[image].double().numpy() for name, head in heads.items()}
            found.append(self._lanes(at, points[image].numpy(), starts[image].numpy()))
        return found

    def _lanes(self, at: dict[str, Numbers], points: NDArray[np.int64], starts: NDArray[np.int64]) -> Lanes:
        """The lanes of one image; points, starts: (row, column) of the peaks [peaks, 2]."""
        centres, cells = self._lanes_of_starts(starts, at["starts"][0])
        row, column = points.T
        pointed = points[:, ::-1] + at["to_start"][:, row, column].T
        place = points[:, ::-1] + at["subpixel"][:, row, column].T
        score = at["keypoints"][0, row, column]
        height, width = at["keypoints"].shape[1:]
        place = place * (self.frame.width / width, self.frame.height / height) - 0.5
        near = np.linalg.norm(pointed[:, None] - centres, axis=2) <= self.radius
        lane = np.where(near.any(1), near.argmax(1), -1) if len(centres) else np.full(len(points), -1)
        lines, slots = [], []
        for index, cell in enumerate(cells):
            own = np.flatnonzero(lane == index)
            own = own[np.lexsort((-score[own], row[own]))]
            own = own[np.unique(row[own], return_index=True)[1]]
            if len(own) > self.more_than:
                lines.append(place[own])
                slots.append(cell[0] * width + cell[1])
        return Lanes.from_points(self.frame.rows, lines, np.array(slots, np.int64))

    def _lanes_of_starts(
        self, starts: NDArray[np.int64], logits: Numbers
    ) -> tuple[Numbers, list[NDArray[np.int64]]]:
        """The mean (x, y) of each group of starts [groups, 2], and (row, column) of its most probable."""
        groups: list[list[NDArray[np.int64]]] = []
        for start in starts:
            for group in groups:
                if min(np.linalg.norm(start - other) for other in group) <= self.radius:
                    group.append(start)
                    break
            else:
                groups.append([start])
        centres = np.array([np.mean(group, axis=0)[::-1] for group in groups]).reshape(-1, 2)
        return centres, [max(group, key=lambda cell: logits[tuple(cell)]) for group in groups]


def _peaks(logits: Tensor, window: tuple[int, int], threshold: float) -> list[Tensor]:
    """(row, column) of the largest of each window [peaks, 2], row by row; logits: [n, 1, h, w]."""
    probability = logits.sigmoid()
    largest = F.max_pool2d(probability, window, 1, (window[0] // 2, window[1] // 2))
    peaks = (probability == largest) & (probability > threshold)
    return [image[0].nonzero() for image in peaks]
