"""Batch norms folded into the layers before them, as deployed engines run them."""

import math
from collections.abc import Callable, Iterable
from copy import deepcopy
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.overrides import TorchFunctionMode

from ptqcore.dataflow import Dataflow, op_name
from ptqcore.modules import LAYERS_WITH_ROWS, rows_to_weight, weight_rows
from ptqcore.progress import say

TOLERANCE = 1e-5


class Folded(nn.Identity):
    """In the place of a batch norm; `into` is the path of the layer that it was folded into."""

    def __init__(self, into: str) -> None:
        super().__init__()
        self.into = into


class WithoutNorm(nn.Module):
    """In the place of a subclass of a batch norm that does more (an activation function): that, without the
    normalization; `into` as of `Folded`."""

    def __init__(self, norm: nn.Module, into: str) -> None:
        super().__init__()
        self.into = into
        rest: Any = deepcopy(norm)
        for table in (rest._parameters, rest._buffers):
            table.update(dict.fromkeys(table))
        rest.track_running_stats = False  # else loading asks for the number of batches
        self.norm = rest

    def forward(self, x: Tensor) -> Any:
        with _SkipNorm():
            return self.norm(x)


class _SkipNorm(TorchFunctionMode):
    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return args[0] if op_name(func) == "batch_norm" else func(*args, **(kwargs or {}))


def find_norms(model: nn.Module, flow: Dataflow) -> dict[str, str]:
    """Path of each batch norm that can be folded → path of the layer that alone feeds it."""
    producers, consumers = flow.producers(), flow.consumers()
    found = {}
    for op in flow.ops:
        path = op.site.owner
        norm = model.get_submodule(path)
        if op.name != "batch_norm" or not isinstance(norm, _BatchNorm) or norm.running_var is None:
            continue
        producer = producers.get(op.inputs[0])
        if producer is None or len(consumers[op.inputs[0]]) != 1:
            continue
        layer = producer.site.owner
        once = len(flow.called(path)) == len(flow.called(layer)) == 1
        if once and type(model.get_submodule(layer)) in LAYERS_WITH_ROWS:
            found[path] = layer
    return found


def fold(model: nn.Module, flow: Dataflow, run: Callable[[], object]) -> dict[str, str]:
    """Fold every batch norm that can be, each checked on what flows through it.

    Args:
        model: the model, in evaluation mode; changed in place.
        flow: one traced forward pass.
        run: one forward pass of the model on a sample.

    Returns:
        Folded norm → layer. A norm is left alone, and the reason said, if its output would change by
        more than 1e-5 of its largest value.
    """
    found = find_norms(model, flow)
    seen = _record(model, found, run) if found else {}
    folded = {}
    for path, layer in found.items():
        error = _fold_pair(model, path, layer, *seen[path])
        if error <= TOLERANCE:
            folded[path] = layer
        else:
            say(f"batch norm {path!r} is not folded: its output would change by {error:.2g}")
    return folded


def _record(
    model: nn.Module, pairs: dict[str, str], run: Callable[[], object]
) -> dict[str, tuple[Tensor, Tensor]]:
    """What goes into the layer, and what comes out of the norm, of every pair."""
    inputs: dict[str, Tensor] = {}
    outputs: dict[str, Tensor] = {}
    handles = []
    for path, layer in pairs.items():
        handles += [
            model.get_submodule(layer).register_forward_pre_hook(
                lambda _, args, key=path: inputs.update({key: args[0].clone()})
            ),
            model.get_submodule(path).register_forward_hook(
                lambda _, args, output, key=path: outputs.update({key: output.clone()})
            ),
        ]
    try:
        with torch.no_grad():
            run()
    finally:
        for handle in handles:
            handle.remove()
    return {path: (inputs[path], outputs[path]) for path in pairs}


@torch.no_grad()
def _fold_pair(model: nn.Module, path: str, layer: str, x: Tensor, expected: Tensor) -> float:
    """Fold one norm; the difference that it makes, and no change where that is too large."""
    before, norm = model.get_submodule(layer), model.get_submodule(path)
    parameters = dict(before._parameters)
    _scale(before, norm)
    fold_structure(model, {path: layer})
    error = relative_difference([expected], [model.get_submodule(path)(before(x))])
    if error > TOLERANCE:
        model.set_submodule(path, norm)
        before._parameters.update(parameters)
    return error


def fold_structure(model: nn.Module, folded: dict[str, str]) -> None:
    """Take folded norms out of a model, and give the layers before them a bias.

    Raises:
        AttributeError: if the model has no such norm or layer.
    """
    for path, layer in folded.items():
        norm, before = model.get_submodule(path), model.get_submodule(layer)
        if before.bias is None:
            weight = before.get_parameter("weight")
            zeros = torch.zeros(norm.num_features, dtype=weight.dtype, device=weight.device)
            before.register_parameter("bias", nn.Parameter(zeros, requires_grad=False))
        plain = type(norm) in (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
        model.set_submodule(path, Folded(layer) if plain else WithoutNorm(norm, layer))


def folded_norms(model: nn.Module) -> dict[str, str]:
    """Folded norm → layer, as far as they were folded in this model."""
    return {
        path: module.into
        for path, module in model.named_modules()
        if isinstance(module, Folded | WithoutNorm)
    }


def _scale(layer: nn.Module, norm: Any) -> None:
    """Put a norm's scale and shift into a layer's weight and bias, computed in double precision."""
    scale = (norm.running_var.double() + norm.eps).rsqrt()
    if norm.weight is not None:
        scale = scale * norm.weight.double()
    bias: Any = 0.0 if layer.bias is None else layer.bias.double()
    shift = (bias - norm.running_mean.double()) * scale
    if norm.bias is not None:
        shift = shift + norm.bias.double()
    rows = weight_rows(layer)
    scaled = rows.double() * scale.view(-1, *[1] * (rows.ndim - 1))
    new_weight = rows_to_weight(scaled.to(rows.dtype), layer).contiguous()
    layer.register_parameter("weight", nn.Parameter(new_weight, requires_grad=False))
    layer.register_parameter("bias", nn.Parameter(shift.to(rows.dtype), requires_grad=False))


def relative_difference(expected: Iterable[Tensor], found: Iterable[Tensor]) -> float:
    """Largest difference of any output, relative to that output's largest value; infinite where one of the
    two is NaN."""
    worst = 0.0
    for one, other in zip(expected, found, strict=True):
        largest = float(one.abs().max()) if one.numel() else 0.0
        difference = float((one - other).abs().max()) if one.numel() else 0.0
        relative = difference / largest if largest else difference
        worst = math.inf if math.isnan(relative) else max(worst, relative)
    return worst
