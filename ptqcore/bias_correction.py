"""The step `bias-correction`: the mean error that rounding brings, taken out of the biases
(empirical, Nagel et al., arXiv 1906.04721, appendix D)."""

from collections.abc import Iterable, Iterator
from functools import partial
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from ptqcore.blocks import Block
from ptqcore.calibration import Calibration
from ptqcore.errors import ModelError
from ptqcore.step import Context, Step, StepOptions

Call = tuple[str, Tensor, int]
"""The path of a layer, the sum of its outputs [channels] in one call, and over how many places."""


class BiasCorrectionOptions(StepOptions):
    """inputs: what flows into the full-precision block that gives the means to reach: what comes from
    the quantized prefix, or from the full-precision model."""

    inputs: Literal["quantized", "full-precision"] = "quantized"


class BiasCorrection(Step):
    """Makes the mean of every output channel what it is in full precision, over the samples.

    One layer after the other, in the order of their calls: what is behind a layer sees it corrected.
    """

    name = "bias-correction"
    shares_samples = True
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
    model, io = calibration.block.model, calibration.io
    calls: list[Call] = []

    def of_samples() -> Iterator[list[Call]]:
        for sample in range(len(io)):
            calls.clear()
            io.run_sample(sample, exact)
            yield list(calls)

    handles = []
    for path in paths:
        hook = partial(_note, calls, path)
        handles.append(model.get_submodule(path).register_forward_hook(hook))
    means: dict[str, _Mean] = {}
    try:
        for of_sample in calibration.share.in_order(of_samples()):
            for path, total, count in of_sample:
                means.setdefault(path, _Mean()).update(total, count)
    finally:
        for handle in handles:
            handle.remove()
    return {path: mean.value for path, mean in means.items()}


class _Mean:
    def __init__(self) -> None:
        self._sum: Any = 0.0
        self._count = 0

    def update(self, total: Tensor, count: int) -> None:
        self._sum = self._sum + total
        self._count += count

    @property
    def value(self) -> Tensor:
        return self._sum / max(self._count, 1)


def _note(calls: list[Call], path: str, layer: nn.Module, args: Any, output: Tensor) -> None:
    linear = hasattr(layer, "in_features")
    rows = output.movedim(-1 if linear else 1, -1).flatten(0, -2)
    calls.append((path, rows.sum(0, dtype=torch.float64), len(rows)))
