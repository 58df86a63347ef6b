"""The verb of a recipe: what a method does to a model, block by block."""

from collections.abc import Callable
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import ClassVar

from pydantic import BaseModel, ConfigDict
from torch import Tensor, nn

from ptqcore.blocks import Block
from ptqcore.calibration import Calibration
from ptqcore.dataflow import Dataflow
from ptqcore.errors import ModelError
from ptqcore.grids import Grids
from ptqcore.modules import QuantModule, weight_rows
from ptqcore.observers import Observer
from ptqcore.packed import QuantizedTensor
from ptqcore.recipe import QuantSection, TensorQuant


class StepOptions(BaseModel):
    """Options of a step in a recipe; subclasses add fields, unknown keys are refused."""

    model_config = ConfigDict(frozen=True, extra="forbid")


@dataclass(frozen=True)
class Context:
    """What every step may know about the run.

    quant: the recipe's `quant` section.
    observer: makes the observer that a `TensorQuant` names.
    excluded: layers that the task leaves in full precision, path → reason.
    seed: the run's seed.
    grids: which grid every weight and activation gets.
    """

    quant: QuantSection
    observer: Callable[[TensorQuant], Observer]
    excluded: dict[str, str]
    seed: int
    grids: Grids

    def reason_to_skip(self, path: str) -> str | None:
        """Why the layer at `path` stays in full precision, or None if it is to be quantized."""
        return reason_to_skip(path, self.quant, self.excluded)

    def targets(self, block: Block) -> dict[str, nn.Module]:
        """Float layers of a block that are to be quantized, by path."""
        return {path: layer for path, layer in block.layers().items() if self.reason_to_skip(path) is None}


def reason_to_skip(path: str, quant: QuantSection, excluded: dict[str, str]) -> str | None:
    """Why a layer stays in full precision: the recipe's reason, else the task's, else None."""
    for glob in quant.ignore:
        if fnmatchcase(path, glob):
            return f"ignored by the recipe ({glob})"
    return excluded.get(path)


class Step:
    """One step of a recipe. Subclasses set `name`, may replace `Options`, and override what they need.

    After the last step every layer that the recipe does not leave alone must be a `QuantModule`.
    """

    name: ClassVar[str]
    Options: ClassVar[type[StepOptions]] = StepOptions
    needs_exact: bool = False
    """Whether `block` reads the inputs from the full-precision model, `calibration.io.run(exact=True)`."""

    def __init__(self, options: StepOptions, context: Context) -> None:
        self.options = options
        self.context = context

    def weight_range(self, path: str, layer: nn.Module) -> tuple[Tensor, Tensor]:
        """The range that the recipe's observer chooses for the weight of a float layer."""
        observer = self.context.observer(self.context.grids.weights(path))
        observer.update(weight_rows(layer).detach().flatten(1).float())
        return observer.range()

    def quantize_layer(
        self, block: Block, calibration: Calibration, path: str, weight: QuantizedTensor
    ) -> QuantModule:
        """Replace the float layer at `path` by one with this weight, its input on the recipe's grid.

        In the scope `dataflow` inputs have quantizers of their own, outside the layers.

        Raises:
            ModelError: if the input's range is static and no calibration sample reached the layer.
        """
        activations = self.context.grids.inputs(path)
        quantized = block.quantize_layer(path, weight, None if activations is None else activations.spec)
        if activations is None or activations.dynamic or quantized.input_quantizer is None:
            return quantized
        observer = calibration.observer(path)
        if observer is None:
            raise ModelError(
                f"layer {path!r} received no calibration input, so its static input range is unknown: "
                "use more samples, dynamic activations, or add it to quant.ignore"
            )
        quantized.input_quantizer.set_range(*observer.range())
        return quantized

    def prepare(self, model: nn.Module, flow: Dataflow, run: Callable[[], object]) -> None:
        """Called once before the walk; may change the model's weights, not its structure.

        Args:
            model: the full-precision model.
            flow: one traced forward pass of it.
            run: that pass again, of the model as it now is; returns its output.
        """

    def before(self, block: Block, calibration: Calibration) -> None:
        """Called for every block before any step changes it, and before its activations are rounded."""

    def block(self, block: Block, calibration: Calibration) -> None:
        """Called for every block in order; `calibration` holds its inputs and their statistics."""

    def finish(self, model: nn.Module) -> None:
        """Called once after the walk."""
