"""The table of the bench: Markdown to read, CSV to compute with, and a web page with charts."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

from ptq_llm.bench_job import Cost, Job, Verdict
from ptqcore import BarChart, TablePage, csv_table, markdown_table, write_text

Cell = str | float | None

FULL_PRECISION = "full precision"
NOTES = (
    "Perplexity, the KL divergence from full precision (nats) and the top-1 agreement with it are those on "
    "the text.",
    "Tokens per second are the calibration tokens divided by the seconds that all blocks took together, "
    "with their calibration and every step in them.",
    "Seconds are those of the run without measuring. Peak memory is the largest resident memory of the "
    "run's process. Sizes are those of the tensors in full precision and in the artifact.",
    "The texts of a recipe and a model share one run.",
)
HEADINGS = {
    "kl_divergence": "KL divergence",
    "top1_agreement": "top-1 agreement",
    "tokens_per_second": "tokens/s",
    "peak_memory_bytes": "peak memory (GB)",
    "size_before_bytes": "size before (MB)",
    "size_after_bytes": "size after (MB)",
    "reason": "failed because",
}
UNITS = {"peak_memory_bytes": 1e9, "size_before_bytes": 1e6, "size_after_bytes": 1e6}


@dataclass(frozen=True)
class Row:
    """A recipe on a model, judged on a text. cost: None if the run failed. tasks: task → verdict."""

    recipe: str
    model: str
    text: str
    verdict: Verdict
    cost: Cost | None = None
    tasks: Mapping[str, Verdict] = field(default_factory=dict)

    @property
    def reason(self) -> str:
        """Why something is missing; empty if nothing is."""
        failed = {name: verdict.reason for name, verdict in self.tasks.items() if verdict.reason}
        found = [self.verdict.reason, *(f"{name}: {reason}" for name, reason in failed.items())]
        return "; ".join(reason for reason in found if reason)

    def parts(self) -> tuple[dict[str, Cell], ...]:
        """Column → cell, in parts: names, metrics, cost, tasks and the reason."""
        before, after = self.verdict.before, self.verdict.after
        metrics: dict[str, Cell] = {
            "perplexity_before": before.get("perplexity"),
            "perplexity_after": after.get("perplexity"),
            "kl_divergence": after.get("kl_divergence"),
            "top1_agreement": after.get("top1_agreement"),
        }
        metrics |= {name: value for name, value in after.items() if name != "perplexity"}
        cost: dict[str, Cell] = dict.fromkeys(Cost.__dataclass_fields__)
        cost |= {} if self.cost is None else asdict(self.cost)
        tasks: dict[str, Cell] = {}
        for name, verdict in self.tasks.items():
            for metric, value in verdict.after.items():
                tasks[f"{name}_{metric}_before"] = verdict.before.get(metric)
                tasks[f"{name}_{metric}_after"] = value
        names: dict[str, Cell] = {"recipe": self.recipe, "model": self.model, "text": self.text}
        return names, metrics, cost, tasks, {"reason": self.reason or None}


def make_rows(jobs: Sequence[Job]) -> list[Row]:
    """A row for each text of each job, as far as it is known."""
    models = short_names([job.model for job in jobs])
    sources = short_names([exam.source for job in jobs for exam in job.exams])
    rows = []
    for job in jobs:
        known = [(exam, verdict) for exam in job.exams if (verdict := exam.read()) is not None]
        tasks = {sources[exam.source]: verdict for exam, verdict in known if exam.kind == "task"}
        cost = job.read_cost()
        rows += [
            Row(job.recipe, models[job.model], sources[exam.source], verdict, cost, tasks)
            for exam, verdict in known
            if exam.kind == "text"
        ]
    return rows


def short_names(sources: Sequence[str]) -> dict[str, str]:
    """Path → its last part, without .yaml; the whole path where another ends in the same."""
    names = {source: Path(source).name.removesuffix(".yaml") for source in sources}
    ends = list(names.values())
    return {source: name if ends.count(name) == 1 else source for source, name in names.items()}


def table(rows: Sequence[Row]) -> tuple[list[str], list[dict[str, Cell]]]:
    """The columns that any row has, and the cells of each row by column."""
    parts = [row.parts() for row in rows]
    kinds = zip(*parts, strict=True)
    columns = [name for kind in kinds for name in dict.fromkeys(name for part in kind for name in part)]
    cells = [{name: value for part in row for name, value in part.items()} for row in parts]
    return columns, [{column: row.get(column) for column in columns} for row in cells]


def write_tables(rows: Sequence[Row], folder: Path) -> None:
    """Write bench.md, bench.csv and bench.html.

    Raises:
        ArtifactError: if the folder cannot be written.
    """
    write_text(folder / "bench.md", to_markdown(rows))
    write_text(folder / "bench.csv", to_csv(rows))
    write_text(folder / "bench.html", to_html(rows))


def to_csv(rows: Sequence[Row]) -> str:
    """The cells with all their digits, in the units that the columns name; what is unknown is empty."""
    return csv_table(*table(rows))


def _for_people(rows: Sequence[Row]) -> tuple[list[str], list[dict[str, Cell]]]:
    """As `table`, with headings and units that are easy to read, without columns that nothing is in."""
    columns, cells = table(rows)
    used = [column for column in columns if any(row[column] is not None for row in cells)]
    headings = {column: HEADINGS.get(column, column.replace("_", " ")) for column in used}
    shown = [{headings[column]: _in_unit(column, row[column]) for column in used} for row in cells]
    return list(headings.values()), shown


def _in_unit(column: str, cell: Cell) -> Cell:
    return cell / UNITS[column] if column in UNITS and isinstance(cell, int | float) else cell


def to_markdown(rows: Sequence[Row]) -> str:
    """A table with five significant digits, and what its columns mean."""
    return markdown_table(*_for_people(rows), NOTES)


def to_html(rows: Sequence[Row]) -> str:
    """A page with the table, and charts of perplexity and KL divergence by recipe."""
    columns, cells = _for_people(rows)
    recipes, models, texts = (
        list(dict.fromkeys(getattr(row, name) for row in rows)) for name in ("recipe", "model", "text")
    )
    counted = ((recipes, "recipe"), (models, "model"), (texts, "text"))
    lead = ", ".join(f"{len(names)} {name}{'s' * (len(names) != 1)}" for names, name in counted)
    return TablePage("ptq-llm", "bench", columns, cells, lead, NOTES, _charts(rows)).render()


def _charts(rows: Sequence[Row]) -> list[BarChart]:
    """Bars of every model and text side by side, a colour for each recipe."""
    measured = [row for row in rows if row.verdict.after]
    places = dict.fromkeys((row.model, row.text) for row in measured)
    ordered = [row for place in places for row in measured if (row.model, row.text) == place]
    bars = []
    for place in places:
        here = [row for row in ordered if (row.model, row.text) == place]
        bars.append((FULL_PRECISION, place, here[0].verdict.before["perplexity"]))
        bars += [(row.recipe, place, row.verdict.after["perplexity"]) for row in here]
    divergences = [
        (row.recipe, (row.model, row.text), row.verdict.after["kl_divergence"]) for row in ordered
    ]
    return [
        _chart("Perplexity", "perplexity", bars),
        _chart("KL divergence from full precision", "nats", divergences),
    ]


def _chart(heading: str, axis: str, bars: Sequence[tuple[str, tuple[str, str], float]]) -> BarChart:
    groups = [" · ".join(place) for _, place, _ in bars]
    kinds = [kind for kind, _, _ in bars]
    labels = [f"{kind}, {group}" for kind, group in zip(kinds, groups, strict=True)]
    return BarChart(heading, axis, labels, [value for _, _, value in bars], kinds, groups)
