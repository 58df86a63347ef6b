"""The published schedule of TFMQ-DM (Huang et al., CVPR 2024), re-created on our own modules.

What its released code does in what order, and how often, with the parts of this project: the same
network, grids, rounding variables and observers as our recipes, so that what differs in cost and in
quality is the schedule. It is no port, and its cost is not that of TFMQ-DM's program.

1. Calibration data: for each of T steps images are sampled anew from fresh noise up to that step,
   T (T − 1) / 2 calls of the denoiser.
2. Weight ranges: 80 candidates, norm 2.4, in a Python loop over the output channels.
3. Temporal block: all its roundings together, on random rows of all calibration data, so that every
   timestep comes many times.
4. Blocks, one after the other: for each the whole network is run again from its input over all
   calibration data, in full precision for inputs and targets and quantized for inputs, up to the block;
   then weights are learned with activations in full precision, and all iterations are made.
5. Activation ranges, timestep by timestep: a search of 80 candidates on the first images for every
   layer, then overwritten by the moving average of minimum and maximum over the timestep's images.

Where it is not what was released:

- Layers, blocks and grids are those of the recipe: all layers are quantized (there the first, the last,
  shortcuts and some others stay in full precision), attention projections are part of their block, the
  block's own layers of the temporal block are left as step 3 made them.
- A step's images are sampled as one batch, as T (T − 1) / 2 counts them.
- The timesteps are those of a schedule of T = 20 in which every step is used for reconstruction; there
  T is 100 to 400 for unconditional models, and every fifth to 25th step is used.
- Dropout is off; the released code leaves it on.
- Memory holds what flows into and out of one block for all images, channels last, as our own
  reconstruction has it: that makes convolutions faster than the released code would have them.
- Ranges for a timestep are looked up by its value, not loaded into the network before every call.
"""

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from operator import itemgetter
from pathlib import Path
from typing import Any

import torch
from stages import Stages
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils._pytree import tree_flatten, tree_map_only, tree_unflatten

from ptq_diffusion.calls import DenoiserCall
from ptq_diffusion.denoising import Denoising
from ptq_diffusion.drawing import SamplingOptions, draw
from ptq_diffusion.features_of_time import TimePath
from ptq_diffusion.pipelines import Loaded
from ptq_diffusion.sampling import before_calls
from ptq_diffusion.temporal import TemporalMap, find_temporal
from ptqcore import (
    MSE,
    Block,
    FakeQuant,
    LearnedRounding,
    MovingAverage,
    QuantizedTensor,
    TensorQuant,
    grid,
    tensors_in,
    track,
    weight_rows,
)
from ptqcore.allocator import keep_freed_memory
from ptqcore.modules import rows_to_weight
from ptqcore.plan import Plan
from ptqcore.preparation import Prepared, prepare

DATA = "calibration data"
RANGES = "weight ranges"
TEMPORAL = "temporal block"
BLOCKS = "blocks"
ACTIVATIONS = "activation ranges"


@dataclass(frozen=True)
class Schedule:
    """How much and how long, as published for unconditional models.

    images: sampled for every step, and all of them reconstructed on: 256 for each of 20 steps are the
    5,120 of the paper. iterations, batch, rate: of the rounding variables of a block, and of the temporal
    block. regularisation, warmup, beta: the weight of the term that decides roundings, the share of the
    iterations before it begins, its exponent first and last. candidates: of the search of ranges.
    together: images in a pass of activation ranges. momentum: of their moving average.
    """

    images: int = 256
    iterations: int = 20_000
    batch: int = 32
    rate: float = 1e-3
    regularisation: float = 0.01
    warmup: float = 0.2
    beta: tuple[float, float] = (20.0, 2.0)
    candidates: int = 80
    together: int = 16
    momentum: float = 0.95

    def scaled(self, scale: float) -> "Schedule":
        """Images and iterations in the same proportion: every image is seen as often."""
        images, iterations = (max(round(scale * n), 1) for n in (self.images, self.iterations))
        return replace(self, images=images, iterations=iterations)


