"""Whether an engine computes what the simulation computed: outputs side by side, in steps of their grid."""

import warnings
from collections.abc import Sequence
from dataclasses import replace
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from ptqcore.dataflow import tensors_in
from ptqcore.engines import ENGINES, Execution, execute, fallback_reasons
from ptqcore.errors import ExportError
from ptqcore.export.feeding import named_inputs, output_names
from ptqcore.report.record import EngineRecord
from ptqcore.task import Task

SAMPLES = 32
_CONTROLS = 8
# Outputs that are on no grid are compared in steps of 8 bits over their range.
_STEPS = 127
_BINS = {"≤ 0.1": 0.1, "≤ 0.5": 0.5, "≤ 1": 1.0, "≤ 2": 2.0, "≤ 4": 4.0, "> 4": np.inf}
# A difference of one step is one step, whatever float32 makes of it.
_SLACK = 1e-3

Outputs = list[np.ndarray]


def compare(path: Path, model: nn.Module, task: Task, samples: Sequence[Any]) -> tuple[EngineRecord, ...]:
    """Run a file in every engine, and the model in PyTorch, on the first calibration samples."""
    samples = samples[:SAMPLES]
    inputs = [
        {name: tensor.detach().cpu().numpy() for name, tensor in named_inputs(model, sample).items()}
        for sample in samples
    ]
    simulated = _simulate(model, task, samples)
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
        records.append(_figures(record, simulated, found, steps))
    return tuple(records)


def _simulate(model: nn.Module, task: Task, samples: Sequence[Any]) -> list[Outputs]:
    with torch.no_grad():
        return [
            [one.detach().cpu().numpy() for one in tensors_in(task.forward(model, sample))]
            for sample in samples
        ]


def _simulate_otherwise(model: nn.Module, task: Task, samples: Sequence[Any]) -> list[Outputs]:
    """The same with sums in another order, for convolutions: without oneDNN."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the switch also sets what this build of PyTorch may not have
        with torch.backends.mkldnn.flags(enabled=False):
            return _simulate(model, task, samples)


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
    graph = onnx.load(str(path), load_external_data=False).graph
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
    record: EngineRecord, ours: list[Outputs], theirs: list[Outputs], steps: list[float]
) -> EngineRecord:
    differences = np.concatenate(_differences(ours, theirs, steps))
    if not differences.size:
        return record
    limits = np.asarray(list(_BINS.values())) + _SLACK
    below = np.searchsorted(np.sort(differences), limits, side="right")
    shares = np.diff(below, prepend=0) / differences.size
    same = [
        (one.argmax(1) == other.argmax(1)).ravel()
        for sample, found in zip(ours, theirs, strict=True)
        for one, other, step in zip(sample, found, steps, strict=True)
        if step and one.ndim in (2, 4)
    ]
    return replace(
        record,
        within_one_step=_within(differences),
        largest_steps=float(differences.max()),
        histogram={name: float(share) for name, share in zip(_BINS, shares, strict=True)},
        agreement=float(np.concatenate(same).mean()) if same else None,
    )
