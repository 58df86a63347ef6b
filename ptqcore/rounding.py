"""The step `round`: every weight to the nearest value of the grid that its observer chose."""

from torch import Tensor

from ptqcore.blocks import Block
from ptqcore.calibration import Calibration
from ptqcore.distributed import divided
from ptqcore.modules import weight_rows
from ptqcore.packed import QuantizedTensor
from ptqcore.step import Step


class Round(Step):
    """Rounding to nearest: the weights from their observer's range, static inputs from calibration."""

    name = "round"
    stage = "quantize"
    data_free = True
    shares_samples = True

    def block(self, block: Block, calibration: Calibration) -> None:
        layers = self.context.targets(block)
        weights = {path: weight_rows(layer) for path, layer in layers.items()}
        specs = {path: self.context.grids.weights(path).spec for path in layers}

        def nearest(path: str) -> tuple[Tensor, Tensor, Tensor | None]:
            ends = calibration.weight_range(path, layers[path])
            return QuantizedTensor.from_range(weights[path], *ends, specs[path]).tensors

        found = divided(list(layers), nearest, lambda path: weights[path].numel())
        for path, tensors in zip(layers, found, strict=True):
            record = QuantizedTensor(*tensors, specs[path], tuple(weights[path].shape))
            self.quantize_layer(block, calibration, path, record)
