"""Which group of outputs costs how many pixels of lane: the table of `ptq lane sensitivity`."""

from collections.abc import Mapping
from pathlib import Path
from tempfile import TemporaryDirectory

from ptq_lane.lane_task import LaneOptions, LaneTask
from ptq_lane.selection import Sensitivity
from ptqcore import (
    BarChart,
    Recipe,
    RecipeError,
    TablePage,
    csv_table,
    load,
    markdown_table,
    quantize,
    write_text,
)

COLUMNS = ("group", "rms error", "pixels", "share of pixels", "pixels per unit")
_NOTE = (
    "pixels: the mean Lane Distortion Score where this group alone is quantized, the others in full "
    "precision. Groups do not add up: together they can move lanes by more, or by less."
)

Rows = list[dict[str, str | float]]


def measure(recipe: Recipe) -> dict[str, Sensitivity]:
    """Round a detector to nearest on the grids of a recipe, and splice its groups into full precision.

    Raises:
        PtqError: if the recipe is not about lanes, or does not fit.
    """
    nearest = recipe.model_copy(update={"steps": [type(recipe.steps[0])(name="round")], "export": []})
    if recipe.task.kind.rpartition(":")[2] != "lanes":
        raise RecipeError(
            f"recipe key 'task.kind' is {recipe.task.kind!r}: sensitivity is of the kind lanes"
        )
    with TemporaryDirectory(prefix="ptq-lane-") as folder:
        quantize(nearest, "lane", Path(folder) / "run")
        task = LaneTask(LaneOptions.model_validate(recipe.task.options), recipe.seed, Path(folder))
        model = task.load_model()
        task.evaluate(model)
        task.judged = "quantized"
        task.evaluate(load(Path(folder) / "run"))
    return dict(task.groups)


def rows_of(groups: Mapping[str, Sensitivity]) -> Rows:
    """A row for each group, the most costly first."""
    total = sum(one.distortion for one in groups.values()) or 1.0
    ordered = sorted(groups.items(), key=lambda item: -item[1].distortion)
    return [
        dict(
            zip(COLUMNS, (name, one.rms, one.distortion, one.distortion / total, one.per_unit), strict=True)
        )
        for name, one in ordered
    ]


def write(groups: Mapping[str, Sensitivity], lead: str, folder: Path) -> None:
    """Write sensitivity.md, sensitivity.csv and sensitivity.html.

    Raises:
        ArtifactError: if the folder cannot be written.
    """
    rows = rows_of(groups)
    names = [str(row["group"]) for row in rows]
    pixels = [float(row["pixels"]) for row in rows]
    chart = BarChart("Pixels of lane", "pixels", names, pixels, names, names)
    page = TablePage("ptq-lane", "sensitivity", COLUMNS, rows, lead, [_NOTE], [chart])
    write_text(folder / "sensitivity.md", to_markdown(groups))
    write_text(folder / "sensitivity.csv", csv_table(COLUMNS, rows))
    write_text(folder / "sensitivity.html", page.render())


def to_markdown(groups: Mapping[str, Sensitivity]) -> str:
    """The table, and what its columns mean."""
    return markdown_table(COLUMNS, rows_of(groups), [_NOTE])
