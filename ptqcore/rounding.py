"""The step `round`: every weight to the nearest value of the grid that its observer chose."""

from ptqcore.blocks import Block
from ptqcore.calibration import Calibration
from ptqcore.modules import weight_rows
from ptqcore.packed import QuantizedTensor
from ptqcore.step import Step


class Round(Step):
    """Rounding to nearest: the weights from their observer's range, static inputs from calibration."""

    name = "round"
    stage = "quantize"
    data_free = True

    def block(self, block: Block, calibration: Calibration) -> None:
        for path, layer in self.context.targets(block).items():
            spec = self.context.grids.weights(path).spec
            rounded = QuantizedTensor.from_range(
                weight_rows(layer), *calibration.weight_range(path, layer), spec
            )
            self.quantize_layer(block, calibration, path, rounded)
