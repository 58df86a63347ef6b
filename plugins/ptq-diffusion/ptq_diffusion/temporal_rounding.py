"""The weights of a temporal block, rounded together against its temporal features.

Source: TFMQ-DM (Huang et al., CVPR 2024), temporal information aware reconstruction.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from ptq_diffusion.features_of_time import TimePath
from ptqcore import LearnedRounding, ModelError, Problem, Schedule, reconstruct


def round_together(
    model: nn.Module,
    way: TimePath,
    wanted: Mapping[str, Tensor],
    roundings: Mapping[str, LearnedRounding],
    timesteps: Tensor,
    schedule: Schedule,
    generator: torch.Generator,
) -> list[float]:
    """Learn roundings so that Σᵢ ‖gᵢ(h(t)) − ĝᵢ(ĥ(t))‖² over features and timesteps is small.

    Args:
        model: the denoiser.
        way: from the timestep to its features.
        wanted: path → feature [timesteps, …] in full precision.
        roundings: path → rounding of a layer's weight.
        timesteps: [timesteps], of the schedule.
        schedule: of the updates, each on as many timesteps as it says.
        generator: of their order.

    Returns:
        The loss of each update.

    Raises:
        ModelError: if the loss becomes NaN or infinite.
    """

    def predict(rows: Sequence[int]) -> list[Tensor]:
        weights = {path: rounding.weight for path, rounding in roundings.items()}
        with torch.enable_grad(), replaced(model, weights):
            found = way(timesteps[list(rows)])
        return [found[path] for path in wanted]

    problem = Problem(
        "temporal block",
        len(timesteps),
        predict,
        lambda rows: [feature[list(rows)] for feature in wanted.values()],
        list(roundings.values()),
        [],
        squared_error,
        len(timesteps),
    )
    try:
        with torch.enable_grad():
            reconstruct(problem, schedule, generator)
    except FloatingPointError as error:
        raise ModelError(f"{error}: lower the rate of the step tiar") from None
    return problem.history


@torch.no_grad()
def rounded_features(
    model: nn.Module, way: TimePath, roundings: Mapping[str, LearnedRounding], timesteps: Tensor
) -> dict[str, Tensor]:
    """The temporal features path → [timesteps, …] with every rounding decided, activations as they are."""
    weights = {path: rounding.hard().dequantize() for path, rounding in roundings.items()}
    with replaced(model, weights):
        return way(timesteps)


def squared_error(predicted: list[Tensor], target: list[Tensor], _: str) -> Tensor:
    """Σ over features of the squared norm of the difference, mean over timesteps (TFMQ-DM)."""
    errors = [(p - t).square().sum(-1).mean() for p, t in zip(predicted, target, strict=True)]
    return torch.stack(errors).sum()


@contextmanager
def replaced(model: nn.Module, weights: Mapping[str, Tensor]) -> Iterator[None]:
    """Compute layers with other weights, with gradients, for a while."""
    layers = {path: model.get_submodule(path) for path in weights}
    kept = {path: layer._parameters["weight"] for path, layer in layers.items()}
    for path, layer in layers.items():
        layer._parameters["weight"] = weights[path]  # type: ignore[assignment]
    try:
        yield
    finally:
        for path, layer in layers.items():
            layer._parameters["weight"] = kept[path]
