"""Convolutions that make several groups of outputs, as one for each: then each group has a grid of its own.

One scale for scores, pixels and slopes spends its steps on whichever is largest. Which channels belong to
which group is found by planting channel numbers in the place of what a convolution makes, and reading the
groups.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ptq_lane.adapter import Adapter

Splits = Mapping[str, Sequence[Sequence[int]]]
"""Path of a convolution → the channels of each of its groups."""

_PLANTED = (1.0, 3.0)  # factors of channel numbers: what is only moved is proportional to them
_FIRST = 2.0**12  # channel numbers begin here, far from what networks put out


class SplitHead(nn.Module):
    """A convolution as several, each of which makes some of its channels."""

    def __init__(self, convolution: nn.Conv2d, groups: Sequence[Sequence[int]]) -> None:
        super().__init__()
        self.parts = nn.ModuleList(_part(convolution, channels) for channels in groups)
        order = [channel for channels in groups for channel in channels]
        self.order = None if order == sorted(order) else [order.index(at) for at in range(len(order))]

    def forward(self, x: Tensor) -> Tensor:
        made = torch.cat([part(x) for part in self.parts], 1)
        return made if self.order is None else made[:, self.order]


def find_splits(model: nn.Module, adapter: Adapter, run: Callable[[], Any]) -> dict[str, list[list[int]]]:
    """The convolutions whose channels go into different groups, and into those alone without a change.

    Args:
        model: in evaluation mode.
        adapter: reads its outputs.
        run: runs it on an image.
    """
    found = {}
    for path, layer in model.named_modules():
        if isinstance(layer, nn.Conv2d) and layer.groups == 1 and layer.out_channels > 1:
            groups = _groups(layer, adapter, run)
            channels = sorted(channel for group in groups for channel in group)
            if len(groups) > 1 and channels == list(range(layer.out_channels)):
                found[path] = groups
    return found


def split(model: nn.Module, splits: Splits) -> None:
    """Replace convolutions, in place."""
    for path, groups in splits.items():
        parent, _, name = path.rpartition(".")
        convolution = model.get_submodule(path)
        assert isinstance(convolution, nn.Conv2d)
        setattr(model.get_submodule(parent), name, SplitHead(convolution, groups))


@torch.no_grad()
def _groups(layer: nn.Conv2d, adapter: Adapter, run: Callable[[], Any]) -> list[list[int]]:
    """The channels that each group of outputs holds, of those groups that hold any."""
    planted = [_planted(layer, adapter, run, factor) for factor in _PLANTED]
    groups = []
    for name, once in planted[0].items():
        more = planted[1].get(name)
        if more is None or more.shape != once.shape:
            return []
        moved = (once >= _FIRST) & (more == once * (_PLANTED[1] / _PLANTED[0]))
        if moved.any():
            groups.append((once[moved] - _FIRST).unique().long().tolist())
    return groups


def _planted(
    layer: nn.Conv2d, adapter: Adapter, run: Callable[[], Any], factor: float
) -> dict[str, Tensor]:
    """The groups of outputs if the layer made the numbers of its channels, times a factor."""

    def plant(_: nn.Module, args: Any, made: Tensor) -> Tensor:
        numbers = _FIRST + torch.arange(made.shape[1], dtype=made.dtype)
        return (factor * numbers).view(1, -1, 1, 1).expand_as(made).clone()

    handle = layer.register_forward_hook(plant)
    try:
        return adapter.heads(run())
    finally:
        handle.remove()


def _part(convolution: nn.Conv2d, channels: Sequence[int]) -> nn.Conv2d:
    """The convolution that makes some channels of another."""
    part = nn.Conv2d(
        convolution.in_channels,
        len(channels),
        convolution.kernel_size,  # type: ignore[arg-type]
        convolution.stride,  # type: ignore[arg-type]
        convolution.padding,  # type: ignore[arg-type]
        convolution.dilation,  # type: ignore[arg-type]
        bias=convolution.bias is not None,
        padding_mode=convolution.padding_mode,
    )
    with torch.no_grad():
        part.weight.copy_(convolution.weight[list(channels)])
        if part.bias is not None and convolution.bias is not None:
            part.bias.copy_(convolution.bias[list(channels)])
    return part.eval()
