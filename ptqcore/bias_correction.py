"""The step `bias-correction`: the mean error that rounding brings, taken out of the biases
(empirical, Nagel et al., arXiv 1906.04721, appendix D)."""

from collections.abc import Iterable
from functools import partial
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from ptqcore.blocks import Block
from ptqcore.calibration import Calibration
from ptqcore.errors import ModelError
from ptqcore.step import Context, Step, StepOptions


class BiasCorrectionOptions(StepOptions):
    """inputs: what flows into the full-precision block that gives the means to reach: what comes from
    the quantized prefix, or from the full-precision model."""

    inputs: Literal["quantized", "full-precision"] = "quantized"


class BiasCorrection(Step):
    """Makes the mean of every output channel what it is in full precision, over the samples.

    One layer after the other, in the order of their calls: what is behind a layer sees it corrected.
    """

    name = "bias-correction"
    stage = "correct"
    Options: ClassVar[type[StepOptions]] = BiasCorrectionOptions
    options: BiasCorrectionOptions

    def __init__(self, options: BiasCorrectionOptions, context: Context) -> None:
        super().__init__(options, context)
        self.needs_exact = options.inputs == "full-precision"

    def before(self, block: Block, calibration: Calibration) -> None:
        self._wanted = output_means(calibration, self.context.targets(block), self.needs_exact)

    def block(self, block: Block, calibration: Calibration) -> None:
        layers = block.quantized_layers()
        for path, wanted in self._wanted.items():
            if path not in layers:
                raise ModelError(
                    f"step bias-correction finds {path!r} in full precision: put it behind the step "
                    "that quantizes"
                )
            found = output_means(calibration, [path])[path]
            bias = layers[path].ensure_bias()
            bias.data = (bias.double() - (found - wanted)).to(bias.dtype)


def output_means(calibration: Calibration, paths: Iterable[str], exact: bool = False) -> dict[str, Tensor]:
    """The mean of every output channel [channels] of layers of a block, in the order of their calls.

    Args:
        calibration: of the block, which is run as it now is on every sample.
        paths: the layers.
        exact: whether the inputs come from the full-precision model.
    """
    model = calibration.block.model
    means: dict[str, _Mean] = {}
    handles = []
    for path in paths:
        hook = partial(_note, means, path)
        handles.append(model.get_submodule(path).register_forward_hook(hook))
    try:
        for _ in calibration.io.run(exact):
            pass
    finally:
        for handle in handles:
            handle.remove()
    return {path: mean.value for path, mean in means.items()}


class _Mean:
    def __init__(self) -> None:
        self._sum: Any = 0.0
        self._count = 0

    def update(self, x: Tensor, channel: int) -> None:
        rows = x.movedim(channel, -1).flatten(0, -2)
        self._sum = self._sum + rows.sum(0, dtype=torch.float64)
        self._count += len(rows)

    @property
    def value(self) -> Tensor:
        return self._sum / max(self._count, 1)


def _note(means: dict[str, _Mean], path: str, layer: nn.Module, args: Any, output: Tensor) -> None:
    linear = hasattr(layer, "in_features")
    means.setdefault(path, _Mean()).update(output, -1 if linear else 1)
