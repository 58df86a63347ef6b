"""Who feeds whom: a record of one real forward pass.

Hooks note every call of a module, and a function mode every torch function below them, with the
identity of the tensors that go in and come out. Unlike symbolic tracing or `torch.export` this asks
nothing of the model: any Python that runs can be recorded, and what is found is named by module
path, which is how users, recipes and checkpoints name things too.
"""

from collections import Counter, defaultdict
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from itertools import chain, count
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_flatten
from torch.utils.weak import WeakTensorKeyDictionary


def tensors_in(value: Any) -> list[Tensor]:
    """The tensors among the leaves of nested tuples, lists and dicts, in order."""
    return [leaf for leaf in tree_flatten(value)[0] if isinstance(leaf, Tensor)]


def inside(path: str, module: str) -> bool:
    """Whether a path names a module or something below it."""
    return path == module or path.startswith(f"{module}.") or not module


@dataclass(frozen=True)
class Call:
    """One call of a module: its path, and the numbers of the tensors that went in and came out."""

    path: str
    inputs: tuple[int, ...]
    outputs: tuple[int, ...]


@dataclass(frozen=True)
class Site:
    """The place of one torch function in a forward pass, the same in every pass of the model.

    owner: path of the innermost module that was running; call: which of its calls, from 0;
    name: the function; ordinal: which call of that function within the owner's call, from 0.
    """

    owner: str
    call: int
    name: str
    ordinal: int

    def __str__(self) -> str:
        call = f"#{self.call}" if self.call else ""
        ordinal = f".{self.ordinal}" if self.ordinal else ""
        return f"{self.owner}{call}:{self.name}{ordinal}"


@dataclass(frozen=True)
class Op:
    """One call of a torch function: its site, the tensors in and out, and its other arguments."""

    site: Site
    inputs: tuple[int, ...]
    outputs: tuple[int, ...]
    arguments: tuple[Any, ...] = ()

    @property
    def name(self) -> str:
        """The function's name without underscores and in-place marks: add, conv2d, getitem."""
        return self.site.name


@dataclass
class Dataflow:
    """Calls and ops of one forward pass, in the order in which they ended.

    inputs: numbers of the tensors that the model itself was called with. shapes: tensor number →
    shape. floating: numbers of the tensors of floating point. names: number → name of the parameters
    and buffers that functions read.
    """

    calls: list[Call] = field(default_factory=list)
    ops: list[Op] = field(default_factory=list)
    inputs: tuple[int, ...] = ()
    shapes: dict[int, tuple[int, ...]] = field(default_factory=dict, repr=False)
    floating: set[int] = field(default_factory=set, repr=False)
    names: dict[int, str] = field(default_factory=dict, repr=False)
    _by_path: dict[str, list[Call]] = field(default_factory=lambda: defaultdict(list), repr=False)

    def add(self, call: Call) -> None:
        """Note a call that has just ended."""
        self.calls.append(call)
        self._by_path[call.path].append(call)

    def called(self, path: str) -> list[Call]:
        """All calls of the module at `path`."""
        return self._by_path.get(path, [])

    def feeds(self, producer: str, consumer: str) -> bool:
        """Whether the very tensor that `producer` returns goes into `consumer` (both called once)."""
        first, second = self.called(producer), self.called(consumer)
        if len(first) != 1 or len(second) != 1:
            return False
        return not set(first[0].outputs).isdisjoint(second[0].inputs)

    def producers(self) -> dict[int, Op]:
        """Tensor number → the op that made it."""
        return {number: op for op in self.ops for number in op.outputs}

    def consumers(self) -> dict[int, list[Op]]:
        """Tensor number → the ops that read it."""
        found: dict[int, list[Op]] = defaultdict(list)
        for op in self.ops:
            for number in dict.fromkeys(op.inputs):
                found[number].append(op)
        return found

    def variable(self) -> set[int]:
        """Numbers of all tensors that depend on the model's inputs."""
        known = set(self.inputs)
        for op in self.ops:
            if not known.isdisjoint(op.inputs):
                known.update(op.outputs)
        return known


def trace(model: nn.Module, run: Callable[[], object]) -> Dataflow:
    """Record all calls and ops inside `model` while `run()` executes it once, without gradients.

    What `run()` computes outside the model is not recorded; what it hands to the model is an input.

    Every tensor object gets a number of its own, forgotten with the object, so that the record need
    not keep tensors alive to know them again. A tensor that is changed in place gets a new number.
    """
    recorder = _Recorder()
    handles = []
    for path, module in model.named_modules():
        handles.append(
            module.register_forward_pre_hook(recorder.enter(path), with_kwargs=True, prepend=True)
        )
        handles.append(
            module.register_forward_hook(recorder.leave(path), with_kwargs=True, always_call=True)
        )
    try:
        with torch.no_grad(), recorder:
            run()
    finally:
        for handle in handles:
            handle.remove()
    recorder.name(model)
    return recorder.flow


