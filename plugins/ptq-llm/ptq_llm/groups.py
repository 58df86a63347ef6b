"""Groups: who makes the channels that linear layers read, found by probing one block.

A group is a set of layers that read the same channels, and what makes these channels: a norm, a linear
layer somewhere before (v → o, up → down), or nothing that could be changed. Dividing what is made by a
factor per channel and multiplying what reads it leaves the block's function as it is. No architecture
is known here: candidates come from the dataflow map and from probes of the block on calibration
samples, and every group is tried with random factors before it is used.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Literal

import torch
from torch import Tensor, nn

from ptq_llm.flow_questions import FlowQuestions, within
from ptq_llm.norm_probe import find_norm
from ptq_llm.probing import Unreached, channel_map, in_precision
from ptqcore import Block, BlockIO, Dataflow

Kind = Literal["norm", "linear", "shared"]


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
    direct: of kind `linear`: whether the layers read nothing but the producer's very output, and
    nothing else does.
    unit_offset: whether the norm's gain is 1 + its weight.
    behind_norm: whether the channels are the output of a norm, if only of an earlier block.
    behind_attention: whether tokens are mixed between the last linear layers and the channels.
    """

    kind: Kind
    producer: str
    consumers: tuple[str, ...]
    others: tuple[str, ...] = ()
    rows: Tensor | None = None
    direct: bool = False
    unit_offset: bool = False
    behind_norm: bool = False
    behind_attention: bool = False

    @property
    def layers(self) -> tuple[str, ...]:
        """The norm and linear layers of the group."""
        return (self.producer, *self.consumers) if self.producer else self.consumers

    def within(self, block: str) -> str:
        """What to call it in messages, by paths inside a block."""
        consumers = ", ".join(_relative(path, block) for path in self.consumers)
        return f"{_relative(self.producer, block) or 'input'} → {consumers}"


@dataclass
class _Probed:
    """What probes of one block found, by paths inside it: consumer → producer and the rows of it that the
    consumer's channels are; norm → whether its gain is 1 + weight."""

    rows: dict[str, tuple[str, Tensor]] = field(default_factory=dict)
    unit_offset: dict[str, bool] = field(default_factory=dict)


class Finder:
    """Finds the groups of a model's blocks; blocks of the same structure are probed once."""

    def __init__(self, model: nn.Module, flow: Dataflow) -> None:
        """Args:
        model: the float model.
        flow: one traced forward pass of it.
        """
        self.model, self.map = model, FlowQuestions(model, flow)
        self._known: dict[tuple[str, ...], _Probed] = {}

    def candidates(self, block: Block, io: BlockIO) -> list[Group]:
        """The groups of a block, not yet checked, in the order in which their consumers run.

        Args:
            block: the block, in full precision.
            io: its inputs; the first samples are used for probing.
        """
        groups = self.from_map(block)
        structure = tuple(_relative(path, block.path) for path in block.layers())
        if structure not in self._known:
            with in_precision(block, torch.float32):
                self._known[structure] = self._probe(block, io, groups)
        known = self._known[structure]
        groups = [
            replace(g, unit_offset=known.unit_offset.get(_relative(g.producer, block.path), False))
            for g in groups
        ]
        groups += self._of_rows(block, known.rows)
        return sorted(groups, key=lambda group: self.map.order[group.consumers[0]])

    def from_map(self, block: Block) -> list[Group]:
        """The groups that read one tensor, as the dataflow map alone shows them."""
        layers, seen, found = block.layers(), set[str](), []
        for path in self.map.in_order(layers):
            source = self.map.source(self.map.input(path))
            if path in seen or source is None:
                continue
            readers = self.map.readers(source)
            inside = tuple(reader for reader in readers.layers if reader in layers)
            seen.update(inside)
            alone = not readers.anything_else and len(inside) == len(readers.layers)
            norm = self.map.norms.get(source, "")
            linear = self.map.layer_that_returns(source)
            if norm and alone and within(norm, block.path):
                found.append(Group("norm", norm, inside, tuple(readers.parameters), behind_norm=True))
            elif linear in layers and alone and not readers.parameters:
                rows = torch.arange(self.map.flow.shapes[source][-1])
                found.append(Group("linear", linear, inside, rows=rows, direct=True))
            else:
                mixed = self.map.behind_attention(path)
                found.append(Group("shared", "", inside, behind_norm=bool(norm), behind_attention=mixed))
        return found

    def _probe(self, block: Block, io: BlockIO, groups: list[Group]) -> _Probed:
        found = _Probed()
        for norm in (group.producer for group in groups if group.kind == "norm"):
            module = block.model.get_submodule(norm)
            convention = find_norm(module, len(module.get_parameter("weight")))
            found.unit_offset[_relative(norm, block.path)] = (
                convention is not None and not convention.identity
            )
        direct = {path for group in groups if group.direct for path in group.consumers}
        layers = block.layers()
        unreached = []
        for consumer in self.map.in_order(layers.keys() - direct):
            try:
                for producer in self.map.layers_before(consumer, layers):
                    rows = channel_map(io, producer, consumer)
                    if rows is not None:
                        key, value = _relative(consumer, block.path), _relative(producer, block.path)
                        found.rows[key] = (value, rows)
                        break
            except Unreached:
                unreached.append(consumer)
        for consumer in unreached:
            self._take_from_sibling(consumer, block, found.rows)
        return found

    def _take_from_sibling(self, consumer: str, block: Block, rows: dict[str, tuple[str, Tensor]]) -> None:
        """An expert that no sample reaches has the rows of another one, which runs the same code."""
        path = _relative(consumer, block.path)
        before = [_relative(p, block.path) for p in self.map.layers_before(consumer, block.layers())]
        for sibling, (producer, known) in rows.items():
            mine = [p for p in before if _numbers_aside(p) == _numbers_aside(producer)]
            if _numbers_aside(sibling) == _numbers_aside(path) and len(mine) == 1:
                rows[path] = (mine[0], known)
                return

    def _of_rows(self, block: Block, rows: Mapping[str, tuple[str, Tensor]]) -> Iterator[Group]:
        for consumer, (producer, found) in rows.items():
            path = _absolute(consumer, block.path)
            mixed = self.map.behind_attention(path)
            yield Group(
                "linear", _absolute(producer, block.path), (path,), rows=found, behind_attention=mixed
            )


def _relative(path: str, block: str) -> str:
    return path[len(block) + 1 :] if block and path else path


def _absolute(path: str, block: str) -> str:
    return f"{block}.{path}".strip(".")


def _numbers_aside(path: str) -> tuple[str, ...]:
    """What experts in a list have in common."""
    return tuple("*" if part.isdecimal() else part for part in path.split("."))
