"""A drawing with the meaning of its colours."""

from collections.abc import Iterable
from dataclasses import dataclass, field

from markupsafe import Markup

# The palette has this many distinct colours; kinds beyond them share one more.
KIND_COLOURS = 7


@dataclass(frozen=True)
class Chart:
    """A drawing, the meaning of its colours (kind → CSS class), and what stands out in it."""

    svg: Markup
    legend: dict[str, str] = field(default_factory=dict)
    note: str = ""


def kind_colours(kinds: Iterable[str]) -> dict[str, str]:
    """Kind → CSS class; those beyond the palette share one."""
    distinct = list(dict.fromkeys(kinds))
    return {kind: f"k{i}" if i < KIND_COLOURS else "other" for i, kind in enumerate(distinct)}
