"""Whether an engine computes what the simulation computed: outputs side by side, in steps of their grid."""

import warnings
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.modules.module import register_module_forward_hook

from ptqcore.dataflow import tensors_in
from ptqcore.engines import ENGINES, Execution, execute, fallback_reasons
from ptqcore.errors import ExportError
from ptqcore.export.feeding import named_inputs, output_names
from ptqcore.export.onnx_file import read_onnx_graph
from ptqcore.report.record import EngineRecord
from ptqcore.task import Task

SAMPLES = 32
# Fewer samples are compared where their outputs are large (a vocabulary for every token).
_MOST_VALUES = 2**25
_CONTROLS = 8
# Outputs that are on no grid are compared in steps of 8 bits over their range.
_STEPS = 127
_BINS = {"≤ 0.1": 0.1, "≤ 0.5": 0.5, "≤ 1": 1.0, "≤ 2": 2.0, "≤ 4": 4.0, "> 4": np.inf}
# A difference of one step is one step, whatever float32 makes of it.
_SLACK = 1e-3

Outputs = list[np.ndarray]


def compare(path: Path, model: nn.Module, task: Task, samples: Sequence[Any]) -> tuple[EngineRecord, ...]:
    """Run a file in every engine, and the model in PyTorch, on calibration samples `in_turn`."""
    samples = in_turn(task, samples)
    simulated = _simulate(model, task, samples)
    samples = samples[: len(simulated)]
    inputs = [
        {name: tensor.detach().cpu().numpy() for name, tensor in named_inputs(model, sample).items()}
        for sample in samples
    ]
    again = _simulate_otherwise(model, task, samples[:_CONTROLS])
    steps = _steps(path, simulated)
    control = _within(np.concatenate(_differences(simulated[:_CONTROLS], again, steps)))
    records = []
    for engine in ENGINES:
        try:
            execution = execute(engine, path, inputs, profile=True)
            layers = fallback_reasons(path, execution)
            found = _in_order(execution, simulated)
        except ExportError as error:
            records.append(EngineRecord(engine, problem=str(error)))
            continue
        record = EngineRecord(engine, layers=layers, samples=len(samples), control=control)
        records.append(_figures(record, simulated, found, steps, task.class_dimension))
    return tuple(records)


def in_turn(task: Task, samples: Sequence[Any]) -> Sequence[Any]:
    """The samples that are compared: one of every timestep, where samples are of timesteps, and others."""
    first: dict[float | None, int] = {}
    for place, sample in enumerate(samples):
        first.setdefault(task.timestep(sample), place)
    if first.keys() <= {None}:
        return samples[:SAMPLES]
    others = [place for place in range(len(samples)) if place not in first.values()]
    return [samples[place] for place in [*first.values(), *others][: max(SAMPLES, len(first))]]


@torch.no_grad()
def _simulate(model: nn.Module, task: Task, samples: Sequence[Any]) -> list[Outputs]:
    """The outputs of the first samples: as many as `_MOST_VALUES` allows, and at least one."""
    found: list[Outputs] = []
    values = 0
    for sample in samples:
        outputs = [one.detach().cpu().numpy() for one in tensors_in(task.forward(model, sample))]
        values += sum(one.size for one in outputs)
        if found and values > _MOST_VALUES:
            break
        found.append(outputs)
    return found


def _simulate_otherwise(model: nn.Module, task: Task, samples: Sequence[Any]) -> list[Outputs]:
    """The same with other rounding errors of float32, as engines have them.

    Convolutions sum in another order (without oneDNN), attention is computed in single steps, and what
    modules return is off by one in its last place.
    """
    generator = torch.Generator().manual_seed(0)
    handle = register_module_forward_hook(partial(_nudge, generator))  # type: ignore[arg-type]
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the switch also sets what this build of PyTorch may not have
            with torch.backends.mkldnn.flags(enabled=False), sdpa_kernel(SDPBackend.MATH):
                return _simulate(model, task, samples)
    finally:
        handle.remove()


