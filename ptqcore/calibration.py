"""What the calibration samples say about one block: collected in one pass, shared by all steps."""

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext, suppress
from functools import cached_property, partial
from itertools import repeat
from typing import Any

from torch import Tensor, nn

from ptqcore.allocator import give_freed_memory_back
from ptqcore.blocks import Block
from ptqcore.dataflow import inside, tensors_in
from ptqcore.distributed import Share
from ptqcore.edges import ActivationQuantizers
from ptqcore.finite import check_range
from ptqcore.grids import Grids
from ptqcore.midway import Midway
from ptqcore.modules import weight_rows
from ptqcore.observers import Observer
from ptqcore.placement import Edge
from ptqcore.quantizers import FakeQuant
from ptqcore.recipe import TensorQuant
from ptqcore.sightings import Sighting, Sightings
from ptqcore.statistics import Gram
from ptqcore.walk import BlockIO

NewObserver = Callable[[TensorQuant], Observer]
Range = tuple[Tensor, Tensor]
Weigh = Callable[[Tensor, int], Tensor | None]


class _LastCalled(Exception):  # noqa: N818 - a signal that ends a forward pass, not an error
    pass


class _LastOf:
    """Ends forward passes behind the last of some layers, once a pass has called each of them once."""

    def __init__(self, layers: Mapping[str, nn.Module]) -> None:
        self._layers = list(layers.values())
        self._once = False

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Watch one pass."""
        calls: list[nn.Module] = []

        def note(layer: nn.Module, _: Any) -> None:
            calls.append(layer)
            if self._once and len(calls) == len(self._layers):
                raise _LastCalled

        handles = [layer.register_forward_pre_hook(note) for layer in self._layers]
        try:
            with suppress(_LastCalled):
                yield
        finally:
            for handle in handles:
                handle.remove()
        self._once = len(calls) == len(self._layers) == len({id(layer) for layer in calls})


class Calibration:
    """Inputs, full-precision outputs, statistics and weight ranges of the layers and edges of one block.

    Statistics are computed at the first use, in one pass of the block as it then is over its inputs
    from the quantized prefix; a step that changes what flows into layers says so with `changed`.
    Layers that read the same tensor share one Gram. Steps add the losses of what they learn to
    `losses`, for the report.
    """

    def __init__(
        self,
        block: Block,
        io: BlockIO,
        grids: Grids,
        new_observer: NewObserver,
        exact: list[list[Tensor]] | None = None,
        masks: Sequence[Tensor | None] | None = None,
        midways: Iterator[Midway | None] | None = None,
    ) -> None:
        """Args:
        block: the block, still in full precision.
        io: its inputs.
        grids: the grids of the model's activations.
        new_observer: makes the observer of a range.
        exact: the block's output tensors in the full-precision model, if a step needs them.
        masks: of every sample, which positions count (bool, the leading dimensions of what flows).
        midways: where the states of what steps learn are written now and then.
        """
        self.block = block
        self.io = io
        self.quantizers: dict[Edge, FakeQuant] = {}
        self.losses: list[float] = []
        self.midways: Iterator[Midway | None] = midways or repeat(None)
        self._exact = exact
        self._masks = masks or [None] * len(io)
        self._grids = grids
        self._new_observer = new_observer
        self._weigh: Weigh | None = None
        self._weight_ranges: dict[str, Range] = {}
        self._grams: dict[str, Gram] = {}
        self._observers: dict[str, Observer] = {}
        self._edges: dict[Edge, Observer] = {}
        self._reached: set[Edge] = set()
        self._current = False
        self._fresh: set[str] = set()
        self._latest: tuple[int, Gram] | None = None

    @property
    def share(self) -> Share:
        """Which of all calibration samples this process has: those of `io`, counted from 0 there."""
        return self.io.share

    @property
    def exact(self) -> list[list[Tensor]]:
        """The block's output tensors in the full-precision model, for every sample.

        Raises:
            ValueError: if no step of the recipe says that it needs them (`Step.needs_exact`).
        """
        if self._exact is None:
            raise ValueError("set `needs_exact` on the step that reads the full-precision stream")
        return self._exact

    @property
    def edges(self) -> dict[Edge, TensorQuant]:
        """The grids of the activations that are rounded inside the block."""
        edges = self._grids.edges.items()
        return {edge: quant for edge, quant in edges if inside(edge.site.owner, self.block.path)}

    @cached_property
    def targets(self) -> list[list[Tensor]]:
        """The tensors of the full-precision block's output, for every sample: ask before it is changed."""
        return self._collect()

    def changed(self) -> None:
        """Statistics of the layers that are still float are to be collected anew at the next use."""
        _ = self.targets
        self._current = False
        self._fresh.clear()
        for path in self.block.layers():
            self._grams.pop(path, None)

    def forget_layers(self) -> None:
        """Give the memory of the layers' statistics back, once no step needs them any more."""
        self._grams.clear()
        self._observers.clear()

    def refresh(self, paths: Iterable[str]) -> None:
        """Collect the statistics of some layers anew, if they are to be, without the rest of the block:
        the others wait until they are asked for."""
        _ = self.targets
        if not self._current:
            self._fresh = set(paths)
            self._collect(keep_outputs=False, only=self._fresh)

    def weigh(self, weigh: Weigh) -> None:
        """Let some values of activations count more than others when ranges are found.

        Args:
            weigh: what flows at an edge or into a layer, and the number of the sample → the weight of
                each value, 0 or more, that broadcasts to it; None if all count the same.
        """
        self._weigh = weigh
        self.changed()

    def gram(self, path: str) -> Gram | None:
        """The Gram of the inputs of a linear layer; None for other layers, or if no token reached it."""
        self._update(path)
        return self._grams.get(path)

    def observer(self, path: str) -> Observer | None:
        """The observer of a layer's inputs, where static ranges are wanted and something reached it."""
        self._update(path)
        return self._observers.get(path)

    def weight_range(self, path: str, layer: nn.Module) -> Range:
        """The range of a float layer's weight: what a step has set, else what the recipe's observer
        chooses."""
        if path not in self._weight_ranges:
            observer = self._new_observer(self._grids.weights(path))
            observer.update(weight_rows(layer).detach().flatten(1).float())
            return observer.range()
        return self._weight_ranges[path]

    def set_weight_range(self, path: str, low: Tensor, high: Tensor) -> None:
        """Set the range of a layer's weight, in the layout of its grid, for the steps that follow."""
        self._weight_ranges[path] = (low, high)

    def counted(self, x: Tensor, sample: int) -> Tensor:
        """The tokens [n, channels] of x [..., channels] that count (no padding), for a sample.

        Where x has another number of tokens than the sample has positions, all of them count.
        """
        rows, mask = x.flatten(0, -2), self._masks[sample]
        return rows[mask.flatten()] if mask is not None and mask.numel() == len(rows) else rows

    def record(
        self, paths: Iterable[str], exact: bool = False, outputs: bool = False
    ) -> dict[str, list[Tensor]]:
        """What flows into, or out of, layers of the block as it now is, call by call over the samples.

        Args:
            paths: the layers.
            exact: take the block's inputs from the full-precision model, and round no activations.
            outputs: record what the layers return, not what they read.
        """
        found = self.record_by_sample(paths, exact, outputs)
        return {path: [x for of_sample in samples for x in of_sample] for path, samples in found.items()}

    def record_by_sample(
        self, paths: Iterable[str], exact: bool = False, outputs: bool = False
    ) -> dict[str, list[list[Tensor]]]:
        """As `record`, of every layer, with the calls of each sample together."""
        found: dict[str, list[list[Tensor]]] = {path: [] for path in paths}

        def hook(path: str) -> Callable[..., None]:
            def note(_: nn.Module, args: Any, result: Tensor) -> None:
                found[path][-1].append(self.io.store.keep((result if outputs else args[0]).clone()))

            return note

        io, model = self.io, self.block.model
        handles = [model.get_submodule(path).register_forward_hook(hook(path)) for path in found]
        functions, io.functions = io.functions, {} if exact else io.functions
        try:
            for sample in range(len(io)):
                for calls in found.values():
                    calls.append([])
                io.run_sample(sample, exact)
        finally:
            io.functions = functions
            for handle in handles:
                handle.remove()
            give_freed_memory_back()
        return found

    def quantize_edges(self, quantizers: ActivationQuantizers) -> None:
        """Give the block's activation quantizers the observed ranges; every later run applies them."""
        self._update()
        for edge, observer in self._edges.items():
            if edge in self._reached:
                low, high = observer.range()
                check_range(low, high, f"the activation {edge}")
                quantizers[edge].set_range(low, high)
                self.quantizers[edge] = quantizers[edge]
        self.io.functions = {edge: quantizer.forward for edge, quantizer in self.quantizers.items()}

    def _update(self, path: str | None = None) -> None:
        _ = self.targets
        if not self._current and path not in self._fresh:
            self._collect(keep_outputs=False)

    def _collect(
        self, keep_outputs: bool = True, only: Collection[str] | None = None
    ) -> list[list[Tensor]]:
        """Run the block on every sample; statistics of its float layers, all or some, and of its edges.

        For some alone a run ends behind the last of them, where the first sample calls each of them once.
        """
        layers = self.block.layers()
        if only is not None:
            layers = {path: layer for path, layer in layers.items() if path in only}
        for known in (self._grams, self._observers):
            for path in layers:
                known.pop(path, None)
        sightings = Sightings(self.share, self.io.moments, self._begin_sample, self._take)
        handles = [
            layer.register_forward_pre_hook(self._watch(path, sightings)) for path, layer in layers.items()
        ]
        last = None if only is None else _LastOf(layers)
        functions = self.io.functions
        if not self.quantizers and only is None:
            self._edges = {edge: self._new_observer(quant) for edge, quant in self.edges.items()}
            self.io.functions = {
                edge: partial(self._watch_edge, place, observer, sightings)
                for place, (edge, observer) in enumerate(self._edges.items())
            }
        try:
            outputs = []
            for sample in sightings.samples():
                with nullcontext() if last is None else last.watching():
                    result = self.io.run_sample(sample)
                if keep_outputs:
                    outputs.append([self.io.store.keep(tensor) for tensor in tensors_in(result)])
            for gram in {id(gram): gram for gram in self._grams.values()}.values():
                gram.complete()
            self._current = only is None
            return outputs
        finally:
            self._latest = None
            self.io.functions = functions
            for handle in handles:
                handle.remove()
            give_freed_memory_back()

    def _watch_edge(self, place: int, observer: Observer, sightings: Sightings, x: Tensor) -> Tensor:
        if x.numel():  # experts are called on no tokens too
            weight = self._weights(x, sightings.sample)
            plain = sightings.at_once or weight is not None
            sightings.see(place, x if plain else observer.condensed(x), weight)
        return x

    def _watch(self, path: str, sightings: Sightings) -> Callable[..., None]:
        static = self._is_static(path)

        def hook(layer: nn.Module, args: tuple[Tensor, ...]) -> None:
            x, sample = args[0], sightings.sample
            linear = isinstance(layer, nn.Linear)
            if not x.numel() or not (linear or static):
                return
            rows = self.counted(x, sample) if linear else x
            weight = self._weights(rows, sample) if static else None
            if not linear and not sightings.at_once and weight is None:
                rows = self._observer(path).condensed(rows)
            sightings.see(path, rows, weight, x if linear else None)

        return hook

    def _weights(self, x: Tensor, sample: int) -> Tensor | None:
        return None if self._weigh is None else self._weigh(x, sample)

    def _is_static(self, path: str) -> bool:
        quant = self._grids.inputs(path)
        return quant is not None and not quant.dynamic

    def _observer(self, path: str) -> Observer:
        """The observer of a layer's static inputs, or a new one if it has seen nothing."""
        quant = self._grids.inputs(path)
        assert quant is not None
        return self._observers.get(path) or self._new_observer(quant)

    def _begin_sample(self) -> None:
        self._latest = None

    def _take(self, seen: Sighting) -> None:
        """Give a sighting to the observer and the Gram of its place."""
        if isinstance(seen.place, int):
            edge, observer = list(self._edges.items())[seen.place]
            _update(observer, seen)
            self._reached.add(edge)
            return
        if self._is_static(seen.place):
            observer = self._observer(seen.place)
            _update(observer, seen)
            self._observers[seen.place] = observer
        if isinstance(self.block.model.get_submodule(seen.place), nn.Linear):
            self._update_gram(seen.place, seen)

    def _update_gram(self, path: str, seen: Sighting) -> None:
        """Add what was seen to the layer's Gram, once for all layers that saw the very same tensor."""
        latest = self._latest
        if latest is not None and latest[0] == seen.number and path not in self._grams:
            self._grams[path] = latest[1]
        gram = self._grams.get(path)
        if gram is None:
            turn = len(self._grams)
            gram = self._grams[path] = Gram(seen.x.shape[-1], seen.x.device, self.share, turn)
        if latest is None or latest != (seen.number, gram):
            gram.update(seen.x)
        self._latest = seen.number, gram


def _update(observer: Observer, seen: Sighting) -> None:
    if seen.weight is None:
        observer.update(seen.x)
    else:
        observer.update_weighted(seen.x, seen.weight)
