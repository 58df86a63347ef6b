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
    say,
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
    reconstructed too if they are fewer. Rounding anew loses some of what was learned: where it loses all,
    the blocks stay as they were.
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
            low, high = calibration.weight_range(path, layer)
            rounded = QuantizedTensor.from_range(weight, low, high, self.context.grids.weights(path).spec)
            generator = torch.Generator().manual_seed(self.context.seed * 2**31 + crc32(path.encode()))
            shares = tuple(map(_share, (low, high), self._observed(path, weight)))
            self._corrections[path] = Correction(weight, rounded, shares, self.options.rank, generator)
            self.quantize_layer(block, calibration, path, rounded)

    def finish_span(self, blocks: Sequence[Block], chain: Chain) -> list[float]:
        layers = {path: layer for block in blocks for path, layer in block.quantized_layers().items()}
        layers = {path: layer for path, layer in layers.items() if path in self._corrections}
        corrections = {path: self._corrections.pop(path) for path in layers}
        name = " to ".join(dict.fromkeys(block.path for block in (blocks[0], blocks[-1])))
        before = _total_error(chain)
        losses = self._learn(layers, corrections, chain, name)
        for path, layer in layers.items():
            layer.set_weight(self._rounded(path, corrections[path]))
        if _total_error(chain) >= before:
            say(f"low-rank: nothing is gained for {name}, which stay as they were")
            for path, layer in layers.items():
                layer.set_weight(corrections[path].rounded)
        return losses

    def _observed(self, path: str, weight: Tensor) -> tuple[Tensor, Tensor]:
        """The range that the recipe's observer chooses."""
        observer = self.context.observer(self.context.grids.weights(path))
        observer.update(weight.detach().float())
        return observer.range()

    def _rounded(self, path: str, correction: "Correction") -> QuantizedTensor:
        """Q(W + A B), in the shares of the observed range that the range of W was of its own."""
        corrected = correction.corrected()
        ends = self._observed(path, corrected)
        low, high = (share * end for share, end in zip(correction.shares, ends, strict=True))
        return QuantizedTensor.from_range(corrected, low, high, self.context.grids.weights(path).spec)

    def _learn(
        self,
        layers: dict[str, QuantModule],
        corrections: dict[str, "Correction"],
        chain: Chain,
        name: str,
    ) -> list[float]:
        variables = [v for correction in corrections.values() for v in (correction.down, correction.up)]
        optimizer = torch.optim.AdamW(variables, lr=self.options.rate, weight_decay=0.0)
        updates = self.options.epochs * chain.samples
        falling = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda done: 1 - done / updates)
        generator = torch.Generator().manual_seed(self.context.seed)
        losses = []
        with ExitStack() as hooked, torch.enable_grad():
            for path, layer in layers.items():
                handle = layer.register_forward_hook(corrections[path].correct)
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


@torch.no_grad()
def _total_error(chain: Chain) -> float:
    """The sum of the errors of all samples."""
    return sum(float(_mean_squared_error(chain.run(i), chain.exact[i])) for i in range(chain.samples))


def _share(end: Tensor, observed: Tensor) -> Tensor:
    """How much of an observed end of a range another one is; 1 where there is nothing."""
    return torch.where(observed == 0, torch.ones_like(end), end / observed)


class Correction:
    """A B / r beside a quantized weight: y + Q(x) A B / r, the same as with W + (A B)ᵀ / r.

    down: A [in, r], uniform as Kaiming's; up: B [r, out], zeros at first.
    """

    def __init__(
        self,
        weight: Tensor,
        rounded: QuantizedTensor,
        shares: tuple[Tensor, ...],
        rank: int,
        generator: torch.Generator,
    ) -> None:
        """Args:
        weight: W [out, in].
        rounded: the same, rounded.
        shares: of the range that the recipe's observer chooses for W, which it was rounded in.
        rank: r.
        generator: of A.
        """
        out, channels = weight.shape
        bound = 1 / math.sqrt(channels)
        down = (torch.rand(channels, rank, generator=generator) * 2 - 1) * bound * math.sqrt(3)
        self._weight, self._rank = weight.detach(), rank
        self.rounded, self.shares = rounded, shares
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
