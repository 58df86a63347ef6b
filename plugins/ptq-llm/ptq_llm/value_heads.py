"""The heads of attention between a linear layer that makes values and one that reads their sums.

Attention gives each token a weighted mean of the values of tokens. So where the values of all tokens are
the same, each input channel of the layer behind attention is the value of one output row of the layer in
front of it, whatever the weights are: told to return numbers that name its rows, the layer in front says
by itself which rows are values, in what order, and which heads share them.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ptqcore import Dataflow, Op

_DIGITS = 8  # few enough to be told apart in bfloat16
_KEEP_ORDER = {"clone", "contiguous", "detach", "to", "type", "flatten", "reshape", "view"}


@dataclass(frozen=True)
class ValueHeads:
    """rows [heads, width]: the output row of the layer `producer` that each input channel of the layer
    `consumer` is, a mean over tokens for every head. Heads have the same rows or none in common."""

    producer: str
    consumer: str
    rows: Tensor


@torch.no_grad()
def find_value_heads(
    model: nn.Module, flow: Dataflow, run: Callable[[], object], consumers: Iterable[str]
) -> list[ValueHeads]:
    """The heads in front of linear layers, those of each producer once.

    Args:
        model: the model.
        flow: one traced forward pass of it.
        run: that pass again.
        consumers: paths of linear layers, called once in a pass.
    """
    made_by = flow.producers()
    inputs = {op.site.owner: op.inputs[0] for op in flow.ops if op.name == "linear"}
    widths = {path: width for path in consumers if (width := _width(flow, made_by, inputs[path]))}
    layers = {path for path, module in model.named_modules() if isinstance(module, nn.Linear)}
    producers = {path: sorted(_layers_before(made_by, inputs[path]) & layers) for path in widths}
    found: dict[str, ValueHeads] = {}
    for consumer, (producer, rows) in _channel_maps(model, run, producers).items():
        heads = rows.view(-1, widths[consumer])
        if producer not in found and _share_all_or_nothing(heads):
            found[producer] = ValueHeads(producer, consumer, heads)
    return list(found.values())


def _width(flow: Dataflow, made_by: dict[int, Op], number: int) -> int | None:
    """The channels of a head: those that are merged with others just before a layer reads the tensor."""
    channels = flow.shapes[number][-1]
    while (op := made_by.get(number)) is not None and op.name in _KEEP_ORDER:
        number = op.inputs[0]
        width = flow.shapes[number][-1]
        if width != channels:
            return width if channels % width == 0 else None
    return None


def _layers_before(made_by: dict[int, Op], number: int) -> set[str]:
    """The modules of linear functions from which a tensor is computed without another between."""
    found: set[str] = set()
    seen, left = set(), [number]
    while left:
        op = made_by.get(left.pop())
        if op is None or op.site in seen:
            continue
        seen.add(op.site)
        if op.name == "linear":
            found.add(op.site.owner)
        else:
            left += op.inputs
    return found


def _channel_maps(
    model: nn.Module, run: Callable[[], object], producers: dict[str, list[str]]
) -> dict[str, tuple[str, Tensor]]:
    """Consumer → the producer that makes all its channels, and the output row [channels] that each is.

    Rows are numbered through all layers; a pass of the model shows one digit of the number of each.
    """
    paths = list(dict.fromkeys(path for few in producers.values() for path in few))
    counts = [len(model.get_submodule(path).get_parameter("weight")) for path in paths]
    numbers = dict(zip(paths, torch.arange(sum(counts)).split(counts), strict=True)) if paths else {}
    channels: dict[str, Tensor | None] = {}
    place = 1
    while place < max(sum(counts), 1):
        told = {path: own // place % _DIGITS for path, own in numbers.items()}
        for path, digits in _digits(model, run, told, producers).items():
            before = channels.get(path, torch.tensor(0))
            channels[path] = None if digits is None or before is None else before + digits * place
        place *= _DIGITS
    starts = torch.tensor([0, *counts]).cumsum(0)
    found = {}
    for consumer, number in channels.items():
        if number is None or int(number.max()) >= sum(counts):
            continue
        owners = torch.searchsorted(starts, number, right=True) - 1
        path = paths[int(owners[0])]
        if bool((owners == owners[0]).all()) and path in producers[consumer]:
            found[consumer] = (path, number - starts[owners[0]])
    return found


def _digits(
    model: nn.Module, run: Callable[[], object], told: dict[str, Tensor], consumers: Iterable[str]
) -> dict[str, Tensor | None]:
    """The digits [channels] that consumers read when producers return those of their rows, for all tokens;
    None if it is not the same for all tokens."""
    seen: dict[str, Tensor | None] = {}

    def tell(digits: Tensor) -> Callable[..., Tensor]:
        def hook(_: nn.Module, args: Any, output: Tensor) -> Tensor:
            return (1 + digits / _DIGITS).to(output).expand_as(output).clone()

        return hook

    def note(path: str) -> Callable[..., None]:
        def hook(_: nn.Module, args: Any) -> None:
            x = (args[0].flatten(0, -2).float() - 1) * _DIGITS
            digits = x[:1].round()
            clear = len(x) > 0 and bool(((x - digits).abs() < 0.25).all()) and bool((digits >= 0).all())
            seen[path] = digits[0].long().cpu() if clear and bool((digits < _DIGITS).all()) else None

        return hook

    get = model.get_submodule
    handles = [get(path).register_forward_hook(tell(digits)) for path, digits in told.items()]
    handles += [get(path).register_forward_pre_hook(note(path)) for path in consumers]
    try:
        run()
    finally:
        for handle in handles:
            handle.remove()
    return seen


def _share_all_or_nothing(heads: Tensor) -> bool:
    """Whether any two heads [heads, width] have the same rows, in the same order, or none in common."""
    distinct = heads.unique(dim=0)
    return len(distinct.unique()) == distinct.numel()
