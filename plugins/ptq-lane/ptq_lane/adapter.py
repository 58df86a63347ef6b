"""What a family of lane detectors tells us about its outputs; the door for families of others."""

from abc import ABC, abstractmethod
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

from ptq_lane.lanes import Frame, Lanes
from ptqcore import ModelError


class Adapter(ABC):
    """Reads the outputs of one family of lane detectors.

    `outputs` is what the model returns for a batch of images: a tensor, or nested tuples, lists or dicts
    of tensors, all with the batch first. Subclasses set `name`.
    """

    name: ClassVar[str]
    confidence_heads: ClassVar[frozenset[str]] = frozenset()
    """The groups that say whether there is a lane. Errors of the others do no harm where there is none."""
    warm_start: ClassVar[float] = 0.0
    """The share of its updates in which `selective-focus` learns every block of such a network against its
    own output first, where the recipe does not say."""

    def __init__(self, frame: Frame) -> None:
        """Args:
        frame: the images that lanes are to be given in; networks may see them resized.
        """
        self.frame = frame

    @abstractmethod
    def heads(self, outputs: Any) -> dict[str, Tensor]:
        """The groups of outputs that mean different things, each [batch, ...].

        Groups are parts of the output tensors as views (slices, splits, transposes), so that what is
        written into them is written into the outputs.
        """

    @abstractmethod
    def confidence(self, outputs: Any) -> dict[str, Tensor]:
        """How much a lane is there, 0 to 1, for every position of each group; broadcasts to the group.

        Groups that are not named count the same everywhere.
        """

    @abstractmethod
    def decode(self, outputs: Any) -> list[Lanes]:
        """The lanes of each image of the batch, at `self.frame.rows`, as the family's post-process finds
        them."""

    def geometry(self, outputs: Any) -> tuple[Tensor, Tensor] | None:
        """Where every candidate lane would be, differentiable in the outputs, for a loss in pixels.

        Returns:
            x [batch, candidates, rows] in pixels of the frame, and how much each place counts
            [batch, candidates, rows], 0 to 1; None if the post-process cannot be differentiated.
        """
        return None

    @torch.no_grad()
    def splice(self, outputs: Any, replaced: dict[str, Tensor]) -> Any:
        """The outputs with some groups replaced; the outputs themselves stay as they are.

        Raises:
            ModelError: if a group is not a view of the outputs.
        """
        copied = tree_map(lambda leaf: leaf.clone() if isinstance(leaf, Tensor) else leaf, outputs)
        views = self.heads(copied)
        for name, value in replaced.items():
            views[name].copy_(value)
        written = self.heads(copied)
        for name, value in replaced.items():
            if not torch.equal(written[name], value):
                raise ModelError(
                    f"heads() of the adapter {type(self).__name__} returns {name!r} as a copy: return "
                    "views of the outputs (slices, splits, transposes), or override splice()"
                )
        return copied
