"""Which layers of the temporal block tables can replace, and how many bytes that saves.

Source: cache-based maintenance and disturbance-aware selection, in the journal version of TFMQ-DM (Huang et
al., TPAMI 2025, arXiv 2407.19547).
"""

import math
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ptq_diffusion.temporal import TemporalMap, values_read
from ptqcore import (
    Dataflow,
    ModelError,
    TensorQuant,
    TimestepTable,
    packed_bytes,
    relative_difference,
    tensors_in,
    weight_rows,
)

_SAME = 1e-5


class Caching:
    """The layers of a temporal block that tables may replace.

    A table with a row for each timestep stands in the place of a temporal feature. Layers that are no
    features, and that only replaced layers read, are vacant: nothing needs them any more.
    """

    def __init__(
        self,
        flow: Dataflow,
        temporal: TemporalMap,
        layers: Mapping[str, nn.Module],
        weights: Callable[[str], TensorQuant],
        features: Mapping[str, Tensor],
    ) -> None:
        """Args:
        flow: one traced forward pass of the full-precision denoiser.
        temporal: its map.
        layers: path → layer, of the temporal block: those that are to be quantized, `with_one_value`.
        weights: the grid of a layer's weight.
        features: path → temporal feature [timesteps, …] in full precision.
        """
        self._flow, self._temporal, self._features = flow, temporal, features
        self._layers = dict(layers)
        self._packed = {path: packed_bytes(one, weights(path).spec) for path, one in layers.items()}
        self._readers = {path: self._layers_behind(path) for path in layers}

    @property
    def features(self) -> list[str]:
        """The temporal features that tables can replace."""
        return [path for path in self._layers if path in self._features]

    def vacant(self, cached: Collection[str]) -> list[str]:
        """The layers that nothing needs once tables replace these features."""
        found: set[str] = set()
        for path in reversed(self._layers):
            if path not in self._features and self._readers[path] <= {*cached, *found}:
                found.add(path)
        return [path for path in self._layers if path in found]

    def tables(self, cached: Collection[str]) -> dict[str, Tensor]:
        """The tables of these features, and those without rows of the layers that become vacant."""
        empty = {path: self._row(path).new_empty(0, *self._row(path).shape) for path in self.vacant(cached)}
        return {path: self._features[path] for path in cached} | empty

    def bytes_of(self, paths: Collection[str]) -> int:
        """Of these layers' tables."""
        return sum(self._features[path].nbytes for path in paths if path in self._features)

    def bytes_packed(self, paths: Collection[str]) -> int:
        """Of these layers with their weights as packed integers."""
        return sum(self._packed[path] for path in paths)

    def chosen_by_size(self) -> list[str]:
        """The features whose table takes no more bytes than the packed weights that it replaces: those of
        its own layer, and if all features have tables, of the layers that they share."""
        small = [path for path in self.features if self.bytes_of([path]) <= self._packed[path]]
        rest = {path for path in self.features if path not in small}
        shared = set(self.vacant(self.features)) - set(self.vacant(small))
        all_pay = self.bytes_of(rest) <= self.bytes_packed(rest | shared)
        return self.features if all_pay else small

    def _row(self, path: str) -> Tensor:
        """An empty output of a layer, for one row of the batch."""
        number = self._flow.called(path)[0].outputs[0]
        return self._layers[path].get_parameter("weight").new_empty(self._flow.shapes[number][1:])

    def _layers_behind(self, path: str) -> set[str]:
        """The layers that read what a layer returns, through functions that are no layers."""
        consumers = self._flow.consumers()
        left = [number for call in self._flow.called(path) for number in call.outputs]
        found, seen = set(), set(left)
        while left:
            number = left.pop()
            for op in consumers.get(number, []):
                if number not in values_read(op.name, op.inputs):
                    continue
                if op.site.owner in self._temporal.weights:
                    found.add(op.site.owner)
                else:
                    left += [made for made in op.outputs if made not in seen]
                    seen.update(op.outputs)
        return found


@torch.no_grad()
def with_one_value(layers: Mapping[str, nn.Module], run: Callable[[], object]) -> dict[str, nn.Module]:
    """Those layers that give each row of the batch one value a channel, the same at every call: what they
    give depends neither on the size nor on the number of images.

    Args:
        layers: path → layer, of the temporal block.
        run: a pass of the denoiser.
    """
    seen: dict[str, list[Tensor]] = {path: [] for path in layers}

    def note(path: str, _: nn.Module, args: Any, output: Tensor) -> None:
        seen[path].append(output.clone())

    handles = [layer.register_forward_hook(partial(note, path)) for path, layer in layers.items()]
    try:
        run()
    finally:
        for handle in handles:
            handle.remove()
    return {path: layer for path, layer in layers.items() if _is_one_value(layer, seen[path])}


def _is_one_value(layer: nn.Module, outputs: list[Tensor]) -> bool:
    shapes = {tuple(output.shape[1:]) for output in outputs if output.ndim > 1}
    single = [shape for shape in shapes if math.prod(shape) == weight_rows(layer).shape[0]]
    return len(single) == 1 and all(output.equal(outputs[0]) for output in outputs)


@torch.no_grad()
def prove(model: nn.Module, tables: Mapping[str, Tensor], run: Callable[[], object]) -> None:
    """Make sure that tables in the place of layers leave what the denoiser returns as it was.

    Args:
        model: the denoiser.
        tables: path → table.
        run: a pass of the denoiser at one of the timesteps; returns its output.

    Raises:
        ModelError: naming the difference.
    """
    expected = tensors_in(run())
    with _tried(model, tables):
        found = tensors_in(run())
    difference = relative_difference(expected, found)
    if not difference < _SAME:
        raise ModelError(
            f"tables in the place of {len(tables)} layers of the temporal block change what the denoiser "
            f"returns by {difference:.2g} of its largest value: set the step tiar's mode to reconstruct"
        )


@contextmanager
def _tried(model: nn.Module, tables: Mapping[str, Tensor]) -> Iterator[None]:
    """Let layers return what tables would, for a while."""

    def instead(table: TimestepTable, _: nn.Module, args: Any, output: Any) -> Tensor:
        return table(args[0])

    layers = {path: model.get_submodule(path) for path in tables}
    handles = [
        layer.register_forward_hook(partial(instead, TimestepTable(layer, tables[path])))
        for path, layer in layers.items()
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
