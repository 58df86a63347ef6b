"""ptqcore: post-training quantization by task. The names in `__all__` are the public interface."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from ptqcore.version import __version__

if TYPE_CHECKING:
    from ptqcore.artifact import load
    from ptqcore.blocks import Block, BlockIO
    from ptqcore.errors import (
        ArtifactError,
        DataError,
        ExportError,
        ModelError,
        PluginError,
        PtqError,
        RecipeError,
    )
    from ptqcore.export.base import Exporter
    from ptqcore.modules import QuantConv2d, QuantLinear, QuantModule
    from ptqcore.observers import Observer, ObserverOptions
    from ptqcore.packed import QuantizedTensor, pack_bits, unpack_bits
    from ptqcore.plugin import Plugin
    from ptqcore.progress import track
    from ptqcore.quantizers import FakeQuant
    from ptqcore.recipe import QuantSection, Recipe, TensorQuant
    from ptqcore.run import quantize
    from ptqcore.spec import QuantSpec
    from ptqcore.statistics import Gram
    from ptqcore.step import Step, StepOptions
    from ptqcore.task import Task, TaskOptions

_HOME = {
    "load": "artifact",
    "Block": "blocks",
    "BlockIO": "blocks",
    "ArtifactError": "errors",
    "DataError": "errors",
    "ExportError": "errors",
    "ModelError": "errors",
    "PluginError": "errors",
    "PtqError": "errors",
    "RecipeError": "errors",
    "Exporter": "export.base",
    "QuantConv2d": "modules",
    "QuantLinear": "modules",
    "QuantModule": "modules",
    "Observer": "observers",
    "ObserverOptions": "observers",
    "QuantizedTensor": "packed",
    "pack_bits": "packed",
    "unpack_bits": "packed",
    "Plugin": "plugin",
    "track": "progress",
    "FakeQuant": "quantizers",
    "QuantSection": "recipe",
    "Recipe": "recipe",
    "TensorQuant": "recipe",
    "quantize": "run",
    "QuantSpec": "spec",
    "Gram": "statistics",
    "Step": "step",
    "StepOptions": "step",
    "Task": "task",
    "TaskOptions": "task",
}

__all__ = ["__version__", *_HOME]


def __getattr__(name: str) -> Any:
    """Import a public name at its first use, so that the command line starts without torch."""
    if name not in _HOME:
        raise AttributeError(f"module 'ptqcore' has no attribute {name!r}")
    return getattr(import_module(f"ptqcore.{_HOME[name]}"), name)
