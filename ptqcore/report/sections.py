"""What some sections of the report show: the map, activations on their grids, losses of learning."""

from collections.abc import Sequence
from dataclasses import dataclass

from markupsafe import Markup

from ptqcore.report import charts
from ptqcore.report.block_chart import KINDS, layer_class
from ptqcore.report.legend import Chart
from ptqcore.report.line_chart import line
from ptqcore.report.map_chart import draw, shape_text
from ptqcore.report.network import FlowMap
from ptqcore.report.record import ActivationRecord, BlockRecord


def map_chart(network: FlowMap) -> Chart:
    """The drawing of a map, with what it counts."""
    present = {"other" if part.reason else layer_class(part) for part in network.layers}
    legend = {kind: style for style, kind in KINDS.items() if style in present}
    if "other" in present:
        legend["full precision"] = "other"
    return Chart(Markup(draw(network)), legend, counts(network))


@dataclass(frozen=True)
class Table:
    """A heading, the names of the columns, and rows of text."""

    heading: str
    columns: tuple[str, ...]
    rows: Sequence[tuple[str, ...]]


def map_tables(network: FlowMap) -> list[Table]:
    """Everything that a map lists, without what it has not."""
    edges = [(edge.name, edge.grid, shape_text(edge.shape)) for edge in network.edges]
    joins = [
        (join.site, join.kind, ", ".join(f"{t.source} [{shape_text(t.shape)}]" for t in join.tensors))
        for join in network.joins
    ]
    constants = [(one.parameter, shape_text(one.shape), one.site) for one in network.constants]
    tables = [
        Table(
            "Functions that join tensors", ("function", "kind", "tensors, by where they come from"), joins
        ),
        Table(
            "Layers and their batch norms",
            ("batch norm", "layer before it"),
            list(network.norm_pairs.items()),
        ),
        Table(
            "Norms and the layers that read them",
            ("norm", "layers"),
            [(norm, ", ".join(layers) or "none") for norm, layers in network.norm_readers.items()],
        ),
        Table(
            "Layers in a row",
            ("layer", "through", "layer"),
            [(row.first, ", ".join(row.between), row.second) for row in network.rows],
        ),
        Table("Parameters outside of layers", ("parameter", "shape", "read by"), constants),
        Table("Layers left in full precision", ("layer", "reason"), list(network.alone.items())),
        Table("Activations that the recipe rounds", ("edge", "grid", "shape"), edges),
    ]
    return [table for table in tables if table.rows]


def counts(network: FlowMap) -> str:
    """How much of what there is, in one line."""
    joins = [join.kind for join in network.joins]
    parts = [
        _count(network.modules, "module"),
        _count(network.functions, "function call"),
        _count(len(network.layers), "layer"),
        _count(len(network.blocks), "block"),
        _count(joins.count("residual"), "residual addition"),
        _count(joins.count("concatenation"), "concatenation"),
    ]
    return f"{', '.join(parts)}. {norms_text(network)}".rstrip()


def norms_text(network: FlowMap) -> str:
    """What became of the batch norms, in a sentence; nothing if there are none."""
    pairs, folded = len(network.norm_pairs), network.folded
    if not pairs:
        return ""
    share = (
        _count(folded, "batch norm") if folded == pairs else f"{folded} of {_count(pairs, 'batch norm')}"
    )
    difference = charts.number(network.difference)
    return f"{share} folded into the layers before, the outputs differ by {difference} of the largest."


def _count(number: int, name: str) -> str:
    return f"{number} {name}{'s' * (number != 1)}"


def activation_charts(records: Sequence[ActivationRecord]) -> dict[str, Chart]:
    """The charts of quantized activations, by name; none without any."""
    if not records:
        return {}
    ends = [record.range for record in records]
    ranges = charts.ranges(_names(records), ends, title="range of the grid", marks=_block_marks(records))
    counted = [record for record in records if record.clipped is not None]
    shares = [100 * record.clipped for record in counted if record.clipped is not None]
    clipped = charts.bars(
        _names(counted), shares, title="share of values", unit="%", marks=_block_marks(counted)
    )
    return {"ranges": Chart(Markup(ranges)), "clipped": Chart(Markup(clipped))}


def _names(records: Sequence[ActivationRecord]) -> list[str]:
    return [record.name for record in records]


def _block_marks(records: Sequence[ActivationRecord]) -> dict[int, str]:
    """Index → short block name, for the first activation of each block."""
    first: dict[str, int] = {}
    for index, record in enumerate(records):
        if record.block:
            first.setdefault(record.block, index)
    return dict(zip(first.values(), short(list(first)), strict=True))


def loss_lines(blocks: Sequence[BlockRecord]) -> list[Markup]:
    """A small chart of the losses of each block that was learned."""
    learned = [block for block in blocks if block.losses]
    names = short([block.path for block in learned])
    return [Markup(line(block.losses, name)) for block, name in zip(learned, names, strict=True)]


def short(paths: Sequence[str]) -> list[str]:
    """The paths without the components that all of them begin with; the last one always stays."""
    split = [path.split(".") for path in paths]
    shortest = min((len(parts) for parts in split), default=1)
    shared = 0
    while shared < shortest - 1 and len({parts[shared] for parts in split}) == 1:
        shared += 1
    return [".".join(parts[shared:]) for parts in split]
