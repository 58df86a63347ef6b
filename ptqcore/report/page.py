"""The report of a run: one HTML page that needs nothing but itself."""

import math
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from statistics import median
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from ptqcore.report import charts, engines
from ptqcore.report.charts import number
from ptqcore.report.legend import KIND_COLOURS, Chart
from ptqcore.report.network import FlowMap
from ptqcore.report.record import BlockRecord, LayerRecord, RunRecord
from ptqcore.report.sections import activation_charts, loss_lines, map_chart, map_tables, short

MISSING = "—"
METRIC_CARDS = 6


@dataclass(frozen=True)
class Metric:
    """A metric of full precision, of the naive baseline, and of the quantized model; what became of it."""

    name: str
    before: str
    baseline: str
    after: str
    change: str


@dataclass(frozen=True)
class Card:
    """A headline figure: what it is, how it went, and what to make of it."""

    name: str
    figure: str
    detail: str = ""


def render(record: RunRecord) -> str:
    """The page for a record: styles and drawings inline, no reference to any other file."""
    return (
        environment()
        .get_template("page.html.j2")
        .render(
            record=record,
            cards=_cards(record),
            metrics=_metrics(record),
            facts={name: _fact(value) for name, value in record.facts.items()},
            results=[(figure.title, figure.draw()) for figure in record.figures],
            layer_charts=_layer_charts(record.layers),
            block_charts=_block_charts(record.blocks),
            engines=engines.sections(record),
            map_chart=None if record.map is None else map_chart(record.map),
            map_tables=[] if record.map is None else map_tables(record.map),
            activation_charts=activation_charts(record.activations),
            loss_lines=loss_lines(record.blocks),
            worst_phase=max(record.phases.values(), default=0.0),
        )
    )


def render_map(network: FlowMap, plugin: str, recipe: str) -> str:
    """A page for the map of a network alone."""
    template = environment().get_template("map_page.html.j2")
    drawn, tables = map_chart(network), map_tables(network)
    return template.render(map_chart=drawn, map_tables=tables, plugin=plugin, recipe=recipe)


