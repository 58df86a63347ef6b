"""Layers computed as if they were quantized, while methods search for what comes behind them."""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from types import TracebackType
from typing import Any, Self

import torch
from torch import Tensor, nn

from ptqcore import Block, Calibration, Context, FakeQuant, QuantizedTensor, QuantSpec, grid

TensorFunction = Callable[[Tensor], Tensor]


def rounded(weight: Tensor, spec: QuantSpec) -> Tensor:
    """A weight [out, in] rounded to nearest in its min-max ranges, in its dtype."""
    ends = grid.value_range(weight.float(), spec)
    return QuantizedTensor.from_range(weight, *ends, spec).dequantize()


def input_rounding(
    context: Context, path: str, low: Tensor, high: Tensor, change: TensorFunction
) -> TensorFunction:
    """What rounds the changed input of a layer: nothing where inputs stay in floating point.

    Args:
        context: of the run.
        path: the layer.
        low, high: its input's smallest and largest values per channel [channels], before the change.
        change: what is done to the input; a static range covers the changed extremes.
    """
    quant = context.grids.inputs(path)
    if quant is None:
        return lambda x: x
    quantizer = FakeQuant(quant.spec)
    if not quant.dynamic:
        ends = change(torch.stack([low, high]))
        quantizer.set_range(ends.min().clamp(max=0), ends.max().clamp(min=0))
    return quantizer


class Simulation:
    """Computes layers of a block with rounded weights and inputs, from `add` until the end of `with`."""

    def __init__(self, block: Block, calibration: Calibration, context: Context) -> None:
        self._block, self._calibration, self._context = block, calibration, context
        self._added: list[str] = []
        self._weights: dict[str, nn.Parameter] = {}
        self._handles: list[Any] = []

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop()

    def add(self, paths: Iterable[str]) -> None:
        """Compute these layers as if quantized too, those of them that are to be."""
        targets = self._context.targets(self._block)
        for path in paths:
            if path in targets and path not in self._added:
                self._added.append(path)
                self._start(path)

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Compute everything in full precision for a while; weights may change in it."""
        self._stop()
        try:
            yield
        finally:
            for path in self._added:
                self._start(path)

    def _start(self, path: str) -> None:
        layer = self._block.model.get_submodule(path)
        gram = self._calibration.gram(path)
        weight = layer.get_parameter("weight")
        self._weights[path] = weight
        spec = self._context.grids.weights(path).spec
        layer._parameters["weight"] = nn.Parameter(rounded(weight, spec), requires_grad=False)
        if gram is None or not gram.count:
            return
        rounding = input_rounding(self._context, path, gram.low, gram.high, lambda x: x)
        self._handles.append(layer.register_forward_pre_hook(lambda _, args: (rounding(args[0]),)))

    def _stop(self) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        for path, weight in self._weights.items():
            self._block.model.get_submodule(path)._parameters["weight"] = weight
        self._weights.clear()