def quantize_as_published(plan: Plan, schedule: Schedule, stages: Stages, workspace: Path) -> nn.Module:
    """The denoiser of a plan's task, quantized on the grids of its recipe.

    Args:
        plan: of a recipe of ptq-diffusion; its steps are not used.
        schedule: how much and how long.
        stages: gets the CPU-seconds.
        workspace: of the task.
    """
    keep_freed_memory()
    task = plan.task(workspace)
    assert isinstance(task, Denoising)
    model = task.load_model().eval().requires_grad_(False)
    generator = torch.Generator().manual_seed(plan.recipe.seed)
    with stages(DATA):
        seeds = range(plan.recipe.seed * 10**6, (plan.recipe.seed + 1) * 10**6)
        calls = sample_anew(task.loaded, task._sampling, schedule.images, seeds, stages)
    prepared = prepare(plan, task, model, [dict(call.values) for call in calls])
    temporal = find_temporal(model, prepared.flow, calls[0])
    work = _Work(model, copy.deepcopy(model), prepared, temporal, calls, schedule, stages, generator)
    with stages(RANGES):
        work.round_to_nearest()
    with stages(TEMPORAL):
        work.reconstruct_temporal_block()
    for block in track(prepared.blocks, "blocks"):
        with stages(BLOCKS):
            work.reconstruct(block)
    with stages(ACTIVATIONS):
        ranges = work.activation_ranges()
    work.install(ranges)
    return model


def sample_anew(
    loaded: Loaded, options: SamplingOptions, images: int, seeds: Sequence[int], stages: Stages
) -> list[DenoiserCall]:
    """What the denoiser is called with at every step, of images that are sampled from fresh noise for it.

    Args:
        images: for every step.
        seeds: as many as images and steps, or more.
        stages: counts the calls that are computed: those of step k are k.
    """
    found = []
    for step in track(range(options.steps), "sampling anew for every step"):
        batch = seeds[step * images : (step + 1) * images]
        found.append(_call_of_step(loaded, options, batch, step, stages))
    return found


def _call_of_step(
    loaded: Loaded, options: SamplingOptions, seeds: Sequence[int], step: int, stages: Stages
) -> DenoiserCall:
    """The call of one step, itself not computed, with a timestep for every row."""
    met: list[DenoiserCall] = []

    def note(call: DenoiserCall) -> None:
        met.append(call)
        if len(met) > step:
            raise _EnoughError

    with suppress(_EnoughError), before_calls(loaded, note), stages.counting(loaded.denoiser):
        draw(loaded, options, seeds, lambda _: None)
    call = met[-1].copied()
    times = call.times.reshape(-1)[:1].expand(call.rows).clone()
    return replace(call, values={**call.values, call.timestep: times})


class _EnoughError(Exception):
    """Nothing further is needed of a pass."""


def search_by_channel(weight: Tensor, quant: TensorQuant, candidates: int) -> QuantizedTensor:
    """A weight [rows, …] rounded to nearest on the range of least error, channel by channel."""
    ends = []
    for row in weight.detach().flatten(1).float():
        observer = MSE(quant.spec, candidates=candidates)
        observer.update(row[None])
        ends.append(observer.range())
    low, high = (torch.cat(parts) for parts in zip(*ends, strict=True))
    return QuantizedTensor.from_range(weight, low, high, quant.spec)


def learn(
    roundings: Sequence[LearnedRounding],
    predict: Callable[[Tensor], list[Tensor]],
    target: Callable[[Tensor], list[Tensor]],
    rows: int,
    schedule: Schedule,
    generator: torch.Generator,
) -> None:
    """Adam on the rounding variables for all iterations, whether they are decided before or not.

    The loss is, of every output, the squared error summed over channels and averaged over the rest, and
    the regulariser of AdaRound (eq. 24) with a fixed weight.

    Args:
        predict, target: numbers of rows → outputs [n, channels, …].
        rows: how many there are.
    """
    optimizer = torch.optim.Adam([rounding.variable for rounding in roundings], lr=schedule.rate)
    start = schedule.warmup * schedule.iterations
    first, last = schedule.beta
    for iteration in range(schedule.iterations):
        chosen = torch.randperm(rows, generator=generator)[: schedule.batch]
        optimizer.zero_grad()
        pairs = zip(predict(chosen), target(chosen), strict=True)
        loss = torch.stack([(p - t).square().sum(1).mean() for p, t in pairs]).sum()
        if iteration >= start:
            beta = first + (last - first) * (iteration - start) / (schedule.iterations - start)
            open_ = [(1 - (2 * rounding.share_up() - 1).abs().pow(beta)).sum() for rounding in roundings]
            loss = loss + schedule.regularisation * torch.stack(open_).sum()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()


