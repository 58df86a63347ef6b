"""Groups: who makes the channels that linear layers read, found by probing one block.

A group is a set of layers that read the same channels, and what makes these channels: a norm, a linear
layer somewhere before (v → o, up → down), or nothing that could be changed. Dividing what is made by a
factor per channel and multiplying what reads it leaves the block's function as it is. No architecture
is known here: candidates come from the dataflow map and from probes of the block on a calibration
sample, and every group is tried with random factors before it is used.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Literal

import torch
from torch import Tensor, nn

from ptq_llm.probing import channel_map
from ptqcore import Block, BlockIO, Dataflow, Op

Kind = Literal["norm", "linear", "shared"]
_HANDS_ON = {
    "clone",
    "contiguous",
    "detach",
    "flatten",
    "float",
    "getitem",
    "index_select",
    "reshape",
    "squeeze",
    "to",
    "type",
    "type_as",
    "unsqueeze",
    "view",
}
_MIXES_TOKENS = {"baddbmm", "einsum", "matmul", "scaled_dot_product_attention", "softmax"}
_LOOKS_ONLY = {
    "device",
    "dim",
    "dtype",
    "empty_like",
    "new_empty",
    "new_zeros",
    "ones_like",
    "shape",
    "size",
    "zeros_like",
}


@dataclass(frozen=True)
class Group:
    """Layers of a block that read the same channels.

    kind: `norm`, the channels are the output of a norm that nothing else reads; `linear`, they are
    output rows of a linear layer, scaled by nothing on the way; `shared`, others read them too, so that
    only the layers' own inputs can be changed.
    producer: path of the norm or linear layer, empty for `shared`.
    consumers: paths of the linear layers that read the channels, in the order of their calls.
    others: names of the other parameters [..., channels] that multiply them (the router of experts).
    rows: of kind `linear`: the producer's output row that each channel is, [channels].
    unit_offset: whether the norm's gain is 1 + its weight.
    behind_norm: whether the channels are the output of a norm, if only of an earlier block.
    behind_attention: whether tokens are mixed between the last linear layers and the channels.
    """

    kind: Kind
    producer: str
    consumers: tuple[str, ...]
    others: tuple[str, ...] = ()
    rows: Tensor | None = None
    unit_offset: bool = False
    behind_norm: bool = False
    behind_attention: bool = False

    @property
    def name(self) -> str:
        """What to call it in messages."""
        return f"{self.producer or 'input'} → {', '.join(self.consumers)}"


class Finder:
    """Finds the groups of a model's blocks; blocks of the same structure are probed once."""

    def __init__(self, model: nn.Module, flow: Dataflow) -> None:
        """Args:
        model: the float model.
        flow: one traced forward pass of it.
        """
        self.map = FlowQuestions(model, flow)
        self._known: dict[tuple[str, ...], list[Group]] = {}

    def candidates(self, block: Block, io: BlockIO) -> list[Group]:
        """The groups of a block, not yet checked, in the order in which their consumers run.

        Args:
            block: the block, in full precision.
            io: its inputs; the first samples are used for probing.
        """
        relative = [_relative(path, block.path) for path in block.layers()]
        if tuple(relative) not in self._known:
            groups = [*self.map.of_norms(block), *self.map.of_linears(block, io)]
            self._known[tuple(relative)] = [_moved(group, block.path, "") for group in groups]
        groups = [_moved(group, "", block.path) for group in self._known[tuple(relative)]]
        order = self.map.order
        return sorted(groups, key=lambda group: order[group.consumers[0]])


def _relative(path: str, block: str) -> str:
    return path[len(block) + 1 :] if block else path


def _moved(group: Group, old: str, new: str) -> Group:
    """The same group of another block."""

    def move(path: str) -> str:
        return f"{new}.{_relative(path, old)}".strip(".") if path else path

    return replace(
        group,
        producer=move(group.producer),
        consumers=tuple(map(move, group.consumers)),
        others=tuple(map(move, group.others)),
    )


