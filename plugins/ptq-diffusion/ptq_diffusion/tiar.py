"""The step `tiar`: temporal information aware reconstruction (TFMQ-DM, Huang et al., CVPR 2024), and tables
of temporal features in its place (Huang et al., TPAMI 2025, arXiv 2407.19547)."""

import math
from collections.abc import Callable, Iterable, Mapping
from typing import ClassVar, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from ptq_diffusion.caching import Caching, prove, with_one_value
from ptq_diffusion.calls import DenoiserCall
from ptq_diffusion.features_of_time import TimePath
from ptq_diffusion.judge import temporal_errors
from ptq_diffusion.table_correction import TableCorrection
from ptq_diffusion.temporal_rounding import round_together, rounded_features, squared_error
from ptq_diffusion.temporal_step import TemporalStep
from ptqcore import (
    Block,
    Calibration,
    Context,
    Dataflow,
    LearnedRounding,
    QuantizedTensor,
    QuantSpec,
    Schedule,
    StepOptions,
    Timesteps,
    TimestepTable,
    replace_by_table,
    say,
    weight_rows,
)


class TIAROptions(StepOptions):
    """mode: `reconstruct`, round the weights of the temporal block together; `cache`, put tables of the
    full-precision temporal features in their place; `auto`, for each feature a table where it takes no more
    bytes than the packed weights that it replaces, or where the reconstructed feature's error is above the
    tolerance: the mean of 1 − cos over the timesteps, inputs rounded where they have a range for each.

    correction: once the rest of a block is quantized, the tables of features that are only added to another
    tensor take the mean error of that sum, for each channel and timestep.

    iterations: updates, each on all timesteps of the schedule. rate: learning rate of the rounding
    variables (the paper's 20,000 iterations have 1e-3)."""

    mode: Literal["reconstruct", "cache", "auto"] = "reconstruct"
    tolerance: float = Field(default=1e-3, ge=0)
    correction: bool = False
    iterations: int = Field(default=1000, ge=1)
    rate: float = Field(default=1e-2, gt=0)

    @model_validator(mode="after")
    def _check(self) -> "TIAROptions":
        if self.correction and self.mode == "reconstruct":
            raise ValueError("correction is for tables: set mode to cache or auto")
        return self


