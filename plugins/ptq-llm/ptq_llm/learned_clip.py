"""The step `learned-clip`: learnable weight clipping (OmniQuant, Shao et al., arXiv 2308.13137,
section 3.2)."""

from functools import partial
from typing import ClassVar

from pydantic import Field
from torch import Tensor, nn

from ptq_llm.learned_range import LearnedRange
from ptq_llm.straight_through import round_dynamic
from ptq_llm.tuning import BlockOutput, TensorFunction, TuneOptions, learning_rate, tune
from ptqcore import Block, Calibration, FakeQuant, Step, StepOptions

_WAY = 5.0


class LearnedClipOptions(TuneOptions):
    """rate: the learning rate. null is the paper's, 0.01 where only weights are rounded, else 0.001; where
    there are few updates, as much as lets a variable move by 5 in all of them: from the whole range to
    a quarter of it."""

    rate: float | None = Field(default=None, gt=0)


class LearnedClip(Step):
    """Learns the range of every weight so that the block with rounded weights (and inputs, if the recipe
    rounds them) returns what the full-precision block does.

    It begins with the ranges that a step before, or the recipe's observer, has chosen, and leaves them if
    nothing better is found.
    """

    name = "learned-clip"
    Options: ClassVar[type[StepOptions]] = LearnedClipOptions
    options: LearnedClipOptions
    stage = "range"
    needs_exact = True

    def block(self, block: Block, calibration: Calibration) -> None:
        layers = {p: layer for p, layer in self.context.targets(block).items() if type(layer) is nn.Linear}
        ranges = {path: self._start(path, layer, calibration) for path, layer in layers.items()}

        def parameters() -> dict[str, Tensor]:
            return {f"{path}.weight": ranges[path].rounded(layers[path].weight) for path in layers}

        rounding = {path: function for path in layers if (function := self._rounding(path, calibration))}
        output = BlockOutput(calibration, self.options.inputs, parameters, rounding)
        seed, epochs = self.context.seed, self.options.epochs
        least = 1e-3 if rounding or calibration.edges else 1e-2
        rate = self.options.rate or learning_rate(least, _WAY, output, epochs)
        variables = [(learned.variable, rate) for learned in ranges.values()]
        calibration.losses += tune(variables, output, block, epochs, seed, self.name)
        for path, learned in ranges.items():
            calibration.set_weight_range(path, *(end.detach() for end in learned.ends()))

    def _start(self, path: str, layer: nn.Linear, calibration: Calibration) -> LearnedRange:
        low, high = calibration.weight_range(path, layer)
        return LearnedRange(layer.weight, low, high, self.context.grids.weights(path).spec)

    def _rounding(self, path: str, calibration: Calibration) -> TensorFunction | None:
        """What rounds the input of a layer, as the recipe says."""
        quant = self.context.grids.inputs(path)
        if quant is None:
            return None
        if quant.dynamic:
            return partial(round_dynamic, spec=quant.spec)
        observer = calibration.observer(path)
        if observer is None:
            return None
        quantizer = FakeQuant(quant.spec)
        quantizer.set_range(*observer.range())
        return quantizer
