"""Activations on static grids in figures: what a grid covers, and how much of the values it clips."""

from collections.abc import Iterable, Mapping
from functools import partial

import torch
from torch import Tensor

from ptqcore import grid
from ptqcore.blocks import Block
from ptqcore.distributed import Share
from ptqcore.edges import TensorFunction
from ptqcore.placement import Edge
from ptqcore.quantizers import FakeQuant
from ptqcore.report.record import ActivationRecord
from ptqcore.timesteps import Moment, at


class CountClipped:
    """Rounds the tensors at edges, and counts the values outside the grids."""

    def __init__(self, quantizers: Mapping[Edge, FakeQuant]) -> None:
        self._quantizers = quantizers
        self._clipped = dict.fromkeys(quantizers, 0)
        self._seen = dict.fromkeys(quantizers, 0)

    def functions(self) -> dict[Edge, TensorFunction]:
        """What `edges.applying` takes."""
        return {edge: partial(self.round, edge) for edge in self._quantizers}

    def round(self, edge: Edge, x: Tensor) -> Tensor:
        """x on the grid of an edge."""
        quantizer = self._quantizers[edge]
        inside = grid.inside(x.float(), *quantizer.parameters_for(x), quantizer.spec)
        self._clipped[edge] += x.numel() - int(inside.sum())
        self._seen[edge] += x.numel()
        return quantizer(x)

    def records(self, block: str, share: Share) -> list[ActivationRecord]:
        """The figures of the edges that were reached, for the samples of all processes."""
        own = [(self._clipped[edge], self._seen[edge]) for edge in self._seen]
        of_edges = zip(*share.everywhere(own), strict=True)
        totals = [[sum(each) for each in zip(*counts, strict=True)] for counts in of_edges]
        return [
            _record(str(edge), block, self._quantizers[edge], clipped / seen)
            for edge, (clipped, seen) in zip(self._seen, totals, strict=True)
            if seen
        ]


def between_record(
    edge: Edge,
    quantizer: FakeQuant,
    tensors: Iterable[Tensor],
    moments: Iterable[Moment | None],
    share: Share,
) -> ActivationRecord:
    """The figures of an edge between blocks, for the tensors of a share of the samples there and their
    timesteps."""
    count = CountClipped({edge: quantizer})
    for tensor, moment in zip(tensors, moments, strict=True):
        with at(moment):
            count.round(edge, tensor)
    return count.records("", share)[0]


def input_records(block: Block) -> list[ActivationRecord]:
    """The figures of the static inputs of a block's quantized layers."""
    quantizers = {path: layer.input_quantizer for path, layer in block.quantized_layers().items()}
    return [
        _record(path, block.path, quantizer, None)
        for path, quantizer in quantizers.items()
        if quantizer is not None and not quantizer.spec.dynamic
    ]


def grid_ends(quantizer: FakeQuant) -> tuple[float, float]:
    """The smallest and the largest value of a static grid, or of those of all timesteps."""
    spec, scale = quantizer.spec, quantizer.scale
    assert scale is not None
    if spec.is_float:
        largest = grid.float_max(spec) * float(scale.max())
        return -largest, largest
    codes = torch.tensor([[0.0], [spec.levels]])
    ends = grid.values(codes, scale.float().cpu(), quantizer.zero_point, spec)
    return float(ends.min()), float(ends.max())


def _record(name: str, block: str, quantizer: FakeQuant, clipped: float | None) -> ActivationRecord:
    assert quantizer.scale is not None
    return ActivationRecord(
        name, block, str(quantizer.spec), grid_ends(quantizer), float(quantizer.scale.max()), clipped
    )
