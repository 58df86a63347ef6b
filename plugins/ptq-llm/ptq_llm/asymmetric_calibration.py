"""The step `asymmetric-calibration`: weights that give full-precision outputs from quantized inputs.

Methods that quantize layer by layer aim at W x̂ for what the quantized prefix hands on, so that errors
add up from block to block. With x from the full-precision model, the least squares
Σ ‖W* x̂ − W x‖² + λ ‖W* − W‖² aims at what should have been (the asymmetric calibration of GPTAQ, Li et
al., arXiv 2504.02692, section 4.1, solved for the whole weight before it is rounded).
"""

import math
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from operator import itemgetter
from typing import ClassVar

import torch
from pydantic import Field
from torch import Tensor, nn

from ptq_llm.rescale import set_parameter
from ptq_llm.sequence import in_sequence
from ptqcore import Block, Calibration, Dataflow, Step, StepOptions

_PANEL = 256  # columns of a product that one process adds up

Recorded = list[list[Tensor]]
"""What a layer reads, call by call, for every sample of this process."""


class AsymmetricCalibrationOptions(StepOptions):
    """damping: λ, as a share of the mean diagonal of the inputs' Gram: the larger, the closer weights stay
    to what they were."""

    damping: float = Field(default=0.1, gt=0)


class AsymmetricCalibration(Step):
    """Moves the weights of one layer after the other, in the order in which they run, while their block
    still computes in full precision; layers that no token reaches stay as they are."""

    name = "asymmetric-calibration"
    shares_samples = True
    Options: ClassVar[type[StepOptions]] = AsymmetricCalibrationOptions
    options: AsymmetricCalibrationOptions
    stage = "transform"
    needs_exact = True

    def prepare(self, model: nn.Module, flow: Dataflow, run: Callable[[], object]) -> None:
        """Keep the map: it says which layers of a block come before which."""
        self._flow = flow

    def transform(self, block: Block, calibration: Calibration) -> None:
        targets = self.context.targets(block)
        stages = [self._sharing(calibration, paths) for paths in in_sequence(self._flow, block, targets)]
        calibration.changed()  # so that no Gram is kept meanwhile
        every = [paths[0] for stage in stages for paths in stage]
        exact = calibration.record_by_sample(every, exact=True)
        for stage in stages:
            inputs = calibration.record_by_sample([paths[0] for paths in stage])
            for paths in stage:
                wanted, found = exact.pop(paths[0]), inputs.pop(paths[0])
                if not _same_shapes(calibration, wanted, found):
                    continue
                layers = [targets[path] for path in paths]
                weights = [layer.get_parameter("weight").data for layer in layers]
                difference, gram = products(calibration, wanted, found)
                difference -= gram
                del wanted, found
                changes = corrections(weights, gram, difference, self.options.damping)
                del gram, difference
                for layer, weight, change in zip(layers, weights, changes, strict=True):
                    set_parameter(layer, "weight", (weight.float() + change).to(weight.dtype))
        calibration.changed()

    def _sharing(self, calibration: Calibration, paths: list[str]) -> list[list[str]]:
        """Layers by the tensor that they read."""
        found: dict[int, list[str]] = defaultdict(list)
        for path in paths:
            found[id(calibration.gram(path))].append(path)
        return list(found.values())


def _same_shapes(calibration: Calibration, exact: Recorded, inputs: Recorded) -> bool:
    """Whether tokens came, and as many in both streams (a router may send others to an expert)."""
    found = ([[list(x.shape) for x in calls] for calls in pair] for pair in zip(exact, inputs, strict=True))
    shapes = list(calibration.share.in_order(found))
    reached = any(math.prod(shape) for _, calls in shapes for shape in calls)
    return reached and all(one == other for one, other in shapes)


def products(calibration: Calibration, exact: Recorded, inputs: Recorded) -> list[Tensor]:
    """XᵀX̂ and X̂ᵀX̂ [channels, channels] over the tokens that count, of all samples.

    Processes that share samples add up some columns each, in the order of samples.

    Args:
        calibration: of the block.
        exact: X, for every sample of this process.
        inputs: X̂, for the same.
    """
    share = calibration.share

    def pairs() -> Iterator[list[tuple[Tensor, Tensor]]]:
        for sample, calls in enumerate(zip(exact, inputs, strict=True)):
            both = ([calibration.counted(x, sample).float() for x in stream] for stream in calls)
            yield list(zip(*both, strict=True))

    sums: dict[tuple[int, int], Tensor] = {}
    for of_sample in share.in_order(pairs()):
        for pair in of_sample:
            channels = pair[1].shape[1]
            panels = [(which, start) for which in range(2) for start in range(0, channels, _PANEL)]
            for which, start in panels[share.rank :: share.ranks]:
                x, y = pair[which], pair[1][:, start : start + _PANEL]
                if (which, start) not in sums:
                    sums[which, start] = x.new_zeros(channels, y.shape[1])
                sums[which, start].addmm_(x.T, y)
    for others in share.everywhere(sums):
        sums |= others
    return [
        torch.cat([part for (at, _), part in sorted(sums.items(), key=itemgetter(0)) if at == which], 1)
        for which in range(2)
    ]


def corrections(
    weights: Sequence[Tensor], gram: Tensor, difference: Tensor, damping: float
) -> list[Tensor]:
    """W Δ (H + λ)⁻¹ for every weight W [outputs, channels], which is to be added to it; 0 where no λ helps,
    as for inputs that are all 0.

    Args:
        weights: of layers that read the same inputs.
        gram: H = X̂ᵀX̂ [channels, channels]; overwritten.
        difference: Δ = XᵀX̂ − H [channels, channels].
        damping: λ, as a share of the mean diagonal of H; ten times it, and so on, where H + λ is singular.
    """
    wanted = torch.cat([weight.float() for weight in weights]) @ difference
    mean, added, failed = float(gram.diagonal().mean()), 0.0, True
    while failed:
        gram.diagonal().add_(damping * mean - added)
        added = damping * mean
        lower, info = torch.linalg.cholesky_ex(gram)
        failed, damping = bool(info) and damping < 1, damping * 10
    if bool(info):
        return [torch.zeros_like(weight, dtype=torch.float32) for weight in weights]
    found = torch.cholesky_solve(wanted.T, lower).T
    return list(found.split([len(weight) for weight in weights]))
