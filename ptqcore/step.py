"""The verb of a recipe: what a method does to a model, block by block."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from itertools import repeat
from typing import ClassVar, Literal

from pydantic import BaseModel, ConfigDict
from torch import Tensor, nn

from ptqcore.blocks import Block
from ptqcore.calibration import Calibration
from ptqcore.dataflow import Dataflow
from ptqcore.errors import ModelError, RecipeError, nearest
from ptqcore.finite import check_range
from ptqcore.grids import Grids
from ptqcore.midway import Midway
from ptqcore.modules import QuantModule
from ptqcore.observers import Observer
from ptqcore.packed import QuantizedTensor
from ptqcore.recipe import QuantSection, TensorQuant
from ptqcore.task import Task

Stage = Literal["transform", "range", "quantize", "correct"]
"""What a step does, in the order in which recipes may name steps: change weights so that the function
stays, choose the ranges of weights, quantize, correct what quantization did."""


@dataclass(frozen=True)
class Chain:
    """Several blocks in a row, as one function of a calibration sample's number.

    run: the tensors behind the last block, from the quantized inputs of the first. exact: the same in
    the full-precision model. samples: how many there are.
    """

    samples: int
    run: Callable[[int], list[Tensor]]
    exact: list[list[Tensor]]


class StepOptions(BaseModel):
    """Options of a step in a recipe; subclasses add fields, unknown keys are refused."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


@dataclass(frozen=True)
class Context:
    """What every step may know about the run.

    quant: the recipe's `quant` section.
    observer: makes the observer that a `TensorQuant` names.
    excluded: layers that the task leaves in full precision, path → reason.
    seed: the run's seed.
    grids: which grid every weight and activation gets.
    task: of the run, for steps that are made for some kinds of tasks.
    midways: where the states of what steps learn in `prepare` are written now and then; take the next one
    for each `Problem`, in the same order in every run.
    """

    quant: QuantSection
    observer: Callable[[TensorQuant], Observer]
    excluded: dict[str, str]
    seed: int
    grids: Grids
    task: Task
    midways: Iterator[Midway | None] = field(default_factory=lambda: repeat(None))

    def reason_to_skip(self, path: str) -> str | None:
        """Why the layer at `path` stays in full precision, or None if it is to be quantized."""
        return reason_to_skip(path, self.quant, self.excluded)

    def targets(self, block: Block) -> dict[str, nn.Module]:
        """Float layers of a block that are to be quantized, by path: none that tables replace."""
        return {
            path: layer
            for path, layer in block.layers().items()
            if path not in self.grids.tables and self.reason_to_skip(path) is None
        }


def shares_samples(step: type["Step"]) -> bool:
    """What a step's own class says of it: a subclass may read more."""
    return vars(step).get("shares_samples", False)


def reason_to_skip(path: str, quant: QuantSection, excluded: dict[str, str]) -> str | None:
    """Why a layer stays in full precision: the recipe's reason, else the task's, else None."""
    for glob in quant.ignore:
        if fnmatchcase(path, glob):
            return f"ignored by the recipe ({glob})"
    return excluded.get(path)


def check_globs(key: str, globs: Iterable[str], model: nn.Module) -> None:
    """Make sure that every glob names modules of a model.

    Raises:
        RecipeError: naming the recipe key, the glob, and the nearest path.
    """
    paths = [path for path, _ in model.named_modules()]
    for glob in globs:
        if not any(fnmatchcase(path, glob) for path in paths):
            raise RecipeError(f"recipe key {key!r}: {glob!r} matches no layer{nearest(glob, paths)}")


class Step:
    """One step of a recipe. Subclasses set `name`, may replace `Options`, and override what they need.

    After the last step every layer that the recipe does not leave alone must be a `QuantModule`.
    """

    name: ClassVar[str]
    Options: ClassVar[type[StepOptions]] = StepOptions
    stage: ClassVar[Stage | None] = None
    """What the step does, by which recipes are checked; None for steps that go anywhere."""
    partial: ClassVar[bool] = False
    """Whether a step that quantizes leaves layers to the next one."""
    data_free: ClassVar[bool] = False
    """Whether the step needs no calibration samples."""
    shares_samples: ClassVar[bool] = False
    """Whether the step comes to the same result where every process has a part of the samples
    (`Calibration.share`). Grams, observers and ranges are always those of all samples; `calibration.io` and
    what `calibration.record` finds are of the part, so that a step that reads them must exchange what it
    makes of them. Subclasses do not inherit it. If one step of a recipe does not share, every process has
    all samples, and steps need to know nothing of processes."""
    needs_exact: bool = False
    """Whether `block` reads the inputs from the full-precision model, `calibration.io.run(exact=True)`."""
    attaches: str = ""
    """What the step, as `prepare` left it, will attach to modules: exports must be able to hold that."""
    origin: str = "a step"
    """Which step of which plugin it is, for sentences; the run sets it."""
    span: int = 1
    """How many blocks in a row the step reconstructs together, in `finish_span`."""

    def __init__(self, options: StepOptions, context: Context) -> None:
        self.options = options
        self.context = context

    def quantize_layer(
        self, block: Block, calibration: Calibration, path: str, weight: QuantizedTensor
    ) -> QuantModule:
        """Replace the float layer at `path` by one with this weight, its input on the recipe's grid.

        In the scope `dataflow` inputs have quantizers of their own, outside the layers.

        Raises:
            ModelError: if the input's range is static and no calibration sample reached the layer.
        """
        activations = self.context.grids.inputs(path)
        static = activations is not None and not activations.dynamic
        observer = calibration.observer(path) if static else None  # asked while the layer is still float
        quantized = block.quantize_layer(path, weight, None if activations is None else activations.spec)
        if not static or quantized.input_quantizer is None:
            return quantized
        if observer is None:
            raise ModelError(
                f"layer {path!r} received no calibration input, so its static input range is unknown: "
                "use more samples, dynamic activations, or add it to quant.ignore"
            )
        low, high = observer.range()
        check_range(low, high, f"the input of layer {path!r}")
        quantized.input_quantizer.set_range(low, high)
        return quantized

    def prepare(self, model: nn.Module, flow: Dataflow, run: Callable[[], object]) -> None:
        """Called once before the walk; may change the model's weights, not its structure.

        Args:
            model: the full-precision model.
            flow: one traced forward pass of it.
            run: that pass again, of the model as it now is; returns its output.
        """

    def transform(self, block: Block, calibration: Calibration) -> None:
        """Called for every block first: may change weights so that the block's function stays the same.

        Afterwards `calibration.changed()` must be called if what flows into layers is another.
        """

    def before(self, block: Block, calibration: Calibration) -> None:
        """Called for every block before its activations are rounded and its weights quantized."""

    def block(self, block: Block, calibration: Calibration) -> None:
        """Called for every block in order; `calibration` holds its inputs and their statistics."""

    def after(self, block: Block, calibration: Calibration) -> None:
        """Called for every block once all steps have had it: its weights are quantized."""

    def finish_span(self, blocks: Sequence[Block], chain: Chain) -> list[float]:
        """Called behind every `span` blocks (the last span may be shorter), all of them quantized.

        Args:
            blocks: the blocks.
            chain: the blocks as one function.

        Returns:
            The losses of what was learned, for the report.
        """
        return []

    def finish(self, model: nn.Module) -> None:
        """Called once after the walk."""
