"""What the calibration samples say about one block: collected in one pass, shared by all steps."""

from collections.abc import Callable
from functools import cached_property, partial
from typing import Any

from torch import Tensor, nn

from ptqcore.blocks import Block
from ptqcore.dataflow import inside, tensors_in
from ptqcore.edges import ActivationQuantizers
from ptqcore.grids import Grids
from ptqcore.observers import Observer
from ptqcore.placement import Edge
from ptqcore.quantizers import FakeQuant
from ptqcore.recipe import TensorQuant
from ptqcore.statistics import Gram
from ptqcore.walk import BlockIO

NewObserver = Callable[[TensorQuant], Observer]


class Calibration:
    """Inputs, full-precision outputs, and statistics of the layers and edges of one block.

    Everything is computed at the first use, in one pass of the full-precision block over its inputs
    from the quantized prefix: ask before the block is changed. Layers that read the same tensor
    share one Gram. Steps add the losses of what they learn to `losses`, for the report.
    """

    def __init__(
        self,
        block: Block,
        io: BlockIO,
        grids: Grids,
        new_observer: NewObserver,
        exact: list[list[Tensor]] | None = None,
    ) -> None:
        """Args:
        block: the block, still in full precision.
        io: its inputs.
        grids: the grids of the model's activations.
        new_observer: makes the observer of a static range.
        exact: the block's output tensors in the full-precision model, if a step needs them.
        """
        self.block = block
        self.io = io
        self.quantizers: dict[Edge, FakeQuant] = {}
        self.losses: list[float] = []
        self._exact = exact
        self._grids = grids
        self._new_observer = new_observer
        self._grams: dict[str, Gram] = {}
        self._observers: dict[str, Observer] = {}
        self._reached: set[Edge] = set()
        self._edges = {edge: new_observer(quant) for edge, quant in self.edges.items()}

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
        """The tensors of the full-precision block's output, for every sample."""
        layers = self.block.layers()
        latest: dict[str, Any] = {}
        handles = [
            layer.register_forward_pre_hook(self._watch(path, latest)) for path, layer in layers.items()
        ]
        self.io.functions = {edge: partial(self._observe, edge) for edge in self._edges}
        try:
            outputs = []
            for output in self.io.run():
                outputs.append([self.io.store.keep(tensor) for tensor in tensors_in(output)])
                latest.clear()
            return outputs
        finally:
            self.io.functions = {}
            for handle in handles:
                handle.remove()

    def _observe(self, edge: Edge, x: Tensor) -> Tensor:
        self._edges[edge].update(x)
        self._reached.add(edge)
        return x

    def gram(self, path: str) -> Gram | None:
        """The Gram of the inputs of a linear layer; None for other layers, or if it was never called."""
        _ = self.targets
        return self._grams.get(path)

    def observer(self, path: str) -> Observer | None:
        """The observer of a layer's inputs, where static ranges are wanted and the layer was called."""
        _ = self.targets
        return self._observers.get(path)

    def quantize_edges(self, quantizers: ActivationQuantizers) -> None:
        """Give the block's activation quantizers the observed ranges; every later run applies them."""
        _ = self.targets
        for edge, observer in self._edges.items():
            if edge in self._reached:
                quantizers[edge].set_range(*observer.range())
                self.quantizers[edge] = quantizers[edge]
        self.io.functions = {edge: quantizer.forward for edge, quantizer in self.quantizers.items()}

    def _watch(self, path: str, latest: dict[str, Any]) -> Callable[..., None]:
        quant = self._grids.inputs(path)

        def hook(layer: nn.Module, args: tuple[Tensor, ...]) -> None:
            x = args[0]
            if quant is not None and not quant.dynamic:
                observer = self._observers.get(path) or self._new_observer(quant)
                observer.update(x)
                self._observers[path] = observer
            if isinstance(layer, nn.Linear):
                self._update_gram(path, x, latest)

        return hook

    def _update_gram(self, path: str, x: Tensor, latest: dict[str, Any]) -> None:
        """Add x to the layer's Gram, once for all layers that were handed the very same tensor."""
        if latest.get("tensor") is x and path not in self._grams:
            self._grams[path] = latest["gram"]
        gram = self._grams.get(path)
        if gram is None:
            gram = self._grams[path] = Gram(x.shape[-1], x.device)
        if latest.get("tensor") is not x or latest["gram"] is not gram:
            gram.update(x)
        latest.update(tensor=x, gram=gram)
