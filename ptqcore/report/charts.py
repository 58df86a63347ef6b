"""Charts as SVG text: pure functions, coloured by the CSS classes of the page around them.

A chart has one slot per label, in the order given. Where the values span decades its axis is
logarithmic and says so. A value that cannot be drawn (NaN, infinity) becomes a cross at the top of
its slot, never a broken picture; every slot carries its label and value as a tooltip.
"""

import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from html import escape

WIDTH, HEIGHT = 1000, 236
LEFT, RIGHT, TOP, BOTTOM = 62, 992, 26, 206
TICK_SPACING = 20
CHARACTER_WIDTH = 6.2
LONGEST_MARK = 18
NARROWEST_BAR, WIDEST_BAR, LOWEST_BAR = 1.0, 44.0, 0.8

# Beyond these, tick arithmetic would overflow or divide by zero.
LARGEST, SMALLEST = 1e300, 1e-300
# From this ratio of the largest to the smallest value on, a linear axis hides the small ones.
LOG_RATIO = 50.0
# Decades that a symmetric logarithmic axis resolves on each side of zero.
SYMLOG_DECADES = 4

_NOT_XML = re.compile("[^\t\n\r -\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")


def number(value: float) -> str:
    """A number for people: four significant digits, thousands separated, short exponents."""
    if math.isnan(value):
        return "NaN"
    if math.isinf(value):
        return "∞" if value > 0 else "-∞"
    rounded = float(f"{value:.4g}")
    if rounded == 0:
        return "0"
    if 1e3 <= abs(rounded) < 1e7:
        return f"{rounded:,.4f}".rstrip("0").rstrip(".")
    return re.sub(r"e([+-])0*(\d)", lambda found: f"e{found[1].strip('+')}{found[2]}", f"{rounded:.4g}")


@dataclass(frozen=True)
class Axis:
    """A vertical axis: `warp` maps a value to a line on which `low` … `high` is drawn evenly."""

    warp: Callable[[float], float]
    low: float
    high: float
    ticks: Sequence[float]
    name: str = ""

    def y(self, value: float) -> float:
        """The vertical position of a value, in the units of the drawing."""
        share = (self.warp(value) - self.low) / (self.high - self.low)
        return BOTTOM - share * (BOTTOM - TOP)

    def spaced_ticks(self) -> list[float]:
        """The ticks, in order of preference, without those whose labels would touch."""
        kept: list[float] = []
        for tick in self.ticks:
            if all(abs(self.y(tick) - self.y(other)) >= TICK_SPACING for other in kept):
                kept.append(tick)
        return kept


def round_step(rough: float, factors: Sequence[float] = (1, 2, 2.5, 5, 10)) -> float:
    """The smallest step of a power of ten and one of the factors that is not below `rough`."""
    power = 10.0 ** math.floor(math.log10(rough))
    return next(power * factor for factor in factors if power * factor >= rough * 0.999)


def linear_axis(values: Sequence[float]) -> Axis:
    """An even axis that includes zero and ends at round numbers."""
    low, high = min(0.0, *values, 0.0), max(0.0, *values, 0.0)
    if low == high:
        high = 1.0
    step = round_step((high - low) / 5)
    first, last = math.floor(low / step), math.ceil(high / step)
    ticks = [step * index for index in range(first, last + 1)]
    return Axis(lambda value: value, step * first, step * last, ticks)


def log_axis(values: Sequence[float]) -> Axis:
    """A logarithmic axis over the positive values; zero lies on its lower end."""
    positive = [value for value in values if value > 0]
    low = math.ceil(math.log10(min(positive))) - 1
    high = max(math.ceil(math.log10(max(positive))), low + 1)
    ticks = [10.0**power for power in range(low, high + 1)]
    return Axis(lambda value: math.log10(value) if value > 0 else low, low, high, ticks, "log scale")