class TIAR(TemporalStep):
    """Brings the temporal features of a quantized denoiser back, at exactly the timesteps of the schedule:
    by rounding the weights of the temporal block together, so that Σᵢ ‖gᵢ(h(t)) − ĝᵢ(ĥ(t))‖² over the
    features is small, or by tables of gᵢ(h(t)), which are exact.

    The block is h, what embeds the timestep, and all gᵢ that hand it to the rest of the denoiser. No image
    has a say, so that nothing is fitted to the calibration samples (but for the correction of tables). The
    rest of the recipe's steps find the block quantized.
    """

    name = "tiar"
    Options: ClassVar[type[StepOptions]] = TIAROptions
    options: TIAROptions
    stage = "quantize"
    partial = True

    def __init__(self, options: TIAROptions, context: Context) -> None:
        super().__init__(options, context)
        self.needs_exact = options.correction

    def prepare(self, model: nn.Module, flow: Dataflow, run: Callable[[], object]) -> None:
        self._learned: dict[str, QuantizedTensor] = {}
        self._tables: dict[str, Tensor] = {}
        self._losses: list[float] = []
        self._inputs: dict[str, QuantSpec] = {}
        self._correction = TableCorrection(flow)
        temporal = self.find(model, flow, run)
        targets = self.context.targets(Block(model, ""))
        layers = {path: targets[path] for path in temporal.block if path in targets}
        if not temporal.features or not layers:
            say("tiar: the denoiser has no temporal features that are quantized")
            return
        self._times = torch.tensor(self.timesteps)
        way = TimePath(model, self._example(), temporal)
        with torch.no_grad():
            features = way(self._times)
        single = with_one_value(layers, run)
        caching = Caching(flow, temporal, single, self.context.grids.weights, features)
        chosen = self._at_once(caching)
        gone = caching.tables(chosen)
        left = {path: feature for path, feature in features.items() if path not in gone}
        rest = {path: layer for path, layer in layers.items() if path not in gone}
        if left and rest:
            self._round(model, way, left, rest)
        if self.options.mode == "auto":
            found = rounded_features(model, way, self._learned, self._inputs, self._times)
            chosen = self._with_inexact(caching, chosen, left, found)
        self._tables = caching.tables(chosen)
        for path in self._tables:
            self._learned.pop(path, None)
        if self.options.mode != "reconstruct":
            self._say(caching, chosen, len(set(features) & set(layers)))
        if self._tables:
            self.context.grids.tables.update(self._tables)
            with Timesteps.of(self.timesteps, self.call.timestep).during(self.times_of_rows):
                prove(model, self._tables, run)

    def before(self, block: Block, calibration: Calibration) -> None:
        if self.options.correction:
            self._correction.before(
                calibration, [path for path, table in self._tables.items() if len(table)]
            )

    def block(self, block: Block, calibration: Calibration) -> None:
        for path in block.layers():
            if len(self._tables.get(path, ())):
                replace_by_table(block.model, path, self._tables[path])
            elif path in self._learned:
                self.quantize_layer(block, calibration, path, self._learned.pop(path))
                calibration.losses += self._losses
                self._losses = []

    def after(self, block: Block, calibration: Calibration) -> None:
        if self.options.correction:
            self._correction.after(calibration)

    def finish(self, model: nn.Module) -> None:
        for path, table in self._tables.items():  # what no block holds, and what nothing reads any more
            if not isinstance(model.get_submodule(path), TimestepTable):
                replace_by_table(model, path, table)

    def _example(self) -> DenoiserCall:
        """The traced call; with more rows, up to twice as many, where that many timesteps are computed at
        once: what a pass of few rows costs hardly depends on how many they are."""
        call, rows = self.call, min(len(self.timesteps), 2 * self.call.rows)
        return call.with_rows(rows) if call.has_time_of_rows and rows > call.rows else call

    def _at_once(self, caching: Caching) -> list[str]:
        """The features that get tables whatever reconstruction could do."""
        if self.options.mode == "cache":
            return caching.features
        return caching.chosen_by_size() if self.options.mode == "auto" else []

    def _with_inexact(
        self,
        caching: Caching,
        chosen: list[str],
        wanted: dict[str, Tensor],
        found: dict[str, Tensor],
    ) -> list[str]:
        """The chosen features and those whose error is above the tolerance, in the order of their calls."""
        errors = {path: float(error.mean()) for path, error in temporal_errors(found, wanted).items()}
        tolerance = self.options.tolerance
        worse = {path for path, error in errors.items() if error > tolerance}
        both = [path for path in caching.features if path in chosen or path in worse]
        say(
            f"tiar: {len(chosen)} temporal features get tables for their size, {len(both) - len(chosen)} "
            f"more for an error above {tolerance:g} (largest {max(errors.values(), default=0.0):.2g})"
        )
        return both

    def _say(self, caching: Caching, chosen: list[str], features: int) -> None:
        """What the tables take, and what they replace."""
        other = len(self._tables) - len(chosen)
        say(
            f"tiar: tables of {len(self.timesteps)} timesteps for {len(chosen)} of {features} temporal "
            f"features, {caching.bytes_of(chosen) / 1e3:.1f} kB, in the place of weights of "
            f"{caching.bytes_packed(self._tables) / 1e3:.1f} kB packed; {other} layers that only they read "
            "are left out"
        )

    def _rounding(self, path: str, layer: nn.Module) -> LearnedRounding:
        quant = self.context.grids.weights(path)
        observer = self.context.observer(quant)
        weight = weight_rows(layer).detach()
        observer.update(weight.flatten(1).float())
        return LearnedRounding(weight, QuantizedTensor.from_range(weight, *observer.range(), quant.spec))

    def _rounded_inputs(self, paths: Iterable[str]) -> dict[str, QuantSpec]:
        """Grids of rows for the inputs of layers that have a range for each timestep, by path."""
        grids = {path: self.context.grids.inputs(path) for path in paths}
        return {
            path: QuantSpec(bits=quant.bits, symmetric=quant.symmetric, granularity="channel")
            for path, quant in grids.items()
            if quant is not None and quant.of_timestep
        }

    def _round(
        self, model: nn.Module, way: TimePath, wanted: Mapping[str, Tensor], layers: Mapping[str, nn.Module]
    ) -> None:
        """Learn the roundings; the loss of each update is kept for the report.

        They are learned with the inputs as they are and, where these have a range for each timestep, again
        with rounded inputs: neither is always the better, so that what then errs less is kept.
        """
        schedule = Schedule(self.options.iterations, len(self._times), self.options.rate, 0.0)
        self._inputs = self._rounded_inputs(layers)
        least = math.inf
        for inputs in [{}, self._inputs] if self._inputs else [{}]:
            roundings = {path: self._rounding(path, layer) for path, layer in layers.items()}
            generator = torch.Generator().manual_seed(self.context.seed)
            losses = round_together(
                model,
                way,
                wanted,
                roundings,
                inputs,
                self._times,
                schedule,
                generator,
                next(self.context.midways),
            )
            learned = {path: rounding.hard() for path, rounding in roundings.items()}
            found = rounded_features(model, way, learned, self._inputs, self._times)
            error = float(squared_error([found[path] for path in wanted], list(wanted.values())))
            if error < least:
                least, self._learned, self._losses = error, learned, losses
