"""ONNX with QuantizeLinear and DequantizeLinear, which ONNX Runtime and OpenVINO run in integers."""

from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ptqcore.errors import ExportError
from ptqcore.export.base import Exporter
from ptqcore.export.parity import compare
from ptqcore.modules import QuantModule
from ptqcore.recipe import QuantSection
from ptqcore.report.record import Verification
from ptqcore.spec import QuantSpec
from ptqcore.task import Task

MODEL_FILE = "model.onnx"
_DATA_FILE = "model.onnx.data"
# A protobuf file holds 2 GiB; larger models keep their constants beside it.
_LARGEST_FILE = 1_900_000_000


class OnnxQDQ(Exporter):
    """One `model.onnx` that takes the tensors of a sample and returns what the model returns.

    Activations: static ranges per tensor, of the scope `dataflow`. Weights: 2 to 8 bits, per tensor or
    channel; linear layers with float inputs also in groups.
    """

    name = "onnx-qdq"

    def check(self, quant: QuantSection) -> None:
        for package in ("onnx", "onnxscript"):
            if find_spec(package) is None:
                raise ExportError(
                    f"export onnx-qdq needs {package}, which is not installed: pip install 'ptqcore[onnx]'"
                )
        _refuse_weights(quant.weights.spec)
        activations = quant.activations
        if activations is None:
            return
        _refuse_activations(activations.spec)
        if quant.scope != "dataflow":
            raise ExportError(
                "export onnx-qdq quantizes whole networks, and quant.scope is layers: set quant.scope to "
                "dataflow"
            )
        if quant.weights.granularity == "group":
            raise ExportError(
                "export onnx-qdq: no engine multiplies weights in groups with quantized activations, set "
                "quant.weights.granularity to channel, or quant.activations to null"
            )

    def check_layers(self, quant: QuantSection, layers: dict[str, nn.Module]) -> None:
        for path, layer in layers.items():
            if quant.weights.granularity == "group" and not isinstance(layer, nn.Linear):
                raise ExportError(
                    f"export onnx-qdq holds weights in groups for linear layers only, and {path} is a "
                    f"{type(layer).__name__}: set quant.weights.granularity to channel, or add {path} to "
                    "quant.ignore"
                )
            if layer.get_parameter("weight").dtype != torch.float32:
                raise ExportError(
                    f"export onnx-qdq holds models in float32, and the weight of {path} is "
                    f"{layer.get_parameter('weight').dtype}: load the model in float32"
                )

    def export(self, model: nn.Module, task: Task, samples: Sequence[Any], folder: Path) -> None:
        _refuse_model(model)
        # The packages of the optional dependency are imported by these modules alone.
        from ptqcore.export.onnx_activations import Activations
        from ptqcore.export.onnx_edit import Editor, save
        from ptqcore.export.onnx_layers import place_layers
        from ptqcore.export.onnx_patterns import (
            finish,
            name_nodes,
            pool_globally,
            protect_float_layers,
            unfold_upsampling,
        )
        from ptqcore.export.onnx_trace import trace_marked

        marked = trace_marked(model, task, samples)
        editor = Editor(marked.model)
        name_nodes(editor)
        pool_globally(editor)
        grids = Activations(editor, marked.activations).grids
        unfold_upsampling(editor)
        place_layers(editor, marked.weights, marked.biases, grids)
        protect_float_layers(editor)
        finish(editor)
        save(editor.model, folder / MODEL_FILE, _LARGEST_FILE, _DATA_FILE)

    def verify(self, model: nn.Module, task: Task, samples: Sequence[Any], folder: Path) -> Verification:
        from ptqcore.export.onnx_read import fixed_inputs, largest_difference

        path = folder / MODEL_FILE
        difference = largest_difference(path, model)
        notes = [f"takes {name} in this shape only: {shape}" for name, shape in fixed_inputs(path).items()]
        return Verification(difference, compare(path, model, task, samples), tuple(notes))


def _refuse_weights(spec: QuantSpec) -> None:
    if spec.is_float:
        raise ExportError(
            f"export onnx-qdq holds integers, and quant.weights.dtype is {spec.dtype}: set it to int"
        )


def _refuse_activations(spec: QuantSpec) -> None:
    if spec.is_float:
        raise ExportError(
            f"export onnx-qdq holds integers, and quant.activations.dtype is {spec.dtype}: set it to int"
        )
    if spec.dynamic or spec.granularity != "tensor":
        raise ExportError(
            "export onnx-qdq holds static ranges, and quant.activations.dynamic is true: set it to false, "
            "quant.activations.granularity to tensor and quant.scope to dataflow"
        )
    if spec.signed_scale:
        raise ExportError(
            "export onnx-qdq: engines take no negative scale of activations, set "
            "quant.activations.signed_scale to false"
        )


def _refuse_model(model: nn.Module) -> None:
    """Refuse a model that the format cannot hold.

    Raises:
        ExportError: naming the layer.
    """
    layers = {path: layer for path, layer in model.named_modules() if isinstance(layer, QuantModule)}
    if not layers:
        raise ExportError("export onnx-qdq: the model has no quantized layer")
    for path, layer in layers.items():
        _refuse_weights(layer.weight_spec)
        if layer.input_quantizer is not None:
            raise ExportError(
                f"export onnx-qdq cannot hold the input grid of {path} alone: set quant.scope to dataflow"
            )
