"""A table of figures as text: Markdown to read, CSV to compute with."""

import csv
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from io import StringIO

from ptqcore.report.charts import number


@dataclass(frozen=True)
class Spread:
    """The mean of a figure over several runs, and how far they lie apart; None if there was one run."""

    mean: float
    spread: float | None = None

    def __str__(self) -> str:
        own = number(self.mean)
        return own if self.spread is None else f"{own} ± {number(float(f'{self.spread:.2g}'))}"


Cell = str | float | Spread | None


def numeric_columns(columns: Sequence[str], rows: Sequence[Mapping[str, Cell]]) -> set[str]:
    """The columns that hold something, and no text."""
    cells = {column: [row.get(column) for row in rows] for column in columns}
    return {
        column
        for column, values in cells.items()
        if any(value is not None for value in values)
        and not any(isinstance(value, str) for value in values)
    }


def markdown_table(
    columns: Sequence[str], rows: Sequence[Mapping[str, Cell]], notes: Sequence[str] = ()
) -> str:
    """A table with five significant digits (means and spreads with fewer), and a list of notes below it.

    rows: column → cell. Columns of numbers are aligned to the right.
    """
    numeric = numeric_columns(columns, rows)
    lines = [list(columns), ["--:" if column in numeric else "---" for column in columns]]
    lines += [[_text(row.get(column)) for column in columns] for row in rows]
    table = "".join(f"| {' | '.join(line)} |\n" for line in lines)
    return table + ("\n" + "".join(f"- {note}\n" for note in notes) if notes else "")


def csv_table(columns: Sequence[str], rows: Sequence[Mapping[str, Cell]]) -> str:
    """The same with all digits (a `Spread` as it reads); cells that are not there are empty."""
    text = StringIO()
    writer = csv.DictWriter(text, columns, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def _text(cell: Cell) -> str:
    if cell is None:
        return ""
    return f"{cell:.5g}" if isinstance(cell, int | float) else str(cell).replace("|", "\\|")
