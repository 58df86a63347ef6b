"""The contract of an exporter: write the canonical records to a format, and read them back."""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

from torch import nn

from ptqcore.errors import ExportError
from ptqcore.recipe import QuantSection, TensorQuant
from ptqcore.report.record import Verification
from ptqcore.task import Task
from ptqcore.timesteps import Unseen


class Exporter(ABC):
    """Writes a quantized model to the files of one format. Subclasses set `name`."""

    name: ClassVar[str]
    holds_attachments: ClassVar[bool] = False
    """Whether the format can hold functions that steps attach to modules (`ptqcore.Attachment`)."""
    holds_timesteps: ClassVar[bool] = False
    """Whether the format can hold activation ranges for each timestep (`ptqcore.Timesteps`)."""

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

    def check_model(self, model: nn.Module, task: Task, layers: Mapping[str, nn.Module]) -> None:  # noqa: B027
        """Refuse, before anything is quantized, a model that the format cannot hold; by default none.

        Args:
            model: the full-precision model.
            task: its task, for what is exported beside the model (a tokenizer, say).
            layers: those that will be quantized, by path.

        Raises:
            ExportError: one sentence that names what cannot be held.
        """

    def check_timesteps(self, unseen: Unseen) -> None:  # noqa: B027
        """Refuse, before anything is quantized, tables for each timestep that the format cannot hold.

        Args:
            unseen: what the model does about timesteps that it has no row for.

        Raises:
            ExportError: one sentence that says which.
        """

    def check_grids(self, quant: QuantSection, weights: Mapping[str, TensorQuant]) -> None:
        """Refuse, before anything is quantized, grids of layers that the format cannot hold.

        Some are not the recipe's own: those of first and last layers, and those for which a step chose
        another width. By default `check` is asked about each of them.

        Args:
            quant: the recipe's section.
            weights: the grid of every layer that will be quantized, by path.

        Raises:
            ExportError: one sentence that names the layer.
        """
        others = {grid.bits: (path, grid) for path, grid in weights.items() if grid != quant.weights}
        for bits, (path, grid) in others.items():
            try:
                self.check(quant.model_copy(update={"weights": grid}))
            except ExportError as error:
                raise ExportError(f"{error} ({path} gets {bits} bits)") from None

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
