"""The commands `ptq diffusion …`. Every command imports what it needs when it runs."""

import sys
from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer(help="Diffusion models: compare methods.", no_args_is_help=True)


@app.command()
def ablation(
    pipelines: Annotated[
        list[str] | None,
        typer.Option("--pipeline", help="As task.pipeline; by default the embedded one. Repeatable."),
    ] = None,
    weights: Annotated[str, typer.Option("--weights", help="Bits, with commas between.")] = "4",
    activations: Annotated[str, typer.Option("--activations", help="Bits, with commas between.")] = "8",
    seeds: Annotated[str, typer.Option("--seeds", help="A run for each, with commas between.")] = "0,1",
    samples: Annotated[int, typer.Option("--samples", help="Images that are judged.")] = 128,
    steps: Annotated[int, typer.Option("--steps", help="Inference steps.")] = 20,
    layers: Annotated[
        str, typer.Option("--layers", help="temporal: the temporal block alone; or all.")
    ] = "temporal",
    scope: Annotated[
        str, typer.Option("--scope", help="What FSC is for: temporal, the temporal block; or all.")
    ] = "temporal",
    cache: Annotated[
        bool, typer.Option("--cache", help="Rows with tables in the place of the temporal block too.")
    ] = False,
    rest: Annotated[
        str, typer.Option("--rest", help="The step that quantizes what TIAR does not.")
    ] = "round",
    overrides: Annotated[
        list[str] | None,
        typer.Option(
            "--set", metavar="KEY=VALUE", help="Change a key of the recipe of all runs. Repeatable."
        ),
    ] = None,
    output: Annotated[Path, typer.Option("--output", help="Folder for everything.")] = Path(
        "runs/diffusion-ablation"
    ),
    resume: Annotated[
        bool, typer.Option("--resume", help="Keep what is finished; go on with the rest.")
    ] = False,
) -> None:
    """Compare TIAR on and off, and FSC (finite set calibration) on and off, in one table.

    Every combination is an ordinary run of the recipe w4a8 with other steps, for each pipeline, each pair
    of widths and each seed.
    """
    from ptq_diffusion import embedded
    from ptq_diffusion.ablation import Ablation, run
    from ptq_diffusion.ablation_table import to_markdown

    compared = Ablation(
        pipelines=pipelines or [embedded.DEFAULT],
        weights=_numbers(weights, "--weights"),
        activations=_numbers(activations, "--activations"),
        seeds=_numbers(seeds, "--seeds"),
        samples=samples,
        steps=steps,
        layers=layers,
        scope=scope,
        cache=cache,
        rest=rest,
        overrides=overrides or [],
        output=output,
    )
    try:
        rows = run(compared, resume)
    except KeyboardInterrupt:  # typer would end the command without a word
        print("interrupted; run the same command with --resume to go on", file=sys.stderr)
        raise typer.Exit(130) from None
    typer.echo(to_markdown(rows, []))
    typer.echo(f"table: {output / 'ablation.md'}, ablation.csv and ablation.html")


def _numbers(text: str, option: str) -> list[int]:
    """Raises:
    RecipeError: if they are not whole numbers with commas between.
    """
    from ptqcore import RecipeError

    try:
        return [int(part) for part in text.split(",")]
    except ValueError:
        raise RecipeError(f"{option} {text!r}: give whole numbers with commas between, as 4,8") from None