class _Work:
    """The stages behind the calibration data. `model` becomes quantized, `exact` stays."""

    def __init__(
        self,
        model: nn.Module,
        exact: nn.Module,
        prepared: Prepared,
        temporal: TemporalMap,
        calls: Sequence[DenoiserCall],
        schedule: Schedule,
        stages: Stages,
        generator: torch.Generator,
    ) -> None:
        self.model, self.exact, self.prepared, self.temporal = model, exact, prepared, temporal
        self.calls, self.schedule, self.stages, self.generator = calls, schedule, stages, generator
        context = prepared.context
        self.layers = {
            path: layer for block in prepared.blocks for path, layer in context.targets(block).items()
        }
        self.block = [path for path in temporal.block if path in self.layers]
        self.weights: dict[str, QuantizedTensor] = {}

    def round_to_nearest(self) -> None:
        """Search the range of every weight, and round it."""
        for path, layer in track(self.layers.items(), "weight ranges", len(self.layers)):
            quant = self.prepared.context.grids.weights(path)
            self.weights[path] = search_by_channel(weight_rows(layer), quant, self.schedule.candidates)
        self._put(self.layers)

    def reconstruct_temporal_block(self) -> None:
        """Learn the roundings of the temporal block, on random rows of all calibration data."""
        example = self.calls[0].with_rows(self.schedule.batch)
        way, exact = (TimePath(model, example, self.temporal) for model in (self.model, self.exact))
        times = torch.cat([call.times for call in self.calls])
        with torch.no_grad():
            wanted = exact(times)
        roundings = self._roundings(self.block)

        def predict(rows: Tensor) -> list[Tensor]:
            with _weights_changed(self.layers, self._soft(roundings)):
                return list(way(times[rows]).values())

        def target(rows: Tensor) -> list[Tensor]:
            return [wanted[path][rows] for path in way.features]

        self._learn(roundings, predict, target, len(times))

    def reconstruct(self, block: Block) -> None:
        """Learn the roundings of one block from its inputs in the network quantized so far."""
        paths = [path for path in self.prepared.context.targets(block) if path not in self.block]
        if not paths:
            return
        exact = self._recorded(self.exact, block.path, behind=True)
        inputs = self._recorded(self.model, block.path, behind=False)
        flat, structure = tree_flatten(inputs)
        module, roundings = block.module, self._roundings(paths)
        start = len(block.path) + 1 if block.path else 0

        def predict(rows: Tensor) -> list[Tensor]:
            chosen = [leaf[rows] if isinstance(leaf, Tensor) else leaf for leaf in flat]
            args, kwargs = tree_unflatten(chosen, structure)
            named = {
                f"{path[start:]}.weight".lstrip("."): one for path, one in self._soft(roundings).items()
            }
            return tensors_in(functional_call(module, named, args, kwargs))

        def target(rows: Tensor) -> list[Tensor]:
            return [one[rows] for one in exact]

        self._learn(roundings, predict, target, sum(call.rows for call in self.calls))

    def activation_ranges(self) -> dict[str, tuple[Tensor, Tensor]]:
        """Layer → low and high [timesteps], rising, of its input in the quantized network."""
        ends: dict[str, list[tuple[Tensor, Tensor]]] = {path: [] for path in self._rounded_inputs()}
        rising = sorted(self.calls, key=lambda call: float(call.times[0]))
        for call in track(rising, "activation ranges"):
            parts = list(_parts(call, self.schedule.together))
            self._search_ranges(parts[0])
            for path, found in self._average_ranges(parts).items():
                ends[path].append(found)
        return {
            path: tuple(torch.cat([end.reshape(1) for end in each]) for each in zip(*found, strict=True))  # type: ignore[misc]
            for path, found in ends.items()
        }

    def install(self, ranges: Mapping[str, tuple[Tensor, Tensor]]) -> None:
        """Replace the layers by quantized ones, with their ranges for each timestep."""
        grids = self.prepared.context.grids
        grids.range_for_each_timestep(self.layers)
        for path, weight in self.weights.items():
            quant = grids.inputs(path)
            spec = None if quant is None else quant.spec
            layer = Block(self.model, "").quantize_layer(path, weight, spec)
            if layer.input_quantizer is not None:
                layer.input_quantizer.set_range(*ranges[path])
        assert self.prepared.timesteps is not None
        self.prepared.timesteps.attach(self.model)

    def _learn(
        self,
        roundings: Mapping[str, LearnedRounding],
        predict: Callable[[Tensor], list[Tensor]],
        target: Callable[[Tensor], list[Tensor]],
        rows: int,
    ) -> None:
        with torch.enable_grad():
            learn(list(roundings.values()), predict, target, rows, self.schedule, self.generator)
        self.weights |= {path: rounding.hard() for path, rounding in roundings.items()}
        self._put(roundings)

    def _roundings(self, paths: Sequence[str]) -> dict[str, LearnedRounding]:
        exact = {path: weight_rows(self.exact.get_submodule(path)) for path in paths}
        return {path: LearnedRounding(weight, self.weights[path]) for path, weight in exact.items()}

    def _soft(self, roundings: Mapping[str, LearnedRounding]) -> dict[str, Tensor]:
        return {path: rows_to_weight(one.soft(), self.layers[path]) for path, one in roundings.items()}

    def _put(self, paths: Mapping[str, object]) -> None:
        """Let layers compute with their weights as they now are quantized."""
        for path in paths:
            layer: Any = self.layers[path]
            layer.weight.data = rows_to_weight(self.weights[path].dequantize(), layer)

    def _recorded(self, model: nn.Module, path: str, behind: bool) -> Any:
        """What flows out of a block of a model, or its args and kwargs, for all calibration data: the
        network is run from its input up to there."""
        found: list[Any] = []

        def before(_: nn.Module, args: Any, kwargs: Any) -> None:
            found.append((args, kwargs))
            raise _EnoughError

        def after(_: nn.Module, args: Any, output: Any) -> None:
            found.append(tensors_in(output))
            raise _EnoughError

        module = model.get_submodule(path)
        hook = (
            module.register_forward_hook(after)
            if behind
            else module.register_forward_pre_hook(before, with_kwargs=True)
        )
        try:
            with torch.no_grad(), self.stages.counting(model):
                for call in self.calls:
                    for part in _parts(call, self.schedule.batch):
                        with suppress(_EnoughError):
                            part.run(model)
        finally:
            hook.remove()
        return _joined(found)

    def _rounded_inputs(self) -> dict[str, FakeQuant]:
        """A quantizer with one range for the input of every layer."""
        inputs = {path: self.prepared.context.grids.inputs(path) for path in self.layers}
        return {path: FakeQuant(quant.spec) for path, quant in inputs.items() if quant is not None}

    def _search_ranges(self, part: DenoiserCall) -> None:
        """The ranges of a timestep by search: used in this pass alone."""
        quantizers = self._rounded_inputs()

        def search(path: str, x: Tensor) -> Tensor:
            observer = MSE(quantizers[path].spec, candidates=self.schedule.candidates)
            observer.update(x)
            return _rounded(quantizers[path], *observer.range(), x)

        with _inputs_changed(self.model, quantizers, search):
            self._run(part)

    def _average_ranges(self, parts: Sequence[DenoiserCall]) -> dict[str, tuple[Tensor, Tensor]]:
        """The moving averages of the ranges of a timestep."""
        quantizers = self._rounded_inputs()
        averages = {
            path: MovingAverage(one.spec, momentum=self.schedule.momentum)
            for path, one in quantizers.items()
        }

        def average(path: str, x: Tensor) -> Tensor:
            averages[path].update(x)
            return _rounded(quantizers[path], *averages[path].range(), x)

        with _inputs_changed(self.model, quantizers, average):
            for part in parts:
                self._run(part)
        return {path: observer.range() for path, observer in averages.items()}

    def _run(self, call: DenoiserCall) -> None:
        with torch.no_grad(), self.stages.counting(self.model):
            call.run(self.model)


