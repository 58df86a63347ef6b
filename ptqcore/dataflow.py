"""Who feeds whom: a record of one real forward pass.

Module hooks note every call with the identity of the tensors that go in and come out. Unlike
symbolic tracing this asks nothing of the model: any Python that runs can be recorded.
"""

from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import count
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten
from torch.utils.weak import WeakTensorKeyDictionary


def tensors_in(value: Any) -> list[Tensor]:
    """The tensors among the leaves of nested tuples, lists and dicts, in order."""
    return [leaf for leaf in tree_flatten(value)[0] if isinstance(leaf, Tensor)]


@dataclass(frozen=True)
class Call:
    """One call of a module: its path, and the numbers of the tensors that went in and came out."""

    path: str
    inputs: tuple[int, ...]
    outputs: tuple[int, ...]


@dataclass
class Dataflow:
    """Calls of one forward pass, in the order in which they ended."""

    calls: list[Call] = field(default_factory=list)
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


def trace(model: nn.Module, run: Callable[[], object]) -> Dataflow:
    """Record the calls of all submodules of `model` while `run()` executes it once, without gradients.

    Every tensor object gets a number of its own, forgotten with the object, so that the record need
    not keep tensors alive to know them again.
    """
    flow = Dataflow()
    unused = count()
    numbers = WeakTensorKeyDictionary()

    def number(tensor: Tensor) -> int:
        if tensor not in numbers:
            numbers[tensor] = next(unused)
        return int(numbers[tensor])

    def note(path: str) -> Callable[..., None]:
        def hook(_: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
            inputs = tuple(number(tensor) for tensor in tensors_in((args, kwargs)))
            flow.add(Call(path, inputs, tuple(number(tensor) for tensor in tensors_in(output))))

        return hook

    handles = [
        module.register_forward_hook(note(path), with_kwargs=True) for path, module in model.named_modules()
    ]
    try:
        with torch.no_grad():
            run()
    finally:
        for handle in handles:
            handle.remove()
    return flow
