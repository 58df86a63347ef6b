"""Where a model comes from: its structure, its weights, and how it wants its images."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from torch import Tensor, nn

from ptq_vision.preprocess import Preprocess


def unchanged(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Names of a checkpoint that are the structure's own."""
    return state


@dataclass(frozen=True)
class Source:
    """A model before it is loaded. `models.find` makes one; nothing heavy happens until it is used.

    name: what `models.find` finds it by again, or the key in `files` of the file that it is made from.
    structure: makes the network; takes the number of classes (None: the usual one).
    preprocess: how it wants its images, where the recipe does not say otherwise.
    rename: turns the names of public checkpoints into the structure's.
    scores: the tensor of the renamed checkpoint whose first side is the number of classes; None if
        the structure has a fixed one.
    default_checkpoint: finds the weights when the recipe names none; None if there are none to find.
    brings_weights: whether the structure comes with weights of its own.
    ignore_label: the label of pixels that don't count, for segmentation.
    files: text files that must go with a saved model, by name.
    """

    name: str
    structure: Callable[[int | None], nn.Module]
    preprocess: Preprocess
    rename: Callable[[dict[str, Tensor]], dict[str, Tensor]] = unchanged
    scores: str | None = None
    default_checkpoint: Callable[[], Path] | None = None
    brings_weights: bool = False
    ignore_label: int = 255
    files: Mapping[str, str] = field(default_factory=dict)
