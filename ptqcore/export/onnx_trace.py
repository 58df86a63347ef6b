"""From a quantized model to an ONNX graph whose grids are still open: marks stand where they belong.

The model is traced without the quantizers of its activations. In their place, and around the weight and the
bias of every quantized layer, stands a node `Mark` that does nothing; what it stands for is kept
beside the graph. So nothing of the rounding has to be recognised in the graph.
"""

import logging
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
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
from ptqcore.task import Task

OPSET = 21
BATCH = "batch"
DOMAIN = "ptqcore"


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
    """The graph; `activations`, `weights` and `biases` say by key what its marks stand for."""

    model: ir.Model
    activations: dict[str, Activation]
    weights: dict[str, Parameter]
    biases: dict[str, Parameter]
    dimensions: Dimensions


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
        graph, dimensions = _to_onnx(_Fed(model, task, sample, functions), task.open_dimensions)
    return Marked(graph, activations, weights, biases, dimensions)


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


def _to_onnx(fed: _Fed, open_dimensions: Dimensions) -> tuple[ir.Model, Dimensions]:
    """The graph, and which of its dimensions are open."""
    tensors = list(fed.inputs.values())
    count = len(fed.plain(tensors))
    with _quietly():
        program, dimensions = _traced_openly(fed, tensors, open_dimensions)
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
    return model, dimensions


def _traced_openly(
    fed: _Fed, tensors: list[Tensor], asked: Dimensions
) -> tuple[torch.export.ExportedProgram, Dimensions]:
    """The exported program with as many open dimensions as the model allows: those that are asked for
    and a batch, a batch alone, or none.

    Raises:
        ExportError: if it cannot be traced with fixed shapes either.
    """
    doubled = _doubled(fed, tensors)
    if doubled is not None:
        batch = {name: {0: BATCH} for name in fed.inputs}
        wider = {name: {**sizes, **asked.get(name, {})} for name, sizes in batch.items()}
        for dimensions in (wider, batch):
            try:
                return _traced(fed, doubled, dimensions), dimensions
            except Exception:
                continue
    try:
        return _traced(fed, tensors, {}), {}
    except Exception as error:
        reason = _first_line(error)
        raise ExportError(f"export to ONNX: PyTorch cannot trace the model: {reason}") from error


def _doubled(fed: _Fed, tensors: list[Tensor]) -> list[Tensor] | None:
    """Every tensor twice along its first dimension, if that is a batch; tracers merge sizes of 1."""
    sizes = {tensor.shape[0] if tensor.ndim else 0 for tensor in tensors}
    if len(sizes) != 1 or not (size := sizes.pop()):
        return None
    twice = [torch.cat([tensor, tensor]) for tensor in tensors]
    try:
        outputs = fed.plain(twice)
    except Exception:
        return None
    return twice if all(one.ndim and one.shape[0] == 2 * size for one in outputs) else None


def _traced(fed: _Fed, tensors: list[Tensor], dimensions: Dimensions) -> torch.export.ExportedProgram:
    """The exported program; it raises whatever the tracer raises."""
    named: dict[str, Any] = {}
    for name in (name for sizes in dimensions.values() for name in sizes.values()):
        named.setdefault(name, torch.export.Dim(name))
    shapes = tuple(
        {place: named[name] for place, name in dimensions.get(given, {}).items()} for given in fed.inputs
    )
    return torch.export.export(fed, tuple(tensors), dynamic_shapes=(shapes,), strict=False)


def _first_line(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0][:300] if lines else type(error).__name__


@contextmanager
def _quietly() -> Iterator[None]:
    """Without the tracer's warnings, which concern its own code."""
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)
