"""Records what a denoiser computes of the timestep alone, to compute it again without the rest.

One forward pass is watched: every torch function, and every call of some layers. What reads the values of
the sample or of a condition is left out, and so is what was computed from that. What a run holds fixed,
such as the guidance, is a constant.
"""

import operator
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain, count
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import TreeSpec, tree_flatten, tree_unflatten
from torch.utils.weak import WeakTensorKeyDictionary

from ptq_diffusion.calls import DenoiserCall
from ptq_diffusion.probe import evaluating
from ptq_diffusion.temporal import values_read
from ptqcore import tensors_in


@dataclass(frozen=True)
class Recording:
    """What leads from the timestep to the outputs of some layers.

    time: number of the tensor that is the timestep. nodes: the functions, in order. outputs: path → number
    of the first output of each layer that was reached. values: path → that output, in the recorded pass.
    """

    time: int
    nodes: tuple["Node", ...]
    outputs: Mapping[str, int]
    values: Mapping[str, Tensor]

    def replay(self, model: nn.Module, time: Tensor) -> dict[str, Tensor]:
        """The outputs of the layers at another time, given as in the recorded pass."""
        paths = {number: path for path, number in self.outputs.items()}
        known = {self.time: time.clone()}
        found = {}
        for node in self.nodes:
            node.run(model, known)
            for number in node.outputs:
                if number in paths and paths[number] not in found:
                    found[paths[number]] = known[number].clone()  # a function may write into it later
        return found


def record(model: nn.Module, call: DenoiserCall, layers: Sequence[str], wanted: Sequence[str]) -> Recording:
    """Watch one forward pass in evaluation mode, up to the last of the wanted layers.

    Args:
        model: the denoiser.
        call: what it is called with; the time is a tensor.
        layers: the paths of what is replayed as a layer, whatever it then computes.
        wanted: those of them whose outputs are asked for.
    """
    call = call.copied()
    recorder = _Recorder(model, call)
    handles = []
    for path in layers:
        layer = model.get_submodule(path)
        handles.append(layer.register_forward_pre_hook(recorder.enter(), with_kwargs=True, prepend=True))
        handles.append(layer.register_forward_hook(recorder.leave(path, wanted), with_kwargs=True))
    try:
        with evaluating(model), torch.no_grad(), recorder:
            call.run(model)
    except _Reached:
        pass
    finally:
        for handle in handles:
            handle.remove()
    return recorder.recording()


@dataclass(frozen=True)
class _Number:
    """Stands for a recorded tensor."""

    number: int


@dataclass(frozen=True)
class _Own:
    """Stands for a parameter or buffer of the model."""

    name: str

    def of(self, model: nn.Module) -> Tensor:
        """The tensor."""
        path, _, name = self.name.rpartition(".")
        tensor: Tensor = getattr(model.get_submodule(path), name)
        return tensor


@dataclass(frozen=True)
class Node:
    """One call of a function, or of the layer with this path.

    structure: of args and kwargs; None where the leaves are the args. reads, changes: addresses of the
    memory that it reads, and that it writes into: views share it.
    """

    function: Callable[..., Any] | str
    leaves: tuple[Any, ...]
    structure: TreeSpec | None
    outputs: tuple[int, ...]
    reads: frozenset[int]
    changes: frozenset[int]

    def run(self, model: nn.Module, known: dict[int, Tensor]) -> None:
        """Call the function again, and note what it returns."""
        leaves = [_value(leaf, model, known) for leaf in self.leaves]
        args, kwargs = (leaves, {}) if self.structure is None else tree_unflatten(leaves, self.structure)
        function = model.get_submodule(self.function) if isinstance(self.function, str) else self.function
        known.update(zip(self.outputs, tensors_in(function(*args, **kwargs)), strict=True))


def _value(leaf: Any, model: nn.Module, known: Mapping[int, Tensor]) -> Any:
    if isinstance(leaf, _Number):
        return known[leaf.number]
    return leaf.of(model) if isinstance(leaf, _Own) else leaf