def environment() -> Environment:
    """Where the pages' templates are, and the filters that they use."""
    found = Environment(
        loader=PackageLoader("ptqcore", "report"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    found.filters.update(
        number=_optional_number,
        signed=signed,
        size=size,
        duration=duration,
        limits=limits,
        percent=_percent,
        sortable=sortable,
    )
    return found


def size(count: float) -> str:
    """Bytes for people, in decimal units: 1 MB is 10⁶ bytes."""
    divisor, unit = _size_unit(count)
    return f"{number(count / divisor)} {unit}"


def duration(seconds: float) -> str:
    """Seconds for people: "12.3 s" up to 90 s, then m:ss, from one hour on h:mm:ss."""
    if not math.isfinite(seconds) or seconds <= 90:
        return f"{number(seconds)} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def signed(value: float) -> str:
    """A difference: a number that shows its sign."""
    return f"+{number(value)}" if value > 0 else number(value)


def limits(pair: tuple[float, float] | None) -> str:
    """A range: "-0.5 … 0.75"."""
    return MISSING if pair is None else f"{number(pair[0])} … {number(pair[1])}"


def sortable(value: float | None) -> str:
    """What the page sorts a table cell by: nothing below all numbers, NaN above them."""
    if value is None:
        return "-Infinity"
    return repr(float(value)) if math.isfinite(value) else "Infinity"


def change(before: float | None, after: float | None) -> str:
    """From one figure to the next, absolute and relative: "+0.5 (+2 %)"."""
    if before is None or after is None:
        return ""
    absolute = signed(after - before)
    return f"{absolute} ({signed((after - before) / abs(before) * 100)} %)" if before else absolute


def _optional_number(value: float | None) -> str:
    return MISSING if value is None else number(value)


def _fact(value: int | float | str) -> str:
    if isinstance(value, str):
        return value
    return f"{value:,}" if isinstance(value, int) else number(value)


def _percent(share: float | None) -> str:
    return MISSING if share is None else f"{number(100 * share)} %"


def _size_unit(count: float) -> tuple[float, str]:
    return (1e9, "GB") if count >= 1e9 else (1e6, "MB")


def _cards(record: RunRecord) -> list[Card]:
    cards = [
        Card(metric.name, f"{metric.before} → {metric.after}", metric.change)
        for metric in _metrics(record)[:METRIC_CARDS]
    ]
    sizes = dict(record.size_bytes)
    if "before" in sizes and "after" in sizes:
        before, after = sizes.pop("before"), sizes.pop("after")
        cards.append(Card("model size", f"{size(before)} → {size(after)}", _ratio(before, after)))
    cards += [Card(f"size: {name}", size(count)) for name, count in sizes.items()]
    cards.append(Card("total time", duration(record.seconds)))
    peak = size(record.peak_memory_bytes) if record.peak_memory_bytes else MISSING
    cards.append(Card("peak memory", peak, "resident"))
    return cards


def _ratio(before: float, after: float) -> str:
    """How many times smaller (or larger) a size became."""
    if not before or not after:
        return ""
    if after > before:
        return f"{number(after / before)}\N{MULTIPLICATION SIGN} larger"
    return f"{number(before / after)}\N{MULTIPLICATION SIGN} smaller"


def _metrics(record: RunRecord) -> list[Metric]:
    """Every metric that any evaluation has."""
    found = []
    for name in dict.fromkeys([*record.before, *record.baseline, *record.after]):
        before, after = record.before.get(name), record.after.get(name)
        baseline = _optional_number(record.baseline.get(name))
        shown = _optional_number(before), baseline, _optional_number(after)
        found.append(Metric(name, *shown, change(before, after)))
    return found


def _layer_charts(layers: Sequence[LayerRecord]) -> dict[str, Chart]:
    """The charts of layers, by name, each over the layers that have its figure."""
    colours = _kind_colours(layers)

    def chart(
        draw: Callable[..., str], shown: Sequence[LayerRecord], values: Sequence[Any], **options: str
    ) -> Chart:
        classes = [colours[_kind(layer)] for layer in shown]
        svg = draw(_paths(shown), values, classes=classes, marks=_block_marks(shown), **options)
        return Chart(Markup(svg), _legend(shown, colours))

    measured = [layer for layer in layers if layer.relative_error is not None]
    errors = [layer.relative_error for layer in layers if layer.relative_error is not None]
    observed = [layer for layer in layers if layer.input_range is not None]
    error = chart(charts.bars, measured, errors, title="relative error")
    return {
        "error": replace(error, note=_worst(_paths(measured), errors)),
        "weights": chart(charts.ranges, layers, [layer.weight_range for layer in layers], title="weight"),
        "inputs": chart(charts.ranges, observed, [layer.input_range for layer in observed], title="input"),
        "clipped": chart(
            charts.bars,
            layers,
            [layer.clipped * 100 for layer in layers],
            title="share of weights",
            unit="%",
        ),
    }


def _block_charts(blocks: Sequence[BlockRecord]) -> dict[str, Chart]:
    """The charts of blocks, by name."""
    paths = _paths(blocks)
    marks = dict(enumerate(short(paths)))

    def chart(values: Sequence[float], title: str, unit: str = "", note: str = "") -> Chart:
        return Chart(Markup(charts.bars(paths, values, title=title, unit=unit, marks=marks)), note=note)

    errors = [block.relative_error for block in blocks]
    seconds = [block.seconds for block in blocks]
    divisor, unit = _size_unit(max((block.peak_memory_bytes for block in blocks), default=0))
    return {
        "error": chart(errors, "relative error", note=_worst(paths, errors)),
        "seconds": chart(seconds, "time", "s", f"All blocks: {duration(sum(seconds))}."),
        "memory": chart([block.peak_memory_bytes / divisor for block in blocks], "peak memory", unit),
    }


def _paths(records: Sequence[LayerRecord] | Sequence[BlockRecord]) -> list[str]:
    return [record.path for record in records]


def _worst(paths: Sequence[str], values: Sequence[float]) -> str:
    """The median of the finite values, the worst of them, and how many are no numbers at all."""
    finite = [(value, path) for path, value in zip(paths, values, strict=True) if math.isfinite(value)]
    broken = len(values) - len(finite)
    parts = []
    if finite:
        value, path = max(finite)
        parts.append(
            f"Median {number(median(value for value, _ in finite))}, worst {number(value)} at {path}."
        )
    if broken:
        parts.append(f"Not finite: {broken} of {len(values)}.")
    return " ".join(parts)


def _kind(layer: LayerRecord) -> str:
    return layer.path.rpartition(".")[2]


def _kind_colours(layers: Sequence[LayerRecord]) -> dict[str, str]:
    """Kind of layer → CSS class; the most frequent kinds get colours of their own."""
    order = list(dict.fromkeys(_kind(layer) for layer in layers))
    frequent = {kind for kind, _ in Counter(_kind(layer) for layer in layers).most_common(KIND_COLOURS)}
    own = {kind: f"k{index}" for index, kind in enumerate(kind for kind in order if kind in frequent)}
    return {kind: own.get(kind, "other") for kind in order}


def _legend(layers: Sequence[LayerRecord], colours: dict[str, str]) -> dict[str, str]:
    """Kind → CSS class for the kinds among these layers; empty where one kind says nothing."""
    present = dict.fromkeys(_kind(layer) for layer in layers)
    legend = {kind: colours[kind] for kind in present if colours[kind] != "other"}
    if len(legend) < len(present):
        legend["other kinds"] = "other"
    return legend if len(present) > 1 else {}


def _block_marks(layers: Sequence[LayerRecord]) -> dict[int, str]:
    """Index → short block name, for the layers at which a new block begins."""
    blocks = [layer.block for layer in layers]
    names = dict(zip(dict.fromkeys(blocks), short(list(dict.fromkeys(blocks))), strict=True))
    starts = [index for index, block in enumerate(blocks) if index == 0 or block != blocks[index - 1]]
    return {index: names[blocks[index]] for index in starts}
