"""A small line as SVG text: how a figure went, with its first and its last value."""

import math
from collections.abc import Sequence

from ptqcore.report.charts import LARGEST, number, spread, xml_text

WIDTH, HEIGHT, TOP, BOTTOM = 220, 92, 22, 72
LOG_RATIO = 20.0
LONGEST_TITLE = 34


def line(values: Sequence[float], title: str) -> str:
    """The values from left to right; on a logarithmic scale where they span more than a decade.

    Values that have no place on it (NaN, infinity, on a logarithmic scale 0) leave a gap.
    """
    shown = title if len(title) <= LONGEST_TITLE else f"…{title[1 - LONGEST_TITLE :]}"
    step = WIDTH / max(len(values) - 1, 1)
    points = [None if y is None else (i * step, y) for i, y in enumerate(_heights(values))]
    ends = f"{number(values[0])} → {number(values[-1])}" if values else "no data"
    return (
        f'<svg class="line" viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{xml_text(title)}">'
        f"<title>{xml_text(f'{title}: {ends}')}</title>"
        f'<text x="0" y="12">{xml_text(shown)}</text>'
        f'<path d="M0 {BOTTOM + 4}H{WIDTH}"/><path class="curve" d="{path(points)}"/>'
        f'<text x="0" y="{HEIGHT - 3}">{ends}</text></svg>'
    )


def _heights(values: Sequence[float]) -> list[float | None]:
    """The vertical position of each value."""
    known = [value for value in values if math.isfinite(value) and abs(value) < LARGEST]
    logarithmic = spread(known, LOG_RATIO)
    warped = [_warp(value, logarithmic) for value in values]
    drawn = [value for value in warped if value is not None]
    if not drawn:
        return [None] * len(values)
    low, high = min(drawn), max(drawn)
    scale = (BOTTOM - TOP) / (high - low) if high > low else 0.0
    return [None if value is None else BOTTOM - (value - low) * scale for value in warped]


def _warp(value: float, logarithmic: bool) -> float | None:
    if not math.isfinite(value) or abs(value) >= LARGEST:
        return None
    if not logarithmic:
        return value
    return math.log10(value) if value > 0 else None


def path(points: Sequence[tuple[float, float] | None]) -> str:
    """The data of an SVG path through points; None leaves a gap."""
    parts, pen = [], "M"
    for point in points:
        if point is None:
            pen = "M"
            continue
        parts.append(f"{pen}{point[0]:.1f} {point[1]:.1f}")
        pen = "L"
    return "".join(parts)
