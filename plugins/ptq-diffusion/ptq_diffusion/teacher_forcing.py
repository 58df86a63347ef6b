"""What a denoiser predicts where the full-precision one stood: errors without those that they lead to."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ptq_diffusion.calls import DenoiserCall
from ptq_diffusion.drawing import SamplingOptions
from ptq_diffusion.pipelines import Loaded
from ptq_diffusion.sampling import calls_by_step
from ptqcore import tensors_in


class Teacher:
    """Calls of the full-precision denoiser in every step of sampling a few images, and what it returns."""

    def __init__(self, loaded: Loaded, options: SamplingOptions, seeds: Sequence[int]) -> None:
        """Args:
        loaded: the pipeline, its denoiser in full precision.
        options: how images are made.
        seeds: of the images; one batch.
        """
        self._calls = [[call.copied() for call in step] for step in calls_by_step(loaded, options, seeds)]
        self._wanted = [self._predict(loaded.denoiser, step) for step in self._calls]

    def errors(self, denoiser: nn.Module) -> list[float]:
        """Σ (found − expected)² / Σ expected² of another denoiser's predictions in every step."""
        found = (self._predict(denoiser, step) for step in self._calls)
        return [
            float((one - other).square().sum() / other.square().sum())
            for one, other in zip(found, self._wanted, strict=True)
        ]

    def _predict(self, denoiser: nn.Module, calls: Sequence[DenoiserCall]) -> Tensor:
        with torch.no_grad():
            return torch.cat([tensors_in(call.copied().run(denoiser))[0].flatten() for call in calls])
