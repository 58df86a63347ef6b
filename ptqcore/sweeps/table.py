"""The table of a sweep: Markdown to read, CSV and JSON to compute with, and a web page with charts."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from ptqcore import files
from ptqcore.report.table_page import BarChart, TablePage
from ptqcore.report.table_text import Cell, csv_table, markdown_table
from ptqcore.sweeps.job import Outcome
from ptqcore.sweeps.runs import Run

State = Literal["waiting", "done", "refused", "failed"]
NOTES = (
    "Metrics are those of the model in full precision (before), rounded to nearest (baseline, where the "
    "recipe asks for it) and quantized (after).",
    "Sizes are those of the tensors in full precision and in the artifact. Seconds and peak memory are of "
    "the run's process; those of a run that was gone on with, of its last process.",
)
_UNITS = {"peak_memory_bytes": 1e9, "size_before_bytes": 1e6, "size_after_bytes": 1e6}
_HEADINGS = {
    "peak_memory_bytes": "peak memory (GB)",
    "size_before_bytes": "size before (MB)",
    "size_after_bytes": "size after (MB)",
    "reason": "not done because",
}
_STAGES = ("before", "baseline", "after")


@dataclass(frozen=True)
class Row:
    """A run, and how it ended; None as long as it has not."""

    run: Run
    outcome: Outcome | None = None

    @property
    def state(self) -> State:
        """refused: as the input is wrong. failed: for any other reason."""
        if self.outcome is None:
            return "waiting"
        if self.outcome.metrics is not None:
            return "done"
        return "refused" if self.outcome.refused else "failed"

    @property
    def metrics(self) -> Mapping[str, Any]:
        """What `metrics.json` of the run holds; empty as long as it is not done."""
        return (self.outcome and self.outcome.metrics) or {}

    @property
    def reason(self) -> str:
        """Why it is refused or failed."""
        return self.outcome.reason if self.outcome else ""

    def parts(self) -> tuple[dict[str, Cell], ...]:
        """Column → cell, in parts: names, metrics, cost and the reason."""
        run, found = self.run, self.metrics
        names: dict[str, Cell] = {"recipe": run.recipe.name, "model": run.model or None}
        names |= {"seed": run.seed, "state": self.state}
        metrics: dict[str, Cell] = {
            f"{name}_{stage}": found[stage][name]
            for name in found.get("after", {})
            for stage in _STAGES
            if name in found.get(stage, {})
        }
        sizes = found.get("size_bytes", {})
        cost: dict[str, Cell] = {f"size_{when}_bytes": sizes.get(when) for when in ("before", "after")}
        cost |= {name: found.get(name) for name in ("seconds", "peak_memory_bytes")}
        return names, metrics, cost, {"reason": self.reason or None}

    def to_json(self) -> dict[str, Any]:
        """Everything that is known, for programs."""
        run = self.run
        names = {"name": run.name, "recipe": run.recipe.name, "model": run.model, "seed": run.seed}
        return names | {"state": self.state, "reason": self.reason, "metrics": dict(self.metrics)}


def write_tables(rows: Sequence[Row], title: str, folder: Path) -> None:
    """Write sweep.md, sweep.csv, sweep.json and sweep.html.

    Raises:
        ArtifactError: if the folder cannot be written.
    """
    files.write_text(folder / "sweep.md", to_markdown(rows))
    files.write_text(folder / "sweep.csv", csv_table(*_table(rows)))
    files.write_json(folder / "sweep.json", [row.to_json() for row in rows])
    files.write_text(folder / "sweep.html", to_html(rows, title))


def to_markdown(rows: Sequence[Row]) -> str:
    """A table with five significant digits, and what its columns mean."""
    return markdown_table(*_for_people(rows), NOTES)


def to_html(rows: Sequence[Row], title: str) -> str:
    """A page with the table, and a chart of each metric."""
    columns, cells = _for_people(rows)
    states = [row.state for row in rows]
    counts = [f"{states.count(state)} {state}" for state in dict.fromkeys(states)]
    lead = f"{len(rows)} runs: {', '.join(counts)}"
    return TablePage("sweep", title, columns, cells, lead, NOTES, _charts(rows)).render()


def _table(rows: Sequence[Row]) -> tuple[list[str], list[dict[str, Cell]]]:
    """The columns that any row has something in, and the cells of each row by column."""
    parts = [row.parts() for row in rows]
    kinds = zip(*parts, strict=True)
    columns = [name for kind in kinds for name in dict.fromkeys(name for part in kind for name in part)]
    cells = [{name: value for part in row for name, value in part.items()} for row in parts]
    used = [column for column in columns if any(row.get(column) is not None for row in cells)]
    return used, [{column: row.get(column) for column in used} for row in cells]


def _for_people(rows: Sequence[Row]) -> tuple[list[str], list[dict[str, Cell]]]:
    """As `_table`, with headings and units that are easy to read."""
    columns, cells = _table(rows)
    headings = {column: _HEADINGS.get(column, column.replace("_", " ")) for column in columns}
    shown = [{headings[column]: _in_unit(column, row[column]) for column in columns} for row in cells]
    return list(headings.values()), shown


def _in_unit(column: str, cell: Cell) -> Cell:
    return cell / _UNITS[column] if column in _UNITS and isinstance(cell, int | float) else cell


def _charts(rows: Sequence[Row]) -> list[BarChart]:
    """Bars of the runs of a model side by side, a colour for each recipe."""
    done = sorted((row for row in rows if row.state == "done"), key=lambda row: row.run.model)
    return [
        _chart(metric, [row for row in done if metric in row.metrics["after"]])
        for metric in dict.fromkeys(name for row in done for name in row.metrics["after"])
    ]


def _chart(metric: str, rows: Sequence[Row]) -> BarChart:
    name = metric.replace("_", " ")
    return BarChart(
        f"{name[0].upper()}{name[1:]} of the quantized models",
        name,
        [row.run.name for row in rows],
        [row.metrics["after"][metric] for row in rows],
        [row.run.recipe.name for row in rows],
        [row.run.model for row in rows],
    )
