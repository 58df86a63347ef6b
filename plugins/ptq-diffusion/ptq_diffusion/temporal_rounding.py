"""The weights of a temporal block, rounded together against its temporal features.

Source: TFMQ-DM (Huang et al., CVPR 2024), temporal information aware reconstruction. Ours: where
inputs have a range for each timestep, they are rounded while weights learn, which make up for that too.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ptq_diffusion.features_of_time import TimePath
from ptqcore import (
    LearnedRounding,
    Midway,
    ModelError,
    Objective,
    Problem,
    QuantizedTensor,
    QuantSpec,
    Schedule,
    grid,
    reconstruct,
)


def round_together(
    model: nn.Module,
    way: TimePath,
    wanted: Mapping[str, Tensor],
    roundings: Mapping[str, LearnedRounding],
    inputs: Mapping[str, QuantSpec],
    timesteps: Tensor,
    schedule: Schedule,
    generator: torch.Generator,
    midway: Midway | None = None,
) -> list[float]:
    """Learn roundings so that Σᵢ ‖gᵢ(h(t)) − ĝᵢ(ĥ(t))‖² over features and timesteps is small.

    Args:
        model: the denoiser.
        way: from the timestep to its features.
        wanted: path → feature [timesteps, …] in full precision.
        roundings: path → rounding of a layer's weight.
        inputs: path → grid of the rows of a layer's input, which are rounded meanwhile.
        timesteps: [timesteps], of the schedule.
        schedule: of the updates, each on as many timesteps as it says.
        generator: of their order.
        midway: where the state is written now and then.

    Returns:
        The loss of each update.

    Raises:
        ModelError: if the loss becomes NaN or infinite.
    """

    def predict(rows: Sequence[int]) -> list[Tensor]:
        weights = {path: rounding.weight for path, rounding in roundings.items()}
        with torch.enable_grad(), replaced(model, weights), rounding(model, inputs):
            found = way(timesteps[list(rows)])
        return [found[path] for path in wanted]

    problem = Problem(
        "temporal block",
        range(len(timesteps)),
        predict,
        lambda rows: [feature[list(rows)] for feature in wanted.values()],
        list(roundings.values()),
        [],
        _FeatureError(),
        len(timesteps),
        midway=midway,
    )
    try:
        with torch.enable_grad():
            reconstruct(problem, schedule, generator)
    except FloatingPointError as error:
        raise ModelError(f"{error}: lower the rate of the step tiar") from None
    return problem.history


@torch.no_grad()
def rounded_features(
    model: nn.Module,
    way: TimePath,
    learned: Mapping[str, QuantizedTensor],
    inputs: Mapping[str, QuantSpec],
    timesteps: Tensor,
) -> dict[str, Tensor]:
    """The temporal features path → [timesteps, …] with quantized weights; else as `round_together`."""
    weights = {path: weight.dequantize() for path, weight in learned.items()}
    with replaced(model, weights), rounding(model, inputs):
        return way(timesteps)


def squared_error(predicted: list[Tensor], target: list[Tensor]) -> Tensor:
    """Σ over features of the squared norm of the difference, mean over timesteps (TFMQ-DM)."""
    errors = [(p - t).square().sum(-1).mean() for p, t in zip(predicted, target, strict=True)]
    return torch.stack(errors).sum()


class _FeatureError(Objective):
    def loss(self, predicted: list[Tensor], target: list[Tensor], samples: Sequence[int]) -> Tensor:
        return squared_error(predicted, target)


def rounded_by_row(x: Tensor, spec: QuantSpec) -> Tensor:
    """x [rows, channels] with every row rounded in the range of its values, which the spec calls a channel.

    Where rows are timesteps and nothing else has a say in x, that is the range for each timestep which
    calibration finds. Gradients pass straight through.
    """
    scale, zero_point = grid.scale_and_zero_point(*grid.value_range(x, spec), spec)
    return grid.fake_quantize(x, scale, zero_point, spec)


@contextmanager
def rounding(model: nn.Module, inputs: Mapping[str, QuantSpec]) -> Iterator[None]:
    """Compute layers with inputs rounded by row for a while."""

    def hook(spec: QuantSpec) -> Callable[..., Any]:
        return lambda _, args: (rounded_by_row(args[0], spec), *args[1:])

    handles = [
        model.get_submodule(path).register_forward_pre_hook(hook(spec)) for path, spec in inputs.items()
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


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
