"""Sensitivity aware selection: how many pixels of lane an error of each group of outputs costs.

After Fan et al., "Selective Focus" (AAAI 2024), who find the groups that matter most to the post-process
while they optimise, and change the objective accordingly; the formula is ours.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor

from ptq_lane.adapter import Adapter
from ptq_lane.distortion import lane_distortion
from ptq_lane.lanes import Lanes


@dataclass(frozen=True)
class Sensitivity:
    """One group of outputs.

    rms: its error, the root of the (weighted) mean square. distortion: the mean Lane Distortion Score in
    pixels where this group alone is that of the quantized model.
    """

    rms: float
    distortion: float

    @property
    def per_unit(self) -> float:
        """Pixels of lane for an error of 1."""
        return self.distortion / self.rms if self.rms else 0.0


@torch.no_grad()
def sensitivities(
    adapter: Adapter,
    exact: Any,
    found: Any,
    lanes: Sequence[Lanes],
    cap: float,
    weights: Mapping[str, Tensor] | None = None,
    scale: float = 1.0,
) -> dict[str, Sensitivity]:
    """Splice each group of quantized outputs into the full-precision ones, and see what becomes of lanes.

    Args:
        adapter: reads the outputs.
        exact: outputs of the full-precision model for a batch of images.
        found: those of the quantized model.
        lanes: what the full-precision outputs decode to, image by image.
        cap: of the Lane Distortion Score.
        weights: of the positions of each group; by default all count the same.
        scale: the share of each error that is spliced in, and that pixels are divided by.
    """
    wanted, got = adapter.heads(exact), adapter.heads(found)
    result = {}
    for name, head in wanted.items():
        error = got[name] - head
        weight = torch.ones(()) if weights is None else weights[name]
        spliced = got[name] if scale == 1 else head + scale * error
        decoded = adapter.decode(adapter.splice(exact, {name: spliced}))
        scores = [lane_distortion(*pair, cap) for pair in zip(lanes, decoded, strict=True)]
        distortion = sum(scores) / len(scores) / scale
        result[name] = Sensitivity(weighted_square(error, weight) ** 0.5, distortion)
    return result


def weighted_square(error: Tensor, weight: Tensor) -> float:
    """Σ w · error² / Σ w over all elements; the weight broadcasts to the error."""
    return float(weighted_mean(error.square(), weight))


def weighted_mean(values: Tensor, weight: Tensor) -> Tensor:
    """Σ w · values / Σ w over all elements; the weight broadcasts to the values."""
    return (values * weight).sum() / (weight.sum() * (values.numel() / weight.numel()))


class Selection(BaseModel):
    """How the groups' losses are weighed against each other.

    mode: all: λ = (pixels / rms error)², so that Σ λ · loss is the quadratic model of the squared
    distortion in pixels², whatever the units of the outputs; top: the same for the half of the groups
    that distort most, 0 for the others; none: λ = 1. evaluations: how often it is measured anew;
    in between, weights move in a straight line. images: on so many. momentum: weight of the past.
    probe_scale: the share of the error that is spliced in. floor: the least share of the largest squared
    distortion that a group is given.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    mode: Literal["all", "top", "none"] = "all"
    evaluations: int = Field(default=8, ge=1)
    images: int = Field(default=16, ge=1)
    momentum: float = Field(default=0.5, ge=0, lt=1)
    probe_scale: float = Field(default=1.0, gt=0, le=1)
    floor: float = Field(default=1e-4, gt=0, le=1)

    def weights(self, measured: Mapping[str, Sensitivity]) -> dict[str, float]:
        """λ of each group in pixels² per unit of its mean squared error; 0 where it has no error."""
        if self.mode == "none":
            return dict.fromkeys(measured, 1.0)
        squares = {name: one.distortion**2 for name, one in measured.items()}
        largest = max(squares.values(), default=0.0)
        if largest == 0:  # nothing moves a lane: then all groups count alike
            squares, largest = dict.fromkeys(squares, 1.0), 1.0
        kept = set(squares)
        if self.mode == "top":
            kept = set(sorted(squares, key=squares.__getitem__, reverse=True)[: (len(squares) + 1) // 2])
        return {
            name: max(square, self.floor * largest) / measured[name].rms ** 2
            if name in kept and measured[name].rms
            else 0.0
            for name, square in squares.items()
        }


class Weights:
    """The λ of each group over a run: averaged over evaluations, in a straight line between them."""

    def __init__(self, selection: Selection, iterations: int) -> None:
        """Args:
        selection: how they are found.
        iterations: updates of the run.
        """
        self.selection = selection
        self.every = max(1, iterations // selection.evaluations)
        self._before: dict[str, float] = {}
        self._after: dict[str, float] = {}
        self._from = 0

    def due(self, updates: int) -> bool:
        """Whether to measure before this update."""
        if self.selection.mode == "none":
            return updates == 0
        return updates % self.every == 0

    def update(self, updates: int, measured: Mapping[str, Sensitivity]) -> None:
        """Take in what was measured before an update."""
        found = self.selection.weights(measured)
        momentum = self.selection.momentum if self._after else 0.0
        self._before = self.at(updates) or found
        self._after = {
            name: momentum * self._after.get(name, 0.0) + (1 - momentum) * value
            for name, value in found.items()
        }
        self._from = updates

    def at(self, updates: int) -> dict[str, float]:
        """λ of each group at an update: on the way from what held at an evaluation to what it found."""
        share = min(1.0, (updates - self._from) / self.every)
        return {name: (1 - share) * self._before[name] + share * end for name, end in self._after.items()}
