"""Schedulers of diffusers by the name of their class."""

import inspect
import os
from collections.abc import Mapping
from importlib.util import find_spec
from typing import Any

from ptqcore import ModelError, RecipeError, nearest

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import diffusers


def make_scheduler(name: str, base: Mapping[str, Any], config: Mapping[str, Any]) -> Any:
    """A scheduler of diffusers.

    Args:
        name: its class, for example `DDIMScheduler`.
        base: settings of another scheduler, which are taken over where the class has such.
        config: settings of its own.

    Raises:
        RecipeError: if there is no such class, or it has no such setting.
        ModelError: if it cannot be made, or cannot set timesteps.
    """
    known = [each for each in dir(diffusers) if each.endswith("Scheduler")]
    if name not in known:
        raise RecipeError(f"task.scheduler {name!r} is not a scheduler of diffusers{nearest(name, known)}")
    kind = getattr(diffusers, name)
    check_scheduler(kind)
    settings = list(inspect.signature(kind.__init__).parameters)[1:]
    for key in config:
        if key not in settings:
            raise RecipeError(f"{name} has no setting {key!r}{nearest(key, settings)}")
    # diffusers would give defaults of the other scheduler up for those of this one
    given = {key: value for key, value in base.items() if key != "_use_default_values"}
    try:
        return kind.from_config(given, **config)
    except Exception as error:
        raise ModelError(f"task.scheduler {name!r} cannot be made: {line_of(error)}") from error


def check_scheduler(kind: Any) -> None:
    """Whether schedules can be made with a scheduler's class.

    Raises:
        ModelError: if not.
    """
    absent = [name for name in getattr(kind, "_backends", ()) if find_spec(name) is None]
    if absent:
        raise ModelError(f"{kind.__name__} of diffusers needs {absent[0]}: pip install {absent[0]}")
    missing = [method for method in ("set_timesteps", "step") if not hasattr(kind, method)]
    if missing:
        raise ModelError(
            f"{kind.__name__} has no {missing[0]}, so that no schedule can be made with it: set "
            "task.scheduler to another, for example DDIMScheduler"
        )


def line_of(error: Exception) -> str:
    """What an error says, in one line."""
    text = " ".join(str(error).split())
    return text if len(text) <= 300 else text[:297] + "..."
