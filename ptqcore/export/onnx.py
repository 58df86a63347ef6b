"""ONNX files: what every exporter to ONNX shares, and the standard's own quantized form."""

from abc import abstractmethod
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from ptqcore.errors import ExportError
from ptqcore.export.base import Exporter
from ptqcore.export.parity import compare, in_turn
from ptqcore.modules import QuantModule
from ptqcore.recipe import QuantSection
from ptqcore.report.record import Verification
from ptqcore.spec import QuantSpec
from ptqcore.task import Task
from ptqcore.timesteps import Timesteps, Unseen, timesteps_of

if TYPE_CHECKING:  # the packages of the optional dependency are imported where a model is exported
    from ptqcore.export.onnx_calls import LayerCall
    from ptqcore.export.onnx_edit import OnnxEditor

MODEL_FILE = "model.onnx"
_DATA_FILE = "model.onnx.data"
# A protobuf file holds 2 GiB; larger models keep their constants beside it.
_LARGEST_FILE = 1_900_000_000


class OnnxExporter(Exporter):
    """One `model.onnx` that takes the tensors of a sample and returns what the model returns.

    Inputs have the names of the arguments of the model's `forward`; a batch, and what the task calls
    `open_dimensions`, may have any size. Constants of more than 1.9 GB lie beside it, in
    `model.onnx.data`. Subclasses say how quantized layers are stored and read back.
    """

    holds_attachments = True
    holds_timesteps = True

    @abstractmethod
    def place(self, editor: "OnnxEditor", calls: "Sequence[LayerCall]") -> None:
        """Put every call of a quantized layer into the graph, in place of its product and marks."""

    @abstractmethod
    def difference(self, path: Path, model: nn.Module) -> float:
        """The largest absolute difference between the layers in a file and the model's.

        Raises:
            ExportError: if a layer is missing or has another shape.
        """

    def check(self, quant: QuantSection) -> None:
        for package in ("onnx", "onnxscript"):
            if find_spec(package) is None:
                raise ExportError(
                    f"export {self.name} needs {package}, which is not installed: pip install "
                    "'ptqcore[onnx]'"
                )

    def check_layers(self, quant: QuantSection, layers: dict[str, nn.Module]) -> None:
        for path, layer in layers.items():
            dtype = layer.get_parameter("weight").dtype
            if dtype != torch.float32:
                raise ExportError(
                    f"export {self.name} holds models in float32, and the weight of {path} is {dtype}: "
                    "load the model in float32"
                )

    def check_timesteps(self, unseen: Unseen) -> None:
        if unseen == "interpolate":
            raise ExportError(
                f"export {self.name} takes the nearest timestep for one that it has no row for: set what "
                "the task does about unseen timesteps to nearest, not to interpolate"
            )

    def export(self, model: nn.Module, task: Task, samples: Sequence[Any], folder: Path) -> None:
        if not any(isinstance(layer, QuantModule) for layer in model.modules()):
            raise ExportError(f"export {self.name}: the model has no quantized layer")
        from ptqcore.export.onnx_activations import Activations
        from ptqcore.export.onnx_calls import find_calls
        from ptqcore.export.onnx_edit import OnnxEditor, save
        from ptqcore.export.onnx_patterns import (
            finish,
            keep_roundings_before_sums,
            name_nodes,
            pool_globally,
            protect_float_layers,
            unfold_upsampling,
        )
        from ptqcore.export.onnx_products import multiply_codes
        from ptqcore.export.onnx_timesteps import look_up
        from ptqcore.export.onnx_trace import trace_marked

        marked = trace_marked(model, task, samples)
        editor = OnnxEditor(marked.model)
        name_nodes(editor)
        pool_globally(editor)
        timesteps = timesteps_of(model)
        timed = None if timesteps is None else look_up(editor, timesteps)
        activations = Activations(editor, marked.activations, timed)
        unfold_upsampling(editor)
        multiply_codes(editor, activations)
        self.place(editor, find_calls(editor, marked, activations))
        editor.tidy()
        keep_roundings_before_sums(editor)
        protect_float_layers(editor)
        finish(editor, marked.dimensions, marked.largest)
        save(editor.model, folder / MODEL_FILE, _LARGEST_FILE, _DATA_FILE)

    def verify(self, model: nn.Module, task: Task, samples: Sequence[Any], folder: Path) -> Verification:
        from ptqcore.export.onnx_read import fixed_dimensions

        path = folder / MODEL_FILE
        difference, engines = self.difference(path, model), compare(path, model, task, samples)
        timesteps, notes = timesteps_of(model), fixed_dimensions(path, task.open_dimensions)
        if timesteps is not None:
            notes += _timestep_notes(timesteps, task, samples, max(engine.samples for engine in engines))
        return Verification(difference, engines, tuple(notes))


