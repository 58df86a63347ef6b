"""What a worker process does: one ordinary run, in the folder that it is told."""

import os
import platform
import traceback
from contextlib import redirect_stderr
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ptqcore.errors import PtqError

LOG = "run.log"


@dataclass(frozen=True)
class Job:
    """What a worker is told.

    recipe: a resolved `Recipe`, as plain values. folder: of the artifact, on storage that every node sees.
    working_folder: what paths in the recipe are relative to. threads: of the run, which decide the order
    of its sums, and so its last bits. versions: of what computes where the sweep was started.
    """

    plugin: str
    recipe: dict[str, Any]
    folder: str
    working_folder: str
    threads: int
    versions: dict[str, str]


@dataclass(frozen=True)
class Outcome:
    """How a run ended: with its metrics, or with a reason. refused: whether the user can mend it."""

    metrics: dict[str, Any] | None = None
    reason: str = ""
    refused: bool = False


def carry_out(job: Job) -> Outcome:
    """Run a job, from the last finished block on if a worker before this one began it.

    What it says goes to `run.log` in its folder. Call it in a process that has not imported torch.
    """
    os.environ["OMP_NUM_THREADS"] = str(job.threads)
    folder = Path(job.folder)
    if not folder.is_dir():
        return Outcome(reason=_unseen(folder), refused=True)
    with open(folder / LOG, "a", encoding="utf-8") as log, redirect_stderr(log):
        try:
            return Outcome(metrics=_quantize(job))
        except PtqError as error:
            return Outcome(reason=str(error), refused=error.exit_code == 2)
        except Exception as error:
            traceback.print_exc()
            return Outcome(reason=f"{type(error).__name__}: {error} (see {folder / LOG})")


def _quantize(job: Job) -> dict[str, Any]:
    from ptqcore.fingerprint import versions
    from ptqcore.plugin import discover
    from ptqcore.recipe import Recipe
    from ptqcore.run import quantize

    registry = discover()
    _require_same(job.versions, versions(registry.versions()))
    if Path(job.working_folder).is_dir():
        os.chdir(job.working_folder)
    recipe = Recipe.model_validate(job.recipe)
    return quantize(recipe, job.plugin, Path(job.folder), resume=True, registry=registry).metrics()


def _require_same(wanted: dict[str, str], found: dict[str, str]) -> None:
    """Raises:
    PtqError: naming the first package that is another on this node.
    """
    for name, version in wanted.items():
        if found.get(name) != version:
            raise PtqError(
                f"node {platform.node()} has {name} {found.get(name, 'not at all')}, the sweep was started "
                f"with {version}: install the same on all nodes"
            )


def _unseen(folder: Path) -> str:
    return (
        f"node {platform.node()} does not see the folder {folder}: choose an --output on storage that all "
        "nodes share"
    )
