"""Factors and offsets of a group as variables."""

from dataclasses import replace

import torch
from torch import Tensor

from ptq_llm.groups import Group
from ptq_llm.os_plus import centre
from ptq_llm.rescale import Rescaling
from ptq_llm.scaling import ChannelStatistics
from ptq_llm.smoothquant import smoothing

_SMALLEST = 1e-2  # of a factor: half precision has to hold what it divides


class LearnedRescaling:
    """s = s₀ · exp(v) and z = z₀ + u · (half the width of the channel), for every channel of a group.

    Channels that are the same row of the producer share v. Both variables are relative, so that one
    learning rate serves channels of any size.
    """

    def __init__(self, group: Group, statistics: ChannelStatistics, shifts: bool) -> None:
        """Args:
        group: the group.
        statistics: of its channels.
        shifts: whether offsets are learned, too.
        """
        self.group, self.shifts = group, shifts
        self._statistics = statistics
        channels = len(statistics.low)
        rows = torch.arange(channels) if group.rows is None else group.rows
        self._rows, self._place = rows.unique(return_inverse=True)
        self._half = (statistics.high - statistics.low).float() / 2
        self._v = torch.zeros(len(self._rows), requires_grad=True)
        self._u = torch.zeros(channels, requires_grad=shifts)
        self.variables = [self._v, self._u] if shifts else [self._v]
        self.begin(Rescaling.identity(channels))

    def begin(self, start: Rescaling) -> None:
        """Begin with these factors and offsets."""
        scale = start.scale.float().clamp(min=_SMALLEST)
        self._first = torch.empty(len(self._rows)).scatter(0, self._place, scale)
        self._shift = start.shift.float()

    def identity(self) -> Rescaling:
        """A start that changes nothing."""
        return Rescaling.identity(len(self._place))

    def smoothing(self, alpha: float) -> Rescaling:
        """SmoothQuant's factors as a start; of centred channels, where offsets are learned."""
        seen = self._statistics
        shift = centre(seen.low, seen.high) if self.shifts else torch.zeros_like(seen.low)
        centred = replace(seen, low=seen.low - shift, high=seen.high - shift)
        return Rescaling(smoothing(centred, alpha).scale, shift)

    @property
    def scale(self) -> Tensor:
        """s [channels]."""
        return self._of_rows()[self._place]

    @property
    def shift(self) -> Tensor:
        """z [channels]."""
        return self._shift + self._u * self._half

    def divisors(self, rows: int) -> Tensor:
        """What the producer's rows [rows] are divided by: s where they are channels, else 1."""
        return torch.ones(rows).index_put((self._rows,), self._of_rows())

    def inputs(self, x: Tensor) -> Tensor:
        """(x − z) / s of x [..., channels], float32."""
        return (x.float() - self.shift) / self.scale

    @torch.no_grad()
    def change(self) -> Rescaling:
        """What has been learned, to be moved into weights."""
        return Rescaling(self.scale.double(), self.shift.double())

    def _of_rows(self) -> Tensor:
        return (self._first * self._v.exp()).clamp(min=_SMALLEST)
