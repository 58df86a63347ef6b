"""Tables of temporal features as a correction, for each timestep, of what is quantized around them.

Where a feature is only added to another tensor, its table can also take the mean error of the sum: what
bias correction does once (Nagel et al., arXiv 1906.04721), for every timestep of the schedule, at no cost.
"""

import math
from collections import defaultdict
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from ptqcore import Block, BlockIO, Calibration, Dataflow, Edge, Op, TimestepTable

_VIEWS = {"getitem", "reshape", "squeeze", "unsqueeze", "view"}


@dataclass(frozen=True)
class Sum:
    """Where a temporal feature is added: the sum, and the shape in which the feature is added there."""

    edge: Edge
    shape: tuple[int, ...]

    def is_in(self, block: Block) -> bool:
        """Whether the sum is computed inside a block."""
        return not block.path or f"{self.edge.site.owner}.".startswith(f"{block.path}.")

    def per_row(self, x: Tensor) -> Tensor:
        """The mean of the sum x over what the feature is the same for: [batch, values of the feature]."""
        same = [dim for dim, size in enumerate(self.shape) if dim and size == 1]
        return (x.double().mean(same, keepdim=True) if same else x.double()).flatten(1)


def find_sum(flow: Dataflow, path: str) -> Sum | None:
    """The sum of a layer's output and another tensor, if that is all that the output is used for.

    Args:
        flow: one traced forward pass.
        path: of the layer.
    """
    if len(flow.called(path)) != 1:
        return None
    consumers = flow.consumers()
    number = flow.called(path)[0].outputs[0]
    rows, values = flow.shapes[number][0], math.prod(flow.shapes[number])
    while len(readers := consumers.get(number, [])) == 1:
        (op,) = readers
        if op.name == "add":
            return _sum(flow, op, number)
        if not _is_view(op):
            return None
        number = op.outputs[0]
        if flow.shapes[number][:1] != (rows,) or math.prod(flow.shapes[number]) != values:
            return None
    return None


def _sum(flow: Dataflow, op: Op, number: int) -> Sum | None:
    others = [other for other in op.inputs if other != number]
    made, added = flow.shapes[op.outputs[0]], flow.shapes[number]
    if len(others) != 1 or op.arguments or len(made) != len(added) or made != flow.shapes[others[0]]:
        return None
    return Sum(Edge(op.site, "output"), added)


def _is_view(op: Op) -> bool:
    """Whether a function may only add or drop dimensions of size 1, if the number of values stays."""
    if op.name not in _VIEWS or len(op.inputs) != 1 or len(op.outputs) != 1:
        return False
    return op.name != "getitem" or all(
        one is None or one is Ellipsis or isinstance(one, slice) for one in op.arguments
    )


class TableCorrection:
    """Corrects the tables of one block after the other; those of a block in the order of their calls, so
    that each sees what those before it have corrected."""

    def __init__(self, flow: Dataflow) -> None:
        """flow: one traced forward pass of the full-precision denoiser."""
        self._flow = flow

    def before(self, calibration: Calibration, cached: Collection[str]) -> None:
        """Note the means of the full-precision denoiser, while the block is still float.

        Args:
            calibration: of the block.
            cached: the paths of the features that get tables.
        """
        block = calibration.block
        own = block.layers()
        found = {path: find_sum(self._flow, path) for path in cached if path in own}
        self._sums = {path: one for path, one in found.items() if one is not None and one.is_in(block)}
        self._wanted = means(calibration.io, self._sums, exact=True)

    def after(self, calibration: Calibration) -> None:
        """Add the mean errors of the block as it now is to its tables."""
        for path, one in self._sums.items():
            table = calibration.block.model.get_submodule(path)
            assert isinstance(table, TimestepTable)
            found = means(calibration.io, {path: one})[path]
            for row, wanted in self._wanted[path].items():
                table.table[row] += (wanted - found[row]).view_as(table.table[row])


def means(io: BlockIO, sums: Mapping[str, Sum], exact: bool = False) -> dict[str, dict[int, Tensor]]:
    """The mean of every sum at every timestep, over the samples: path → row of the table → [values].

    Args:
        io: of the block, which is run as it now is.
        sums: path → sum.
        exact: whether the block's inputs come from the full-precision model.
    """
    found: dict[str, dict[int, list[Tensor]]] = {path: defaultdict(list) for path in sums}
    functions = io.functions
    try:
        for sample in range(len(io)) if sums else ():
            moment = io.moments[sample]
            assert moment is not None
            noting = {
                one.edge: partial(_note, one, moment.lower, found[path], functions.get(one.edge))
                for path, one in sums.items()
            }
            io.functions = {**functions, **noting}
            io.run_sample(sample, exact)
    finally:
        io.functions = functions
    return {
        path: {row: torch.cat(values).mean(0) for row, values in rows.items()}
        for path, rows in found.items()
    }


def _note(
    one: Sum,
    rows: Tensor,
    found: dict[int, list[Tensor]],
    after: Callable[[Tensor], Tensor] | None,
    x: Tensor,
) -> Tensor:
    """Note what a sum is for each row of the batch, by the row of its timestep in tables."""
    for row, values in zip(rows.expand(len(x)).tolist(), one.per_row(x), strict=True):
        found[row].append(values[None])
    return x if after is None else after(x)
