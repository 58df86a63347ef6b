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
    context: Context, calibration: Calibration, path: str, change: TensorFunction = lambda x: x
) -> TensorFunction:
    """What rounds the changed input of a layer: nothing where inputs stay in floating point.

    Args:
        context: of the run.
        calibration: a static range covers the extremes that it knows of every channel, changed.
        path: the layer.
        change: what is done to the input.
    """
    quant = context.grids.inputs(path)
    if quant is None:
        return lambda x: x
    quantizer = FakeQuant(quant.spec)
    if quant.dynamic:
        return quantizer
    gram = calibration.gram(path)
    if gram is None or not gram.count:
        return lambda x: x
    ends = change(torch.stack([gram.low, gram.high]))
    quantizer.set_range(ends.min().clamp(max=0), ends.max().clamp(min=0))
    return quantizer


class Simulation:
    """Computes layers of a block with rounded weights and inputs, from `add` until the end of `with`."""

    def __init__(self, block: Block, calibration: Calibration, context: Context) -> None:
        self._block, self._calibration, self._context = block, calibration, context
        self._added: dict[str, TensorFunction] = {}
        self._weights: dict[str, nn.Parameter] = {}
        self._handles: list[Any] = []

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop()

    def add(self, paths: Iterable[str]) -> None:
        """Compute these layers as if quantized too, those of them that are to be; statistics of layers
        behind them are to be collected anew.

        Static ranges of inputs are those that the statistics have now.
        """
        targets = self._context.targets(self._block)
        new = [path for path in paths if path in targets and path not in self._added]
        if not new:
            return
        self._added |= {path: input_rounding(self._context, self._calibration, path) for path in new}
        for path in new:
            self._start(path)
        self._calibration.changed()

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
        layer, rounding = self._block.model.get_submodule(path), self._added[path]
        weight = layer.get_parameter("weight")
        self._weights[path] = weight
        spec = self._context.grids.weights(path).spec
        layer._parameters["weight"] = nn.Parameter(rounded(weight, spec), requires_grad=False)
        self._handles.append(layer.register_forward_pre_hook(lambda _, args: (rounding(args[0]),)))

    def _stop(self) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        for path, weight in self._weights.items():
            self._block.model.get_submodule(path)._parameters["weight"] = weight
        self._weights.clear()
