"""What a run leaves behind for its metrics file and its report."""

from dataclasses import asdict, dataclass, field
from typing import Any


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
    same inputs x from the quantized prefix; peak_memory_bytes is resident memory."""

    path: str
    relative_error: float
    seconds: float
    peak_memory_bytes: int


@dataclass(frozen=True)
class ExportRecord:
    """One exported format; largest_difference is between the weights read back from its files and
    the quantized model's."""

    path: str
    verified: bool
    largest_difference: float


@dataclass
class RunRecord:
    """Everything the metrics file and the report say about one run."""

    plugin: str
    recipe: str
    description: str = ""
    before: dict[str, float] = field(default_factory=dict)
    after: dict[str, float] = field(default_factory=dict)
    size_bytes: dict[str, int] = field(default_factory=dict)
    seconds: float = 0.0
    peak_memory_bytes: int = 0
    exports: dict[str, ExportRecord] = field(default_factory=dict)
    layers: list[LayerRecord] = field(default_factory=list)
    blocks: list[BlockRecord] = field(default_factory=list)
    skipped: dict[str, str] = field(default_factory=dict)
    phases: dict[str, float] = field(default_factory=dict)
    recipe_yaml: str = ""
    versions: dict[str, str] = field(default_factory=dict)
    seed: int = 0

    def metrics(self) -> dict[str, Any]:
        """What `metrics.json` holds."""
        return {
            "plugin": self.plugin,
            "recipe": self.recipe,
            "before": self.before,
            "after": self.after,
            "size_bytes": self.size_bytes,
            "seconds": self.seconds,
            "peak_memory_bytes": self.peak_memory_bytes,
            "exports": {name: asdict(export) for name, export in self.exports.items()},
        }
