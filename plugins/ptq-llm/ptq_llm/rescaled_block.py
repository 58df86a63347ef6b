"""What a block computes with factors and offsets that are still variables, weights and inputs rounded."""

from collections.abc import Mapping, Sequence
from functools import partial

import torch
from torch import Tensor, nn

from ptq_llm.learned_range import share_of
from ptq_llm.learned_rescaling import LearnedRescaling
from ptq_llm.straight_through import round_dynamic, round_in_range, value_range
from ptqcore import Block, Calibration, Context, grid


class RescaledBlock:
    """The parameters and the inputs of a block's layers.

    A linear producer's rows are divided; other channels are changed in front of the layers that read
    them, which computes the same as a change of what makes them. Weights are rounded in the shares of
    their extremes that the recipe takes of them as they were; static ranges hold all inputs.
    """

    def __init__(
        self,
        block: Block,
        calibration: Calibration,
        context: Context,
        learned: Sequence[LearnedRescaling],
    ) -> None:
        self._learned, self._context, model = learned, context, block.model
        targets = {p: layer for p, layer in context.targets(block).items() if type(layer) is nn.Linear}
        self._readers = {path: one for one in learned for path in one.group.consumers}
        self._layers = targets | {path: model.get_submodule(path) for path in self._readers}
        for one in learned:
            if one.group.kind == "linear":
                self._layers[one.group.producer] = model.get_submodule(one.group.producer)
        self._shares = {
            path: self._share(path, layer.weight, *calibration.weight_range(path, layer))
            for path, layer in targets.items()
        }
        self._grams = {path: calibration.gram(path) for path in targets}
        self.inputs = {path: partial(self._input, path) for path in targets.keys() | self._readers.keys()}

    def parameters(self) -> Mapping[str, Tensor]:
        """Weights and biases, by their paths in the model."""
        weights = {path: layer.get_parameter("weight").float() for path, layer in self._layers.items()}
        biases = {
            path: layer.get_parameter("bias").float()
            for path, layer in self._layers.items()
            if layer._parameters.get("bias") is not None
        }
        for one in self._learned:
            for path in one.group.consumers:
                if one.shifts:
                    biases[path] = biases.get(path, 0) + weights[path] @ one.shift
                weights[path] = weights[path] * one.scale
            if one.group.kind == "linear":
                path = one.group.producer
                divisors = one.divisors(len(weights[path]))
                weights[path] = weights[path] / divisors[:, None]
                if path in biases:
                    biases[path] = biases[path] / divisors
        found = {}
        for path, layer in self._layers.items():
            dtype = layer.get_parameter("weight").dtype
            found[f"{path}.weight"] = self._rounded(path, weights[path], dtype).to(dtype)
            if path in biases:
                found[f"{path}.bias"] = biases[path].to(dtype)
        return found

    def _rounded(self, path: str, weight: Tensor, dtype: torch.dtype) -> Tensor:
        if path not in self._shares:
            return weight
        spec = self._context.grids.weights(path).spec
        low, high = value_range(weight, spec)
        shares = self._shares[path]
        return round_in_range(weight, low * shares[0], high * shares[1], spec, dtype)

    def _share(self, path: str, weight: Tensor, low: Tensor, high: Tensor) -> tuple[Tensor, Tensor]:
        lowest, highest = grid.value_range(weight.float(), self._context.grids.weights(path).spec)
        return share_of(low.float(), lowest), share_of(high.float(), highest)

    def _input(self, path: str, x: Tensor) -> Tensor:
        """What a layer reads instead of x."""
        one = self._readers.get(path)
        if one is not None and one.group.kind != "linear":
            x = one.inputs(x).to(x.dtype)
        quant = self._context.grids.inputs(path) if path in self._shares else None
        if quant is None or not x.numel():  # experts are called on no tokens too
            return x
        if quant.dynamic:
            return round_dynamic(x, quant.spec)
        gram = self._grams[path]
        if gram is None or not gram.count:
            return x
        ends = torch.stack([gram.low, gram.high])
        ends = ends if one is None else one.inputs(ends)
        low, high = ends.amin().clamp(max=0), ends.amax().clamp(min=0)
        shape = (1,) * x.ndim
        return round_in_range(x.float(), low.view(shape), high.view(shape), quant.spec).to(x.dtype)
