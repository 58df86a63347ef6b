"""The commands `ptq llm …`. Every command imports what it needs when it runs."""

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer

PLUGIN = "llm"

app = typer.Typer(help="Language models: compare recipes, choose calibration text.", no_args_is_help=True)

Models = Annotated[
    list[str] | None,
    typer.Option(
        "--model", help="As task.model: a folder, a GGUF file, or smollm2-135m (default). Repeatable."
    ),
]
Overrides = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="Change a key of every recipe. Repeatable."),
]


@app.command()
def bench(
    recipes: Annotated[
        list[str] | None,
        typer.Option("--recipe", help="One of the plugin's recipes, or a YAML file. Repeatable."),
    ] = None,
    models: Models = None,
    texts: Annotated[
        list[str] | None,
        typer.Option("--text", help="Text to evaluate on, or self (default). Repeatable."),
    ] = None,
    tasks: Annotated[
        list[str] | None,
        typer.Option(
            "--tasks", help="YAML file of a zero-shot task of lm-eval, on local data. Repeatable."
        ),
    ] = None,
    overrides: Overrides = None,
    output: Annotated[Path, typer.Option("--output", help="Folder for everything.")] = Path(
        "runs/llm-bench"
    ),
    resume: Annotated[
        bool, typer.Option("--resume", help="Keep what is finished; go on with the rest.")
    ] = False,
) -> None:
    """Compare recipes on models and texts in one table.

    Nothing is exported unless --set export says so. If a row of the table failed, it has the reason, and
    the exit code is 1.
    """
    from ptqcore import find_recipe

    changes = ["export=[]", *(overrides or ())]
    names: Sequence[str | None] = recipes or [None]
    chosen = [find_recipe(name, PLUGIN, changes) for name in names]
    from ptq_llm.bench import Bench, refuse_own_keys, run  # brings in transformers: only once they stand
    from ptq_llm.bench_table import to_markdown
    from ptq_llm.models import EMBEDDED

    refuse_own_keys(changes)
    compared = Bench(chosen, models or [EMBEDDED], texts or ["self"], tasks or [], output)
    try:
        rows = run(compared, resume)
    except KeyboardInterrupt:  # typer would end the command without a word
        print("interrupted; run the same command with --resume to go on", file=sys.stderr)
        raise typer.Exit(130) from None
    typer.echo(to_markdown(rows))
    typer.echo(f"table: {output / 'bench.md'}, bench.csv and bench.html")
    if any(row.reason for row in rows):
        raise typer.Exit(1)


@app.command()
def advise(
    text: Annotated[str, typer.Option("--text", help="Text like what the model will read.")],
    corpora: Annotated[
        list[str], typer.Option("--corpus", help="Text that could be calibrated on. Repeatable.")
    ],
    model: Annotated[
        str | None,
        typer.Option("--model", help="As task.model, by default smollm2-135m; no weights are read."),
    ] = None,
    recipe: Annotated[
        str | None, typer.Option("--recipe", help="The recipe whose calibration setting is looked at.")
    ] = None,
    overrides: Overrides = None,
) -> None:
    """Rank texts to calibrate on, and say whether the calibration has tokens enough."""
    from ptqcore import find_recipe

    chosen = find_recipe(recipe, PLUGIN, overrides or ())
    from ptq_llm import adviser, models
    from ptq_llm.causal_lm import options_of

    windows, window = options_of(chosen).calibration_samples, options_of(chosen).calibration_window
    typer.echo(adviser.advise(model or models.EMBEDDED, text, corpora, windows, window))
