"""From a quantized model to an ONNX graph whose grids are still open: marks stand where they belong.

The model is traced without the quantizers of its activations. In their place, and around the weight and the
bias of every quantized layer, stands a node `Mark` that does nothing; what it stands for is kept
beside the graph. So nothing of the rounding has to be recognised in the graph.
"""

import logging
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import onnx_ir as ir
import torch
from torch import Tensor, nn

from ptqcore.dataflow import Dataflow, Site, tensors_in, trace
from ptqcore.edges import TensorFunction, applying, detached, quantizers_of
from ptqcore.errors import ExportError
from ptqcore.export.feeding import named_inputs, output_names, with_tensors
from ptqcore.modules import QuantModule
from ptqcore.placement import LAYERS, Edge
from ptqcore.quantizers import FakeQuant
from ptqcore.quiet import quietly
from ptqcore.task import Task
from ptqcore.timesteps import Moment, Timesteps, timesteps_of

OPSET = 21
BATCH = "batch"
DOMAIN = "ptqcore"
# How PyTorch says that it has traced a model for sizes up to a bound alone.
_BOUND = r"(\w+) = Dim\('\w+', max=(\d+)\)"


@dataclass(frozen=True)
class Activation:
    """A mark on a tensor that its quantizer rounds."""

    edge: Edge
    quantizer: FakeQuant


@dataclass(frozen=True)
class Parameter:
    """A mark on the weight or the bias of one call of a quantized layer."""

    site: Site
    layer: QuantModule


Dimensions = Mapping[str, Mapping[int, str]]
"""Input → which of its dimensions are open → the name of their size."""


@dataclass(frozen=True)
class Marked:
    """The graph; `activations`, `weights` and `biases` say by key what its marks stand for; `largest`: how
    large the open dimensions may be that PyTorch bounds.

    The row of a timestep in the model's tables is a node `Moment` that reads it.
    """

    model: ir.Model
    activations: dict[str, Activation]
    weights: dict[str, Parameter]
    biases: dict[str, Parameter]
    dimensions: Dimensions
    largest: Mapping[str, int]


def trace_marked(model: nn.Module, task: Task, samples: Sequence[Any]) -> Marked:
    """The ONNX graph of a quantized model with marks.

    It takes any batch size, and any size of `task.open_dimensions`, if the model allows that.

    Raises:
        ExportError: if PyTorch cannot trace the model.
    """
    quantizers = quantizers_of(model)
    layers = {path: layer for path, layer in model.named_modules() if isinstance(layer, QuantModule)}
    for layer in layers.values():
        _ = layer.weight  # made now: unpacking it is no part of the graph
    with detached(model), _unrounded(layers.values()) as inputs, torch.no_grad():
        sample = samples[0]
        flow = trace(model, partial(task.forward, model, sample))
        weights, biases = _parameters(layers, flow)
        edges = {} if quantizers is None else {edge: quantizers[edge] for edge in quantizers.names}
        edges |= {
            Edge(one.site, "input"): inputs[one.layer] for one in weights.values() if one.layer in inputs
        }
        activations = {str(edge): Activation(edge, quantizer) for edge, quantizer in edges.items()}
        functions = {one.edge: _marker(key) for key, one in activations.items()}
        functions |= {Edge(one.site, "input", 1): _marker(key) for key, one in weights.items()}
        functions |= {Edge(one.site, "input", 2): _marker(key) for key, one in biases.items()}
        with _unsearched(timesteps_of(model)):
            graph, opened = _to_onnx(_Fed(model, task, sample, functions), task.open_dimensions)
    return Marked(graph, activations, weights, biases, opened.dimensions, opened.largest)


@contextmanager
def _unrounded(layers: Iterable[QuantModule]) -> Iterator[dict[QuantModule, FakeQuant]]:
    """Run layers without the quantizers of their own inputs, which are given by layer."""
    found = {layer: layer.input_quantizer for layer in layers if layer.input_quantizer is not None}
    for layer in found:
        layer.input_quantizer = None
    try:
        yield found
    finally:
        for layer, quantizer in found.items():
            layer.input_quantizer = quantizer


def _parameters(
    layers: Mapping[str, QuantModule], flow: Dataflow
) -> tuple[dict[str, Parameter], dict[str, Parameter]]:
    weights, biases = {}, {}
    for op in flow.ops:
        layer = layers.get(op.site.owner)
        if op.name in LAYERS and layer is not None:
            weights[f"{op.site} weight"] = Parameter(op.site, layer)
            if layer.bias is not None:
                biases[f"{op.site} bias"] = Parameter(op.site, layer)
    return weights, biases


def _marker(key: str) -> TensorFunction:
    def mark(x: Tensor) -> Tensor:
        return torch.onnx.ops.symbolic(
            f"{DOMAIN}::Mark", (x,), {"key": key}, dtype=x.dtype, shape=x.shape, version=1
        )

    return mark


