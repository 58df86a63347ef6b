"""What `ptq map` prints and writes."""

import json
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from ptqcore.errors import ArtifactError
from ptqcore.report.map_chart import shape_text
from ptqcore.report.network import FlowMap, Join, Row, Stage
from ptqcore.report.page import render_map
from ptqcore.report.sections import counts


def describe_map(network: FlowMap) -> str:
    """Everything on the map, a line each."""
    joins = network.joins
    others = [join for join in joins if join.kind not in ("residual", "concatenation")]
    edges = [(edge.name, edge.grid, shape_text(edge.shape)) for edge in network.edges]
    parts = [
        counts(network),
        *_section("blocks", (_block(stage) for stage in network.blocks)),
        *_section("layers and batch norms behind them", ((b, a) for a, b in network.norm_pairs.items())),
        *_section("residual additions", _joins(j for j in joins if j.kind == "residual")),
        *_section("concatenations", _joins(j for j in joins if j.kind == "concatenation")),
        *_section("other functions that join tensors", _joins(others)),
        *_section(
            "norm -> layers", ((n, ", ".join(to) or "none") for n, to in network.norm_readers.items())
        ),
        *_section("layer -> layer", (_row(row) for row in network.rows if row.only_moves)),
        *_section("layer -> clipped -> layer", (_row(row) for row in network.rows if not row.only_moves)),
        *_section(
            "parameters outside of layers",
            ((one.parameter, shape_text(one.shape), f"read by {one.site}") for one in network.constants),
        ),
        *_section("layers left in full precision", network.alone.items()),
        *_section("activations that the recipe rounds", edges),
    ]
    return "\n".join(parts)


def check_files(files: Iterable[Path | None]) -> None:
    """Make sure that files can be written, before the work begins.

    Raises:
        ArtifactError: naming the first that cannot.
    """
    for file in files:
        if file is not None and not file.parent.is_dir():
            raise ArtifactError(f"cannot write {file}: {file.parent} is not a folder")
        if file is not None and file.is_dir():
            raise ArtifactError(f"cannot write {file}: it is a folder")


def write_map(network: FlowMap, plugin: str, recipe: str, as_json: Path | None, page: Path | None) -> None:
    """Write a map as JSON, and as a web page, where wanted.

    Raises:
        ArtifactError: if a file cannot be written.
    """
    texts = {}
    if as_json is not None:
        texts[as_json] = json.dumps(network.to_json(), indent=2) + "\n"
    if page is not None:
        texts[page] = render_map(network, plugin, recipe)
    for path, text in texts.items():
        try:
            path.write_text(text, encoding="utf-8")
        except OSError as error:
            raise ArtifactError(f"cannot write {path}: {error.strerror}") from None


def _section(heading: str, rows: Iterable[Sequence[str]]) -> Iterator[str]:
    """A heading with the number of rows, and the rows in columns; nothing if there are none."""
    listed = list(rows)
    if not listed:
        return
    yield f"\n{heading}: {len(listed)}"
    widths = [max(map(len, column)) for column in zip(*listed, strict=True)]
    for row in listed:
        yield "  " + "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()


def _block(stage: Stage) -> tuple[str, str, str]:
    count = len(stage.layers)
    flowing = " and ".join(shape_text(link.shape) for link in stage.reads)
    made = " and ".join(map(shape_text, stage.makes))
    return stage.name, f"{count} layer{'s' * (count != 1)}", f"{flowing} -> {made}"


def _joins(joins: Iterable[Join]) -> Iterator[tuple[str, str]]:
    for join in joins:
        yield join.site, ", ".join(f"{one.source} [{shape_text(one.shape)}]" for one in join.tensors)


def _row(row: Row) -> tuple[str, str, str]:
    return row.first, ", ".join(row.between) or "-", row.second