class Running:
    """Which module runs, and the site of every function it calls; the same in every pass."""

    def __init__(self, root: str = "") -> None:
        self._calls: Counter[str] = Counter()
        self._stack: list[tuple[str, int, Counter[str]]] = [(root, 0, Counter())]

    @property
    def idle(self) -> bool:
        """Whether no module runs."""
        return len(self._stack) == 1

    def enter(self, path: str) -> None:
        """A call of the module at `path` begins."""
        self._stack.append((path, self._calls[path], Counter()))
        self._calls[path] += 1

    def leave(self) -> None:
        """The innermost call ends."""
        self._stack.pop()

    def site(self, function: Callable[..., Any]) -> Site:
        """The site of a function that is called now."""
        name = op_name(function)
        owner, call, seen = self._stack[-1]
        ordinal = seen[name]
        seen[name] += 1
        return Site(owner, call, name, ordinal)


_ALIASES = {
    "iadd": "add",
    "radd": "add",
    "imul": "mul",
    "rmul": "mul",
    "isub": "sub",
    "truediv": "div",
    "itruediv": "div",
    "concat": "cat",
    "concatenate": "cat",
    "multiply": "mul",
    "rmatmul": "matmul",
    "mm": "matmul",
    "bmm": "matmul",
    "clip": "clamp",
    "hardtanh": "clamp",
    "upsample": "interpolate",
}


def op_name(function: Callable[..., Any]) -> str:
    """One name for the ways to write a function: `x + y`, `torch.add`, `x.add_` are all `add`."""
    name = getattr(function, "__name__", type(function).__name__)
    if name == "__get__":  # a property: `x.mT`, `x.shape`
        name = getattr(function.__self__, "__name__", name)  # type: ignore[attr-defined]
    name = name.strip("_")
    return _ALIASES.get(name, name)


class _Recorder(TorchFunctionMode):
    def __init__(self) -> None:
        super().__init__()
        self.flow = Dataflow()
        self._unused = count()
        self._numbers = WeakTensorKeyDictionary()
        self._running = Running()
        self._inputs: list[tuple[int, ...]] = []

    def _number(self, tensor: Tensor) -> int:
        if tensor not in self._numbers:
            self._renumber(tensor)
        return int(self._numbers[tensor])

    def _renumber(self, tensor: Tensor) -> int:
        number = next(self._unused)
        self._numbers[tensor] = number
        self.flow.shapes[number] = tuple(tensor.shape)
        if tensor.is_floating_point():
            self.flow.floating.add(number)
        return number

    def name(self, model: nn.Module) -> None:
        """Note which of the recorded tensors are the model's parameters and buffers."""
        for name, tensor in chain(model.named_parameters(), model.named_buffers()):
            if tensor in self._numbers:
                self.flow.names[int(self._numbers[tensor])] = name

    def _all(self, tensors: Iterable[Tensor]) -> tuple[int, ...]:
        return tuple(self._number(tensor) for tensor in tensors)

    def enter(self, path: str) -> Callable[..., None]:
        def hook(_: nn.Module, args: Any, kwargs: Any) -> None:
            self._running.enter(path)
            self._inputs.append(self._all(tensors_in((args, kwargs))))
            if path == "":
                self.flow.inputs += self._inputs[-1]

        return hook

    def leave(self, path: str) -> Callable[..., None]:
        def hook(_: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
            self._running.leave()
            self.flow.add(Call(path, self._inputs.pop(), self._all(tensors_in(output))))

        return hook

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if self._running.idle:
            return func(*args, **(kwargs or {}))
        site = self._running.site(func)
        leaves = tree_flatten((args, kwargs or {}))[0]
        given = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
        inputs = self._all(given)
        versions = [tensor._version for tensor in given]
        output = func(*args, **(kwargs or {}))
        changed = [
            tensor for tensor, version in zip(given, versions, strict=True) if tensor._version != version
        ]
        known = {id(tensor) for tensor in given} - {id(tensor) for tensor in changed}
        made = [tensor for tensor in tensors_in(output) if id(tensor) not in known]
        if made or changed:  # else it only looked, or returned what it was given
            for tensor in changed:
                self._renumber(tensor)
            outputs = self._all(made) or self._all(changed)
            others = tuple(leaf for leaf in leaves if not isinstance(leaf, Tensor))
            self.flow.ops.append(Op(site, inputs, outputs, others))
        return output
