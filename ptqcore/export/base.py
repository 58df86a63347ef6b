"""The contract of an exporter: write the canonical records to a format, and read them back."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

from torch import nn

from ptqcore.recipe import QuantSection
from ptqcore.report.record import Verification
from ptqcore.task import Task


class Exporter(ABC):
    """Writes a quantized model to the files of one format. Subclasses set `name`."""

    name: ClassVar[str]
    holds_attachments: ClassVar[bool] = False
    """Whether the format can hold functions that steps attach to modules (`ptqcore.Attachment`)."""

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
    def export(self, model: nn.Module, task: Task, samples: Sequence[Any], folder: Path) -> None:
        """Write the files into `folder` (it exists and is empty).

        Args:
            model: the quantized model.
            task: its task; `task.forward` says how a sample is fed to the model.
            samples: the calibration samples, for formats that need an example of the inputs.
            folder: where to write.
        """

    @abstractmethod
    def verify(self, model: nn.Module, task: Task, samples: Sequence[Any], folder: Path) -> Verification:
        """Read the files back with code that shares nothing with `export`'s packing.

        Arguments are those of `export`. An engine that is missing or fails is no error: the record of
        that engine says so.

        Raises:
            ExportError: if a tensor is missing or has another shape.
        """
