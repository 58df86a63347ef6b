"""What a run leaves behind for its metrics file and its report."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from ptqcore.report.figures import Curves, Pictures
from ptqcore.report.network import FlowMap

MOST_LOSSES = 100


@dataclass(frozen=True)
class LayerRecord:
    """One quantized layer.

    relative_error: ‖X(Ŵ − W)ᵀ‖² / ‖X Wᵀ‖² over the calibration inputs, from the weights alone; None
    where the layer has no Gram (convolutions).
    clipped: share of the weights that the grid clips (0 … 1).
    weight_range, input_range: smallest and largest value, of the float weight and of the inputs
    seen in calibration (None where the layer has no Gram).
    """

    path: str
    block: str
    shape: tuple[int, ...]
    weights: str
    activations: str | None
    relative_error: float | None
    clipped: float
    weight_range: tuple[float, float]
    input_range: tuple[float, float] | None


@dataclass(frozen=True)
class BlockRecord:
    """One block: relative_error is ‖Q(x) − F(x)‖² / ‖F(x)‖² over the calibration samples, for the
    same inputs x from the quantized prefix; peak_memory_bytes is resident memory; losses are those of
    the updates in which its rounding was learned, at most `MOST_LOSSES`, each the mean of several."""

    path: str
    relative_error: float
    seconds: float
    peak_memory_bytes: int
    losses: tuple[float, ...] = ()


@dataclass(frozen=True)
class ActivationRecord:
    """One activation on a static grid.

    name: the edge, or the layer whose input it is. range: what the grid covers; scale: its step.
    clipped: share of the values outside the range (0 … 1), over the calibration samples; None where
    they were not counted.
    """

    name: str
    block: str
    grid: str
    range: tuple[float, float]
    scale: float
    clipped: float | None


@dataclass(frozen=True)
class EngineRecord:
    """How one engine runs an exported file, next to the quantized model in PyTorch.

    problem: why the engine could not be asked; empty if it was.
    layers: layer → why it does not run in integers, None where it does.
    samples: calibration samples whose outputs were compared.
    within_one_step: share of the outputs that differ by at most one step of their grid (outputs that
    stay in floating point: 1/127 of the largest).
    largest_steps: the largest difference, in steps.
    histogram: difference in steps → share of the outputs.
    agreement: share of the places where the same channel is the largest; None where outputs have none.
    control: within_one_step of the simulation against itself with other rounding errors of float32:
    values on the edge between two steps fall to either side, and in a deep network many follow.
    """

    engine: str
    problem: str = ""
    layers: dict[str, str | None] = field(default_factory=dict)
    samples: int = 0
    within_one_step: float = 0.0
    largest_steps: float = 0.0
    histogram: dict[str, float] = field(default_factory=dict)
    agreement: float | None = None
    control: float = 1.0

    @property
    def in_integer(self) -> int:
        """How many layers run in integers."""
        return sum(reason is None for reason in self.layers.values())


@dataclass(frozen=True)
class Verification:
    """What was found when the files of an export were read back.

    largest_difference: between the weights in the files and the quantized model's.
    engines: how engines run the files, for formats that an engine at hand can run.
    notes: sentences for the report, on whatever the format could not hold as it was.
    """

    largest_difference: float
    engines: tuple[EngineRecord, ...] = ()
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class ExportRecord:
    """One exported format; `verified` says that its weights are the quantized model's."""

    path: str
    verified: bool
    largest_difference: float
    engines: tuple[EngineRecord, ...] = ()
    notes: tuple[str, ...] = ()


@dataclass
class RunRecord:
    """Everything the metrics file and the report say about one run.

    before, baseline, after: the metrics of the model in full precision, of the naive baseline (empty
    without one), and of the quantized model. coverage: share of the weights inside the blocks that were
    quantized.
    figures: what the task shows of its results; in the report alone. facts: what it says of its data.
    exceptions: quantized layer → how its grid differs from the recipe's. skipped: layer → why it was not
    quantized.
    """

    plugin: str
    recipe: str
    description: str = ""
    before: dict[str, float] = field(default_factory=dict)
    baseline: dict[str, float] = field(default_factory=dict)
    after: dict[str, float] = field(default_factory=dict)
    figures: Sequence[Curves | Pictures] = ()
    facts: Mapping[str, int | float | str] = field(default_factory=dict)
    size_bytes: dict[str, int] = field(default_factory=dict)
    seconds: float = 0.0
    peak_memory_bytes: int = 0
    exports: dict[str, ExportRecord] = field(default_factory=dict)
    layers: list[LayerRecord] = field(default_factory=list)
    blocks: list[BlockRecord] = field(default_factory=list)
    activations: list[ActivationRecord] = field(default_factory=list)
    exceptions: dict[str, str] = field(default_factory=dict)
    skipped: dict[str, str] = field(default_factory=dict)
    coverage: float = 0.0
    phases: dict[str, float] = field(default_factory=dict)
    map: FlowMap | None = None
    recipe_yaml: str = ""
    versions: dict[str, str] = field(default_factory=dict)
    seed: int = 0

    def metrics(self) -> dict[str, Any]:
        """What `metrics.json` holds."""
        return {
            "plugin": self.plugin,
            "recipe": self.recipe,
            "before": self.before,
            **({"baseline": self.baseline} if self.baseline else {}),
            "after": self.after,
            **({"facts": dict(self.facts)} if self.facts else {}),
            "size_bytes": self.size_bytes,
            "coverage": self.coverage,
            "seconds": self.seconds,
            "peak_memory_bytes": self.peak_memory_bytes,
            "exports": {name: asdict(export) for name, export in self.exports.items()},
        }
