"""The step `asymmetric-calibration`: weights that give full-precision outputs from quantized inputs.

Methods that quantize layer by layer aim at W x̂ for what the quantized prefix hands on, so that errors
add up from block to block. With x from the full-precision model, the least squares
Σ ‖W* x̂ − W x‖² + λ ‖W* − W‖² aims at what should have been (the asymmetric calibration of GPTAQ, Li et
al., arXiv 2504.02692, section 4.1, solved for the whole weight before it is rounded).
"""

from collections import defaultdict
from collections.abc import Callable, Sequence
from typing import ClassVar

import torch
from pydantic import Field
from torch import Tensor, nn

from ptq_llm.rescale import set_parameter
from ptq_llm.sequence import in_sequence
from ptqcore import Block, Calibration, Dataflow, Step, StepOptions


class AsymmetricCalibrationOptions(StepOptions):
    """damping: λ, as a share of the mean diagonal of the inputs' Gram: the larger, the closer weights stay
    to what they were."""

    damping: float = Field(default=0.1, gt=0)


class AsymmetricCalibration(Step):
    """Moves the weights of one layer after the other, in the order in which they run, while their block
    still computes in full precision; layers that no token reaches stay as they are."""

    name = "asymmetric-calibration"
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
        exact = calibration.record([paths[0] for stage in stages for paths in stage], exact=True)
        for stage in stages:
            inputs = calibration.record([paths[0] for paths in stage])
            for paths in stage:
                wanted, found = exact.pop(paths[0], []), inputs.pop(paths[0], [])
                if not _same_tokens(wanted, found):
                    continue
                layers = [targets[path] for path in paths]
                weights = [layer.get_parameter("weight").data for layer in layers]
                gram = products(calibration, found, found)
                difference = products(calibration, wanted, found).sub_(gram)
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


def _same_tokens(exact: list[Tensor], inputs: list[Tensor]) -> bool:
    """Whether the same tokens came in both streams (a router may send others to an expert)."""
    shapes = [[x.shape for x in stream] for stream in (exact, inputs)]
    return shapes[0] == shapes[1] and sum(x.numel() for x in inputs) > 0


def products(calibration: Calibration, one: list[Tensor], other: list[Tensor]) -> Tensor:
    """XᵀX̂ [channels, channels] over the tokens that count, of all samples."""
    channels = one[0].shape[-1]
    total = torch.zeros(channels, channels, device=one[0].device)
    for sample, (x, y) in enumerate(zip(one, other, strict=True)):
        total.addmm_(calibration.counted(x, sample).float().T, calibration.counted(y, sample).float())
    return total


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
