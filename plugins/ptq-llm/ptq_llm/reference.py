"""What the full-precision model predicts, kept for other runs of the same model on the same text."""

from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from ptqcore import DataError, read_tensor_header, write_tensors

_METRIC = "metric "


def read_kept(file: Path) -> dict[str, Tensor]:
    """The tensors of a file that an earlier run has kept.

    Raises:
        DataError: if it is damaged.
    """
    try:
        read_tensor_header(file)
        return load_file(file)
    except (OSError, ValueError, SafetensorError) as error:
        raise DataError(
            f"{str(file)!r}, kept by an earlier run, is damaged: remove it ({error})"
        ) from error


class Judging(Protocol):
    """A judge whose first model is the reference; `reference` is what it keeps of that model."""

    reference: dict[str, Tensor]

    def measure(self, model: Any, label: str) -> dict[str, float]:
        """The metrics of a model."""
        ...


def measure_reference(judge: Judging, model: Any, label: str, file: Path | None) -> dict[str, float]:
    """The metrics of the full-precision model, measured, or taken from a file.

    Args:
        judge: a new judge, which knows the reference afterwards.
        model: the full-precision model.
        label: what is shown while it is measured.
        file: where they are kept; its name must tell the model and what it is judged on. None: nowhere.

    Raises:
        ArtifactError: if the file cannot be written.
        DataError: if it is damaged.
    """
    if file is not None and file.is_file():
        kept = read_kept(file)
        metrics = [name for name in sorted(kept) if name.startswith(_METRIC)]
        judge.reference = {name: tensor for name, tensor in kept.items() if name not in metrics}
        return {name.split(" ", 2)[2]: float(kept[name]) for name in metrics}
    measured = judge.measure(model, label)
    if file is not None:
        numbered = {
            f"{_METRIC}{index:02} {name}": torch.tensor(value, dtype=torch.float64)
            for index, (name, value) in enumerate(measured.items())
        }
        write_tensors(file, judge.reference | numbered)
    return measured