def _rounded(quantizer: FakeQuant, low: Tensor, high: Tensor, x: Tensor) -> Tensor:
    quantizer.set_range(low, high)
    return grid.fake_quantize(x, *quantizer.parameters_for(x), quantizer.spec)


@contextmanager
def _inputs_changed(
    model: nn.Module, paths: Mapping[str, object], change: Callable[[str, Tensor], Tensor]
) -> Iterator[None]:
    """Compute layers of a model on changed inputs for a while."""

    def hook(path: str) -> Callable[[nn.Module, Any], Any]:
        return lambda _, args: (change(path, args[0]), *args[1:])

    handles = [model.get_submodule(path).register_forward_pre_hook(hook(path)) for path in paths]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def _weights_changed(layers: Mapping[str, nn.Module], weights: Mapping[str, Tensor]) -> Iterator[None]:
    """Compute layers with other weights, with gradients, for a while."""
    kept = {path: layers[path]._parameters["weight"] for path in weights}
    for path, weight in weights.items():
        layers[path]._parameters["weight"] = weight  # type: ignore[assignment]
    try:
        yield
    finally:
        for path, own in kept.items():
            layers[path]._parameters["weight"] = own


def _parts(call: DenoiserCall, size: int) -> Iterator[DenoiserCall]:
    """A call in calls of at most so many rows."""
    for start in range(0, call.rows, size):
        rows = slice(start, start + size)
        values = tree_map_only(Tensor, itemgetter(rows), dict(call.values))
        yield replace(call, values=values)


def _joined(parts: Sequence[Any]) -> Any:
    """Nested tensors [rows, …] joined along the rows, images channels last in memory."""
    flat, structures = zip(*(tree_flatten(part) for part in parts), strict=True)
    leaves = [
        _rows(leaves) if isinstance(leaves[0], Tensor) else leaves[0] for leaves in zip(*flat, strict=True)
    ]
    return tree_unflatten(leaves, structures[0])


def _rows(parts: Sequence[Tensor]) -> Tensor:
    joined = torch.cat(list(parts))
    return joined.contiguous(memory_format=torch.channels_last) if joined.ndim == 4 else joined
