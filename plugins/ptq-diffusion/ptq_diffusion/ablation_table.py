"""The table of the ablation: Markdown to read, CSV to compute with, and a web page with charts."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, stdev
from typing import Literal

from ptqcore import BarChart, Spread, TablePage, csv_table, markdown_table, write_text

Cell = str | float | Spread | None

METRICS = (
    *("temporal_error", "temporal_mismatch", "teacher_forced_error", "trajectory_error"),
    *("image_error", "image_psnr", "frechet_distance"),
)
_CHARTS = ("temporal_error", "trajectory_error", "image_error")


Switch = Literal["off", "on", "cache"]


@dataclass(frozen=True)
class Variant:
    """How a pipeline is quantized. weights, activations: bits. tiar: how the weights of the temporal block
    are. fsc: whether activations have a range for each timestep."""

    pipeline: str
    weights: int
    activations: int
    tiar: Switch
    fsc: bool

    @property
    def bits(self) -> str:
        """As papers write it."""
        return f"W{self.weights}A{self.activations}"

    @property
    def switches(self) -> str:
        """What is on and off."""
        return f"TIAR {self.tiar}, FSC {'on' if self.fsc else 'off'}"

    @property
    def name(self) -> str:
        """A name for its recipe."""
        return f"{self.bits}-{self.switches}".lower().replace(", ", "-").replace(" ", "-")

    def __str__(self) -> str:
        return f"{self.pipeline}, {self.bits}, {self.switches}"


@dataclass(frozen=True)
class Row:
    """A variant, and the metrics of each of its runs."""

    variant: Variant
    runs: Sequence[dict[str, float]]

    def over(self, metric: str) -> Spread:
        """Mean and standard deviation of the sample."""
        values = [run[metric] for run in self.runs]
        return Spread(fmean(values), stdev(values) if len(values) > 1 else None)

    def names(self) -> dict[str, Cell]:
        """The cells that say which row it is."""
        one = self.variant
        fsc = "on" if one.fsc else "off"
        return {"pipeline": one.pipeline, "bits": one.bits, "TIAR": one.tiar, "FSC": fsc}


def write_tables(rows: Sequence[Row], notes: Sequence[str], folder: Path) -> None:
    """Write ablation.md, ablation.csv and ablation.html.

    Raises:
        ArtifactError: if the folder cannot be written.
    """
    write_text(folder / "ablation.md", to_markdown(rows, notes))
    write_text(folder / "ablation.csv", to_csv(rows))
    write_text(folder / "ablation.html", to_html(rows, notes))


def to_markdown(rows: Sequence[Row], notes: Sequence[str]) -> str:
    """A table with means and spreads, and what its columns mean."""
    return markdown_table(*_for_people(rows), notes)


def to_csv(rows: Sequence[Row]) -> str:
    """Means and spreads with all their digits; of how many runs, is said by `runs`."""
    columns = [f"{metric}_{part}" for metric in METRICS for part in ("mean", "spread")]
    lines = []
    for row in rows:
        spreads = [row.over(metric) for metric in METRICS]
        figures: list[Cell] = [value for each in spreads for value in (each.mean, each.spread)]
        lines.append({**row.names(), "runs": len(row.runs), **dict(zip(columns, figures, strict=True))})
    return csv_table(["pipeline", "bits", "TIAR", "FSC", "runs", *columns], lines)


def to_html(rows: Sequence[Row], notes: Sequence[str]) -> str:
    """A page with the table, and charts of some of its columns."""
    columns, cells = _for_people(rows)
    pipelines = ", ".join(dict.fromkeys(row.variant.pipeline for row in rows))
    charts = [_chart(metric, rows) for metric in _CHARTS]
    return TablePage("ptq-diffusion", "ablation", columns, cells, pipelines, notes, charts).render()


def _for_people(rows: Sequence[Row]) -> tuple[list[str], list[dict[str, Cell]]]:
    headings = {metric: metric.replace("_", " ").replace("psnr", "PSNR") for metric in METRICS}
    headings["frechet_distance"] = "Fréchet distance"
    cells = [row.names() | {headings[metric]: row.over(metric) for metric in METRICS} for row in rows]
    return ["pipeline", "bits", "TIAR", "FSC", *headings.values()], cells


def _chart(metric: str, rows: Sequence[Row]) -> BarChart:
    """A bar for each row, a colour for what is on and off."""
    heading = metric.replace("_", " ")
    return BarChart(
        heading.capitalize(),
        heading,
        [str(row.variant) for row in rows],
        [row.over(metric).mean for row in rows],
        [row.variant.switches for row in rows],
        [f"{row.variant.pipeline} · {row.variant.bits}" for row in rows],
    )
