"""A warm start of what is learned over the whole network: every block against its own output first."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map
from torch.utils.hooks import RemovableHandle

from ptqcore import BlockLearner, Objective, tensors_in


class BlockErrors(Objective):
    """Σ over blocks of Σ (found − exact)² / Σ exact² of what they return.

    The network is computed as a whole; no gradient passes from one block to another, so that each is
    learned for itself, from inputs of the blocks before it as they now are. `close` ends that.
    """

    def __init__(self, learner: BlockLearner, network: nn.Module, blocks: Sequence[str]) -> None:
        """Args:
        learner: computes the network, which is one block to it.
        network: the network itself, still in full precision.
        blocks: paths of the blocks in it.
        """
        self.learner, self.network = learner, network
        self._made: dict[str, list[Tensor]] = {}
        self._handles: list[RemovableHandle] = []
        for path in blocks:
            block = network.get_submodule(path)
            self._handles.append(block.register_forward_pre_hook(_alone, with_kwargs=True))
            self._handles.append(block.register_forward_hook(self._noting(path)))

    def loss(self, predicted: list[Tensor], target: list[Tensor], samples: Sequence[int]) -> Tensor:
        """The errors of all blocks, relative to what they return in full precision."""
        found, self._made = self._made, {}
        args, kwargs = self.learner.io.batch(samples, exact=True)
        with torch.no_grad():
            self.network(*args, **kwargs)
        exact, self._made = self._made, {}
        errors = [
            (one.float() - other).square().sum() / other.square().sum().clamp(min=1e-12)
            for path in found
            for one, other in zip(found[path], exact[path], strict=True)
        ]
        return torch.stack(errors).sum()

    def close(self) -> None:
        """Let gradients pass again."""
        for handle in self._handles:
            handle.remove()

    def _noting(self, path: str) -> Any:
        def note(block: nn.Module, args: Any, output: Any) -> None:
            self._made[path] = tensors_in(output)

        return note


def _alone(block: nn.Module, args: Any, kwargs: Any) -> Any:
    """What flows into a block, without where it comes from."""
    return tree_map(lambda leaf: leaf.detach() if isinstance(leaf, Tensor) else leaf, (args, kwargs))
