"""How far a group of layers is from what it should compute, with changed and rounded weights and inputs.

What is compared is what the next layers read (the input of o_proj for queries, keys and values, that of
down_proj for gates and values), computed by the model's own modules: attention masks, rotary
embeddings, gates and norms between them need not be known (Outlier Suppression+, arXiv 2304.09145,
eq. 7). Layers that nothing in the block reads are compared by their own outputs (eq. 6).
"""

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from ptq_llm.flow_questions import FlowQuestions
from ptq_llm.groups import Group
from ptq_llm.simulation import input_rounding, rounded
from ptqcore import Calibration, Context


class Change(Protocol):
    """What is done to the inputs of a group's layers, and to their weights so that the function stays."""

    def inputs(self, x: Tensor) -> Tensor:
        """The changed input."""

    def weight(self, weight: Tensor) -> Tensor:
        """The weight [out, in] for changed inputs."""

    def bias(self, weight: Tensor, bias: Tensor | None) -> Tensor | None:
        """The bias [out] for changed inputs, by the weight before it was changed."""


class _Reached(Exception):  # noqa: N818 - a signal that ends a forward pass, not an error
    pass


class Objective:
    """Σ over what is compared of ‖y′ − y‖² / ‖y‖², over all tokens of all calibration samples that count.

    The samples come from the quantized prefix, through the block as it is at the first loss. Processes
    that share them out exchange the error of each, and add them up in the same order.
    """

    def __init__(
        self, calibration: Calibration, context: Context, group: Group, questions: FlowQuestions
    ) -> None:
        self.calibration, self.block = calibration, calibration.block
        self._context, self._model = context, calibration.block.model
        block = calibration.block
        targets = context.targets(block)
        self._layers = [path for path in group.consumers if path in targets]
        self._sinks = questions.sinks(group.consumers, block)
        self._at = questions.parent([*group.consumers, *self._sinks], block) if self._sinks else ""
        self._alone = not self._sinks
        self._recorded = False

    def _record(self) -> None:
        """Record what is compared: not before a loss is asked for."""
        if self._recorded:
            return
        self._recorded = True
        if self._alone:
            self._inputs = self._record_inputs()
            self._outputs = {path: self._plain_outputs(path) for path in self._layers}
            return
        self._parent = self._model.get_submodule(self._at)
        self._calls = self._record_parent()
        with torch.no_grad():
            self._wanted = [self._compared(sample) for sample in range(len(self._calls))]
        energies = [{sink: _energy(seen[sink]) for sink in seen} for seen in self._wanted]
        self._energy = dict.fromkeys(self._sinks, 0.0)
        for of_sample in self.calibration.share.in_order(energies):
            for sink, energy in of_sample.items():
                self._energy[sink] += energy

    @property
    def layers(self) -> Sequence[str]:
        """The group's layers that are to be quantized."""
        return self._layers

    @torch.no_grad()
    def loss(self, change: Change, limit: float = math.inf) -> float:
        """The error with this change, weights rounded to nearest and inputs as the recipe rounds them; of
        the first samples alone where that is above `limit` already."""
        self._record()
        return self._loss_alone(change, limit) if self._alone else self._loss_behind(change, limit)

    def _loss_alone(self, change: Change, limit: float) -> float:
        total = 0.0
        for path in self._layers:
            for of_sample in self.calibration.share.in_order(self._errors_alone(path, change)):
                for error in of_sample:
                    total += error
                if total > limit:
                    return total
        return total

    def _errors_alone(self, path: str, change: Change) -> Iterator[list[float]]:
        """The error of a layer's outputs, relative to their energy, call by call for every sample of this
        process."""
        layer, rounding = self._model.get_submodule(path), self._rounding(path, change)
        weight, bias = layer.get_parameter("weight"), layer._parameters.get("bias")
        new = rounded(change.weight(weight), self._context.grids.weights(path).spec)
        moved = change.bias(weight, bias)
        outputs, energy = self._outputs[path]
        for calls, wanted in zip(self._inputs[path], outputs, strict=True):
            inputs = (rounding(change.inputs(rows)) for rows in calls)
            found = [nn.functional.linear(x, new, moved) for x in inputs]
            yield [_energy(x - y) / (energy or 1) for x, y in zip(found, wanted, strict=True)]

    def _loss_behind(self, change: Change, limit: float) -> float:
        kept = {path: dict(self._model.get_submodule(path)._parameters) for path in self._layers}
        handles = [self._install(path, change) for path in self._layers]
        total = 0.0
        try:
            errors = map(self._errors_behind, range(len(self._wanted)))
            for of_sample in self.calibration.share.in_order(errors):
                for error in of_sample:
                    total += error
                if total > limit:
                    break
        finally:
            for handle in handles:
                handle.remove()
            for path, parameters in kept.items():
                self._model.get_submodule(path)._parameters.update(parameters)
        return total

    def _errors_behind(self, sample: int) -> list[float]:
        """The error of every sink, relative to its energy, for a sample of this process."""
        wanted, found = self._wanted[sample], self._compared(sample)
        return [
            _energy(found[sink] - wanted[sink]) / self._energy[sink]
            for sink in self._sinks
            if sink in found and sink in wanted
            if found[sink].shape == wanted[sink].shape and self._energy[sink]
        ]

    def _install(self, path: str, change: Change) -> Any:
        """Give a layer its changed, rounded weight, and round its changed inputs; the hook's handle."""
        layer, rounding = self._model.get_submodule(path), self._rounding(path, change)
        weight, bias = layer.get_parameter("weight"), layer._parameters.get("bias")
        moved = change.bias(weight, bias)
        new = rounded(change.weight(weight), self._context.grids.weights(path).spec)
        layer._parameters["weight"] = nn.Parameter(new, requires_grad=False)
        layer._parameters["bias"] = None if moved is None else nn.Parameter(moved, requires_grad=False)
        return layer.register_forward_pre_hook(lambda _, args: (rounding(change.inputs(args[0])),))

    def _rounding(self, path: str, change: Change) -> Callable[[Tensor], Tensor]:
        return input_rounding(self._context, self.calibration, path, change.inputs)

    def _record_inputs(self) -> dict[str, list[list[Tensor]]]:
        """What flows into the layers, call by call of every sample, tokens that count alone,
        [tokens, channels]."""
        found: dict[str, list[list[Tensor]]] = {path: [] for path in self._layers}
        sample = 0

        def note(path: str) -> Callable[..., None]:
            return lambda _, args: found[path][-1].append(self.calibration.counted(args[0], sample).clone())

        handles = [self._model.get_submodule(p).register_forward_pre_hook(note(p)) for p in self._layers]
        io = self.calibration.io
        try:
            for sample in range(len(io)):
                for calls in found.values():
                    calls.append([])
                io.run_sample(sample)
        finally:
            for handle in handles:
                handle.remove()
        return found

    @torch.no_grad()
    def _plain_outputs(self, path: str) -> tuple[list[list[Tensor]], float]:
        """What a layer makes of what was recorded, and Σ ‖y‖² over all samples."""
        layer = self._model.get_submodule(path)
        weight, bias = layer.get_parameter("weight"), layer._parameters.get("bias")
        outputs = [
            [nn.functional.linear(rows, weight, bias) for rows in calls] for calls in self._inputs[path]
        ]
        energies = self.calibration.share.in_order([_energy(y) for y in calls] for calls in outputs)
        return outputs, sum(energy for of_sample in energies for energy in of_sample)

    def _record_parent(self) -> list[tuple[Any, Any]]:
        """What the module around the group and what it leads to is called with, for every sample."""
        calls: list[tuple[Any, Any]] = []

        def note(_: nn.Module, args: Any, kwargs: Any) -> None:
            calls.append(tree_map_only(Tensor, torch.clone, (args, kwargs)))
            raise _Reached

        handle = self._parent.register_forward_pre_hook(note, with_kwargs=True)
        io = self.calibration.io
        try:
            for sample in range(len(io)):
                with suppress(_Reached):
                    io.run_sample(sample)
        finally:
            handle.remove()
        return calls

    def _compared(self, sample: int) -> dict[str, Tensor]:
        """What flows into every sink, tokens that count alone, [tokens, channels]."""
        found: dict[str, Tensor] = {}

        def hook(path: str) -> Callable[..., None]:
            def note(_: nn.Module, args: Any) -> None:
                found[path] = self.calibration.counted(args[0], sample)
                if len(found) == len(self._sinks):
                    raise _Reached

            return note

        handles = [self._model.get_submodule(p).register_forward_pre_hook(hook(p)) for p in self._sinks]
        args, kwargs = tree_map_only(Tensor, torch.clone, self._calls[sample])
        try:
            with suppress(_Reached):
                self._parent(*args, **kwargs)
        finally:
            for handle in handles:
                handle.remove()
        return found


def _energy(x: Tensor) -> float:
    return float(x.double().square().sum())
