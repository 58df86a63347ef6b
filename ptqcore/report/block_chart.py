"""The inside of a block as SVG text: layers in columns, what joins tensors, and what skips columns."""

from collections.abc import Sequence
from dataclasses import dataclass

from ptqcore.report.charts import xml_text
from ptqcore.report.network import Part, Stage

CHIP_WIDTH, CHIP_HEIGHT, JOIN, ROOM, PORT = 112, 34, 24, 20, 10
SKIP, EDGE = 8, 8
CHARACTER = 6.4
TIMES = "\N{MULTIPLICATION SIGN}"
SYMBOLS = {"add": "+", "sub": "-", "mul": TIMES, "matmul": TIMES, "div": "÷", "cat": "∥", "stack": "∥"}
SHORT = {"scaled_dot_product_attention": "attention"}


@dataclass(frozen=True)
class Place:
    """Where a part stands: the middle of its left side, relative to the body, and its width."""

    x: float
    y: float
    width: float


@dataclass(frozen=True)
class Body:
    """The laid-out inside of a block. skips: the edges (from part, -1 for the input; to part) that arch
    over columns, each with its lane."""

    width: float
    height: float
    places: tuple[Place, ...]
    skips: dict[tuple[int, int], int]
    top: float


def lane_of(spans: Sequence[tuple[int, int]]) -> list[int]:
    """A lane for each span (start, end), so that spans that overlap lie in different ones; the shorter
    a span, the lower its lane."""
    lanes = [0] * len(spans)
    used: list[list[tuple[int, int]]] = []
    for index in sorted(range(len(spans)), key=lambda i: (spans[i][1] - spans[i][0], i)):
        start, end = spans[index]
        free = (
            lane
            for lane, taken in enumerate(used)
            if all(end <= other[0] or start >= other[1] for other in taken)
        )
        lane = next(free, len(used))
        if lane == len(used):
            used.append([])
        used[lane].append((start, end))
        lanes[index] = lane
    return lanes


def lay_out(stage: Stage) -> Body:
    """Columns by the longest way from the input; parts of one column below each other."""
    columns = _columns(stage.parts)
    count = max(columns, default=-1) + 1
    members = [[i for i, column in enumerate(columns) if column == at] for at in range(count)]
    edges = [(source, i) for i, part in enumerate(stage.parts) for source in part.reads]
    far = [(s, i) for s, i in edges if columns[i] - (columns[s] if s >= 0 else -1) > 1]
    lanes = lane_of([(columns[s] if s >= 0 else -1, columns[i]) for s, i in far])
    top = EDGE + SKIP * (max(lanes, default=-1) + 1)
    tallest = max((sum(_height(stage.parts[i]) for i in column) for column in members), default=0)
    places: dict[int, Place] = {}
    x = float(PORT + ROOM)
    for column in members:
        width = max(_width(stage.parts[i]) for i in column)
        y = top + (tallest - sum(_height(stage.parts[i]) for i in column)) / 2
        for i in column:
            height = _height(stage.parts[i])
            own = _width(stage.parts[i])
            places[i] = Place(x + (width - own) / 2, y + height / 2, own)
            y += height
        x += width + ROOM
    ordered = tuple(places[i] for i in range(len(stage.parts)))
    return Body(x, top + tallest + EDGE, ordered, dict(zip(far, lanes, strict=True)), top)


def draw_body(body: Body, stage: Stage, left: float, top: float) -> str:
    """The inside of a block whose body begins at (left, top)."""
    port = Place(0.0, (body.top + body.height - EDGE) / 2, PORT)
    drawn = []
    for index, part in enumerate(stage.parts):
        for source in part.reads:
            start = _moved(body.places[source] if source >= 0 else port, left, top)
            end = _moved(body.places[index], left, top)
            lane = body.skips.get((source, index))
            if lane is None:
                drawn.append(_edge(start, end))
            else:
                reach = (CHIP_HEIGHT if part.layer else JOIN) / 2
                drawn.append(_skip(start, end, top + body.top - SKIP * (lane + 0.5), reach))
    drawn.append(f'<circle class="port" cx="{left + 6:.1f}" cy="{top + port.y:.1f}" r="4"/>')
    drawn += [
        _part(part, _moved(place, left, top), stage.name)
        for part, place in zip(stage.parts, body.places, strict=True)
    ]
    return "".join(drawn)


def _moved(place: Place, left: float, top: float) -> Place:
    return Place(place.x + left, place.y + top, place.width)


def _columns(parts: Sequence[Part]) -> list[int]:
    columns: list[int] = []
    for part in parts:
        columns.append(max((columns[source] for source in part.reads if source >= 0), default=-1) + 1)
    return columns


