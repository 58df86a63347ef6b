"""The step `split-concatenations`: a grid for each part of what a layer multiplies, none for the whole
(Q-Diffusion, Li et al., arXiv 2302.04304)."""

from collections.abc import Callable, Iterator, Mapping

from torch import nn

from ptqcore.dataflow import Dataflow, Op
from ptqcore.errors import RecipeError
from ptqcore.placement import LAYERS, PRODUCTS, Edge, moves
from ptqcore.progress import say
from ptqcore.recipe import TensorQuant
from ptqcore.step import Step


class SplitConcatenations(Step):
    """The parts of a skip concatenation have other ranges: on one grid the narrow one loses its steps.

    Concatenations of channels that a convolution or linear layer reads are rounded part by part. Engines
    know one scale of what a layer reads: they compute such a layer in floating point.
    """

    name = "split-concatenations"
    shares_samples = True
    stage = "range"

    def prepare(self, model: nn.Module, flow: Dataflow, run: Callable[[], object]) -> None:
        grids = self.context.grids
        if self.context.quant.scope != "dataflow":
            raise RecipeError(
                f"the step {self.name} is for activations that are rounded between functions, and "
                "quant.scope is layers: set it to dataflow, or remove the step"
            )
        joins = _Joins(flow, grids.edges)
        found = dict(joins.all())
        for whole, parts in found.items():
            quant, readers = grids.edges.pop(whole), grids.readers.pop(whole)
            for part, held in parts.items():
                if held is None or grids.edges[held].bits > quant.bits:
                    grids.edges[part], grids.readers[part] = quant, readers
        say(f"{self.name}: {len(found)} concatenations have a grid for each part")


class _Joins:
    """The concatenations on a grid: edge → the edge of each part, and that on which the part already is."""

    def __init__(self, flow: Dataflow, edges: Mapping[Edge, TensorQuant]) -> None:
        self.flow, self.edges = flow, edges
        self.producers, self.consumers = flow.producers(), flow.consumers()
        self.ops = {op.site: op for op in flow.ops}

    def all(self) -> Iterator[tuple[Edge, dict[Edge, Edge | None]]]:
        for edge in self.edges:
            op = self.ops[edge.site]
            if op.name != "cat" or edge.side != "output" or not self._is_multiplied(op):
                continue
            held = [self._held(number) for number in op.inputs]
            if len(held) > 1 and len(set(held)) == len(held):  # slices of one tensor are on one grid
                yield edge, {Edge(op.site, "input", index): one for index, one in enumerate(held)}

    def _is_multiplied(self, op: Op) -> bool:
        """Whether layers sum over the joined dimension, and no product of activations reads it."""
        (whole,) = op.outputs
        dim, dims = op.arguments[-1] if op.arguments else 0, len(self.flow.shapes[whole])
        multiplying = [one for one in self._readers(whole) if one.name in LAYERS | PRODUCTS]
        channels = {one.name: -1 if one.name == "linear" else 1 for one in multiplying}
        return bool(multiplying) and all(
            name in LAYERS and isinstance(dim, int) and (dim - place) % dims == 0
            for name, place in channels.items()
        )

    def _readers(self, number: int) -> Iterator[Op]:
        for op in self.consumers.get(number, []):
            yield op
            if moves(op):
                for output in op.outputs:
                    yield from self._readers(output)

    def _held(self, number: int) -> Edge | None:
        """The edge whose grid a tensor is on."""
        while (op := self.producers.get(number)) is not None:
            edge = Edge(op.site, "output", op.outputs.index(number))
            if edge in self.edges:
                return edge
            if not moves(op):
                return None
            number = op.inputs[0]
        return None
