"""The step `mixed-bits`: a width for the weights of every layer, under a budget for the whole model."""

import math
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from typing import Annotated, ClassVar

import torch
from pydantic import Field
from torch import Tensor, nn

from ptq_llm.allocation import Choice, allocate, cost
from ptq_llm.sensitivity import measure
from ptqcore import (
    Block,
    Context,
    Dataflow,
    QuantizedTensor,
    RecipeError,
    Step,
    StepOptions,
    grid,
    say,
)

_ZERO_POINT_BITS = 8


class MixedBitsOptions(StepOptions):
    """bits: the widths that a layer may get. average: bits for each weight that is quantized, its share of
    scales and zero points included."""

    bits: tuple[Annotated[int, Field(ge=2, le=8)], ...] = Field(default=(2, 3, 4, 8), min_length=1)
    average: float = Field(default=4.0, gt=0)


class MixedBits(Step):
    """Chooses widths by what they cost the blocks' outputs (`measure`), all together within the budget.

    It looks at the first calibration sample alone, at the model as it is before the walk (transforms that
    are made block by block come after it), and at weights rounded to nearest in their observer's range:
    on a small trained model, ranges that `clip` chose led to no better widths. First and last layers keep
    `quant.first_last_bits`.
    """

    name = "mixed-bits"
    shares_samples = True
    stage = "range"
    Options: ClassVar[type[StepOptions]] = MixedBitsOptions
    options: MixedBitsOptions

    def __init__(self, options: MixedBitsOptions, context: Context) -> None:
        super().__init__(options, context)
        if context.quant.weights.is_float:
            raise RecipeError(
                "recipe key 'steps.mixed-bits' chooses widths of integers, but quant.weights.dtype is "
                f"{context.quant.weights.dtype}: set it to int, or remove the step"
            )

    def prepare(self, model: nn.Module, flow: Dataflow, run: Callable[[], object]) -> None:
        """Measure the layers, and set `context.grids.bits`.

        Raises:
            RecipeError: if the lowest widths are above the budget already.
        """
        targets = self.context.targets(Block(model, ""))
        layers = {path: layer.weight for path, layer in targets.items() if isinstance(layer, nn.Linear)}
        weights = sum(weight.numel() for weight in layers.values())
        budget = int(self.options.average * weights)
        sizes = {path: self._sizes(path, weight) for path, weight in layers.items()}
        self._check(sizes.values(), budget, weights)
        widths = sorted(set(self.options.bits))
        probe = _widest_that_fits(sizes.values(), widths, budget)
        errors = measure(model, list(layers), run, widths, probe, self._rounded)
        choices = [
            Choice(size, {width: errors[path].get(width, 0.0) for width in size})
            for path, size in sizes.items()
        ]
        chosen = allocate(choices, budget)
        self.context.grids.bits.update(zip(layers, chosen, strict=True))
        counts = ", ".join(f"{count} at {width}" for width, count in sorted(Counter(chosen).items()))
        say(f"mixed-bits: layers by width: {counts}; {cost(choices, chosen) / weights:.3f} bits a weight")

    def _sizes(self, path: str, weight: Tensor) -> dict[int, int]:
        """Bits of a layer's codes, scales and zero points by width; one width where the recipe fixes it."""
        grids, quant = self.context.grids, self.context.quant
        spec = grids.weights(path).spec
        fixed = path in grids.ends and quant.first_last_bits is not None
        scales = math.prod(grid.layout_shape(tuple(weight.shape), spec))
        dtype = weight.dtype if spec.scale_dtype is None else getattr(torch, spec.scale_dtype)
        each = torch.finfo(dtype).bits + (0 if spec.symmetric else _ZERO_POINT_BITS)
        widths = {spec.bits} if fixed else set(self.options.bits)
        return {width: weight.numel() * width + scales * each for width in sorted(widths)}

    def _check(self, sizes: Iterable[dict[int, int]], budget: int, weights: int) -> None:
        least = sum(min(size.values()) for size in sizes)
        if least > budget:
            raise RecipeError(
                f"recipe key 'steps.mixed-bits.average' is {self.options.average}, but with scales and "
                f"zero points the lowest widths take {least / weights:.3f} bits a weight: raise it, or "
                "allow lower bits or larger groups"
            )

    def _rounded(self, path: str, weight: Tensor, width: int) -> Tensor:
        quant = self.context.grids.weights(path).model_copy(update={"bits": width})
        observer = self.context.observer(quant)
        observer.update(weight.float())
        return QuantizedTensor.from_range(weight, *observer.range(), quant.spec).dequantize()


def _widest_that_fits(sizes: Iterable[dict[int, int]], widths: Sequence[int], budget: int) -> int:
    """The largest width that all layers with a choice could have, else the lowest."""
    sizes = list(sizes)
    fits = [
        width for width in widths if sum(size.get(width, min(size.values())) for size in sizes) <= budget
    ]
    return max(fits, default=widths[0])
