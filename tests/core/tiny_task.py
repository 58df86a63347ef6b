"""Whole runs on models of a few layers: `run(folder, Net, samples, "round")`."""

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import nn

import ptqcore
from ptqcore import Plugin, Task
from ptqcore.dataflow import tensors_in
from ptqcore.plugin import Installed, Registry
from ptqcore.recipe import Recipe, validate

W3 = {"weights": {"bits": 3, "granularity": "channel"}}
W3A4 = W3 | {"activations": {"bits": 4, "symmetric": False}, "scope": "dataflow"}
W8A8 = {
    "weights": {"bits": 8, "granularity": "channel"},
    "activations": {"bits": 8, "symmetric": False},
    "scope": "dataflow",
}


class TinyTask(Task):
    """The model and the samples that the test in progress wants."""

    name = "tiny"
    make: ClassVar[Callable[[], nn.Module]]
    given: ClassVar[Sequence[Any]]

    def load_model(self):
        return type(self).make()

    def samples(self, model):
        return type(self).given

    def evaluate(self, model):
        with torch.no_grad():
            outputs = [tensors_in(self.forward(model, sample)) for sample in type(self).given]
        return {"sum": sum(float(tensor.sum()) for output in outputs for tensor in output)}

    def save_assets(self, folder: Path):
        (folder / "note.txt").write_text("tiny")

    @classmethod
    def build(cls, folder: Path):
        return cls.make()


def run(
    folder: Path,
    make: Callable[[], nn.Module],
    samples: Sequence[Any],
    step: str | dict[str, Any] | list[str | dict[str, Any]],
    quant: dict[str, Any] = W3,
    resume: bool = False,
    steps: dict[str, str] | None = None,
    task: type[TinyTask] = TinyTask,
    brings: dict[str, dict[str, str]] | None = None,
    **keys: Any,
) -> Any:
    """Quantize; `steps` are further steps by import path, `brings` what else the plugin brings, `keys`
    further keys of the recipe.

    Returns:
        The record of the run.
    """
    task.make, task.given = staticmethod(make), samples
    tasks = {"tiny": f"{task.__module__}:{task.__qualname__}"}
    plugin = Plugin("tiny", tasks=tasks, steps=steps or {}, **(brings or {}))
    registry = Registry([Installed("tiny", "ptq-tiny", "1.0", plugin)])
    entries = step if isinstance(step, list) else [step]
    data = {"name": "tiny", "task": {"kind": "tiny"}, "quant": quant, "steps": entries} | keys
    return ptqcore.quantize(validate(Recipe, data), "tiny", folder, resume, registry)


def weights_of(folder: Path) -> bytes:
    """The stored tensors of an artifact."""
    return (folder / "model.safetensors").read_bytes()


def manifest_of(folder: Path) -> Any:
    """The manifest of an artifact."""
    return json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
