"""GPTQ on tensors: input channels are rounded one after the other, each making up for those before.

Frantar et al., arXiv 2210.17323, in the form of Chee et al., arXiv 2307.13304 (LDLQ, theorem 6: the same
result). With H = U D Uᵀ, U unit upper triangular, the best place for a weight of channel k, given what
the channels before are rounded to, is t_k = w_k + Σ_{j<k} (w_j − q_j) U_jk, and the error of the output is
Σ_k D_k (t_k − q_k)². One Cholesky factor is all it takes, and no inverse.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ptqcore import QuantizedTensor, grid

_MOST_DAMPING = 10.0


@dataclass(frozen=True)
class Factor:
    """H = XᵀX + damping · 1, and H = U D Uᵀ with the channels in the order in which they are rounded.

    gram: XᵀX [channels, channels]. damping: a number. order: of the channels [channels]. unit: U, in that
    order [channels, channels]. pivots: D, in that order [channels].
    """

    gram: Tensor
    damping: float
    order: Tensor
    unit: Tensor
    pivots: Tensor

    def error(self, change: Tensor) -> Tensor:
        """δ H δᵀ [rows] for every row δ of a change of weights [rows, channels]."""
        return (change[:, self.order] @ self.unit).square() @ self.pivots


def factorize(gram: Tensor, damping: float = 0.01, act_order: bool = True) -> Factor | None:
    """The factor of a Gram [channels, channels] with `damping` times the mean of its diagonal added.

    Where that is not positive definite, ten times the damping is tried, and so on. (It is rounding in the
    Gram itself that makes it so: a factor in float64 fails where one in float32 does.) A channel that is
    always 0 is tied to no other: its weights are rounded to nearest.

    Args:
        gram: XᵀX.
        damping: above 0.
        act_order: round the channels of the largest inputs first; else from the first to the last.

    Returns:
        None if the Gram is not finite, or damping up to ten times the mean does not help.
    """
    diagonal = gram.diagonal()
    if not torch.isfinite(gram).all():
        return None
    if act_order:
        order = diagonal.argsort(descending=True, stable=True)
    else:
        order = torch.arange(len(diagonal), device=gram.device)
    backwards = order.flip(0)  # a Cholesky factor from the last channel on is upper triangular
    matrix = gram[backwards.unsqueeze(1), backwards]
    mean, added = float(diagonal.mean()) or 1.0, 0.0
    while damping <= _MOST_DAMPING:
        matrix.diagonal().add_(damping * mean - added)
        added = damping * mean
        lower, failed = torch.linalg.cholesky_ex(matrix)
        if not failed and torch.isfinite(lower.diagonal()).all():
            del matrix
            upper = lower.flip(0, 1)
            del lower
            roots = upper.diagonal().clone()
            return Factor(gram, added, order, upper.div_(roots), roots.square())
        damping *= 10
    return None


def compensate(
    weights: Sequence[Tensor], rounded: Sequence[QuantizedTensor], factor: Factor
) -> tuple[list[QuantizedTensor], list[Tensor]]:
    """Layers that read the same inputs, rounded again in one sweep; scales and zero points stay.

    Groups are static: a channel keeps the scale of its group, whatever the order.

    Args:
        weights: [rows, channels] each.
        rounded: the same rounded to nearest, all on grids of one spec.
        factor: of the Gram of their inputs.

    Returns:
        The layers, and `Factor.error` [rows] of each.
    """
    sweep = _Sweep(weights, rounded, factor)
    sweep.solve(0, len(factor.order))
    channels = torch.empty_like(sweep.codes)
    channels[factor.order] = sweep.codes
    rows = [len(weight) for weight in weights]
    codes = channels.T.split(rows)
    records = [replace(one, codes=part.contiguous()) for one, part in zip(rounded, codes, strict=True)]
    return records, list((factor.pivots @ sweep.targets.square_()).split(rows))


class _Sweep:
    """Channels come first, in their order, and rows behind: what belongs to a channel lies together.

    errors: the weights [channels, rows], and what they are above their rounded values once they have
    some. targets: t [channels, rows], and what they are above the rounded values.
    """

    def __init__(
        self, weights: Sequence[Tensor], rounded: Sequence[QuantizedTensor], factor: Factor
    ) -> None:
        spec = rounded[0].spec
        self.errors = (
            torch.cat([weight.detach().float() for weight in weights]).T[factor.order].contiguous()
        )
        self.targets = self.errors.clone()
        self.codes = torch.empty_like(self.errors, dtype=torch.uint8)
        self.scale = _by_group([one.scale for one in rounded], weights)
        points = [one.zero_point for one in rounded if one.zero_point is not None]
        self.zero_point = _by_group(points, weights) if points else None
        self.group = (factor.order // (spec.group_size or len(factor.order))).tolist()
        self.spec = spec.model_copy(update={"granularity": "channel", "group_size": None})
        self.unit = factor.unit

    def solve(self, first: int, last: int) -> None:
        """Round a range of channels. What the first half of it does to the second is one product: the
        lazy batches of GPTQ (section 3.3, step 2) at every size."""
        if last - first == 1:
            self._round(first)
            return
        middle = (first + last) // 2
        self.solve(first, middle)
        self.targets[middle:last].addmm_(self.unit[first:middle, middle:last].T, self.errors[first:middle])
        self.solve(middle, last)

    def _round(self, index: int) -> None:
        scale = self.scale[self.group[index]]
        zero_point = None if self.zero_point is None else self.zero_point[self.group[index]]
        target = self.targets[index].unsqueeze(1)
        codes, values = (one[:, 0] for one in grid.nearest(target, scale, zero_point, self.spec))
        self.codes[index] = codes
        self.errors[index] -= values
        self.targets[index] -= values


def _by_group(parameters: Sequence[Tensor], weights: Sequence[Tensor]) -> Tensor:
    """Scales or zero points of layers, as [groups, rows of all layers, 1]."""
    pairs = zip(parameters, weights, strict=True)
    rows = torch.cat([one.float().expand(len(weight), -1) for one, weight in pairs])
    return rows.T.contiguous().unsqueeze(-1)
