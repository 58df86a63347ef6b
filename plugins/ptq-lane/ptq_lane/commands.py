"""The commands `ptq lane …`. Every command imports what it needs when it runs."""

from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer(help="Lane detectors: what their outputs are worth.", no_args_is_help=True)


@app.callback()
def lane() -> None:
    """Lane detectors: what their outputs are worth."""


@app.command()
def sensitivity(
    recipe: Annotated[
        str, typer.Option("--recipe", help="Whose grids the outputs are rounded by: a name or a file.")
    ] = "w8a8",
    overrides: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="KEY=VALUE", help="Change a key of the recipe. Repeatable."),
    ] = None,
    output: Annotated[Path, typer.Option("--output", help="Folder for the table.")] = Path(
        "runs/lane-sensitivity"
    ),
) -> None:
    """How many pixels of lane the rounding of each group of outputs costs, before anything is learned.

    The detector is rounded to nearest, each group of its outputs is put into the outputs of full
    precision alone, and the lanes that come out are compared.
    """
    from ptq_lane import sensitivity_table
    from ptqcore import find_recipe

    chosen = find_recipe(recipe, "lane", overrides or [])
    groups = sensitivity_table.measure(chosen)
    sensitivity_table.write(groups, f"{chosen.name}, rounded to nearest", output)
    typer.echo(sensitivity_table.to_markdown(groups))
    typer.echo(f"table: {output / 'sensitivity.md'}, sensitivity.csv and sensitivity.html")
