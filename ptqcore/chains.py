"""Layers in a row: one layer's output is another's input, but for functions that move or clip values."""

import math
from collections.abc import Iterator
from dataclasses import dataclass

from torch import nn

from ptqcore.dataflow import Dataflow, Op
from ptqcore.modules import LAYERS_WITH_ROWS
from ptqcore.placement import CLIPPING, LAYERS, moves


@dataclass(frozen=True)
class Chain:
    """A layer, what its output alone goes through, and the layer that alone reads the result.

    first, second: the ops of the two layers; between: the functions on the way.
    """

    first: Op
    between: tuple[Op, ...]
    second: Op

    @property
    def only_moves(self) -> bool:
        """Whether the second layer reads the very values of the first."""
        return all(op.name not in CLIPPING for op in self.between)


def find_chains(model: nn.Module, flow: Dataflow) -> list[Chain]:
    """All chains of two layers that are called once, in the order of the first."""
    consumers = flow.consumers()
    returned = {number for call in flow.called("") for number in call.outputs}
    found = []
    for op in flow.ops:
        if not _is_layer(op, model, flow):
            continue
        between = list(_only_readers(op, consumers, returned))
        if between and _is_layer(between[-1], model, flow):
            found.append(Chain(op, tuple(between[:-1]), between[-1]))
    return found


def _is_layer(op: Op, model: nn.Module, flow: Dataflow) -> bool:
    """Whether an op is the single call of a plain layer."""
    path = op.site.owner
    plain = type(model.get_submodule(path)) in LAYERS_WITH_ROWS
    return op.name in LAYERS and plain and len(flow.called(path)) == 1


def _only_readers(op: Op, consumers: dict[int, list[Op]], returned: set[int]) -> Iterator[Op]:
    """The ops behind one, as long as each alone reads what the one before made."""
    while len(op.outputs) == 1 and op.outputs[0] not in returned:
        readers = consumers.get(op.outputs[0], [])
        if len(readers) != 1 or readers[0].inputs[0] != op.outputs[0]:
            return
        before, (op,) = op, readers
        yield op
        if not (moves(op) or op.name in CLIPPING) or op.inputs != before.outputs:
            return


def clipping_bounds(op: Op) -> tuple[float, float] | None:
    """What a clipping function keeps its values in; None where the record does not say."""
    if op.name == "relu":
        return 0.0, math.inf
    if op.name == "relu6":
        return 0.0, 6.0
    stated = [n for n in op.arguments if n is None or type(n) in (int, float)]
    if len(stated) != 2:
        return None
    low, high = stated
    return (-math.inf if low is None else float(low)), (math.inf if high is None else float(high))
