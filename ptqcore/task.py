"""A task: a model, the samples that calibrate it, and the figures by which it is judged."""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, Literal

from pydantic import BaseModel, ConfigDict
from torch import Tensor, nn

from ptqcore.report.figures import Curves, Pictures
from ptqcore.timesteps import Unseen

Judged = Literal["full precision", "naive baseline", "quantized"]
"""The models that a run measures, in this order; the second only with `evaluate.baseline`."""


class TaskOptions(BaseModel):
    """The `task` section of a recipe without `kind`; subclasses add fields, unknown keys are refused."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class Task(ABC):
    """What is quantized, on what data, judged by what. One object serves one run.

    Subclasses set `name` (the `kind` of a recipe's `task` section) and `Options`. Bad input raises
    `DataError` or `ModelError` with one clear sentence.
    """

    name: ClassVar[str]
    Options: ClassVar[type[TaskOptions]] = TaskOptions
    least_coverage: ClassVar[float] = 0.0
    """Share of the weights inside the blocks that a run must quantize, or fail."""
    min_tokens: ClassVar[int] = 1
    """Calibration tokens that every linear layer must see, where a step learns from them."""
    open_dimensions: ClassVar[Mapping[str, Mapping[int, str]]] = {}
    """Input → dimensions that may have any size, beside the batch → names of these sizes, for exports."""
    class_dimension: ClassVar[int] = 1
    """The dimension of an output along which the largest number is the model's choice."""
    timestep_argument: ClassVar[str] = "timestep"
    """The parameter of the model's `forward` that is given the timestep, where there is one."""
    unseen_timesteps: Unseen = "nearest"
    """What the deployed model does about timesteps that the calibration samples are not of."""
    judged: Judged = "full precision"
    """Which model `evaluate` is given; the run says so before every call. The naive baseline is the model
    rounded to nearest, with the recipe's grids and no other step."""

    def __init__(self, options: TaskOptions, seed: int, workspace: Path) -> None:
        """Args:
        options: the recipe's `task` section, validated by `Options`.
        seed: the run's seed.
        workspace: a folder that outlives an interrupted run and goes with a finished one; keep
            there what is slow to compute again.
        """
        self.options = options
        self.seed = seed
        self.workspace = workspace

    @abstractmethod
    def load_model(self) -> nn.Module:
        """The full-precision model, in evaluation mode."""

    @abstractmethod
    def samples(self, model: nn.Module) -> Sequence[Any]:
        """Calibration samples: nested tuples, lists or dicts of tensors; the same for the same seed."""

    def example(self, model: nn.Module) -> Any:
        """One sample that shows what the model computes; override where `samples` takes long."""
        return self.samples(model)[0]

    @abstractmethod
    def evaluate(self, model: nn.Module) -> dict[str, float]:
        """Metrics of a model, by name; the names never differ from call to call.

        The first call of a run is with the full-precision model: figures that compare (agreement,
        divergence) take its outputs as reference, and are perfect in that call. Then comes the naive
        baseline, if the recipe wants one, and last the quantized model; `judged` says which it is.
        """

    def figures(self) -> Sequence[Curves | Pictures]:
        """What can be looked at of the results, for the report; called once, after the last `evaluate`.
        To set models side by side, keep what `evaluate` finds, by `judged`. The same for the same recipe.
        """
        return ()

    def facts(self) -> Mapping[str, int | float | str]:
        """What else a reader of the report should know of the data, by name: how much of it there was, what
        it cost. Called once, after the last `evaluate`; `metrics.json` holds it too."""
        return {}

    @abstractmethod
    def save_assets(self, folder: Path) -> None:
        """Write what `build` needs (a configuration; never weights), and what users want beside it."""

    @classmethod
    @abstractmethod
    def build(cls, folder: Path) -> nn.Module:
        """The model's structure from a folder of assets, with any weights, in evaluation mode."""

    def forward(self, model: nn.Module, sample: Any) -> Any:
        """Run the model on one calibration sample: dicts as keywords, tuples as positions."""
        if isinstance(sample, dict):
            return model(**sample)
        return model(*sample) if isinstance(sample, tuple) else model(sample)

    def mask(self, sample: Any) -> Tensor | None:
        """Which positions of a calibration sample count (bool [batch, positions]); None for all.

        Padding must not, wherever it flows through layers with the sample's leading dimensions.
        """
        return None

    def timestep(self, sample: Any) -> float | None:
        """The timestep that a calibration sample is of, as the model is given it; None if models of
        this task have none."""
        return None

    def excluded(self, model: nn.Module) -> dict[str, str]:
        """Layers that stay in full precision by default: path → reason for the report."""
        return {}
