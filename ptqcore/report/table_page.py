"""A page for a table of figures and bar charts of them: what compares runs, beside the report of one."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from markupsafe import Markup

from ptqcore.report import charts
from ptqcore.report.legend import Chart, kind_colours
from ptqcore.report.page import MISSING, environment, sortable
from ptqcore.report.table_text import Cell, Spread, numeric_columns


@dataclass(frozen=True)
class BarChart:
    """Bars side by side.

    labels: what each bar says when it is pointed at. kinds: what gives each bar its colour, explained in
    a legend. groups: what is written below each bar; where neighbours have the same, it stands once,
    where they begin.
    """

    heading: str
    axis: str
    labels: Sequence[str]
    values: Sequence[float]
    kinds: Sequence[str]
    groups: Sequence[str]
    note: str = ""

    def draw(self) -> Chart:
        """The drawing and its legend."""
        colours = kind_colours(self.kinds)
        begins = [i for i, name in enumerate(self.groups) if i == 0 or name != self.groups[i - 1]]
        svg = charts.bars(
            self.labels,
            self.values,
            title=self.axis,
            classes=[colours[kind] for kind in self.kinds],
            marks={index: self.groups[index] for index in begins},
        )
        return Chart(Markup(svg), colours, self.note)


@dataclass(frozen=True)
class TablePage:
    """A table, notes on it, and charts. rows: column → cell; columns of numbers are aligned to the right
    and sorted by value (`Spread`: by the mean), whether or not all their cells are there."""

    eyebrow: str
    title: str
    columns: Sequence[str]
    rows: Sequence[Mapping[str, Cell]]
    lead: str = ""
    notes: Sequence[str] = ()
    charts: Sequence[BarChart] = field(default=())

    def render(self) -> str:
        """The page: styles and drawings inline, no reference to any other file."""
        rows = [{column: _Shown.of(row.get(column)) for column in self.columns} for row in self.rows]
        drawn = {chart.heading: chart.draw() for chart in self.charts}
        template = environment().get_template("table_page.html.j2")
        numeric = numeric_columns(self.columns, self.rows)
        return template.render(page=self, rows=rows, numeric=numeric, charts=drawn)


@dataclass(frozen=True)
class _Shown:
    """What a cell says, and what a column of numbers is sorted by."""

    text: str
    order: str = ""

    @classmethod
    def of(cls, cell: Cell) -> "_Shown":
        if isinstance(cell, str):
            return cls(cell)
        if isinstance(cell, Spread):
            return cls(str(cell), sortable(cell.mean))
        return cls(MISSING if cell is None else charts.number(cell), sortable(cell))
