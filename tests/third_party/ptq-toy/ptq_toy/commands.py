"""The commands `ptq toy …`."""

from typing import Annotated

import typer

app = typer.Typer(help="Toy networks.", no_args_is_help=True)


@app.command()
def weights(
    width: Annotated[int, typer.Option(help="Features of the residual blocks.")] = 24,
    depth: Annotated[int, typer.Option(help="Number of residual blocks.")] = 2,
) -> None:
    """Count the weights of a network."""
    from ptq_toy.task import network  # brings in torch: not for the help
    from ptqcore import RecipeError

    if width < 1:
        raise RecipeError(f"--width is {width}: give 1 or more")
    typer.echo(sum(parameter.numel() for parameter in network(width, depth).parameters()))
