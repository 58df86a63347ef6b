"""Curves over one horizontal axis as SVG text."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from ptqcore.report import charts
from ptqcore.report.charts import BOTTOM, LEFT, RIGHT, WIDTH, Axis, drawable, number, xml_text
from ptqcore.report.line_chart import path

HEIGHT = charts.HEIGHT + 14
LOG_RATIO = 10.0
MOST_TICKS = 10
# Up to so many values of x, every point can be pointed at.
MOST_DOTS = 100
# The label of a tick at either end of the horizontal axis reaches this far beyond it.
OVERHANG = 30

Point = tuple[float, float]


@dataclass(frozen=True)
class Across:
    """A horizontal axis: `low` … `high` is drawn evenly; a single value stands in the middle."""

    low: float
    high: float
    ticks: Sequence[float]

    def x(self, value: float) -> float:
        """The horizontal position of a value, in the units of the drawing."""
        share = (value - self.low) / (self.high - self.low) if self.high > self.low else 0.5
        return LEFT + OVERHANG + share * (RIGHT - LEFT - 2 * OVERHANG)


def curves(
    x: Sequence[float],
    series: Mapping[str, Sequence[float]],
    classes: Mapping[str, str],
    *,
    title: str,
    x_label: str,
    y_label: str,
) -> str:
    """A curve per series, through its points in the order given.

    The vertical axis is logarithmic where the values, none of them negative, span a decade or more.
    Values that have no place on it (NaN, infinity, on a logarithmic scale 0) leave a gap.

    Args:
        x: horizontal positions [n].
        series: name → values [n].
        classes: name → CSS class.
    """
    across = _across(x)
    axis, floor = _axis(x, series)
    heading = charts.named(y_label, "", axis).strip()
    parts = [
        f'<svg class="chart" viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{xml_text(title)}">',
        f'<text class="axis-title" x="{LEFT}" y="12">{xml_text(heading)}</text>',
    ]
    drawn = {name: _points(x, values, axis, across, floor) for name, values in series.items()}
    if not any(point for points in drawn.values() for point in points):
        parts.append(f'<text x="{WIDTH / 2:.0f}" y="{HEIGHT / 2:.0f}" text-anchor="middle">no data</text>')
        return "".join([*parts, "</svg>"])
    parts += [charts.grid_line(axis.y(tick), tick) for tick in axis.spaced_ticks()]
    parts.append(f'<path class="zero" d="M{LEFT} {BOTTOM}H{RIGHT}"/>')
    parts += [_tick(across.x(tick), tick) for tick in across.ticks]
    middle = (LEFT + RIGHT) / 2
    parts.append(
        f'<text class="axis-title" x="{middle}" y="{BOTTOM + 36}" text-anchor="middle">'
        f"{xml_text(x_label)}</text>"
    )
    parts += [f'<path class="{classes[name]}" d="{path(points)}"/>' for name, points in drawn.items()]
    for name, points in drawn.items():
        tips = [
            f"{name}, {x_label} {number(at)}: {number(y)}" for at, y in zip(x, series[name], strict=True)
        ]
        parts += _dots(points, tips, classes[name])
    return "".join([*parts, "</svg>"])


def _axis(x: Sequence[float], series: Mapping[str, Sequence[float]]) -> tuple[Axis, float]:
    """The vertical axis of all values that have a place, and what those drawn on it lie above."""
    pairs = [(at, value) for values in series.values() for at, value in zip(x, values, strict=True)]
    known = [y for at, value in pairs if drawable(at) is not None and (y := drawable(value)) is not None]
    if not charts.spread(known, LOG_RATIO):
        return charts.linear_axis(known), -math.inf
    axis = charts.log_axis(known)
    return replace(axis, name=f"{axis.name}, without zeros") if 0.0 in known else axis, 0.0


def _across(x: Sequence[float]) -> Across:
    """A horizontal axis from the smallest to the largest, with ticks at round numbers."""
    known = sorted({place for value in x if (place := drawable(value)) is not None})
    if not known:
        return Across(0.0, 0.0, [])
    low, high = known[0], known[-1]
    if low == high:
        return Across(low, high, known)
    step = charts.round_step((high - low) / min(MOST_TICKS, len(known) - 1), (1, 2, 5, 10))
    first, last = math.ceil(low / step - 1e-6), math.floor(high / step + 1e-6)
    return Across(low, high, [step * index for index in range(first, last + 1)])


def _points(
    x: Sequence[float], values: Sequence[float], axis: Axis, across: Across, floor: float
) -> list[Point | None]:
    """Where the values are drawn, if they can be and lie above `floor`."""

    def point(at: float | None, value: float | None) -> Point | None:
        if at is None or value is None or value <= floor:
            return None
        return across.x(at), axis.y(value)

    return [point(drawable(at), drawable(value)) for at, value in zip(x, values, strict=True)]


def _tick(x: float, value: float) -> str:
    label = f'<text x="{x:.2f}" y="{BOTTOM + 18}" text-anchor="middle">{number(value)}</text>'
    return f'<path class="tick" d="M{x:.2f} {BOTTOM}v5"/>{label}'


def _dots(points: Sequence[Point | None], tips: Sequence[str], style: str) -> list[str]:
    """What says a point's value when it is pointed at; of many points, only those without a neighbour,
    through which no line is drawn."""
    few = len(points) <= MOST_DOTS
    around = [None, *points, None]
    return [
        f'<circle class="{style}" cx="{point[0]:.1f}" cy="{point[1]:.1f}" r="3">'
        f"<title>{xml_text(tip)}</title></circle>"
        for index, (point, tip) in enumerate(zip(points, tips, strict=True))
        if point and (few or not (around[index] or around[index + 2]))
    ]
