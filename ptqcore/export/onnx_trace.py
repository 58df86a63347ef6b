"""From a quantized model to an ONNX graph whose grids are still open: marks stand where they belong.

The model is traced without its activation quantizers. In their place, and around the weight and the
bias of every quantized layer, stands a node `Mark` that does nothing; what it stands for is kept
beside the graph. So nothing of the rounding has to be recognised in the graph.
"""

import logging
import warnings
from collections.abc import Iterator, Sequence
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


@dataclass(frozen=True)
class Marked:
    """The graph; `activations`, `weights` and `biases` say by key what its marks stand for."""

    model: ir.Model
    activations: dict[str, Activation]
    weights: dict[str, Parameter]
    biases: dict[str, Parameter]


def trace_marked(model: nn.Module, task: Task, samples: Sequence[Any]) -> Marked:
    """The ONNX graph of a quantized model with marks, for any batch size if the model allows that.

    Raises:
        ExportError: if PyTorch cannot trace the model.
    """
    quantizers = quantizers_of(model)
    for layer in model.modules():
        if isinstance(layer, QuantModule):
            _ = layer.weight  # made now: unpacking it is no part of the graph
    with detached(model), torch.no_grad():
        sample = samples[0]
        flow = trace(model, partial(task.forward, model, sample))
        weights, biases = _parameters(model, flow)
        activations = (
            {} if quantizers is None else {str(e): Activation(e, quantizers[e]) for e in quantizers.names}
        )
        functions = {one.edge: _marker(key) for key, one in activations.items()}
        functions |= {Edge(one.site, "input", 1): _marker(key) for key, one in weights.items()}
        functions |= {Edge(one.site, "input", 2): _marker(key) for key, one in biases.items()}
        graph = _to_onnx(_Fed(model, task, sample, functions))
    return Marked(graph, activations, weights, biases)


def _parameters(model: nn.Module, flow: Dataflow) -> tuple[dict[str, Parameter], dict[str, Parameter]]:
    weights, biases = {}, {}
    for op in flow.ops:
        if op.name not in LAYERS:
            continue
        layer = model.get_submodule(op.site.owner)
        if isinstance(layer, QuantModule):
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


def _to_onnx(fed: _Fed) -> ir.Model:
    """Trace with a batch dimension if the model has one, and else with the shapes of the sample."""
    tensors = list(fed.inputs.values())
    count = len(fed.plain(tensors))
    doubled = _doubled(fed, tensors)
    with _quietly():
        program = None if doubled is None else _traced(fed, doubled, dynamic=True)
        if program is None:
            program = _traced(fed, tensors, dynamic=False)
        assert program is not None
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
                f"export onnx-qdq: the model has no ONNX form: {_first_line(error)}"
            ) from error
    assert onnx_program is not None
    model: ir.Model = onnx_program.model
    return model


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


def _traced(fed: _Fed, tensors: list[Tensor], dynamic: bool) -> torch.export.ExportedProgram | None:
    """The exported program; None if the batch dimension cannot be left open.

    Raises:
        ExportError: if it cannot be traced with fixed shapes either.
    """
    batch = torch.export.Dim(BATCH)
    shapes = (({0: batch},) * len(tensors),) if dynamic else None
    try:
        return torch.export.export(fed, tuple(tensors), dynamic_shapes=shapes, strict=False)
    except Exception as error:
        if dynamic:
            return None
        raise ExportError(
            f"export onnx-qdq: PyTorch cannot trace the model: {_first_line(error)}"
        ) from error


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
