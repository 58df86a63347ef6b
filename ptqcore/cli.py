"""The face: the `ptq` command. Every command imports what it needs when it runs."""

import sys
from pathlib import Path
from typing import Annotated

import typer

from ptqcore import distributed
from ptqcore.errors import PtqError
from ptqcore.plugin_commands import PluginCommands

app = typer.Typer(
    cls=PluginCommands,
    help="Post-training quantization by task.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
recipe_app = typer.Typer(help="List, show and check recipes.", no_args_is_help=True)
app.add_typer(recipe_app, name="recipe")

PluginName = Annotated[
    str, typer.Option("--plugin", help="Name of an installed plugin; see `ptq plugins`.")
]
AnyPlugin = Annotated[str | None, typer.Option("--plugin", help="Only this plugin's; by default all.")]
RecipeName = Annotated[
    str | None, typer.Option("--recipe", help="One of the plugin's recipes, or a YAML file.")
]
Overrides = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="Change a recipe key, e.g. quant.weights.bits=3."),
]


@app.command()
def quantize(
    plugin: PluginName,
    recipe: RecipeName = None,
    overrides: Overrides = None,
    output: Annotated[
        Path | None, typer.Option("--output", help="Output folder, by default runs/PLUGIN-RECIPE.")
    ] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with an interrupted run.")] = False,
) -> None:
    """Quantize a task's model: measure, save, export, load back and report."""
    from ptqcore.plugin import discover
    from ptqcore.recipe import read_recipe
    from ptqcore.summary import summarize

    registry = discover()
    chosen = read_recipe(registry.recipe_file(recipe, plugin), overrides or ())
    from ptqcore.run import quantize as run  # brings in torch: only once the recipe stands

    folder = output or Path("runs") / f"{plugin}-{chosen.name}"
    try:
        record = run(chosen, plugin, folder, resume, registry)
    except KeyboardInterrupt:  # typer would end the command without a word
        if distributed.is_first():
            print("interrupted; run the same command with --resume to go on", file=sys.stderr)
        raise typer.Exit(130) from None
    if distributed.is_first():
        typer.echo(summarize(record, folder))


@app.command()
def sweep(
    file: Annotated[Path, typer.Argument(metavar="SWEEP.yaml", help="Recipes, models and seeds.")],
    output: Annotated[
        Path | None, typer.Option("--output", help="Folder for everything, by default runs/SWEEP.")
    ] = None,
    address: Annotated[
        str | None,
        typer.Option(
            "--address",
            help="A Ray cluster that sees the output folder: HOST:PORT, or auto; by default this machine.",
        ),
    ] = None,
    workers: Annotated[
        int | None, typer.Option("--workers", min=1, help="Runs at a time, by default one for each core.")
    ] = None,
    retries: Annotated[
        int, typer.Option("--retries", min=0, help="How often a run survives the death of its process.")
    ] = 3,
    resume: Annotated[
        bool, typer.Option("--resume", help="Keep what is finished; go on with the rest.")
    ] = False,
) -> None:
    """Run recipes on models with seeds, several at a time on Ray, and compare them in one table.

    A run that does not succeed stops no other: the table has the reason, and the exit code is 2 if input
    was wrong, else 1.
    """
    from ptqcore.sweeps.specification import read_sweep

    wanted = read_sweep(file)
    from ptqcore.sweeps.sweep import sweep as run  # brings in torch: only once the file stands
    from ptqcore.sweeps.table import to_markdown

    folder = output or Path("runs") / file.stem
    try:
        rows = run(wanted, folder, address, workers, retries, resume)
    except KeyboardInterrupt:  # typer would end the command without a word
        print("interrupted; run the same command with --resume to go on", file=sys.stderr)
        raise typer.Exit(130) from None
    typer.echo(to_markdown(rows))
    typer.echo(f"table: {folder / 'sweep.md'}, sweep.csv, sweep.json and sweep.html")
    states = [row.state for row in rows]
    if missing := len(states) - states.count("done"):
        print(
            f"error: {missing} of {len(states)} runs did not succeed: mend what the table says, then run "
            "the same command with --resume",
            file=sys.stderr,
        )
        raise typer.Exit(2 if "refused" in states else 1)


@app.command("map")
def show_map(
    plugin: PluginName,
    recipe: RecipeName = None,
    overrides: Overrides = None,
    json_file: Annotated[
        Path | None, typer.Option("--json", metavar="FILE", help="Write the map as JSON.")
    ] = None,
    html_file: Annotated[
        Path | None, typer.Option("--html", metavar="FILE", help="Draw the map as a web page.")
    ] = None,
) -> None:
    """Show what a task's model computes: its blocks, what flows between them, and what is quantized."""
    from ptqcore.plugin import discover
    from ptqcore.recipe import read_recipe

    registry = discover()
    chosen = read_recipe(registry.recipe_file(recipe, plugin), overrides or ())
    from ptqcore.map_summary import check_files, describe_map, write_map

    check_files([json_file, html_file])
    from ptqcore.preparation import map_model  # brings in torch: only once the recipe stands

    network = map_model(chosen, plugin, registry)
    typer.echo(describe_map(network))
    write_map(network, plugin, chosen.name, json_file, html_file)


@app.command()
def plugins() -> None:
    """List the installed plugins, what each brings, and those that could not be loaded."""
    from ptqcore.plugin import discover
    from ptqcore.summary import describe_plugins

    typer.echo(describe_plugins(discover()))


@recipe_app.command("list")
def list_recipes(plugin: AnyPlugin = None) -> None:
    """List recipes with their descriptions."""
    from ptqcore.plugin import discover
    from ptqcore.recipe import read_recipe

    registry = discover()
    for name in [plugin] if plugin else registry.versions():
        owner = registry.plugin(name)
        for recipe, file in owner.recipe_files.items():
            default = " (default)" if recipe == owner.default_recipe else ""
            typer.echo(f"{name} {recipe}{default}: {read_recipe(file).description}")


@recipe_app.command("show")
def show_recipe(
    name: Annotated[str, typer.Argument(help="A plugin's recipe, or a YAML file.")],
    plugin: AnyPlugin = None,
    overrides: Overrides = None,
) -> None:
    """Print a recipe as it would run: overrides applied, every default written out, every name checked."""
    from ptqcore.plan import make_plan
    from ptqcore.plugin import discover
    from ptqcore.recipe import read_recipe

    registry = discover()
    owner = plugin or registry.recipe_owner(name)
    recipe = read_recipe(registry.recipe_file(name, owner), overrides or ())
    typer.echo(make_plan(recipe, owner, registry).resolved.to_yaml(), nl=False)


@recipe_app.command("schema")
def schema() -> None:
    """Print the JSON schema of recipes, for editors."""
    import json

    from ptqcore.plan import recipe_schema
    from ptqcore.plugin import discover

    typer.echo(json.dumps(recipe_schema(discover()), indent=2))


def main() -> None:
    """Run the command line; what the user can mend is one sentence and exit code 2, a plugin's bug one
    sentence and exit code 1."""
    try:
        app()
    except PtqError as error:
        print(f"error: {distributed.name()}{error}", file=sys.stderr, flush=True)
        sys.exit(error.exit_code)
    except SystemExit as end:
        if not end.code:
            distributed.leave()
        raise
