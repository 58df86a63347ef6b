"""The map of a network, put together from what its trace, its blocks and its grids say."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from torch import nn

from ptqcore.blocks import Block
from ptqcore.chains import find_chains
from ptqcore.dataflow import Dataflow, Op, inside
from ptqcore.grids import Grids
from ptqcore.lineage import Lineage
from ptqcore.placement import LAYERS, moves
from ptqcore.report.network import Constant, Flowing, FlowMap, GridEdge, Join, Link, Part, Row, Stage

_READ_PARAMETERS = LAYERS | {
    "batch_norm",
    "embedding",
    "embedding_bag",
    "group_norm",
    "instance_norm",
    "layer_norm",
    "prelu",
    "rms_norm",
}


@dataclass(frozen=True)
class Folding:
    """What became of the batch norms: each with the layer before it, whether they were folded, and the
    largest difference of the outputs, relative to the largest output."""

    pairs: Mapping[str, str] = field(default_factory=dict)
    folded: Mapping[str, str] = field(default_factory=dict)
    difference: float = 0.0


def map_network(
    model: nn.Module,
    flow: Dataflow,
    blocks: Sequence[Block],
    grids: Grids,
    folding: Folding,
    alone: Mapping[str, str],
) -> FlowMap:
    """The map of a model.

    Args:
        model: the model, its batch norms folded.
        flow: one traced forward pass of it.
        blocks: its blocks.
        grids: the grids of a recipe.
        folding: what became of its batch norms.
        alone: layer → why it stays in full precision.
    """
    lineage = Lineage(flow)
    return FlowMap(
        modules=sum(1 for _ in model.modules()),
        functions=len(flow.ops),
        inputs=tuple(flow.shapes[number] for number in flow.inputs),
        stages=_Stages(model, flow, blocks, lineage, alone).all(),
        norm_pairs=dict(folding.pairs),
        folded=len(folding.folded),
        difference=folding.difference,
        joins=_joins(flow, lineage),
        norm_readers=_norm_readers(model, flow),
        rows=_rows(model, flow),
        constants=_constants(model, flow),
        alone=dict(alone),
        edges=_edges(flow, grids),
    )


class _Stages:
    def __init__(
        self,
        model: nn.Module,
        flow: Dataflow,
        blocks: Sequence[Block],
        lineage: Lineage,
        alone: Mapping[str, str],
    ) -> None:
        self.model, self.flow, self.lineage, self.alone = model, flow, lineage, alone
        self.variable = flow.variable()
        self.names: list[str] = []
        self.is_block: list[bool] = []
        self.ops: list[list[Op]] = []
        self.stage_of: dict[int, int] = {}  # tensor → the stage that makes it
        self._group([block.path for block in blocks])

    def _group(self, blocks: list[str]) -> None:
        key: tuple[str, int] | None = None
        for op in self.flow.ops:
            if self.variable.isdisjoint(op.inputs):
                continue
            block = next((path for path in blocks if inside(op.site.owner, path)), None)
            new = (op.site.owner, op.site.call) if block is None else (block, -1)
            if new != key:
                key = new
                self.names.append(new[0])
                self.is_block.append(block is not None)
                self.ops.append([])
            self.ops[-1].append(op)
            self.stage_of.update(dict.fromkeys(op.outputs, len(self.ops) - 1))

    def all(self) -> tuple[Stage, ...]:
        """The stages, in order."""
        read = {link for index in range(len(self.ops)) for link in self._flowing_in(index)}
        returned = {number for call in self.flow.called("") for number in call.outputs}
        return tuple(self._stage(index, read | returned, returned) for index in range(len(self.ops)))

    def _flowing_in(self, index: int) -> list[int]:
        """The tensors that a stage reads and does not make."""
        numbers = dict.fromkeys(number for op in self.ops[index] for number in op.inputs)
        return [n for n in numbers if n in self.variable and self.stage_of.get(n, -1) != index]

    def _stage(self, index: int, wanted: set[int], returned: set[int]) -> Stage:
        ops = self.ops[index]
        made = [n for op in ops for n in dict.fromkeys(op.outputs) if n in wanted]
        links = (
            Link(self.stage_of.get(number, -1), self.flow.shapes[number])
            for number in self._flowing_in(index)
        )
        return Stage(
            name=self.names[index] or ops[0].name,
            block=self.is_block[index],
            parts=self._parts(ops),
            reads=tuple(links),
            makes=tuple(self.flow.shapes[number] for number in made),
            functions=tuple(op.name for op in ops),
            returned=not returned.isdisjoint(made),
        )

    def _parts(self, ops: list[Op]) -> tuple[Part, ...]:
        sites = {op.site for op in ops}
        chosen = [
            number
            for number, item in enumerate(self.lineage.items)
            if item.op is not None and item.op.site in sites
        ]
        place = {number: index for index, number in enumerate(chosen)}
        return tuple(self._part(number, place) for number in chosen)

    def _part(self, number: int, place: dict[int, int]) -> Part:
        item = self.lineage.items[number]
        assert item.op is not None
        layer = item.op.name in LAYERS
        name = self.lineage.name(number)
        return Part(
            name=name,
            function=item.op.name,
            shape=self.flow.shapes[item.op.inputs[1] if layer else item.op.outputs[0]],
            layer=layer,
            reads=tuple(dict.fromkeys(place.get(source, -1) for _, source in item.reads)),
            groups=getattr(self.model.get_submodule(name), "groups", 1) if layer else 1,
            reason=self.alone.get(name) if layer else None,
        )


def _joins(flow: Dataflow, lineage: Lineage) -> tuple[Join, ...]:
    found = []
    for number, item in enumerate(lineage.items):
        if item.op is None or item.op.name in LAYERS or len(item.reads) < 2:
            continue
        kind = {"add": "sum", "cat": "concatenation"}.get(item.op.name, item.op.name)
        if kind == "sum" and lineage.is_residual(number):
            kind = "residual"
        tensors = tuple(Flowing(lineage.name(source), flow.shapes[n]) for n, source in item.reads)
        found.append(Join(str(item.op.site), kind, tensors))
    return tuple(found)


def _is_norm(module: nn.Module) -> bool:
    return "norm" in type(module).__name__.lower() and not list(module.children())


def _norm_readers(model: nn.Module, flow: Dataflow) -> dict[str, tuple[str, ...]]:
    """Norm → the layers that read what it returns, itself or moved."""
    consumers = flow.consumers()
    found: dict[str, tuple[str, ...]] = {}
    for call in flow.calls:
        if not _is_norm(model.get_submodule(call.path)):
            continue
        readers, left = [], list(call.outputs)
        while left:
            for op in consumers.get(left.pop(), []):
                if op.name in LAYERS:
                    readers.append(op.site.owner)
                elif moves(op):
                    left.extend(op.outputs)
        found[call.path] = tuple(dict.fromkeys([*found.get(call.path, ()), *readers]))
    return found


def _rows(model: nn.Module, flow: Dataflow) -> tuple[Row, ...]:
    return tuple(
        Row(
            chain.first.site.owner,
            tuple(op.name for op in chain.between),
            chain.second.site.owner,
            chain.only_moves,
        )
        for chain in find_chains(model, flow)
    )


def _constants(model: nn.Module, flow: Dataflow) -> tuple[Constant, ...]:
    parameters = {name for name, _ in model.named_parameters()}
    return tuple(
        Constant(str(op.site), flow.names[number], flow.shapes[number])
        for op in flow.ops
        if op.name not in _READ_PARAMETERS and not _is_norm(model.get_submodule(op.site.owner))
        for number in dict.fromkeys(op.inputs)
        if flow.names.get(number) in parameters
    )


def _edges(flow: Dataflow, grids: Grids) -> tuple[GridEdge, ...]:
    makers = {op.site: op for op in flow.ops}
    found = []
    for edge, quant in grids.edges.items():
        op = makers[edge.site]
        numbers = op.inputs if edge.side == "input" else op.outputs
        found.append(GridEdge(str(edge), str(quant.spec), flow.shapes[numbers[edge.index]]))
    return tuple(found)
