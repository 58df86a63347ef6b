"""What a block's layers and edges see of the samples, taken in the order of samples by every process.

A sum of floating-point numbers depends on its order, and what is rounded with it on its last digit. So
processes that share samples do not add up what each found: they tell each other what was seen, sample by
sample, and each takes all of it as an only process would.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from ptqcore.distributed import Share
from ptqcore.timesteps import Moment, at


@dataclass(frozen=True)
class Sighting:
    """place: where. number: of the tensor within its sample, the same where the very same one was seen.
    x: the tensor, or what is wanted of it. weight: of each of its values, if they do not count alike."""

    place: str | int
    number: int
    x: Tensor
    weight: Tensor | None = None


class Sightings:
    """Hands on what is seen: at once, or, where processes share samples, when each has computed one."""

    def __init__(
        self,
        share: Share,
        moments: Sequence[Moment | None],
        begin: Callable[[], None],
        take: Callable[[Sighting], None],
    ) -> None:
        """Args:
        share: which samples this process has.
        moments: the timesteps that these are of.
        begin: is called in front of the sightings of each sample.
        take: is given every sighting of every sample, in order.
        """
        self._share, self._moments = share, moments
        self._begin, self._take = begin, take
        self.sample = 0
        self._last: tuple[Tensor | None, int] = None, 0
        self._count = 0
        self._kept: list[Any] = []
        self._tensors: dict[int, Tensor] = {}

    @property
    def at_once(self) -> bool:
        """Whether what is seen need not be sent anywhere."""
        return self._share.ranks == 1

    def samples(self) -> Iterator[int]:
        """The samples to compute, by their number in this process; what is seen meanwhile is of them."""
        mine = len(self._share.numbers)
        for sample in range(-(-self._share.total // self._share.ranks)):
            self.sample = sample
            if self.at_once:
                self._begin()
            if sample < mine:
                yield sample
            if not self.at_once:
                self._exchange(self._moments[sample] if sample < mine else None)
            self._last, self._count = (None, 0), 0

    def see(
        self, place: str | int, x: Tensor, weight: Tensor | None = None, source: Tensor | None = None
    ) -> None:
        """Note a sighting.

        Args:
            place: where.
            x: what is wanted of it.
            weight: of each value of x.
            source: what was seen: x has the number of the one before where this is the very same tensor.
        """
        number = self._number(source)
        if self.at_once:
            self._take(Sighting(place, number, x, weight))
            return
        if number not in self._tensors:  # a copy: code behind may work in place
            self._tensors[number] = x.detach().clone()
        self._kept.append((place, number, weight))

    def _number(self, source: Tensor | None) -> int:
        last, number = self._last
        if source is not None and source is last:
            return number
        self._count += 1
        if source is not None:
            self._last = source, self._count
        return self._count

    def _exchange(self, moment: Moment | None) -> None:
        """Take what was seen of one sample by each process."""
        parts = None
        if moment is not None:
            parts = (moment.lower, moment.upper, moment.share, moment.seen)
        for kept, tensors, timestep in self._share.everywhere((self._kept, self._tensors, parts)):
            self._begin()
            with at(None if timestep is None else Moment(*timestep)):
                for place, number, weight in kept:
                    self._take(Sighting(place, number, tensors[number], weight))
        self._kept, self._tensors = [], {}
