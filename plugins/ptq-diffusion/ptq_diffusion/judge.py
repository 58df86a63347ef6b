"""How a quantized denoiser is judged: by its temporal features, its trajectories and its images."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from statistics import median

import torch
from torch import Tensor, nn

from ptq_diffusion.calls import DenoiserCall
from ptq_diffusion.classifier import Classifier, load_classifier
from ptq_diffusion.drawing import SamplingOptions
from ptq_diffusion.features_of_time import temporal_features
from ptq_diffusion.figures import (
    image_rows,
    prediction_curves,
    range_curves,
    temporal_curves,
    trajectory_curves,
)
from ptq_diffusion.frechet import frechet_distance
from ptq_diffusion.image_metrics import compare
from ptq_diffusion.pipelines import Loaded
from ptq_diffusion.sampling import Samples, sample
from ptq_diffusion.schedules import timesteps_of
from ptq_diffusion.teacher_forcing import Teacher
from ptq_diffusion.temporal import TemporalMap
from ptqcore import Curves, Pictures

TAUGHT = 16  # images whose states predictions are compared at


@dataclass(frozen=True)
class Seen:
    """What is shown of one denoiser.

    images: [n, channels, height, width]. trajectory: the error of the states after every step.
    predictions: the error of what it predicts from full-precision states, in every step.
    temporal: path → 1 − cos [timesteps]. ranges: of the inputs of its temporal block.
    """

    images: Tensor
    trajectory: list[float]
    predictions: list[float]
    temporal: dict[str, Tensor]
    ranges: Curves | None


class Judge:
    """Compares denoisers with the first one measured, the full-precision model, on the same seeds.

    temporal_error: mean of 1 − cos over temporal features and timesteps, 0 where there are none.
    temporal_mismatch: share of (feature, timestep) whose nearest full-precision feature, by cosine, is
    that of another timestep. teacher_forced_error: squared difference of the predictions for full-precision
    states, relative to their squares: the median over the steps, as the last, where little is left to
    predict, would dominate a mean. trajectory_error: mean squared difference of the states half-way
    through the schedule, relative to their mean square. image_error: mean squared difference of the images.
    image_psnr, image_ssim, image_feature_distance: means over pairs of images (see `image_metrics`).
    frechet_distance: between both sets of images, on the features of the embedded classifier of digits.
    """

    def __init__(
        self,
        loaded: Loaded,
        options: SamplingOptions,
        seeds: Sequence[int],
        call: DenoiserCall,
        temporal: TemporalMap,
    ) -> None:
        """Args:
        loaded: the pipeline.
        options: how images are made.
        seeds: of the images.
        call: an example call of the denoiser.
        temporal: the map of the full-precision denoiser.
        """
        self._loaded, self._options, self._seeds = loaded, options, seeds
        self._call, self._temporal = call, temporal
        self._timesteps = torch.unique(timesteps_of(loaded, options))
        self._reference: Samples | None = None
        self._teacher: Teacher | None = None
        self._features: dict[str, Tensor] = {}
        self._seen: dict[str, Seen] = {}

    def measure(self, denoiser: nn.Module, judged: str) -> dict[str, float]:
        """The metrics of a denoiser, which figures call `judged`; those of the first are perfect."""
        made = sample(self._loaded.with_denoiser(denoiser), self._options, self._seeds, "making images")
        features = self.features(denoiser)
        if self._reference is None or self._teacher is None:
            self._reference, self._features = made, features
            few = self._seeds[: min(TAUGHT, self._options.batch)]
            self._teacher = Teacher(self._loaded.with_denoiser(denoiser), self._options, few)
        first, predictions = self._reference, self._teacher.errors(denoiser)
        half = (len(first.states) - 1) // 2
        trajectory = [relative_error(*pair) for pair in zip(made.states, first.states, strict=True)]
        self._seen[judged] = Seen(
            made.images,
            trajectory,
            predictions,
            temporal_errors(features, self._features),
            range_curves(denoiser, self._temporal.block),
        )
        images = compare(made.images, first.images, self._classifier)
        return {
            "temporal_error": temporal_error(features, self._features),
            "temporal_mismatch": mismatch(features, self._features),
            "teacher_forced_error": median(predictions),
            "trajectory_error": trajectory[half],
            "image_error": float((made.images - first.images).square().mean()),
            "image_psnr": images["psnr"],
            "image_ssim": images["ssim"],
            "image_feature_distance": images["feature_distance"],
            "frechet_distance": frechet_distance(
                self._classifier.features(made.images), self._classifier.features(first.images)
            ),
        }

    def figures(self) -> list[Curves | Pictures]:
        """Images of all denoisers; of all but the first, the errors of states and predictions at every step
        and, where there are temporal features, their error at every timestep; of the last, the ranges of
        the inputs of its temporal block, if it has one for each timestep."""
        _, *compared = self._seen
        last = self._seen[compared[-1]]
        found: list[Curves | Pictures] = [
            image_rows({judged: seen.images for judged, seen in self._seen.items()}),
            trajectory_curves({judged: self._seen[judged].trajectory for judged in compared}),
            prediction_curves({judged: self._seen[judged].predictions for judged in compared}),
        ]
        if last.temporal:
            errors = {judged: self._seen[judged].temporal for judged in compared}
            found.append(temporal_curves(errors, self._timesteps))
        return found if last.ranges is None else [*found, last.ranges]

    def features(self, denoiser: nn.Module) -> dict[str, Tensor]:
        """The temporal features of the schedule: path → [timesteps, channels]."""
        if not self._temporal.features:
            return {}
        return temporal_features(denoiser, self._call, self._temporal, self._timesteps)

    @cached_property
    def _classifier(self) -> Classifier:
        return load_classifier()


def relative_error(found: Tensor, expected: Tensor) -> float:
    """Σ (found − expected)² / Σ expected²."""
    return float((found - expected).square().sum() / expected.square().sum())


def temporal_errors(found: dict[str, Tensor], expected: dict[str, Tensor]) -> dict[str, Tensor]:
    """1 − cos of every feature [timesteps, …] at every timestep: path → [timesteps]."""
    errors = {}
    for path, features in expected.items():
        one, other = found[path].double().flatten(1), features.double().flatten(1)
        errors[path] = (1 - nn.functional.cosine_similarity(one, other)).clamp(min=0)
    return errors


def temporal_error(found: dict[str, Tensor], expected: dict[str, Tensor]) -> float:
    """Mean of 1 − cos over features and timesteps; 0 where there are none."""
    errors = temporal_errors(found, expected)
    return float(torch.cat(list(errors.values())).mean()) if errors else 0.0


def mismatch(found: dict[str, Tensor], expected: dict[str, Tensor]) -> float:
    """Share of features at timesteps that are nearest, by cosine, to the expected one of another."""
    wrong, count = 0, 0
    for path, features in expected.items():
        unit, own = (nn.functional.normalize(one.double().flatten(1)) for one in (features, found[path]))
        nearest = (own @ unit.T).argmax(1)
        wrong += int((nearest != torch.arange(len(features))).sum())
        count += len(features)
    return wrong / count if count else 0.0
