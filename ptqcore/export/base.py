"""The contract of an exporter: write the canonical records to a format, and read them back."""

from abc import ABC, abstractmethod
from pathlib import Path
from typing import ClassVar

from torch import nn

from ptqcore.recipe import QuantSection
from ptqcore.task import Task


class Exporter(ABC):
    """Writes a quantized model to the files of one format. Subclasses set `name`."""

    name: ClassVar[str]

    @abstractmethod
    def check(self, quant: QuantSection) -> None:
        """Refuse, before anything is computed, what the format cannot express.

        Raises:
            ExportError: one sentence that names the key and what the format takes.
        """

    def check_layers(self, quant: QuantSection, layers: dict[str, nn.Module]) -> None:  # noqa: B027
        """Refuse, before anything is quantized, layers that the format cannot hold; by default none.

        Raises:
            ExportError: one sentence that names the layer.
        """

    @abstractmethod
    def export(self, model: nn.Module, task: Task, folder: Path) -> None:
        """Write the files into `folder` (it exists and is empty)."""

    @abstractmethod
    def verify(self, model: nn.Module, folder: Path) -> float:
        """Read the files back with code that shares nothing with `export`'s packing.

        Returns:
            The largest absolute difference between the weights in the files and `model`'s.

        Raises:
            ExportError: if a tensor is missing or has another shape.
        """
