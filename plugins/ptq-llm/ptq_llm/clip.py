"""The step `clip`: the range of every scale of a weight that gives the least error of the layer's output.

For a change ΔW of a weight the output changes by tr(ΔW G ΔWᵀ), G = XᵀX summed over all tokens, so that
no sample is needed to try a range. AWQ (Lin et al., arXiv 2306.00978, section 3.2) and LLMC (Gong et al.,
arXiv 2405.06001) search the same ranges on a sample of tokens.
"""

from collections.abc import Callable
from fnmatch import fnmatchcase
from typing import ClassVar, Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from ptqcore import (
    Block,
    Calibration,
    Dataflow,
    QuantSpec,
    Step,
    StepOptions,
    check_globs,
    divided,
    grid,
    weight_rows,
)

Range = tuple[Tensor, Tensor]

_WIDEST_PART = 256
_HALVINGS = 3
_VALUES_AT_A_TIME = 2**17  # few enough to stay in the cache of a core
_FEWEST_ROWS = 32


class OutputError:
    """The output error that a range of a weight brings: Σ_p ΔW_p G_pp ΔW_pᵀ for every scale.

    G_pp are square parts on the diagonal of the Gram. A part is a group where scales are of groups: what
    belongs to one scale is measured exactly. Scales of a channel or a tensor are measured on parts of up
    to 256 input channels: a whole Gram would cost as many products for each weight as the layer has
    inputs, and finds ranges hardly better than parts do (on a small trained model, of groups of 64: 12 %
    more error of rounding at 2 bits, none of GPTQ).
    """

    def __init__(self, weight: Tensor, gram: Tensor, spec: QuantSpec) -> None:
        """Args:
        weight: [rows, channels].
        gram: XᵀX [channels, channels] of its inputs.
        spec: of the weight's grid.
        """
        rows, channels = weight.shape
        size = spec.group_size or min(channels, _WIDEST_PART)
        missing = -channels % size
        parts = (channels + missing) // size
        padded = F.pad(weight.detach().float(), (0, missing))
        self._weight = padded.view(rows, parts, size).transpose(0, 1).contiguous()
        blocks = F.pad(gram, (0, missing, 0, missing)).view(parts, size, parts, size)
        self._gram = blocks.diagonal(dim1=0, dim2=2).permute(2, 0, 1).contiguous()
        self._spec, self._dtype = spec, weight.dtype
        self._row_spec = spec.model_copy(update={"granularity": "channel", "group_size": None})
        self._at_a_time = max(_VALUES_AT_A_TIME // channels, _FEWEST_ROWS)

    def __call__(self, low: Tensor, high: Tensor) -> Tensor:
        """Errors in the layout of the range."""
        scale, zero_point = grid.scale_and_zero_point(low, high, self._spec)
        scale = self._by_part(scale.to(self._dtype).float())  # as the quantized layer keeps it
        zero_point = None if zero_point is None else self._by_part(zero_point)
        rows = self._weight.shape[1]
        pieces = (slice(start, start + self._at_a_time) for start in range(0, rows, self._at_a_time))
        error = torch.cat([self._of_rows(piece, scale, zero_point) for piece in pieces], 1)
        if self._spec.granularity == "group":
            return error.T
        per_row = error.sum(0).unsqueeze(1)
        return per_row if self._spec.granularity == "channel" else per_row.sum(0, keepdim=True)

    def _by_part(self, parameter: Tensor) -> Tensor:
        """Scales or zero points as [parts, rows, 1]."""
        return parameter.T.unsqueeze(-1).expand(*self._weight.shape[:2], 1)

    def _of_rows(self, rows: slice, scale: Tensor, zero_point: Tensor | None) -> Tensor:
        """Errors [parts, rows] of some rows."""
        weight = self._weight[:, rows]
        flat = weight.flatten(0, 1)
        points = None if zero_point is None else zero_point[:, rows].flatten(0, 1)
        rounded = grid.fake_quantize(flat, scale[:, rows].flatten(0, 1), points, self._row_spec)
        change = rounded.sub_(flat).view_as(weight)
        return torch.bmm(change, self._gram).mul_(change).sum(-1)


def clip(
    weight: Tensor,
    gram: Tensor,
    low: Tensor,
    high: Tensor,
    spec: QuantSpec,
    two_sided: bool,
    candidates: int = 10,
    shrink: float = 0.8,
) -> Range:
    """The range inside [low, high] with the least `OutputError`, for every scale on its own.

    Both ends are shrunk together first, by shares from 1 down to 1 − shrink in equal steps, then each end
    alone; around the best the steps are halved three times. A share changes only where that lowers the
    error, so that it is never above the error of [low, high].

    Args:
        weight: [rows, channels].
        gram: XᵀX of its inputs.
        low: ends to start from, as `ptqcore.grid` lays them out.
        high: the same.
        spec: of the grid.
        two_sided: whether each end is searched on its own.
        candidates: shares tried in one go.
        shrink: the most that is taken away.
    """
    search = _Search(OutputError(weight, gram, spec), low.float(), high.float())
    step = shrink / candidates
    shares = [1 - step * index for index in range(candidates + 1)]
    for share in shares[1:]:
        search.offer(share, share)
    if two_sided:
        for share in shares:
            search.offer(share, search.high_share)
        for share in shares:
            search.offer(search.low_share, share)
    for _ in range(_HALVINGS):
        step /= 2
        search.refine(step, two_sided)
    return search.low * search.low_share, search.high * search.high_share


class _Search:
    """The best shares of a range so far, and their errors."""

    def __init__(self, error: OutputError, low: Tensor, high: Tensor) -> None:
        self.low, self.high = low, high
        self.low_share, self.high_share = torch.ones_like(low), torch.ones_like(high)
        self._error = error
        self._least = error(low, high)

    def offer(self, low_share: Tensor | float, high_share: Tensor | float) -> None:
        """Take shares where they lower the error."""
        found = self._error(self.low * low_share, self.high * high_share)
        better = found < self._least
        self._least = torch.where(better, found, self._least)
        self.low_share = torch.where(better, low_share, self.low_share)
        self.high_share = torch.where(better, high_share, self.high_share)

    def refine(self, step: float, two_sided: bool) -> None:
        """Offer what lies a step beside the best, of each end or of both."""
        for ends in ((1, 0), (0, 1)) if two_sided else ((1, 1),):
            low_share, high_share = self.low_share, self.high_share
            for change in (-step, step):
                self.offer(
                    (low_share + change * ends[0]).clamp(step, 1),
                    (high_share + change * ends[1]).clamp(step, 1),
                )


class ClipOptions(StepOptions):
    """symmetry: whether both ends of a range shrink by one share, or each by its own; `auto` takes the
    latter where the grid is asymmetric or its scales are signed. candidates, shrink: shares tried, from 1
    down to 1 − shrink. exclude: globs of layers that keep the observer's range (AWQ leaves out q_proj and
    k_proj)."""

    symmetry: Literal["auto", "symmetric", "asymmetric"] = "auto"
    candidates: int = Field(default=10, ge=1)
    shrink: float = Field(default=0.8, gt=0, lt=1)
    exclude: tuple[str, ...] = ()

    def two_sided(self, spec: QuantSpec) -> bool:
        """Whether each end of a range on this grid is searched on its own."""
        if self.symmetry == "auto":
            return not spec.symmetric or spec.signed_scale
        return self.symmetry == "asymmetric"


class Clip(Step):
    """Ranges of weights by the error of the layers' outputs, for the step that quantizes.

    Layers that are not linear, or that no token reaches, keep their observer's range.
    """

    name = "clip"
    shares_samples = True
    stage = "range"
    Options: ClassVar[type[StepOptions]] = ClipOptions
    options: ClipOptions

    def prepare(self, model: nn.Module, flow: Dataflow, run: Callable[[], object]) -> None:
        """Check the globs.

        Raises:
            RecipeError: if one of `exclude` matches no module.
        """
        check_globs("steps.clip.exclude", self.options.exclude, model)

    def block(self, block: Block, calibration: Calibration) -> None:
        layers = self.context.targets(block)
        grams = {
            path: gram
            for path in layers
            if (gram := calibration.gram(path)) is not None
            if not any(fnmatchcase(path, glob) for glob in self.options.exclude)
        }

        def search(path: str) -> Range:
            spec, options = self.context.grids.weights(path).spec, self.options
            return clip(
                weight_rows(layers[path]),
                grams[path].matrix,
                *calibration.weight_range(path, layers[path]),
                spec,
                options.two_sided(spec),
                options.candidates,
                options.shrink,
            )

        found = divided(list(grams), search, lambda path: weight_rows(layers[path]).numel())
        for path, (low, high) in zip(grams, found, strict=True):
            calibration.set_weight_range(path, low, high)