def symlog_axis(values: Sequence[float]) -> Axis:
    """Logarithmic on both sides of zero, linear near it: sign(v) · log10(1 + |v| / c)."""
    magnitudes = [abs(value) for value in values if value != 0]
    largest = max(magnitudes)
    linear_below = 10.0 ** math.floor(math.log10(max(min(magnitudes), largest * 10.0**-SYMLOG_DECADES)))

    def warp(value: float) -> float:
        return math.copysign(math.log10(1 + abs(value) / linear_below), value)

    top = math.ceil(math.log10(largest / linear_below))
    powers = [linear_below * 10.0**power for power in range(top, -1, -1)]
    low, high = warp(min(0.0, *values)), warp(max(0.0, *values))
    inside = [tick for power in powers for tick in (power, -power) if low <= warp(tick) <= high]
    return Axis(warp, low, high, [0.0, *inside], "symmetric log scale")


def bars(
    labels: Sequence[str],
    values: Sequence[float],
    *,
    title: str,
    unit: str = "",
    classes: Sequence[str] | None = None,
    marks: Mapping[int, str] | None = None,
) -> str:
    """One bar per value, from zero (on a logarithmic axis: from its lower end).

    classes: a CSS class for each bar. marks: index → what to write under that slot where there is
    room; without it, the labels.
    """
    drawn = [drawable(value) for value in values]
    axis = _bar_axis([value for value in drawn if value is not None])
    spans = [None if value is None else (axis.y(value), axis.y(0.0)) for value in drawn]
    figures = [f"{number(value)} {unit}".rstrip() for value in values]
    return _chart(labels, figures, spans, axis, named(title, unit, axis), classes, marks)


def ranges(
    labels: Sequence[str],
    values: Sequence[tuple[float, float]],
    *,
    title: str,
    unit: str = "",
    classes: Sequence[str] | None = None,
    marks: Mapping[int, str] | None = None,
) -> str:
    """One bar per (smallest, largest) pair; the other arguments as in `bars`."""
    drawn = [_drawable_pair(pair) for pair in values]
    axis = _range_axis([pair for pair in drawn if pair is not None])
    spans = [None if pair is None else (axis.y(pair[0]), axis.y(pair[1])) for pair in drawn]
    figures = [f"{number(low)} … {number(high)} {unit}".rstrip() for low, high in values]
    return _chart(labels, figures, spans, axis, named(title, unit, axis), classes, marks)


def spread(values: Sequence[float], ratio: float) -> bool:
    """Whether the largest is so many times the smallest positive value, and none is negative."""
    positive = [value for value in values if value > 0]
    return bool(positive) and min(values) >= 0 and max(positive) / min(positive) >= ratio


def drawable(value: float) -> float | None:
    """The value as far as an axis can take it; None where it has no place on one."""
    if not math.isfinite(value) or abs(value) > LARGEST:
        return None
    return float(value) if abs(value) >= SMALLEST else 0.0


def _drawable_pair(pair: tuple[float, float]) -> tuple[float, float] | None:
    low, high = drawable(pair[0]), drawable(pair[1])
    return None if low is None or high is None else (low, high)


def _bar_axis(values: Sequence[float]) -> Axis:
    return log_axis(values) if spread(values, LOG_RATIO) else linear_axis(values)


def _range_axis(pairs: Sequence[tuple[float, float]]) -> Axis:
    ends = [end for pair in pairs for end in pair]
    extents = [max(abs(low), abs(high)) for low, high in pairs]
    return symlog_axis(ends) if spread(extents, LOG_RATIO) else linear_axis(ends)


def named(title: str, unit: str, axis: Axis) -> str:
    """The title with the unit and the kind of axis: "time (s, log scale)"."""
    details = ", ".join(part for part in (unit, axis.name) if part)
    return f"{title} ({details})" if details else title


def xml_text(text: str) -> str:
    """Text for XML: markup escaped, and characters that XML forbids replaced."""
    return escape(_NOT_XML.sub("\ufffd", text))