def _without_number(path: str) -> str:
    """The list that a numbered module is in; other paths as they are."""
    head, _, last = path.rpartition(".")
    return head if last.isdecimal() else path


@dataclass
class _Readers:
    """Who reads a tensor: linear layers, other parameters, and anything else at all."""

    layers: list[str]
    parameters: list[str]
    anything_else: bool = False


class FlowQuestions:
    """What the dataflow map says of norms and linear layers."""

    def __init__(self, model: nn.Module, flow: Dataflow) -> None:
        self.model, self.flow = model, flow
        self.consumers, self.producers = flow.consumers(), flow.producers()
        self.order = {call.path: index for index, call in enumerate(flow.calls)}
        self.returned = {number for call in flow.called("") for number in call.outputs}

    @cached_property
    def norms(self) -> dict[str, int]:
        """Path of every norm that is called once → the tensor that it returns."""
        found = {}
        for path, module in self.model.named_modules():
            weight = module._parameters.get("weight")
            calls = self.flow.called(path)
            if weight is None or weight.ndim != 1 or len(calls) != 1 or len(calls[0].outputs) != 1:
                continue
            (output,) = calls[0].outputs
            if self.flow.shapes[output][-1:] == tuple(weight.shape):
                found[path] = output
        return found

    def of_norms(self, block: Block) -> Iterator[Group]:
        """The groups that read one tensor: a norm's output, or any other that is not a layer's own."""
        made_by_norm = {number: path for path, number in self.norms.items()}
        layers, seen = block.layers(), set()
        for path in sorted((p for p in layers if p in self.order), key=self.order.__getitem__):
            source = self._source(self._input(path), made_by_norm)
            if path in seen or source is None:
                continue
            readers = self._readers(source)
            inside = [reader for reader in readers.layers if reader in layers]
            seen.update(inside)
            producer = made_by_norm.get(source, "")
            alone = not readers.anything_else and len(inside) == len(readers.layers)
            if producer and alone and _within(producer, block.path):
                offset = _has_unit_offset(self.model.get_submodule(producer))
                yield Group("norm", producer, tuple(inside), tuple(readers.parameters), None, offset, True)
            else:
                mixed = self._behind_attention(source)
                yield Group("shared", "", tuple(inside), behind_norm=bool(producer), behind_attention=mixed)

    def of_linears(self, block: Block, io: BlockIO) -> Iterator[Group]:
        """The groups whose channels are rows of a linear layer, by probing.

        An expert that no sample reaches has the rows of its siblings, which run the same code.
        """
        layers = block.layers()
        known: dict[str, Tensor] = {}
        unknown: list[tuple[str, str]] = []
        for consumer in sorted((p for p in layers if p in self.order), key=self.order.__getitem__):
            for producer in self._layers_before(self._input(consumer), layers):
                rows = channel_map(io, producer, consumer)
                if rows is not None:
                    known[_without_number(consumer)] = rows
                    mixed = self._behind_attention(self._input(consumer))
                    yield Group("linear", producer, (consumer,), rows=rows, behind_attention=mixed)
                    break
                unknown.append((producer, consumer))
        for producer, consumer in unknown:
            family = _without_number(consumer)
            if consumer[-1].isdecimal() and producer.endswith(consumer[len(family) :]) and family in known:
                yield Group("linear", producer, (consumer,), rows=known[family])

    def _input(self, path: str) -> int | None:
        """The tensor that a linear layer reads."""
        ops = [op for op in self.flow.ops if op.site.owner == path and op.name == "linear"]
        return ops[0].inputs[0] if ops else None

    def _source(self, number: int | None, norms: dict[int, str]) -> int | None:
        """The tensor that a layer's input is, before functions that hand its channels on."""
        while number is not None and number not in norms:
            op = self.producers.get(number)
            if op is None or op.name not in _HANDS_ON or not self._keeps_channels(op.inputs[0], number):
                break
            number = op.inputs[0]
        return number

    def _keeps_channels(self, before: int, after: int) -> bool:
        shapes = self.flow.shapes
        return shapes[before][-1:] == shapes[after][-1:]

    def _readers(self, number: int) -> _Readers:
        found = _Readers([], [], number in self.returned)
        for op in self.consumers.get(number, []):
            if op.name == "linear" and op.inputs[0] == number:
                self._add_reader(op.site.owner, op.inputs[1], found)
            elif op.name in _HANDS_ON and all(self._keeps_channels(number, out) for out in op.outputs):
                for output in op.outputs:
                    below = self._readers(output)
                    found.layers += [path for path in below.layers if path not in found.layers]
                    found.parameters += below.parameters
                    found.anything_else |= below.anything_else
            elif op.name not in _LOOKS_ONLY:
                found.anything_else = True
        return found

    def _add_reader(self, owner: str, weight: int, found: _Readers) -> None:
        if type(self.model.get_submodule(owner)) is nn.Linear:
            if owner not in found.layers:
                found.layers.append(owner)
            return
        while weight not in self.flow.names and weight in self.producers:
            weight = self.producers[weight].inputs[0]  # a parameter in another dtype
        if weight in self.flow.names:
            found.parameters.append(self.flow.names[weight])
        else:
            found.anything_else = True

    def sinks(self, paths: Iterable[str], block: Block) -> list[str]:
        """The linear layers of the block that first read what other layers of it lead to."""
        layers = block.layers()
        left = [n for op in self.flow.ops if op.site.owner in set(paths) for n in op.outputs]
        found, seen = [], set(left)
        while left:
            for op in self.consumers.get(left.pop(), []):
                if op.name == "linear" and op.site.owner in layers:
                    found.append(op.site.owner)
                elif _within(op.site.owner, block.path):
                    left += [number for number in op.outputs if number not in seen]
                    seen.update(op.outputs)
        return sorted(set(found) - set(paths), key=self.order.__getitem__)

    def parent(self, paths: Iterable[str], block: Block) -> str:
        """The innermost module of the block around some of its layers that is called once."""
        split = [path.split(".") for path in paths]
        shared = 0
        while len({tuple(parts[: shared + 1]) for parts in split}) == 1 and shared < len(split[0]) - 1:
            shared += 1
        path = ".".join(split[0][:shared])
        while path != block.path and len(self.flow.called(path)) != 1:
            path = path.rpartition(".")[0]
        return path

    def _layers_before(self, number: int | None, layers: Iterable[str]) -> list[str]:
        """The linear layers of the block that a tensor is computed from without another between."""
        owners = {op.site.owner for op in self._ops_before(number) if op.name == "linear"}
        return sorted(owners.intersection(layers), key=self.order.__getitem__, reverse=True)

    def _behind_attention(self, number: int | None) -> bool:
        """Whether tokens are mixed between the last linear layers and a tensor."""
        return any(op.name in _MIXES_TOKENS for op in self._ops_before(number))

    def _ops_before(self, number: int | None) -> list[Op]:
        """What a tensor is computed by, back to linear layers."""
        left, seen = [] if number is None else [number], {}
        while left:
            op = self.producers.get(left.pop())
            if op is not None and op.site not in seen:
                seen[op.site] = op
                left += () if op.name == "linear" else op.inputs
        return list(seen.values())


def _within(path: str, block: str) -> bool:
    return path == block or path.startswith(f"{block}.") or not block


@torch.no_grad()
def _has_unit_offset(norm: nn.Module) -> bool:
    """Whether a norm multiplies by 1 + weight: a weight of 0 does not silence it."""
    weight = norm.get_parameter("weight")
    kept, bias = weight.data, norm._parameters.get("bias")
    x = torch.linspace(-1, 2, 2 * len(kept), dtype=kept.dtype, device=kept.device).view(2, -1)
    try:
        weight.data = torch.zeros_like(kept)
        output = norm(x)
    finally:
        weight.data = kept
    silenced = output if bias is None else output - bias
    return bool(silenced.abs().max() > 0.1)
