"""What the run did to every layer and block, in figures, and whether it did all that was asked."""

import math
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from itertools import pairwise
from statistics import fmean
from typing import Any

import torch
from torch import Tensor, nn

from ptqcore import grid
from ptqcore.blocks import Block
from ptqcore.calibration import Calibration
from ptqcore.dataflow import Dataflow
from ptqcore.distributed import Share, divided
from ptqcore.errors import BugError, ModelError
from ptqcore.modules import QuantModule, quantizable_layers, weight_rows
from ptqcore.recipe import QuantSection
from ptqcore.report.record import MOST_LOSSES, LayerRecord
from ptqcore.statistics import Gram
from ptqcore.step import Context, check_globs, reason_to_skip
from ptqcore.tables import TimestepTable, tables_in


def relative_error(
    results: list[list[Tensor]], targets: list[list[Tensor]], path: str, share: Share
) -> float:
    """‖Q − F‖² / ‖F‖² over the first output tensor of every sample (0 if both are 0).

    Args:
        results: Q, for every sample of this process.
        targets: F, for the same.
        path: of the block.
        share: which of all samples these are.

    Raises:
        ModelError: naming the block, if that is not finite.
    """
    error = energy = 0.0
    for of_sample in share.in_order(map(_energies, results, targets)):
        error += of_sample[0]
        energy += of_sample[1]
    if not math.isfinite(error):
        raise ModelError(f"block {path!r} gives outputs too large for a number once quantized")
    return error / energy if energy else error


def _energies(result: list[Tensor], target: list[Tensor]) -> tuple[float, float]:
    """‖Q − F‖² and ‖F‖² of one sample."""
    wanted = target[0].double()
    return float((result[0].double() - wanted).square().sum()), float(wanted.square().sum())


def weight_shapes(block: Block) -> dict[str, tuple[int, ...]]:
    """The shape of the weight of every float or quantized layer of a block, output channels first, and of
    what tables replace."""
    shapes = {
        path: tuple(module.weight_shape)
        for path, module in block.module.named_modules(prefix=block.path)
        if isinstance(module, QuantModule | TimestepTable)
    }
    return shapes | {path: tuple(weight_rows(layer).shape) for path, layer in block.layers().items()}


def check_weight_shapes(block: Block, before: dict[str, tuple[int, ...]], who: str) -> None:
    """Make sure that the layers of a block have kept their shapes.

    Raises:
        BugError: naming the step, the layer and the shapes.
    """
    for path, shape in weight_shapes(block).items():
        if before.get(path, shape) != shape:
            raise BugError(
                f"{who} changed the shape of the weight of layer {path!r} from {list(before[path])} to "
                f"{list(shape)}: steps must keep it"
            )


def check_output_shapes(
    results: list[list[Tensor]], targets: list[list[Tensor]], path: str, who: str
) -> None:
    """Make sure that a quantized block returns tensors of the same shapes as before.

    Raises:
        BugError: naming the steps, the block and the shapes.
    """
    for result, target in zip(results, targets, strict=True):
        now, before = ([list(tensor.shape) for tensor in tensors] for tensors in (result, target))
        if now != before:
            raise BugError(
                f"{who} changed the shapes that block {path!r} returns from {before} to {now}: steps must "
                "keep them"
            )