def _nudge(generator: torch.Generator, module: nn.Module, args: Any, output: Any) -> Tensor | None:
    """A module's output in float32, each value one place up, down, or as it is."""
    if not isinstance(output, Tensor) or output.dtype != torch.float32 or any(module.children()):
        return None
    places = torch.randint(-1, 2, output.shape, generator=generator).to(output.device)
    return output * (1 + places * torch.finfo(torch.float32).eps)


def _in_order(execution: Execution, simulated: list[Outputs]) -> list[Outputs]:
    """An engine's outputs in the order of the model's.

    Raises:
        ExportError: if their shapes differ.
    """
    names = output_names(len(simulated[0]))
    found = [[outputs[name] for name in names] for outputs in execution.outputs]
    for ours, theirs in zip(simulated, found, strict=True):
        for name, one, other in zip(names, ours, theirs, strict=True):
            if one.shape != other.shape:
                raise ExportError(f"its {name} has the shape {list(other.shape)}, not {list(one.shape)}")
    return found


def _steps(path: Path, simulated: list[Outputs]) -> list[float]:
    """The step of every output's grid; 0 for outputs that are no floating-point numbers."""
    steps = []
    for place, name in enumerate(output_names(len(simulated[0]))):
        outputs = [sample[place] for sample in simulated]
        if not np.issubdtype(outputs[0].dtype, np.floating):
            steps.append(0.0)
            continue
        largest = max(float(np.abs(output).max(initial=0)) for output in outputs)
        steps.append(_scale(path, name) or largest / _STEPS or 1.0)
    return steps


def _scale(path: Path, output: str) -> float | None:
    """The scale of the DequantizeLinear that makes an output, if one does."""
    onnx = import_module("onnx")
    graph = read_onnx_graph(path)
    constants = {tensor.name: tensor for tensor in graph.initializer}
    for node in graph.node:
        if node.op_type == "DequantizeLinear" and output in node.output:
            return abs(float(onnx.numpy_helper.to_array(constants[node.input[1]], str(path.parent)).item()))
    return None


def _differences(ours: list[Outputs], theirs: list[Outputs], steps: list[float]) -> list[np.ndarray]:
    """Differences in steps, flat; what is not a number in either is infinitely far."""
    return [np.zeros(0)] + [
        np.nan_to_num(np.abs(one - other).ravel() / step, nan=np.inf)
        for sample, found in zip(ours, theirs, strict=True)
        for one, other, step in zip(sample, found, steps, strict=True)
        if step
    ]


def _within(differences: np.ndarray) -> float:
    return float((differences <= 1 + _SLACK).mean()) if differences.size else 1.0


def _figures(
    record: EngineRecord,
    ours: list[Outputs],
    theirs: list[Outputs],
    steps: list[float],
    class_dimension: int,
) -> EngineRecord:
    differences = np.concatenate(_differences(ours, theirs, steps))
    if not differences.size:
        return record
    limits = np.asarray(list(_BINS.values())) + _SLACK
    below = np.searchsorted(np.sort(differences), limits, side="right")
    shares = np.diff(below, prepend=0) / differences.size
    same = [
        (one.argmax(class_dimension) == other.argmax(class_dimension)).ravel()
        for sample, found in zip(ours, theirs, strict=True)
        for one, other, step in zip(sample, found, steps, strict=True)
        if step and _has_classes(one, class_dimension)
    ]
    return replace(
        record,
        within_one_step=_within(differences),
        largest_steps=float(differences.max()),
        histogram={name: float(share) for name, share in zip(_BINS, shares, strict=True)},
        agreement=float(np.concatenate(same).mean()) if same else None,
    )


def _has_classes(output: np.ndarray, dimension: int) -> bool:
    """Whether an output looks like scores: of a sample, of every pixel, or of every position."""
    return output.ndim in ((2, 3) if dimension == -1 else (2, 4))