def _symbol(part: Part) -> str | None:
    return None if part.layer else SYMBOLS.get(part.function)


def _width(part: Part) -> float:
    if _symbol(part):
        return JOIN
    return CHIP_WIDTH if part.layer else 20 + CHARACTER * len(_label(part))


def _height(part: Part) -> float:
    return (CHIP_HEIGHT if part.layer else JOIN) + 6


def _label(part: Part) -> str:
    return SHORT.get(part.function, part.function)


def _edge(start: Place, end: Place) -> str:
    x, bend = start.x + start.width, (end.x - start.x - start.width) / 2
    curve = f"C{x + bend:.1f} {start.y:.1f} {end.x - bend:.1f} {end.y:.1f} {end.x:.1f} {end.y:.1f}"
    return f'<path class="flow" d="M{x:.1f} {start.y:.1f}{curve}"/>'


def _skip(start: Place, end: Place, lane: float, reach: float) -> str:
    """Up behind the start, along the lane, and down onto the end, whose top is `reach` above its middle."""
    x, to = start.x + start.width, end.x + end.width / 2
    up = f"C{x + 9:.1f} {start.y:.1f} {x + 3:.1f} {lane:.1f} {x + 14:.1f} {lane:.1f}"
    down = f"H{to - 8:.1f}Q{to:.1f} {lane:.1f} {to:.1f} {lane + 6:.1f}V{end.y - reach:.1f}"
    return f'<path class="arc" d="M{x:.1f} {start.y:.1f}{up}{down}"/>'


def _part(part: Part, place: Place, block: str) -> str:
    if part.layer:
        return _chip(part, place, block)
    symbol = _symbol(part)
    tip = f"<title>{xml_text(part.name)}</title>"
    middle = place.x + place.width / 2
    words = xml_text(symbol or _label(part))
    label = f'<text x="{middle:.1f}" y="{place.y + 4:.1f}" text-anchor="middle">{words}</text>'
    if symbol:
        shape = f'<circle class="join" cx="{middle:.1f}" cy="{place.y:.1f}" r="{JOIN / 2 - 2}"/>'
    else:
        shape = (
            f'<rect class="join" x="{place.x:.1f}" y="{place.y - JOIN / 2:.1f}" '
            f'width="{place.width:.1f}" height="{JOIN}" rx="{JOIN / 2}"/>'
        )
    return f"<g>{tip}{shape}{label}</g>"


def _chip(part: Part, place: Place, block: str) -> str:
    """A layer: its name inside the block, and what it is."""
    name = part.name.removeprefix(block).lstrip(".") or part.name
    room = int((CHIP_WIDTH - 12) / CHARACTER)
    while len(name) > room and "." in name:
        name = name.partition(".")[2]
    shown = name if len(name) <= room else f"…{name[1 - room :]}"
    style = "other" if part.reason else layer_class(part)
    tip = "\n".join(
        filter(None, [part.name, describe(part), part.reason and f"full precision: {part.reason}"])
    )
    top = place.y - CHIP_HEIGHT / 2
    return (
        f'<g><title>{xml_text(tip)}</title><rect class="chip {style}" x="{place.x:.1f}" y="{top:.1f}" '
        f'width="{place.width:.1f}" height="{CHIP_HEIGHT}" rx="4"/>'
        f'<text class="name" x="{place.x + 7:.1f}" y="{top + 14:.1f}">{xml_text(shown)}</text>'
        f'<text x="{place.x + 7:.1f}" y="{top + 27:.1f}">{describe(part)}</text></g>'
    )


KINDS = {"k0": "convolution", "k2": "depthwise", "k3": f"1 {TIMES} 1", "k4": "transposed", "k1": "linear"}


def layer_class(part: Part) -> str:
    """The CSS class of a layer's colour, a key of `KINDS`."""
    if part.function == "linear":
        return "k1"
    if "transpose" in part.function:
        return "k4"
    if part.groups > 1 and part.groups == part.shape[0]:
        return "k2"
    return "k3" if set(part.shape[2:]) == {1} else "k0"


def describe(part: Part) -> str:
    """A layer in few characters: `3x3 16→32`, `5x5 dw 240`, `576→1536`."""
    if part.function == "linear":
        return f"{part.shape[1]}→{part.shape[0]}"
    taps = TIMES.join(map(str, part.shape[2:]))
    if "transpose" in part.function:
        return f"{taps} {part.shape[0]}→{part.shape[1] * part.groups} ↑"
    if layer_class(part) == "k2":
        return f"{taps} dw {part.shape[0]}"
    groups = f" /{part.groups}" if part.groups > 1 else ""
    return f"{taps} {part.shape[1] * part.groups}→{part.shape[0]}{groups}"
