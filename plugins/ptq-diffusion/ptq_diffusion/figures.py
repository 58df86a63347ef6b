"""What the report shows of a quantized denoiser: curves over the schedule, and images of the same seeds."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from ptqcore import Curves, Pictures, QuantModule, timesteps_of

MOST_IMAGES = 10
MOST_RANGES = 6


def trajectory_curves(errors: Mapping[str, Sequence[float]]) -> Curves:
    """The error of the states after every step: model → [steps]."""
    note = (
        "How far the states of sampling are from those of the full-precision model, which began the same."
    )
    return _step_curves("Trajectory error", errors, note)


def prediction_curves(errors: Mapping[str, Sequence[float]]) -> Curves:
    """The error of the predictions in every step: model → [steps]."""
    note = "The predictions for the states that the full-precision model goes through, against its own."
    return _step_curves("Teacher-forced error", errors, note)


def _step_curves(title: str, errors: Mapping[str, Sequence[float]], note: str) -> Curves:
    steps = range(1, max(map(len, errors.values())) + 1)
    return Curves(title, steps, errors, "step of the sampler", "relative squared difference", note)


def temporal_curves(errors: Mapping[str, Mapping[str, Tensor]], timesteps: Tensor) -> Curves:
    """The mean and the worst of the temporal features.

    Args:
        errors: model → path → 1 − cos [timesteps].
        timesteps: rising.
    """
    tables = {model: torch.stack(list(features.values())) for model, features in errors.items()}
    last, table = list(tables.items())[-1]
    feature, at = divmod(int(table.argmax()), table.shape[1])
    means = {f"{model}: mean": each.mean(0).tolist() for model, each in tables.items()}
    worst = {f"{model}: worst": each.amax(0).tolist() for model, each in tables.items()}
    return Curves(
        "Temporal error",
        timesteps.tolist(),
        means | worst,
        "timestep",
        "1 - cosine to the full-precision feature",
        f"Mean and worst of {len(table)} temporal features. Sampling goes from right to left. Worst of the "
        f"{last} model: {list(errors[last])[feature]} at timestep {timesteps[at]:g}.",
    )


def range_curves(model: nn.Module, paths: Sequence[str]) -> Curves | None:
    """The width of the range of layers' inputs at each timestep, of those that change most; None if no
    layer has one for each. Layers that read the same tensor have one curve."""
    known = timesteps_of(model)
    readers: dict[tuple[float, ...], list[str]] = {}
    for path in paths:
        layer = model.get_submodule(path)
        quantizer = layer.input_quantizer if isinstance(layer, QuantModule) else None
        if quantizer is not None and quantizer.scale is not None and quantizer.spec.timesteps:
            widths = tuple((quantizer.scale * quantizer.spec.levels).tolist())
            readers.setdefault(widths, []).append(path)
    if known is None or not readers:
        return None
    chosen = sorted(readers, key=lambda widths: min(widths) / max(widths))[:MOST_RANGES]
    return Curves(
        "Range of the inputs of the temporal block at each timestep",
        known.values.tolist(),
        {_label(readers[widths]): widths for widths in chosen},
        "timestep",
        "width of the range",
        f"Of {len(readers)} tensors the {len(chosen)} that change most, with the layers that read them. "
        "A single range for all timesteps would have to be as wide as the widest.",
    )


def _label(paths: Sequence[str]) -> str:
    return f"{paths[0]} and {len(paths) - 1} more" if len(paths) > 1 else paths[0]


def image_rows(rows: Mapping[str, Tensor]) -> Pictures:
    """The first images [n, channels, height, width] of every row, seed by seed."""
    return Pictures(
        "Images",
        {label: list(images[:MOST_IMAGES].clone()) for label, images in rows.items()},
        "Below each other: the same seed, that is, the same noise.",
    )
