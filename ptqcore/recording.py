"""The tapes of all calibration samples, with as few computed blocks as can be."""

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten

from ptqcore.blocks import Block
from ptqcore.edges import TensorFunction
from ptqcore.outline import Outline
from ptqcore.placement import Edge
from ptqcore.progress import track
from ptqcore.store import Store
from ptqcore.tape import Tape, TapeRecorder
from ptqcore.timesteps import Moment, at

Calibrate = Callable[[Edge, list[Tensor]], TensorFunction]


@dataclass
class Recording:
    """How samples are recorded: as in `Walk`, whose arguments these are."""

    blocks: list[Block]
    samples: Sequence[Any]
    forward: Callable[[Any], object]
    moments: Sequence[Moment | None]
    store: Store
    exact: bool

    def tapes(self, between: Mapping[Edge, Calibrate]) -> list[Tape]:
        """The tapes of all samples; recorded again if there is an edge in front of the first block."""
        seen: dict[Edge, dict[int, Tensor]] = {edge: {} for edge in between}
        tapes = self._record(lambda number: {edge: partial(_note, seen[edge], number) for edge in seen})
        rounding = {
            edge: between[edge](edge, list(found.values())) for edge, found in seen.items() if found
        }
        if not rounding:
            return tapes
        rounded = self._record(lambda _: rounding)
        for tape, plain in zip(rounded, tapes, strict=True):
            tape.exact = plain.exact
        return rounded

    def _record(self, early: Callable[[int], Mapping[Edge, TensorFunction]]) -> list[Tape]:
        known: dict[Any, _Alike] = defaultdict(lambda: _Alike(partial(self._one, early)))
        return [
            known[_shapes(self.samples[number])].record(number)
            for number in track(range(len(self.samples)), "capturing block inputs")
        ]

    def _one(
        self,
        early: Callable[[int], Mapping[Edge, TensorFunction]],
        number: int,
        outlines: Sequence[Outline] = (),
    ) -> TapeRecorder:
        recorder = TapeRecorder(self.blocks, self.exact, self.store, early(number), outlines)
        with torch.no_grad(), at(self.moments[number]):
            recorder.record(lambda: self.forward(self.samples[number]))
        return recorder


class _Alike:
    """Samples that differ in the values of their tensors alone.

    A tape tells where tensors go, not what blocks make of them. So the first sample is computed whole, and
    the others with zeros in the place of what blocks return, once a second sample has proved that its tape
    is the same with them.
    """

    def __init__(self, record: Callable[..., TapeRecorder]) -> None:
        """record: of a sample's number, and of outlines of its blocks or none."""
        self._record = record
        self._outlines: list[Outline] = []
        self._seen, self._proved = 0, False

    def record(self, number: int) -> Tape:
        """The tape of the next sample."""
        if self._proved:
            return self._record(number, self._outlines).tape
        whole = self._record(number)
        self._seen += 1
        if self._seen == 1 and None not in whole.outlines:
            self._outlines = [outline for outline in whole.outlines if outline is not None]
        elif self._seen == 2 and self._outlines:
            self._proved = self._is_same(number, whole.tape)
        return whole.tape

    def _is_same(self, number: int, whole: Tape) -> bool:
        try:
            return self._record(number, self._outlines).tape.does_as(whole)
        except Exception:  # code between the blocks that zeros are not good enough for
            return False


def _shapes(sample: Any) -> Any:
    leaves, structure = tree_flatten(sample)
    kinds = ((x.shape, x.dtype, x.device) if isinstance(x, Tensor) else repr(x) for x in leaves)
    return str(structure), tuple(kinds)


def _note(seen: dict[int, Tensor], number: int, x: Tensor) -> Tensor:
    seen[number] = x.clone()
    return x