class _Reached(Exception):  # noqa: N818 - a signal that ends a forward pass, not an error
    pass


class _Recorder(TorchFunctionMode):
    def __init__(self, model: nn.Module, call: DenoiserCall) -> None:
        super().__init__()
        own = chain(model.named_parameters(), model.named_buffers())
        self._own = {id(tensor): _Own(name) for name, tensor in own}
        self._unused = count()
        self._numbers = WeakTensorKeyDictionary()
        self._foreign = WeakTensorKeyDictionary()
        self._nodes: list[Node] = []
        self._outputs: dict[str, int] = {}
        self._values: dict[str, Tensor] = {}
        self._needed: set[int] = set()
        self._seen: set[str] = set()
        self._calls: list[tuple[Any, Any]] = []
        self._time = self._number(call.values[call.timestep])
        self._mark([*tensors_in(call.values[call.sample]), *call.conditions.values()])

    def enter(self) -> Callable[..., None]:
        def hook(_: nn.Module, args: Any, kwargs: Any) -> None:
            self._calls.append((args, kwargs))

        return hook

    def leave(self, path: str, wanted: Sequence[str]) -> Callable[..., None]:
        def hook(_: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
            given = self._calls.pop()
            if self._calls:
                return
            made = tensors_in(output)
            self._note(path, given, made, tensors_in(given), [])
            if path in wanted and path not in self._seen:
                self._seen.add(path)
                if made[0] in self._numbers:
                    self._outputs[path] = self._number(made[0])
                    self._values[path] = made[0].clone()
                    self._needed.add(_address(made[0]))
            if self._seen.issuperset(wanted):
                raise _Reached

        return hook

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if self._calls:
            return func(*args, **kwargs)
        given = tensors_in((args, kwargs))
        versions = [tensor._version for tensor in given]
        output = func(*args, **kwargs)
        changed = [one for one, version in zip(given, versions, strict=True) if one._version != version]
        made = tensors_in(output)
        if made or changed:
            name = getattr(func, "__name__", "").strip("_")
            self._note(func, (args, kwargs), made, values_read(name, given), changed)
        return output

    def recording(self) -> Recording:
        """The recording, without the functions that the outputs do not need."""
        numbers, memory = set(self._outputs.values()), set(self._needed)
        kept = []
        for node in reversed(self._nodes):
            if numbers.isdisjoint(node.outputs) and memory.isdisjoint(node.changes):
                continue
            numbers.update(leaf.number for leaf in node.leaves if isinstance(leaf, _Number))
            memory |= node.reads
            kept.append(node)
        return Recording(self._time, tuple(reversed(kept)), self._outputs, self._values)

    def _note(
        self,
        function: Callable[..., Any] | str,
        given: tuple[Any, Any],
        made: Sequence[Tensor],
        read: Sequence[Tensor],
        changed: Sequence[Tensor],
    ) -> None:
        if any(tensor in self._foreign for tensor in read):
            self._mark([*made, *changed])
            return
        leaves, structure = tree_flatten(given)
        flat = len(leaves) == len(given[0]) and all(map(operator.is_, leaves, given[0])) and not given[1]
        stand_ins = tuple(map(self._stand_in, leaves))
        numbers = tuple(map(self._number, made))
        memory = (frozenset(map(_address, tensors)) for tensors in (read, changed))
        self._nodes.append(Node(function, stand_ins, None if flat else structure, numbers, *memory))

    def _stand_in(self, leaf: Any) -> Any:
        if not isinstance(leaf, Tensor):
            return leaf
        if leaf in self._numbers:
            return _Number(self._number(leaf))
        if leaf in self._foreign:  # read for its shape and dtype alone
            return leaf.new_empty(()).expand(leaf.shape)
        return self._own.get(id(leaf), leaf)

    def _number(self, tensor: Tensor) -> int:
        if tensor not in self._numbers:
            self._numbers[tensor] = next(self._unused)
        return int(self._numbers[tensor])

    def _mark(self, tensors: Sequence[Tensor]) -> None:
        for tensor in tensors:
            self._foreign[tensor] = True


def _address(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()
