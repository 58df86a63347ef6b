"""ONNX files in which each quantized linear layer is one node of an operator that unpacks its weight."""

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from torch import nn

from ptqcore.errors import ExportError
from ptqcore.export.onnx import OnnxExporter
from ptqcore.modules import QuantLinear
from ptqcore.recipe import QuantSection

if TYPE_CHECKING:
    from ptqcore.export.onnx_calls import LayerCall
    from ptqcore.export.onnx_edit import OnnxEditor


@dataclass(frozen=True)
class OnnxProduct:
    """A node that multiplies its first input by a packed weight.

    op, domain: the operator. constants: its further inputs in order, by name. attributes: by name.
    """

    op: str
    domain: str
    constants: Mapping[str, np.ndarray]
    attributes: Mapping[str, int]


class OnnxWeightOnly(OnnxExporter):
    """An `OnnxExporter` of linear layers with float inputs. Subclasses say which node holds a layer.

    Constants of a layer are named behind its path, and its node has its path as name; a bias is added by
    an `Add` behind it, as the constant `PATH.bias`.
    """

    @abstractmethod
    def product(self, path: str, layer: QuantLinear) -> OnnxProduct:
        """The node that holds the weight of a layer [out, in].

        Raises:
            ExportError: naming the layer, if it cannot.
        """

    def check(self, quant: QuantSection) -> None:
        super().check(quant)
        if quant.activations is not None:
            raise ExportError(
                f"export {self.name} keeps activations in floating point: set quant.activations to null, "
                "or export onnx-qdq"
            )

    def check_layers(self, quant: QuantSection, layers: dict[str, nn.Module]) -> None:
        super().check_layers(quant, layers)
        for path, layer in layers.items():
            if not isinstance(layer, nn.Linear):
                raise ExportError(
                    f"export {self.name} holds linear layers only, and {path} is a {type(layer).__name__}: "
                    "add it to quant.ignore"
                )

    def place(self, editor: "OnnxEditor", calls: "Sequence[LayerCall]") -> None:
        for call in calls:
            path, layer = call.path, call.layer
            if not isinstance(layer, QuantLinear) or call.grid is not None:
                raise ExportError(f"export {self.name} holds linear layers with float inputs, not {path}")
            made = self.product(path, layer)
            constants = [editor.constant(f"{path}.{key}", array) for key, array in made.constants.items()]
            result = editor.add(
                made.op, [call.input, *constants], call.name, domain=made.domain, **made.attributes
            )
            bias = None
            if layer.bias is not None:
                bias = editor.constant(f"{path}.bias", layer.bias.detach().cpu().numpy())
            call.replace(editor, result, bias)
