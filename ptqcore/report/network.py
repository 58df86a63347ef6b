"""What is known of a network before it is quantized: its blocks, and what flows between them."""

from dataclasses import asdict, dataclass, field
from typing import Any

INPUT = "input"


@dataclass(frozen=True)
class Flowing:
    """A tensor: the layer or function that it comes from (`input` for what the model is given)."""

    source: str
    shape: tuple[int, ...]


@dataclass(frozen=True)
class Part:
    """A layer, or a function that joins tensors of different origin (a sum, a product, attention), or
    an embedding.

    name: path of the layer, or site of the function. shape: of the layer's weight, or of what the
    function makes. groups: of a convolution. reads: numbers of the parts of the same stage whose
    results go in, -1 for what flows into the stage. reason: why a layer stays in full precision.
    """

    name: str
    function: str
    shape: tuple[int, ...]
    layer: bool
    reads: tuple[int, ...]
    groups: int = 1
    reason: str | None = None


@dataclass(frozen=True)
class Link:
    """A tensor that flows from one stage (-1: the model's input) into another."""

    stage: int
    shape: tuple[int, ...]


@dataclass(frozen=True)
class Stage:
    """A block, or functions of one module that run in a row between blocks.

    reads: the tensors that flow in. makes: shapes of the tensors that others read, or the model
    returns. returned: whether the model returns one. functions: names, in order.
    """

    name: str
    block: bool
    parts: tuple[Part, ...]
    reads: tuple[Link, ...]
    makes: tuple[tuple[int, ...], ...]
    functions: tuple[str, ...]
    returned: bool = False

    @property
    def layers(self) -> list[Part]:
        """Its layers."""
        return [part for part in self.parts if part.layer]


@dataclass(frozen=True)
class Join:
    """A function that joins tensors; kind: `residual` (of something and what was computed from it),
    `sum`, `concatenation`, or else the function's name."""

    site: str
    kind: str
    tensors: tuple[Flowing, ...]


@dataclass(frozen=True)
class Row:
    """A layer whose output only the next layer reads, through functions that move or clip values."""

    first: str
    between: tuple[str, ...]
    second: str
    only_moves: bool


@dataclass(frozen=True)
class Constant:
    """A parameter that a function reads which is neither a layer, an embedding nor a norm."""

    site: str
    parameter: str
    shape: tuple[int, ...]


@dataclass(frozen=True)
class GridEdge:
    """A tensor between functions that the recipe rounds."""

    name: str
    grid: str
    shape: tuple[int, ...]


@dataclass(frozen=True)
class FlowMap:
    """The map of a network.

    modules, functions: how many there are, and how often functions are called. norm_pairs: batch
    norm → the layer before it; folded: how many of them were folded into it; difference: by how much
    that changes the outputs, relative to the largest. norm_readers: norm → layers that read what it
    returns. alone: layer → why it stays in full precision.
    """

    modules: int
    functions: int
    inputs: tuple[tuple[int, ...], ...]
    stages: tuple[Stage, ...]
    norm_pairs: dict[str, str] = field(default_factory=dict)
    folded: int = 0
    difference: float = 0.0
    joins: tuple[Join, ...] = ()
    norm_readers: dict[str, tuple[str, ...]] = field(default_factory=dict)
    rows: tuple[Row, ...] = ()
    constants: tuple[Constant, ...] = ()
    alone: dict[str, str] = field(default_factory=dict)
    edges: tuple[GridEdge, ...] = ()

    @property
    def blocks(self) -> list[Stage]:
        """The stages that are quantized as one."""
        return [stage for stage in self.stages if stage.block]

    @property
    def layers(self) -> list[Part]:
        """All linear layers and convolutions that are called."""
        return [part for stage in self.stages for part in stage.layers]

    def to_json(self) -> dict[str, Any]:
        """Everything, as JSON has it."""
        return asdict(self)
