"""The map of a network as SVG text: pure functions, coloured by the CSS classes of the page around them.

Stages lie below each other in the order in which they run. A tensor for the next stage is an arrow
down; one for a later stage is an arc along the left edge. Inside a block its layers stand in columns,
what joins tensors is a circle, and what skips a column arches over it. Blocks in a row that are the
same are drawn once.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import takewhile

from ptqcore.report.block_chart import TIMES, Body, draw_body, lane_of, lay_out
from ptqcore.report.charts import xml_text
from ptqcore.report.network import FlowMap, Stage

WIDTH, LANE, HEAD, GAP, LOW = 1000, 13, 196, 26, 30
FEWEST_REPEATED = 3
NAME_LENGTH, LONGEST_LABEL = 29, 100


@dataclass(frozen=True)
class _Row:
    """What is drawn as one: a block, equal blocks in a row, or functions in a row."""

    stages: tuple[Stage, ...]
    first: int
    body: Body | None

    @property
    def stage(self) -> Stage:
        return self.stages[0]

    @property
    def last(self) -> int:
        return self.first + len(self.stages) - 1

    @property
    def height(self) -> float:
        return LOW if self.body is None else max(self.body.height, 46)


@dataclass(frozen=True)
class _Arc:
    """A tensor that skips stages: from one row (-1: the input) to others."""

    start: int
    ends: tuple[int, ...]
    shape: tuple[int, ...]


def draw(network: FlowMap) -> str:
    """The whole drawing."""
    rows = _rows(network)
    arcs = _arcs(rows)
    lanes = lane_of([(arc.start, max(arc.ends)) for arc in arcs])
    left = 10 + LANE * (max(lanes, default=-1) + 1) + (10 if lanes else 0)
    width = max(WIDTH, left + HEAD + max((row.body.width for row in rows if row.body), default=0) + 12)
    tops, y = [], 30.0
    for row in rows:
        tops.append(y + GAP)
        y += GAP + row.height
    parts = [_end("input", network.inputs, left, 4)]
    for index, row in enumerate(rows):
        parts.append(_arrow(rows, index, left + 40, tops))
        parts.append(_stage(row, left, tops[index], width - left - 8))
    parts += [_arc(arc, lane, left, tops, rows) for arc, lane in zip(arcs, lanes, strict=True)]
    returned = [shape for stage in network.stages if stage.returned for shape in stage.makes]
    parts.append(_down(left + 40, y, y + GAP))
    parts.append(_end("output", returned, left, y + GAP))
    label = f"{len(network.blocks)} blocks, {len(network.layers)} layers"
    opening = (
        f'<svg class="map" viewBox="0 0 {width:.0f} {y + GAP + 32:.0f}" role="img" aria-label="{label}" '
        f'style="min-width: {width:.0f}px">'
    )
    return f"{opening}{''.join(parts)}</svg>"


def shape_text(shape: Sequence[int]) -> str:
    """A shape, its sizes multiplied."""
    return f" {TIMES} ".join(map(str, shape)) if shape else "scalar"


def _rows(network: FlowMap) -> list[_Row]:
    rows: list[_Row] = []
    first = 0
    stages = network.stages
    while first < len(stages):
        last = first
        while last + 1 < len(stages) and _goes_on(stages, last):
            last += 1
        stage = stages[first]
        if stage.block and last - first + 1 < FEWEST_REPEATED:
            last = first
        body = lay_out(stage) if stage.block else None
        rows.append(_Row(tuple(stages[first : last + 1]), first, body))
        first = last + 1
    return rows


def _goes_on(stages: Sequence[Stage], index: int) -> bool:
    """Whether the next stage is drawn with this one: only it reads what this one makes, and it is an
    equal block, or both are functions between blocks."""
    here, there = stages[index], stages[index + 1]
    chained = {link.stage for link in there.reads} == {index}
    others = any(link.stage == index for stage in stages[index + 2 :] for link in stage.reads)
    if not chained or others or here.returned or here.block != there.block:
        return False
    return _form(here) == _form(there) if here.block else not here.layers and not there.layers


def _form(stage: Stage) -> object:
    parts = [
        (
            part.name.removeprefix(stage.name),
            part.function,
            part.shape,
            part.reads,
            part.groups,
            part.reason,
        )
        for part in stage.parts
    ]
    return stage.block, parts, [link.shape for link in stage.reads], stage.makes


def _place(rows: Sequence[_Row], stage: int) -> int:
    """The row of a stage, -1 for the input."""
    return next((index for index, row in enumerate(rows) if row.first <= stage <= row.last), -1)


def _arcs(rows: Sequence[_Row]) -> list[_Arc]:
    """What skips rows, one arc for all that comes from the same row."""
    ends: dict[int, list[int]] = {}
    shapes: dict[int, tuple[int, ...]] = {}
    for index, row in enumerate(rows):
        for link in row.stage.reads:
            start = _place(rows, link.stage)
            if start < index - 1:
                ends.setdefault(start, []).append(index)
                shapes[start] = link.shape
    return [
        _Arc(start, tuple(dict.fromkeys(found)), shapes[start]) for start, found in sorted(ends.items())
    ]


def _arc(arc: _Arc, lane: int, left: float, tops: Sequence[float], rows: Sequence[_Row]) -> str:
    x = left - 12 - LANE * lane
    if arc.start < 0:
        y, source = 17.0, "input"
    else:
        y, source = tops[arc.start] + rows[arc.start].height - 9, rows[arc.start].stage.name
    lines = []
    for end in arc.ends:
        low = tops[end] + 9
        turn = f"M{left:.1f} {y:.1f}H{x + 7:.1f}Q{x:.1f} {y:.1f} {x:.1f} {y + 7:.1f}"
        back = f"V{low - 7:.1f}Q{x:.1f} {low:.1f} {x + 7:.1f} {low:.1f}H{left - 5:.1f}"
        head = f'<path class="head" d="M{left - 6:.1f} {low - 4:.1f}l6 4l-6 4z"/>'
        lines.append(f'<path class="arc l{lane % 5}" d="{turn}{back}"/>{head}')
    names = ", ".join(rows[end].stage.name for end in arc.ends)
    tip = xml_text(f"{source} → {names}: {shape_text(arc.shape)}")
    return f"<g><title>{tip}</title>{''.join(lines)}</g>"


def _arrow(rows: Sequence[_Row], index: int, x: float, tops: Sequence[float]) -> str:
    """What the row before hands to this one, if anything."""
    links = [link for link in rows[index].stage.reads if _place(rows, link.stage) == index - 1]
    if not links:
        return ""
    shapes = " · ".join(dict.fromkeys(shape_text(link.shape) for link in links))
    top = tops[index]
    label = f'<text class="shape" x="{x + 10:.1f}" y="{top - GAP / 2 + 4:.1f}">{shapes}</text>'
    return _down(x, top - GAP, top) + label


def _down(x: float, top: float, bottom: float) -> str:
    line = f'<path class="flow" d="M{x:.1f} {top:.1f}V{bottom - 5:.1f}"/>'
    return f'{line}<path class="head" d="M{x - 4:.1f} {bottom - 6:.1f}l4 6l4 -6z"/>'


def _end(name: str, shapes: Sequence[tuple[int, ...]], left: float, y: float) -> str:
    """The input or output of the network."""
    label = f"{name}  {' · '.join(dict.fromkeys(map(shape_text, shapes)))}"
    box = f'<rect class="end" x="{left:.1f}" y="{y:.1f}" width="{HEAD + 120}" height="26" rx="13"/>'
    return f'{box}<text class="name" x="{left + 14:.1f}" y="{y + 17:.1f}">{xml_text(label)}</text>'


def _stage(row: _Row, left: float, top: float, width: float) -> str:
    if row.body is None:
        return _between(row.stages, left, top, width)
    layers, count = len(row.stage.layers), len(row.stages)
    detail, behind = f"{layers} layer{'s' * (layers != 1)}", ""
    if count > 1:
        # The others of a row of equal blocks show as cards behind the first.
        width -= 6
        detail = f"{count} equal blocks, {layers} layers each"
        behind = "".join(_box("block", left + d, top + d, width, row.height, "") for d in (6, 3))
    middle = top + row.height / 2
    heading = (
        f'<text class="name" x="{left + 14:.1f}" y="{middle - 3:.1f}">{xml_text(_title(row))}</text>'
        f'<text x="{left + 14:.1f}" y="{middle + 12:.1f}">{detail}</text>'
    )
    box = _box("block", left, top, width, row.height, _tip(row.stage))
    body = draw_body(row.body, row.stage, left + HEAD, middle - row.body.height / 2)
    return f"{behind}{box}{heading}{body}"


def _box(style: str, x: float, y: float, width: float, height: float, tip: str) -> str:
    radius = 6 if style == "block" else height / 2
    size = f'x="{x:.1f}" y="{y:.1f}" width="{width:.1f}" height="{height:.1f}" rx="{radius}"'
    return f'<rect class="{style}" {size}><title>{xml_text(tip)}</title></rect>'


def _tip(stage: Stage) -> str:
    flows = [f"in: {shape_text(link.shape)}" for link in stage.reads]
    flows += [f"out: {shape_text(shape)}" for shape in stage.makes]
    return "\n".join([stage.name, *flows])


def _title(row: _Row) -> str:
    """The path of a block; of equal blocks the first, and where the last one differs."""
    name = row.stage.name
    if len(row.stages) > 1:
        name = f"{name} … {row.stages[-1].name.rpartition('.')[2]}"
    return name if len(name) <= NAME_LENGTH else f"…{name[1 - NAME_LENGTH :]}"


def _between(stages: Sequence[Stage], left: float, top: float, width: float) -> str:
    """Functions between blocks: a low box with their names."""
    names = [stage.name.split(".") for stage in stages]
    same = takewhile(lambda parts: len(set(parts)) == 1, zip(*names, strict=False))
    owner = ".".join(parts[0] for parts in same) or stages[0].name
    functions = " · ".join(name for stage in stages for name in stage.functions)
    label = functions if owner == functions else f"{owner}: {functions}"
    label = label if len(label) <= LONGEST_LABEL else f"{label[: LONGEST_LABEL - 1]}…"
    layers = [part for stage in stages for part in stage.layers]
    tips = [_tip(stage) for stage in stages]
    tips += [f"{part.name}: full precision: {part.reason}" for part in layers if part.reason]
    wide = min(width, 30 + 6.6 * len(label))
    box = _box("between layer" if layers else "between", left, top, wide, LOW, "\n".join(tips))
    return f'{box}<text x="{left + 14:.1f}" y="{top + LOW / 2 + 4:.1f}">{xml_text(label)}</text>'