def _timestep_notes(timesteps: Timesteps, task: Task, samples: Sequence[Any], count: int) -> list[str]:
    """Sentences on a file with tables for each timestep, compared on so many samples."""
    known = len(timesteps.values)
    seen = {task.timestep(sample) for sample in in_turn(task, samples)[:count]}
    notes = [f"compared at {len(seen)} of the {known} timesteps that it has rows for"]
    if timesteps.unseen == "refuse":
        notes.append("computes any other timestep as the nearest of these, where the model refuses it")
    else:
        notes.append("computes any other timestep with the rows of the nearest of these")
    return notes


class OnnxQDQ(OnnxExporter):
    """QuantizeLinear and DequantizeLinear, which ONNX Runtime and OpenVINO run in integers.

    Activations: static ranges per tensor, or one for each timestep, which is an input of the graph; of
    the scope `dataflow`, or of the scope `layers` where quantized layers are linear or convolutions of one
    group. Weights: 2 to 8 bits, per tensor or channel; linear layers with float inputs also in groups.
    """

    name = "onnx-qdq"

    def check(self, quant: QuantSection) -> None:
        super().check(quant)
        _refuse_weights(quant.weights.spec)
        activations = quant.activations
        if activations is None:
            return
        _refuse_activations(activations.spec)
        if quant.weights.granularity == "group":
            raise ExportError(
                "export onnx-qdq: no engine multiplies weights in groups with quantized activations, set "
                "quant.weights.granularity to channel, or quant.activations to null"
            )

    def check_layers(self, quant: QuantSection, layers: dict[str, nn.Module]) -> None:
        super().check_layers(quant, layers)
        for path, layer in layers.items():
            if isinstance(layer, nn.Linear):
                continue
            if quant.weights.granularity == "group":
                raise ExportError(
                    f"export onnx-qdq holds weights in groups for linear layers only, and {path} is a "
                    f"{type(layer).__name__}: set quant.weights.granularity to channel, or add {path} to "
                    "quant.ignore"
                )
            alone = isinstance(layer, nn.Conv2d) and layer.groups == 1
            if quant.activations is not None and quant.scope != "dataflow" and not alone:
                what = f"a {type(layer).__name__}" + (" in groups" if isinstance(layer, nn.Conv2d) else "")
                raise ExportError(
                    f"export onnx-qdq: engines compute {path}, {what}, in integers only where its output "
                    "is quantized too, and quant.scope is layers: set quant.scope to dataflow"
                )

    def place(self, editor: "OnnxEditor", calls: "Sequence[LayerCall]") -> None:
        from ptqcore.export.onnx_layers import place_layers

        for call in calls:
            _refuse_weights(call.layer.weight_spec)
        place_layers(editor, calls)

    def difference(self, path: Path, model: nn.Module) -> float:
        from ptqcore.export.onnx_read import largest_difference

        return largest_difference(path, model)


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
            "and quant.activations.granularity to tensor"
        )
    if spec.signed_scale:
        raise ExportError(
            "export onnx-qdq: engines take no negative scale of activations, set "
            "quant.activations.signed_scale to false"
        )
