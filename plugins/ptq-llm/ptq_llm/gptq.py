"""The step `gptq`: rounding that makes up for its errors, in the best of several ranges."""

import math
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import ClassVar

import torch
from pydantic import Field
from torch import Tensor, nn

from ptq_llm.adviser import too_few_tokens
from ptq_llm.gptq_sweep import Factor, compensate, factorize
from ptq_llm.scale_refit import refit_scales
from ptq_llm.sequence import in_sequence
from ptq_llm.shrinkage import shrunk
from ptqcore import (
    Block,
    Calibration,
    Context,
    Dataflow,
    Gram,
    QuantizedTensor,
    QuantSpec,
    Step,
    StepOptions,
    divided,
    grid,
    say,
    weight_rows,
)

Range = tuple[Tensor, Tensor]
Tensors = tuple[Tensor, Tensor, Tensor | None]


def gptq(
    weights: Sequence[Tensor],
    ranges: Sequence[Range],
    spec: QuantSpec,
    factor: Factor,
    tries: int = 5,
    refit: bool = True,
) -> list[QuantizedTensor]:
    """Layers that read the same inputs, so that Σ δ H δᵀ over their rows' errors δ is small.

    Errors of other channels move a weight away from where it was: the range that is best for rounding to
    nearest is often too narrow. So a sweep is made in each of several ranges, from the given one to that
    of the weights, and every row keeps what has the least error. Rounding to nearest in the given range
    is among them.

    Args:
        weights: [rows, channels] each.
        ranges: of their grids, as `ptqcore.grid` lays them out.
        spec: of all of them.
        factor: of the Gram of their inputs.
        tries: how many ranges are tried; 1 for the given one alone.
        refit: whether scales are fitted again to the codes (`refit_scales`).
    """
    whole = [grid.value_range(weight.float(), spec) for weight in weights]
    best = _rounded(weights, ranges, spec)
    errors = [
        factor.error(weight.float() - one.dequantize().float())
        for weight, one in zip(weights, best, strict=True)
    ]
    for step in range(tries):
        share = step / max(tries - 1, 1)
        wider = [_between(*ends, share) for ends in zip(ranges, whole, strict=True)]
        if step and all(map(_same, wider, ranges)):
            break
        found, found_errors = compensate(weights, _rounded(weights, wider, spec), factor)
        for index, error in enumerate(found_errors):
            best[index], errors[index] = _better(best[index], errors[index], found[index], error)
    if not refit:
        return best
    pairs = zip(weights, best, strict=True)
    return [refit_scales(weight, one, factor.gram, factor.damping) for weight, one in pairs]


def _rounded(weights: Sequence[Tensor], ranges: Sequence[Range], spec: QuantSpec) -> list[QuantizedTensor]:
    pairs = zip(weights, ranges, strict=True)
    return [QuantizedTensor.from_range(weight, *ends, spec) for weight, ends in pairs]


def _between(narrow: Range, wide: Range, share: float) -> Range:
    low, high = (end.float().lerp(wider, share) for end, wider in zip(narrow, wide, strict=True))
    return low, high


def _same(one: Range, other: Range) -> bool:
    return all(torch.equal(a, b.float()) for a, b in zip(one, other, strict=True))


def _better(
    one: QuantizedTensor, error: Tensor, other: QuantizedTensor, other_error: Tensor
) -> tuple[QuantizedTensor, Tensor]:
    """Of every row what has the smaller error [rows]; of all rows where they share their scale."""
    if one.spec.granularity == "tensor":
        return (other, other_error) if other_error.sum() < error.sum() else (one, error)
    wins = other_error < error
    rows = wins.unsqueeze(1)
    points = None
    if one.zero_point is not None and other.zero_point is not None:
        points = torch.where(rows, other.zero_point, one.zero_point)
    codes, scale = torch.where(rows, other.codes, one.codes), torch.where(rows, other.scale, one.scale)
    return replace(one, codes=codes, scale=scale, zero_point=points), torch.where(wins, other_error, error)


class GPTQOptions(StepOptions):
    """damping: added to the diagonal of a Gram, as a share of its mean. act_order: round the channels of
    the largest inputs first. tries: ranges tried for every row, from the one that a step before or the
    observer has chosen to that of the weights; 1 for the chosen one alone. refit: fit the scales again to
    what was rounded. true_sequential: quantize every layer for inputs from the quantized layers before it
    in the block. That takes one more pass of the block for all layers in a row (three for a Llama block);
    a small trained model gained 3 % of its KL divergence by it."""

    damping: float = Field(default=0.01, gt=0, le=1)
    act_order: bool = True
    tries: int = Field(default=5, ge=1)
    refit: bool = True
    true_sequential: bool = False


