"""The step `low-rank`: low-rank error correction (QLLM, Liu et al., arXiv 2310.08041, section 4.2)."""

import math
from collections.abc import Sequence
from contextlib import ExitStack
from typing import Any, ClassVar
from zlib import crc32

import torch
from pydantic import Field
from torch import Tensor

from ptqcore import (
    Block,
    Calibration,
    Chain,
    Context,
    ModelError,
    QuantizedTensor,
    QuantModule,
    RecipeError,
    Step,
    StepOptions,
    track,
)


class LowRankOptions(StepOptions):
    """rank: of the correction of every weight; blocks: how many in a row are reconstructed together;
    epochs, rate: passes over the calibration samples, and the learning rate, which falls to 0 linearly."""

    rank: int = Field(default=4, ge=1)
    blocks: int = Field(default=4, ge=1)
    epochs: int = Field(default=10, ge=1)
    rate: float = Field(default=5e-4, gt=0)


class LowRank(Step):
    """Rounds every weight, learns A B beside it so that several blocks together return what they do in
    full precision, and rounds W + A B.

    Inputs come from the quantized prefix, targets from the full-precision model. The last blocks are
    reconstructed too if they are fewer.
    """

    name = "low-rank"
    Options: ClassVar[type[StepOptions]] = LowRankOptions
    options: LowRankOptions
    stage = "quantize"
    needs_exact = True

    def __init__(self, options: LowRankOptions, context: Context) -> None:
        super().__init__(options, context)
        if context.quant.scope == "dataflow" and context.quant.activations is not None:
            raise RecipeError(
                "recipe key 'quant.scope' is 'dataflow', but low-rank learns with the inputs of layers "
                "rounded: set it to layers"
            )
        self.span = options.blocks
        self._corrections: dict[str, Correction] = {}

    def block(self, block: Block, calibration: Calibration) -> None:
        for path, layer in self.context.targets(block).items():
            weight = layer.get_parameter("weight")
            spec = self.context.grids.weights(path).spec
            rounded = QuantizedTensor.from_range(weight, *calibration.weight_range(path, layer), spec)
            generator = torch.Generator().manual_seed(self.context.seed * 2**31 + crc32(path.encode()))
            self._corrections[path] = Correction(weight, self.options.rank, generator)
            self.quantize_layer(block, calibration, path, rounded)

    def finish_span(self, blocks: Sequence[Block], chain: Chain) -> list[float]:
        layers = {path: layer for block in blocks for path, layer in block.quantized_layers().items()}
        layers = {path: layer for path, layer in layers.items() if path in self._corrections}
        losses = self._learn(layers, chain, f"{blocks[0].path} to {blocks[-1].path}")
        for path, layer in layers.items():
            corrected = self._corrections.pop(path).corrected()
            spec = self.context.grids.weights(path).spec
            observer = self.context.observer(self.context.grids.weights(path))
            observer.update(corrected.float())
            layer.set_weight(QuantizedTensor.from_range(corrected, *observer.range(), spec))
        return losses

    def _learn(self, layers: dict[str, QuantModule], chain: Chain, name: str) -> list[float]:
        corrections = [self._corrections[path] for path in layers]
        variables = [v for correction in corrections for v in (correction.down, correction.up)]
        optimizer = torch.optim.AdamW(variables, lr=self.options.rate, weight_decay=0.0)
        updates = self.options.epochs * chain.samples
        falling = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda done: 1 - done / updates)
        generator = torch.Generator().manual_seed(self.context.seed)
        losses = []
        with ExitStack() as hooked, torch.enable_grad():
            for path, layer in layers.items():
                handle = layer.register_forward_hook(self._corrections[path].correct)
                hooked.callback(handle.remove)
            for _ in track(range(self.options.epochs), f"correcting {name}"):
                for sample in torch.randperm(chain.samples, generator=generator).tolist():
                    optimizer.zero_grad()
                    loss = _mean_squared_error(chain.run(sample), chain.exact[sample])
                    loss.backward()
                    optimizer.step()
                    falling.step()
                    losses.append(float(loss.detach()))
        if not all(map(math.isfinite, losses)):
            raise ModelError(f"the low-rank correction of {name} diverges: lower the rate of low-rank")
        return losses


def _mean_squared_error(found: list[Tensor], wanted: list[Tensor]) -> Tensor:
    return torch.nn.functional.mse_loss(found[0].float(), wanted[0].float())


class Correction:
    """A B / r beside a quantized weight: y + Q(x) A B / r, the same as with W + (A B)ᵀ / r.

    down: A [in, r], uniform as Kaiming's; up: B [r, out], zeros at first.
    """

    def __init__(self, weight: Tensor, rank: int, generator: torch.Generator) -> None:
        out, channels = weight.shape
        bound = 1 / math.sqrt(channels)
        down = (torch.rand(channels, rank, generator=generator) * 2 - 1) * bound * math.sqrt(3)
        self._weight, self._rank = weight.detach(), rank
        self.down = down.to(weight.device).requires_grad_(True)
        self.up = torch.zeros(rank, out, device=weight.device, requires_grad=True)

    def correct(self, layer: Any, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
        """A forward hook of the quantized layer."""
        x = args[0] if layer.input_quantizer is None else layer.input_quantizer(args[0])
        return output + (((x.float() @ self.down) @ self.up) / self._rank).to(output.dtype)

    @torch.no_grad()
    def corrected(self) -> Tensor:
        """W + (A B)ᵀ / r, in the dtype of W."""
        change = (self.down @ self.up).T / self._rank
        return (self._weight.float() + change).to(self._weight.dtype)