def _chart(
    labels: Sequence[str],
    figures: Sequence[str],
    spans: Sequence[tuple[float, float] | None],
    axis: Axis,
    title: str,
    classes: Sequence[str] | None,
    marks: Mapping[int, str] | None,
) -> str:
    """The whole drawing: grid and tick labels, slots, marks below."""
    opening = (
        f'<svg class="chart" viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{xml_text(title)}">'
    )
    heading = f'<text class="axis-title" x="{LEFT}" y="12">{xml_text(title)}</text>'
    if not labels:
        nothing = f'<text x="{WIDTH / 2:.0f}" y="{HEIGHT / 2:.0f}" text-anchor="middle">no data</text>'
        return f"{opening}{heading}{nothing}</svg>"
    grid = "".join(grid_line(axis.y(tick), tick) for tick in axis.spaced_ticks())
    styles = classes or ["k0"] * len(labels)
    slots = "".join(
        _slot(index, len(labels), span, f"{label}: {figure}", style)
        for index, (label, figure, span, style) in enumerate(
            zip(labels, figures, spans, styles, strict=True)
        )
    )
    floor = f'<path class="zero" d="M{LEFT} {BOTTOM}H{RIGHT}"/>'
    names = dict(enumerate(labels)) if marks is None else marks
    return f"{opening}{heading}{grid}{slots}{floor}{_marks(names, len(labels))}</svg>"


def _slot(index: int, count: int, span: tuple[float, float] | None, tooltip: str, style: str) -> str:
    """One slot of a chart: its tooltip over the full height, and its bar or its cross."""
    width = (RIGHT - LEFT) / count
    left = LEFT + index * width
    hit = f'<rect class="hit" x="{left:.2f}" y="{TOP}" width="{width:.2f}" height="{BOTTOM - TOP}"/>'
    head = f"<g><title>{xml_text(tooltip)}</title>{hit}"
    if span is None:
        cross = f"M{left + width / 2 - 4:.2f} {TOP + 2}l8 8m0 -8l-8 8"
        return f'{head}<path class="broken" d="{cross}"/></g>'
    # Thousands of bars overlap: thinner than a pixel, their colours would blend to grey.
    thick = min(max(width * 0.78, NARROWEST_BAR), WIDEST_BAR)
    height = max(max(span) - min(span), LOWEST_BAR)
    top = min(min(span), BOTTOM - height)
    where = f'x="{left + (width - thick) / 2:.2f}" y="{top:.2f}" width="{thick:.2f}" height="{height:.2f}"'
    return f'{head}<rect class="{xml_text(style)}" {where}/></g>'


def grid_line(y: float, tick: float) -> str:
    """A tick of a vertical axis: a line across the drawing, and its number."""
    line = f'<path class="{"grid" if tick else "zero"}" d="M{LEFT} {y:.2f}H{RIGHT}"/>'
    return f'{line}<text x="{LEFT - 8}" y="{y + 3.5:.2f}" text-anchor="end">{number(tick)}</text>'


def _marks(names: Mapping[int, str], count: int) -> str:
    """Names below the axis, each only where the one before has ended.

    They stand under the middle of their slots; where only some slots have one, at its left edge,
    for there a name begins a group.
    """
    width = (RIGHT - LEFT) / count
    centred = len(names) == count
    parts, free_from = [], 0.0
    for index, name in names.items():
        short = name if len(name) <= LONGEST_MARK else f"…{name[1 - LONGEST_MARK :]}"
        length = len(short) * CHARACTER_WIDTH
        x = LEFT + (index + 0.5 * centred) * width
        start = x - 0.5 * centred * length
        if start < free_from or start + length > WIDTH:
            continue
        free_from = start + length + CHARACTER_WIDTH
        anchor = "middle" if centred else "start"
        tick = f'<path class="tick" d="M{x:.2f} {BOTTOM}v5"/>'
        parts.append(
            f'{tick}<text x="{x:.2f}" y="{BOTTOM + 18}" text-anchor="{anchor}">{xml_text(short)}</text>'
        )
    return "".join(parts)
