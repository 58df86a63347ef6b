"""What was measured, kept for a run that is resumed and for others of the same model on the same text."""

from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from ptqcore import DataError, tensors_on_disk, write_tensors

_METRIC = "metric "


def read_kept(file: Path) -> dict[str, Tensor]:
    """The tensors of a file that an earlier run has kept; large ones stay on disk.

    Raises:
        DataError: if it is damaged.
    """
    try:
        return tensors_on_disk(file)
    except (OSError, ValueError) as error:
        raise DataError(
            f"{str(file)!r}, kept by an earlier run, is damaged: remove it ({error})"
        ) from error


class Judging(Protocol):
    """A judge whose first model is the reference; `reference` is what it keeps of that model."""

    reference: dict[str, Tensor]

    def measure(self, model: Any, label: str) -> dict[str, float]:
        """The metrics of a model."""
        ...


def measure_reference(judge: Judging, model: Any, label: str, file: Path) -> dict[str, float]:
    """The metrics of the full-precision model, measured, or taken from a file.

    Args:
        judge: a new judge, which knows the reference afterwards.
        model: the full-precision model.
        label: what is shown while it is measured.
        file: where they are kept; its name must tell the model and what it is judged on.

    Raises:
        ArtifactError: if the file cannot be written.
        DataError: if it is damaged.
    """
    if file.is_file():
        kept = read_kept(file)
        judge.reference = {name: tensor for name, tensor in kept.items() if not name.startswith(_METRIC)}
        return _metrics(kept)
    measured = judge.measure(model, label)
    write_tensors(file, judge.reference | _numbered(measured))
    return measured


def measured_once(file: Path, measure: Callable[[], dict[str, float]]) -> dict[str, float]:
    """Metrics from a file, or measured and written there.

    Raises:
        ArtifactError: if the file cannot be written.
        DataError: if it is damaged.
    """
    if file.is_file():
        return _metrics(read_kept(file))
    measured = measure()
    write_tensors(file, _numbered(measured))
    return measured


def _numbered(metrics: dict[str, float]) -> dict[str, Tensor]:
    """As tensors, which keep every bit; their names keep the order."""
    return {
        f"{_METRIC}{index:02} {name}": torch.tensor(value, dtype=torch.float64)
        for index, (name, value) in enumerate(metrics.items())
    }


def _metrics(kept: dict[str, Tensor]) -> dict[str, float]:
    names = sorted(name for name in kept if name.startswith(_METRIC))
    return {name.split(" ", 2)[2]: float(kept[name]) for name in names}