@contextmanager
def _unsearched(timesteps: Timesteps | None) -> Iterator[None]:
    """Leave the search for the row of a timestep open in the graph, as a node."""
    if timesteps is None:
        yield
        return

    def moment(timestep: Tensor) -> Moment:
        wanted = torch.as_tensor(timestep)
        row = torch.onnx.ops.symbolic(
            f"{DOMAIN}::Moment", (wanted,), dtype=torch.int64, shape=wanted.shape, version=1
        )
        return Moment(row, row)

    timesteps.moment = moment  # type: ignore[assignment, method-assign]
    try:
        yield
    finally:
        del timesteps.moment


class _Fed(nn.Module):
    """The model as a function of the tensors of a sample, with a tuple of tensors as its result."""

    def __init__(
        self, model: nn.Module, task: Task, sample: Any, marks: dict[Edge, TensorFunction]
    ) -> None:
        super().__init__()
        self.model = model
        self._task, self._sample, self._marks = task, sample, marks
        self.inputs = named_inputs(model, sample)
        self.train(model.training)

    def forward(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        sample = with_tensors(self._sample, tensors)
        with applying(self.model, "", self._marks):
            return tuple(tensors_in(self._task.forward(self.model, sample)))

    def plain(self, tensors: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """What the model itself makes of the tensors."""
        return tuple(tensors_in(self._task.forward(self.model, with_tensors(self._sample, tensors))))


def _to_onnx(fed: _Fed, open_dimensions: Dimensions) -> tuple[ir.Model, "_Open"]:
    """The graph, and which of its dimensions are open."""
    tensors = list(fed.inputs.values())
    count = len(fed.plain(tensors))
    with quietly(logging.getLogger("torch.onnx")):
        program, opened = _traced_openly(fed, tensors, open_dimensions)
        try:
            onnx_program = torch.onnx.export(
                program,
                dynamo=True,
                opset_version=OPSET,
                input_names=list(fed.inputs),
                output_names=list(output_names(count)),
                verbose=False,
            )
        except Exception as error:
            raise ExportError(
                f"export to ONNX: the model has no ONNX form: {_first_line(error)}"
            ) from error
    assert onnx_program is not None
    model: ir.Model = onnx_program.model
    return model, opened


@dataclass(frozen=True)
class _Open:
    dimensions: Dimensions
    largest: Mapping[str, int] = field(default_factory=dict)


def _traced_openly(
    fed: _Fed, tensors: list[Tensor], asked: Dimensions
) -> tuple[torch.export.ExportedProgram, _Open]:
    """The exported program with as many open dimensions as the model allows: those that are asked for
    and a batch, a batch alone, or none.

    Raises:
        ExportError: if it cannot be traced with fixed shapes either.
    """
    pair = _pair(fed, tensors)
    if pair is not None:
        batch = {name: {0: BATCH} for name, tensor in fed.inputs.items() if tensor.ndim}
        wider = {name: {**sizes, **asked.get(name, {})} for name, sizes in batch.items()}
        for dimensions in (wider, batch) if wider != batch else (batch,):
            try:
                return _traced_within_bounds(fed, pair, dimensions)
            except Exception:
                continue
    try:
        return _traced(fed, tensors, _Open({})), _Open({})
    except Exception as error:
        reason = _first_line(error)
        raise ExportError(f"export to ONNX: PyTorch cannot trace the model: {reason}") from error


def _pair(fed: _Fed, tensors: list[Tensor]) -> list[Tensor] | None:
    """The first row of every tensor twice, if the first dimension is a batch wherever there is one;
    tracers merge sizes of 1, and large batches may take other branches."""
    sizes = {tensor.shape[0] for tensor in tensors if tensor.ndim}
    if len(sizes) != 1 or not sizes.pop():
        return None
    twice = [torch.cat([tensor[:1], tensor[:1]]) if tensor.ndim else tensor for tensor in tensors]
    try:
        outputs = fed.plain(twice)
    except Exception:
        return None
    return twice if all(one.ndim and one.shape[0] == 2 for one in outputs) else None


def _traced_within_bounds(
    fed: _Fed, tensors: list[Tensor], dimensions: Dimensions
) -> tuple[torch.export.ExportedProgram, _Open]:
    """The exported program, its dimensions bounded above where the model branches on their size."""
    opened = _Open(dimensions)
    try:
        return _traced(fed, tensors, opened), opened
    except Exception as error:
        bounds = {name: int(size) for name, size in re.findall(_BOUND, str(error))}
        if not bounds:
            raise
        opened = _Open(dimensions, bounds)
    return _traced(fed, tensors, opened), opened


def _traced(fed: _Fed, tensors: list[Tensor], opened: _Open) -> torch.export.ExportedProgram:
    """The exported program; it raises whatever the tracer raises."""
    dimensions, named = opened.dimensions, dict[str, Any]()
    for name in (name for sizes in dimensions.values() for name in sizes.values()):
        named.setdefault(name, torch.export.Dim(name, max=opened.largest.get(name)))
    shapes = tuple(
        {place: named[name] for place, name in dimensions.get(given, {}).items()} for given in fed.inputs
    )
    return torch.export.export(fed, tuple(tensors), dynamic_shapes=(shapes,), strict=False)


def _first_line(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0][:300] if lines else type(error).__name__