def thinned(losses: Sequence[float]) -> tuple[float, ...]:
    """At most `MOST_LOSSES` values: the means of equal parts."""
    parts = min(len(losses), MOST_LOSSES)
    ends = [len(losses) * index // parts for index in range(parts + 1)] if parts else []
    return tuple(fmean(losses[start:end]) for start, end in pairwise(ends))


def layer_records(
    block: Block, originals: dict[str, nn.Module], calibration: Calibration, context: Context
) -> list[LayerRecord]:
    """Figures of every quantized layer of a block, and of every one that a table replaces or that only such
    layers read, against the float layers it had before."""
    layers = {path: layer for path, layer in block.quantized_layers().items() if path in originals}
    grams = {path: calibration.gram(path) for path in layers}

    def error(path: str) -> float | None:
        weight, gram = weight_rows(originals[path]).detach().flatten(1), grams[path]
        dequantized = layers[path].quantized_weight.dequantize().flatten(1)
        return None if gram is None else gram.relative_error(weight, dequantized)

    errors = divided(list(layers), error, lambda path: math.prod(layers[path].weight_shape))
    quantized = [
        _layer_record(block, path, originals[path], layer, grams[path], found)
        for (path, layer), found in zip(layers.items(), errors, strict=True)
    ]
    tables = tables_in(block.module, block.path)
    replaced = [path for path in originals if path in context.grids.tables]
    return quantized + [_table_record(block, path, originals[path], tables.get(path)) for path in replaced]


def _table_record(block: Block, path: str, original: nn.Module, table: TimestepTable | None) -> LayerRecord:
    weight = weight_rows(original).detach()
    return LayerRecord(
        path=path,
        block=block.path,
        shape=tuple(weight.shape),
        weights="removed: only tables read it" if table is None else f"table {list(table.table.shape)}",
        activations=None,
        relative_error=None,
        clipped=0.0,
        weight_range=(float(weight.min()), float(weight.max())),
        input_range=None,
    )


def _layer_record(
    block: Block, path: str, original: nn.Module, layer: QuantModule, gram: Gram | None, error: float | None
) -> LayerRecord:
    weight = weight_rows(original).detach().flatten(1)
    record = layer.quantized_weight
    inside = grid.inside(weight, record.scale, record.zero_point, record.spec)
    quantizer = layer.input_quantizer
    return LayerRecord(
        path=path,
        block=block.path,
        shape=layer.weight_shape,
        weights=str(layer.weight_spec),
        activations=None if quantizer is None else str(quantizer.spec),
        relative_error=error,
        clipped=1 - float(inside.float().mean()),
        weight_range=(float(weight.min()), float(weight.max())),
        input_range=None if gram is None else (float(gram.low.min()), float(gram.high.max())),
    )


def check_targets(model: nn.Module, quant: QuantSection, excluded: dict[str, str]) -> dict[str, nn.Module]:
    """The layers that are to be quantized, by path.

    Raises:
        RecipeError: if `quant.ignore` names what does not exist.
        ModelError: if no layer is left to quantize.
    """
    check_globs("quant.ignore", quant.ignore, model)
    layers = quantizable_layers(model).items()
    targets = {path: layer for path, layer in layers if reason_to_skip(path, quant, excluded) is None}
    if not targets:
        kinds = sorted({type(m).__name__ for m in model.modules() if not list(m.children())})
        raise ModelError(
            "the model has no layer to quantize: linear layers and 2-D convolutions are, "
            f"unless quant.ignore names them; found {', '.join(kinds)}"
        )
    return targets


def never_called(
    model: nn.Module, flow: Dataflow, others: Iterable[Callable[[], object]] = ()
) -> dict[str, str]:
    """Layers that no calibration sample reaches, and that cannot be calibrated therefore: path → reason.

    Args:
        model: the model.
        flow: one traced forward pass of it, on the first sample.
        others: its passes on the other samples; where the data choose the way (mixtures of experts),
            those may reach more. They are made one by one, as long as a layer is missing.
    """
    missing = {path: layer for path, layer in quantizable_layers(model).items() if not flow.called(path)}
    handles = [
        layer.register_forward_pre_hook(partial(_reached, missing, path)) for path, layer in missing.items()
    ]
    try:
        with torch.no_grad():
            for run in others:
                if not missing:
                    break
                run()
    finally:
        for handle in handles:
            handle.remove()
    return dict.fromkeys(missing, "not used by the forward pass on any calibration sample")


def _reached(missing: dict[str, nn.Module], path: str, *_: Any) -> None:
    missing.pop(path, None)


def check_done(blocks: Iterable[Block], context: Context) -> None:
    """Make sure that no layer was silently skipped.

    Raises:
        ModelError: naming the layers that the steps left in full precision.
    """
    left = [path for block in blocks for path in context.targets(block)]
    if left:
        shown = ", ".join(left[:3]) + (f" and {len(left) - 3} more" if len(left) > 3 else "")
        raise ModelError(
            f"the steps left {shown} in full precision: add a step that quantizes (round), "
            "or name them in quant.ignore"
        )


def check_coverage(blocks: Sequence[Block], context: Context, least: float) -> float:
    """Share of the weights inside the blocks (parameters of two or more dimensions) that were quantized, or
    replaced by tables, without those that the recipe or the task leaves alone by name.

    Raises:
        ModelError: if it is less than asked for, naming the largest weight that was left.
    """
    quantized, left = 0, {}
    for block in blocks:
        for path, module in block.module.named_modules(prefix=block.path):
            if isinstance(module, QuantModule | TimestepTable):
                quantized += math.prod(module.weight_shape)
            elif context.reason_to_skip(path) is None:
                for name, one in module.named_parameters(recurse=False):
                    if one.ndim > 1 and one.is_floating_point():
                        left[f"{path}.{name}".strip(".")] = one.numel()
    found = quantized / (quantized + sum(left.values())) if quantized else 0.0
    if found >= least:
        return found
    raise ModelError(
        f"only {found:.1%} of the weights inside the blocks were quantized, fewer than {least:.0%}: "
        f"{max(left, key=left.__getitem__)!r} and {len(left) - 1} others have no quantized kind; name "
        "their modules in quant.ignore if they are to stay in full precision"
    )


def check_reached(block: Block, calibration: Calibration, context: Context, least: int) -> None:
    """Make sure that every linear layer saw enough tokens for steps that learn from them.

    Args:
        block: the block.
        calibration: what its layers saw.
        context: of the run.
        least: how many tokens are enough, if the recipe does not say.

    Raises:
        ModelError: naming the layer that saw the fewest.
    """
    linear = [path for path, layer in context.targets(block).items() if isinstance(layer, nn.Linear)]
    grams = {path: calibration.gram(path) for path in linear}
    counts = {path: 0 if gram is None else gram.count for path, gram in grams.items()}
    if not counts:
        return
    path = min(counts, key=counts.__getitem__)
    needed = least if context.quant.min_tokens is None else context.quant.min_tokens
    if counts[path] < needed:
        raise ModelError(
            f"layer {path!r} saw {counts[path]} calibration tokens, fewer than quant.min_tokens "
            f"{needed}: use more calibration samples, lower that key, or add the layer "
            "to quant.ignore"
        )


def left_alone(model: nn.Module, context: Context) -> dict[str, str]:
    """Layers with a weight matrix that stayed in full precision, and why."""
    outside = quantizable_layers(model)
    reasons = {}
    for path, module in model.named_modules():
        weight = getattr(module, "weight", None)
        if isinstance(module, QuantModule) or not isinstance(weight, nn.Parameter) or weight.ndim < 2:
            continue
        kind = type(module).__name__
        default = "outside the blocks" if path in outside else f"{kind} has no quantized kind"
        reasons[path] = context.reason_to_skip(path) or default
    return reasons
