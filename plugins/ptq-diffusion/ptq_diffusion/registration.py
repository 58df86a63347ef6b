"""Tells diffusers of quantized denoisers as soon as both are imported, without importing diffusers.

Importing diffusers takes seconds, and the command line imports every plugin to list it.
"""

import sys
from importlib import import_module
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from types import ModuleType
from typing import Any

_TABLES = "diffusers.quantizers.auto"
_HUB = "ptq_diffusion.hub"


def register() -> None:
    """Import what adds our entries to diffusers' tables of quantization methods, now or with diffusers."""
    if _TABLES in sys.modules:
        _add()
    elif not any(isinstance(finder, _Watching) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Watching())


def _add() -> None:
    if _HUB not in sys.modules:  # else it is being imported itself
        import_module(_HUB)


class _Watching(MetaPathFinder):
    """Finds the module of diffusers' tables as usual, and adds our entries once it was executed."""

    def find_spec(self, name: str, path: Any, target: ModuleType | None = None) -> ModuleSpec | None:
        if name != _TABLES:
            return None
        sys.meta_path.remove(self)
        spec = PathFinder.find_spec(name, path, target)
        if spec is not None and spec.loader is not None:
            spec.loader = _Adding(spec.loader)
        return spec


class _Adding(Loader):
    def __init__(self, loader: Loader) -> None:
        self._loader = loader

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self._loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        self._loader.exec_module(module)
        _add()
