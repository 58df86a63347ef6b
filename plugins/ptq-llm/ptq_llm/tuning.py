"""Variables learned by gradient so that a block, computed as if quantized, returns what it does in full
precision (OmniQuant, Shao et al., arXiv 2308.13137, eq. 1)."""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Literal
from zlib import crc32

import torch
from pydantic import Field
from torch import Tensor

from ptqcore import Block, Calibration, ModelError, StepOptions, tensors_in

_LEAST_GRADIENT = 1e-12  # relative losses give each of very many variables a small one

TensorFunction = Callable[[Tensor], Tensor]


class TuneOptions(StepOptions):
    """epochs: passes over the calibration samples, one sample an update; 0 leaves the start as it is.
    inputs: what flows into a block while it learns; its target is the full-precision model's output."""

    epochs: int = Field(default=5, ge=0)
    inputs: Literal["quantized", "full-precision"] = "quantized"


class BlockOutput:
    """‖y′ − y‖² / ‖y‖² of a block's first output tensor, tokens that count alone.

    y is the full-precision model's, y′ the block's with the parameters and inputs of the moment.
    """

    def __init__(
        self,
        calibration: Calibration,
        inputs: str,
        parameters: Callable[[], Mapping[str, Tensor]],
        rounding: Mapping[str, TensorFunction],
    ) -> None:
        """Args:
        calibration: of the block.
        inputs: as of `TuneOptions`.
        parameters: makes the parameters, by their paths in the model.
        rounding: what is done to the inputs of layers, by their paths.
        """
        self._calibration, self._exact_inputs = calibration, inputs == "full-precision"
        self._parameters, self._rounding = parameters, rounding
        self.samples = len(calibration.io)
        energy = sum(float(self._wanted(sample).double().square().sum()) for sample in range(self.samples))
        self._energy = energy / self.samples or 1.0

    def loss(self, sample: int) -> Tensor:
        """The error of a sample, relative to the mean energy of all."""
        return self._errors(sample, self._parameters()) / self._energy

    @torch.no_grad()
    def total(self) -> float:
        """The mean of all samples."""
        with self.rounding():
            parameters = self._parameters()
            errors = [float(self._errors(sample, parameters)) for sample in range(self.samples)]
        return math.fsum(errors) / self.samples / self._energy

    @contextmanager
    def rounding(self) -> Iterator[None]:
        """Round the inputs of layers for a while."""
        model = self._calibration.block.model
        handles = [
            model.get_submodule(path).register_forward_pre_hook(lambda _, args, f=function: (f(args[0]),))
            for path, function in self._rounding.items()
        ]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _errors(self, sample: int, parameters: Mapping[str, Tensor]) -> Tensor:
        output = self._calibration.io.compute(sample, parameters, self._exact_inputs)
        found = self._calibration.counted(tensors_in(output)[0], sample).float()
        return (found - self._wanted(sample)).square().sum()

    def _wanted(self, sample: int) -> Tensor:
        return self._calibration.counted(self._calibration.exact[sample][0], sample).float()


def learning_rate(least: float, way: float, output: BlockOutput, epochs: int) -> float:
    """A rate that lets a variable move so far in all updates together, but no lower than the least."""
    return max(least, way / max(epochs * output.samples, 1))


def tune(
    variables: Sequence[tuple[Tensor, float]],
    output: BlockOutput,
    block: Block,
    epochs: int,
    seed: int,
    step: str,
) -> list[float]:
    """Minimise the error of a block's output with AdamW without weight decay.

    Afterwards the variables are those of the epoch with the least error over all samples; where they were
    at the beginning counts as one.

    Args:
        variables: each with its learning rate.
        output: the error, which depends on them.
        block: the block.
        epochs: passes over the samples, each in an order of its own.
        seed: of the run.
        step: the name of the recipe's step, for messages.

    Returns:
        The loss of every update.

    Raises:
        ModelError: if the error is not finite.
    """
    every = [variable for variable, _ in variables]
    if not every or not epochs:
        return []
    groups = [{"params": [variable], "lr": rate} for variable, rate in variables]
    optimizer = torch.optim.AdamW(groups, weight_decay=0.0, eps=_LEAST_GRADIENT)
    generator = torch.Generator().manual_seed(seed * 2**31 + crc32(block.path.encode()))
    best, kept = output.total(), [variable.detach().clone() for variable in every]
    losses = []
    for _ in range(epochs):
        order = torch.randperm(output.samples, generator=generator).tolist()
        with torch.enable_grad(), output.rounding():
            for sample in order:
                optimizer.zero_grad()
                loss = output.loss(sample)
                if loss.requires_grad:  # not if no token reached a layer
                    loss.backward()
                    optimizer.step()
                losses.append(float(loss.detach()))
        found = output.total()
        if not math.isfinite(found):
            raise ModelError(f"{step} diverges in block {block.path!r}: lower its learning rate")
        if found < best:
            best, kept = found, [variable.detach().clone() for variable in every]
    with torch.no_grad():
        for variable, value in zip(every, kept, strict=True):
            variable.copy_(value)
    return losses