class GPTQ(Step):
    """`gptq` for the linear layers that calibration tokens reach, rounding to nearest for the others.

    Layers that read the same tensor share one factor and one sweep. From fewer than four tokens for each
    input channel the Gram is shrunk (`shrunk`), so that chance products are not fitted.
    """

    name = "gptq"
    shares_samples = True
    stage = "quantize"
    Options: ClassVar[type[StepOptions]] = GPTQOptions
    options: GPTQOptions

    def __init__(self, options: GPTQOptions, context: Context) -> None:
        super().__init__(options, context)
        self._rounded: dict[str, str] = {}
        self._short: tuple[float, str, str] = (math.inf, "", "")

    def prepare(self, model: nn.Module, flow: Dataflow, run: Callable[[], object]) -> None:
        """Keep the map: it says which layers of a block come before which."""
        self._flow = flow

    def block(self, block: Block, calibration: Calibration) -> None:
        layers = self.context.targets(block)
        sequential = self.options.true_sequential
        for index, paths in enumerate(in_sequence(self._flow, block, layers) if sequential else [layers]):
            if index:
                calibration.changed()
            sharing: dict[Gram | None, list[str]] = defaultdict(list)
            for path in paths:
                sharing[calibration.gram(path)].append(path)
            groups = list(sharing.items())
            solve, cost = partial(self._solve, block, calibration), partial(self._cost, block)
            found = divided(groups, solve, cost)
            for (gram, together), (reason, records) in zip(groups, found, strict=True):
                self._note(gram, together, reason)
                for path in together:
                    spec, layer = self.context.grids.weights(path).spec, block.model.get_submodule(path)
                    record = QuantizedTensor(*records[path], spec, tuple(weight_rows(layer).shape))
                    self.quantize_layer(block, calibration, path, record)

    def finish(self, model: nn.Module) -> None:
        """Say which layers were rounded to nearest, and where calibration was too short."""
        if self._rounded:
            (path, reason), others = next(iter(self._rounded.items())), len(self._rounded) - 1
            say(f"gptq: {path}{f' and {others} others' if others else ''} rounded to nearest: {reason}")
        _, path, sentence = self._short
        if path:
            say(f"gptq: {path}: {sentence}")

    def _alike(self, block: Block, paths: Sequence[str]) -> list[list[str]]:
        """Layers by grid and dtype."""
        found: dict[tuple[QuantSpec, torch.dtype], list[str]] = defaultdict(list)
        for path in paths:
            dtype = weight_rows(block.model.get_submodule(path)).dtype
            found[self.context.grids.weights(path).spec, dtype].append(path)
        return list(found.values())

    def _solve(
        self, block: Block, calibration: Calibration, group: tuple[Gram | None, list[str]]
    ) -> tuple[str | None, dict[str, Tensors]]:
        """Layers with the same inputs quantized, and why they were rounded to nearest, if they were."""
        gram, paths = group
        factor, reason = self._factor(gram)
        found: dict[str, Tensors] = {}
        for alike in self._alike(block, paths):
            records = self._quantized(block, calibration, alike, factor)
            found |= {path: record.tensors for path, record in zip(alike, records, strict=True)}
        return reason, found

    def _cost(self, block: Block, group: tuple[Gram | None, list[str]]) -> float:
        """How much work that is, in multiplications."""
        gram, paths = group
        weights = [weight_rows(block.model.get_submodule(path)) for path in paths]
        channels = 0 if gram is None else len(gram.matrix)
        rows = sum(len(weight) for weight in weights) * self.options.tries
        return channels**2 * (channels + rows) + sum(weight.numel() for weight in weights)

    def _factor(self, gram: Gram | None) -> tuple[Factor | None, str | None]:
        """The factor of a Gram, or why there is none; the Gram is shrunk where it is of too few tokens."""
        if gram is None or not gram.count:
            return None, "its inputs have no Gram: it is not linear, or no calibration token reached it"
        matrix = gram.matrix
        if too_few_tokens(gram.count, len(matrix)) is not None:
            matrix = shrunk(matrix, gram.count)
        factor = factorize(matrix, self.options.damping, self.options.act_order)
        return factor, "the Gram of its inputs is not finite" if factor is None else None

    def _note(self, gram: Gram | None, paths: Sequence[str], reason: str | None) -> None:
        """Keep what is said at the end."""
        if gram is not None and gram.count:
            channels = len(gram.matrix)
            sentence = too_few_tokens(gram.count, channels)
            if sentence is not None:
                self._short = min(self._short, (gram.count / channels, paths[0], sentence))
        if reason is not None:
            self._rounded.update(dict.fromkeys(paths, reason))

    def _quantized(
        self, block: Block, calibration: Calibration, paths: Sequence[str], factor: Factor | None
    ) -> list[QuantizedTensor]:
        """Layers with the same inputs quantized on grids of one spec."""
        spec = self.context.grids.weights(paths[0]).spec
        layers = [block.model.get_submodule(path) for path in paths]
        weights = [weight_rows(layer).detach() for layer in layers]
        ranges = [calibration.weight_range(path, layer) for path, layer in zip(paths, layers, strict=True)]
        if factor is None:
            return _rounded(weights, ranges, spec)
        return gptq(weights, ranges, spec, factor, self.options.tries, self.options.refit)
