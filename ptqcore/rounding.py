"""The step `round`: every weight to the nearest value of the grid that its observer chose."""

from torch import nn

from ptqcore.blocks import Block
from ptqcore.calibration import Calibration
from ptqcore.errors import ModelError
from ptqcore.packed import QuantizedTensor
from ptqcore.quantizers import FakeQuant
from ptqcore.step import Step


class Round(Step):
    """Rounding to nearest: the weights from their observer's range, static inputs from calibration."""

    name = "round"

    def block(self, block: Block, calibration: Calibration) -> None:
        for path, layer in self.context.targets(block).items():
            self._quantize(block, calibration, path, layer)

    def _quantize(self, block: Block, calibration: Calibration, path: str, layer: nn.Module) -> None:
        weights, activations = self.context.quant.weights, self.context.quant.activations
        weight = layer.get_parameter("weight").detach()
        observer = self.context.observer(weights)
        observer.update(weight.flatten(1).float())
        rounded = QuantizedTensor.from_range(weight, *observer.range(), weights.spec)
        inputs = None if activations is None or activations.dynamic else calibration.observer(path)
        if activations is not None and not activations.dynamic and inputs is None:
            raise ModelError(
                f"layer {path!r} received no calibration input, so its static input range is unknown: "
                "use more samples, dynamic activations, or add it to quant.ignore"
            )
        quantized = block.quantize_layer(path, rounded, None if activations is None else activations.spec)
        if inputs is not None and isinstance(quantized.input_quantizer, FakeQuant):
            quantized.input_quantizer.set_range(*inputs.range())
