"""Code of users, found by import path `package.module:attribute`."""

import sys
from copy import deepcopy
from importlib import import_module
from pathlib import Path
from types import BuiltinFunctionType, FunctionType
from typing import Any

from torch import nn

from ptqcore.errors import ModelError

_CODE = (type, FunctionType, BuiltinFunctionType)


def import_object(path: str, key: str) -> Any:
    """What an import path leads to.

    Args:
        path: `package.module:attribute`.
        key: the recipe key that names it, for errors.

    Raises:
        ModelError: if it is no such path, or cannot be imported.
    """
    module, colon, attribute = path.partition(":")
    if not colon or not module or not attribute:
        raise ModelError(f"{key} {path!r} is no import path: write package.module:attribute")
    if _top(module) in sys.stdlib_module_names:
        raise _of_python(path, key)
    try:
        found: Any = import_module(module)
        for part in attribute.split("."):
            found = getattr(found, part)
    except (Exception, SystemExit) as error:
        raise ModelError(f"{key} {path!r} cannot be imported and called: {_line(error)}") from error
    if isinstance(found, _CODE) and _top(found.__module__) in sys.stdlib_module_names:
        raise _of_python(path, key)
    return found


def import_network(path: str, key: str = "task.model") -> nn.Module:
    """The network that an import path leads to: a copy of a module, or what a class or function makes.

    Raises:
        ModelError: if there is none.
    """
    found = import_object(path, key)
    try:
        # A copy, as the module itself would be quantized in place, and there must be another to build.
        network = deepcopy(found) if isinstance(found, nn.Module) else found()
    except (Exception, SystemExit) as error:
        raise ModelError(f"{key} {path!r} cannot be imported and called: {_line(error)}") from error
    if not isinstance(network, nn.Module):
        raise ModelError(
            f"{key} {path!r} gives a {type(network).__name__}: it must be a torch.nn.Module, or a "
            "class or function that makes one without arguments"
        )
    return network


def check_imported(path: str, source: Path) -> None:
    """Make sure that a file of somebody else names only code that this process has imported already.

    Args:
        path: `package.module:attribute`, as it stands in the file.
        source: the file.

    Raises:
        ModelError: if importing or calling it would be the file's wish, not the user's.
    """
    module, _, attribute = path.partition(":")
    found = getattr(sys.modules.get(module), attribute, None)
    own = isinstance(found, _CODE) and _top(found.__module__) == _top(module)
    if not own and not isinstance(found, nn.Module):
        raise ModelError(
            f"{source} names the code {path!r}, which nobody has imported: if you trust it, import "
            f"{module} before you load"
        )


def _top(module: str | None) -> str:
    return (module or "builtins").partition(".")[0]


def _of_python(path: str, key: str) -> ModelError:
    return ModelError(f"{key} {path!r} leads into Python's own library, which holds no network")


def _line(error: BaseException) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())
