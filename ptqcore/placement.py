"""Which tensors deployed engines need on a grid, so that whole networks run in integers.

An engine computes a layer in integers if what flows in, and for convolutions also what flows out,
is quantized; sums, concatenations, products and pooling likewise. The rules, in one place:

- Every input of a quantized convolution, linear layer or product of two activations.
- The output of a convolution: after its activation function where that clips to a range (ReLU,
  ReLU6), because engines fold such a function into the rounding.
- Both inputs of sums, products, concatenations, averages and resizing whose result is quantized.
- Functions that only move values (reshape, slice, max pooling) keep the grid of their input.
- Everything else (softmax, norms, smooth activation functions) computes in floating point between
  the two; the outputs of a network stay in floating point unless a convolution makes them.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

from ptqcore.dataflow import Dataflow, Op, Site

LAYERS = {
    "conv1d",
    "conv2d",
    "conv3d",
    "conv_transpose1d",
    "conv_transpose2d",
    "conv_transpose3d",
    "linear",
}
PRODUCTS = {"matmul", "baddbmm"}
ARITHMETIC = {
    "add",
    "sub",
    "mul",
    "cat",
    "stack",
    "avg_pool2d",
    "adaptive_avg_pool2d",
    "mean",
    "interpolate",
}
CLIPPING = {"relu", "relu6", "clamp"}
MOVING = {
    "adaptive_max_pool2d",
    "chunk",
    "clone",
    "contiguous",
    "detach",
    "dropout",
    "expand",
    "flatten",
    "getitem",
    "max_pool2d",
    "mT",
    "movedim",
    "narrow",
    "permute",
    "pixel_shuffle",
    "pixel_unshuffle",
    "repeat_interleave",
    "reshape",
    "select",
    "split",
    "squeeze",
    "swapaxes",
    "T",
    "to",
    "transpose",
    "unbind",
    "unflatten",
    "unfold",
    "unsqueeze",
    "view",
}


@dataclass(frozen=True)
class Edge:
    """A tensor that is rounded to a grid: one that the function at `site` reads, or one it makes.

    Tensors are rounded where they are made; only what the model is given from outside is rounded
    where it is read.
    """

    site: Site
    side: Literal["input", "output"]
    index: int = 0

    def __str__(self) -> str:
        if self.side == "input":
            return f"{self.site}<{self.index}"
        return f"{self.site}>{self.index}" if self.index else str(self.site)


def find_edges(flow: Dataflow, targets: Iterable[str]) -> list[Edge]:
    """The tensors to be rounded, in the order in which they come up.

    Args:
        flow: one traced forward pass.
        targets: paths of the layers whose weights will be quantized.
    """
    return _Placement(flow, set(targets)).edges()


def moves(op: Op) -> bool:
    """Whether an op only moves values: what it makes lies on the grid of what it reads."""
    if op.name == "pad":
        return "constant" in op.arguments and op.arguments[-1] in (None, 0)
    if op.name == "interpolate":
        return "nearest" in op.arguments
    if op.name in {"div", "mul"} and len(op.inputs) == 1:  # by a scale of residual sums, 1 by default
        return op.arguments == (1,)
    return op.name in MOVING


class _Placement:
    def __init__(self, flow: Dataflow, targets: set[str]) -> None:
        self.flow, self.targets = flow, targets
        self.variable = flow.variable() & flow.floating
        self.producers, self.consumers = flow.producers(), flow.consumers()
        self.needed: set[int] = set()

    def edges(self) -> list[Edge]:
        for op in reversed(self.flow.ops):
            self._visit(op)
        found = []
        for op in self.flow.ops:
            reads = self._integer(op) or moves(op)
            for index, number in enumerate(op.inputs):
                if reads and number in self.needed and number not in self.producers:
                    found.append(Edge(op.site, "input", index))
            for index, number in enumerate(op.outputs):
                if number in self.needed:
                    found.append(Edge(op.site, "output", index))
        return found

    def _visit(self, op: Op) -> None:
        """Decide on an op's outputs and inputs; everything that reads its outputs was visited before."""
        if self._is_convolution(op):
            self._need_output(op)
        if moves(op) or op.name == "relu":
            self._move_up(op)
        if self._integer(op):
            self.needed.update(self._factors(op) if op.name in PRODUCTS else self._variable_inputs(op))

    def _move_up(self, op: Op) -> None:
        """What only moves values needs no grid of its own where its input can have one."""
        sources = self._variable_inputs(op)
        if len(sources) != 1 or not self.needed.intersection(op.outputs):
            return
        (source,) = sources
        if op.name != "relu" or (source in self.producers and len(self.consumers[source]) > 1):
            self.needed.difference_update(op.outputs)
            self.needed.add(source)

    def _need_output(self, op: Op) -> None:
        (output,) = op.outputs
        readers = self.consumers.get(output, [])
        clipped = [reader for reader in readers if reader.name in CLIPPING and len(reader.outputs) == 1]
        if readers and len(clipped) == len(readers) == 1:
            if not self.needed.intersection(clipped[0].outputs) and not self._on_grid(clipped[0]):
                self.needed.update(clipped[0].outputs)
        else:
            self.needed.add(output)

    def _on_grid(self, op: Op) -> bool:
        """Whether an op's output has the grid of a needed tensor already."""
        return bool(self.needed.intersection(op.inputs))

    def _is_convolution(self, op: Op) -> bool:
        return op.name in LAYERS - {"linear"} and op.site.owner in self.targets

    def _integer(self, op: Op) -> bool:
        """Whether engines compute this op in integers if its inputs are quantized."""
        if op.name in LAYERS:
            return op.site.owner in self.targets
        if op.name in PRODUCTS:
            return len(self._factors(op)) > 1
        if op.name not in ARITHMETIC:
            return False
        merges = op.name in {"add", "sub", "mul"}
        if merges and len([number for number in op.inputs if number in self.variable]) < 2:
            return False
        return any(self._reaches_grid(number) for number in op.outputs)

    def _reaches_grid(self, number: int) -> bool:
        """Whether a tensor is needed on a grid, itself or behind functions that clip or move it."""
        if number in self.needed:
            return True
        readers = self.consumers.get(number, [])
        return any(
            (reader.name in CLIPPING or moves(reader))
            and any(self._reaches_grid(output) for output in reader.outputs)
            for reader in readers
        )

    def _factors(self, op: Op) -> list[int]:
        """What a product multiplies; `baddbmm` adds its first tensor, a mask as a rule, to the product."""
        multiplied = op.inputs[1:] if op.name == "baddbmm" else op.inputs
        return [number for number in multiplied if number in self.variable]

    def _variable_inputs(self, op: Op) -> list[int]:
        return [number for number in dict.fromkeys(op.inputs) if number in self.variable]
