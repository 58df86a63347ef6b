"""The step `tiar`: temporal information aware reconstruction (TFMQ-DM, Huang et al., CVPR 2024)."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import ClassVar

import torch
from pydantic import Field
from torch import Tensor, nn

from ptq_diffusion.features_of_time import TimePath
from ptq_diffusion.temporal_step import TemporalStep
from ptqcore import (
    Block,
    Calibration,
    Dataflow,
    LearnedRounding,
    ModelError,
    Problem,
    QuantizedTensor,
    Schedule,
    StepOptions,
    reconstruct,
    say,
    weight_rows,
)


class TIAROptions(StepOptions):
    """iterations: updates, each on all timesteps of the schedule. rate: learning rate of the rounding
    variables (the paper's 20,000 iterations have 1e-3)."""

    iterations: int = Field(default=1000, ge=1)
    rate: float = Field(default=1e-2, gt=0)


class TIAR(TemporalStep):
    """Rounds the weights of the temporal block together, so that Σᵢ ‖gᵢ(h(t)) − ĝᵢ(ĥ(t))‖² over the
    temporal features and exactly the timesteps of the schedule is small.

    The block is h, what embeds the timestep, and all gᵢ that hand it to the rest of the denoiser. No image
    has a say, so that nothing is fitted to the calibration samples. The rest of the recipe's steps find the
    block quantized.
    """

    name = "tiar"
    Options: ClassVar[type[StepOptions]] = TIAROptions
    options: TIAROptions
    stage = "quantize"
    partial = True

    def prepare(self, model: nn.Module, flow: Dataflow, run: Callable[[], object]) -> None:
        self._learned: dict[str, QuantizedTensor] = {}
        self._losses: list[float] = []
        temporal = self.find(model, flow, run)
        paths = [path for path in temporal.block if self.context.reason_to_skip(path) is None]
        if not temporal.features or not paths:
            say("tiar: the denoiser has no temporal features that are quantized")
            return
        way = TimePath(model, self.call, temporal)
        roundings = {path: self._rounding(path, model.get_submodule(path)) for path in paths}
        self._reconstruct(model, way, roundings)
        self._learned = {path: rounding.hard() for path, rounding in roundings.items()}

    def block(self, block: Block, calibration: Calibration) -> None:
        for path in self.context.targets(block):
            if path in self._learned:
                self.quantize_layer(block, calibration, path, self._learned.pop(path))
                calibration.losses += self._losses
                self._losses = []

    def _rounding(self, path: str, layer: nn.Module) -> LearnedRounding:
        quant = self.context.grids.weights(path)
        observer = self.context.observer(quant)
        weight = weight_rows(layer).detach()
        observer.update(weight.flatten(1).float())
        return LearnedRounding(weight, QuantizedTensor.from_range(weight, *observer.range(), quant.spec))

    def _reconstruct(
        self, model: nn.Module, way: TimePath, roundings: Mapping[str, LearnedRounding]
    ) -> None:
        """Learn the roundings; the loss of each update is kept for the report."""
        timesteps = torch.tensor(self.timesteps)
        with torch.no_grad():
            wanted = way(timesteps)

        def predict(rows: Sequence[int]) -> list[Tensor]:
            weights = {path: rounding.weight for path, rounding in roundings.items()}
            with torch.enable_grad(), replaced(model, weights):
                return list(way(timesteps[list(rows)]).values())

        problem = Problem(
            "temporal block",
            len(timesteps),
            predict,
            lambda rows: [wanted[path][list(rows)] for path in way.features],
            list(roundings.values()),
            [],
            squared_error,
            len(timesteps),
        )
        schedule = Schedule(self.options.iterations, len(timesteps), self.options.rate, 0.0)
        generator = torch.Generator().manual_seed(self.context.seed)
        try:
            with torch.enable_grad():
                reconstruct(problem, schedule, generator)
        except FloatingPointError as error:
            raise ModelError(f"{error}: lower the rate of the step tiar") from None
        self._losses = problem.history


def squared_error(predicted: list[Tensor], target: list[Tensor], _: str) -> Tensor:
    """Σ over features of the squared norm of the difference, mean over timesteps (TFMQ-DM)."""
    errors = [(p - t).square().sum(-1).mean() for p, t in zip(predicted, target, strict=True)]
    return torch.stack(errors).sum()


@contextmanager
def replaced(model: nn.Module, weights: Mapping[str, Tensor]) -> Iterator[None]:
    """Compute layers with other weights, with gradients, for a while."""
    layers = {path: model.get_submodule(path) for path in weights}
    kept = {path: layer._parameters["weight"] for path, layer in layers.items()}
    for path, layer in layers.items():
        layer._parameters["weight"] = weights[path]  # type: ignore[assignment]
    try:
        yield
    finally:
        for path, layer in layers.items():
            layer._parameters["weight"] = kept[path]
