"""The step `error-feedback-round`: what rounding one column loses, the next column makes up for."""

from dataclasses import replace
from fnmatch import fnmatchcase
from typing import ClassVar

import torch
from pydantic import Field
from torch import Tensor, nn

from ptqcore import Block, Calibration, QuantizedTensor, QuantSpec, Step, StepOptions


class ErrorFeedbackOptions(StepOptions):
    """strength: share of a column's rounding error that is added to the next; layers: a glob of paths."""

    strength: float = Field(default=0.5, ge=0, le=1)
    layers: str = "*"


class ErrorFeedbackRound(Step):
    """Rounds each row from left to right and pushes `strength` times the error into the next column."""

    name = "error-feedback-round"
    Options: ClassVar[type[StepOptions]] = ErrorFeedbackOptions
    options: ErrorFeedbackOptions

    def block(self, block: Block, calibration: Calibration) -> None:
        for path, layer in self.context.targets(block).items():
            if fnmatchcase(path, self.options.layers):
                self._quantize(block, calibration, path, layer)

    def _quantize(self, block: Block, calibration: Calibration, path: str, layer: nn.Module) -> None:
        weight, spec = layer.get_parameter("weight"), self.context.quant.weights.spec
        value_range = calibration.weight_range(path, layer)
        rounded = round_with_feedback(weight, value_range, spec, self.options.strength)
        self.quantize_layer(block, calibration, path, rounded)


def round_with_feedback(
    weight: Tensor, value_range: tuple[Tensor, Tensor], spec: QuantSpec, strength: float
) -> QuantizedTensor:
    """Round the columns of weight [rows, ...] in turn, on the grid that covers `value_range`.

    A column alone has one scale a row, whatever the granularity of the whole.
    """
    low, high = value_range
    whole = QuantizedTensor.from_range(weight, low, high, spec)
    column_spec = spec.model_copy(update={"granularity": "channel", "group_size": None})
    matrix = weight.detach().flatten(1)
    rows, columns = matrix.shape
    size = spec.group_size or columns
    codes = torch.empty_like(whole.codes)
    error = torch.zeros(rows, 1)
    for column in range(columns):
        wanted = matrix[:, column, None].float() + strength * error
        ends = (end[:, column // size, None].expand(rows, 1) for end in (low, high))
        rounded = QuantizedTensor.from_range(wanted.to(weight.dtype), *ends, column_spec)
        codes[:, column] = rounded.codes[:, 0]
        error = wanted - rounded.dequantize().float()
    return replace(whole, codes=codes)
