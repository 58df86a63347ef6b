"""Who feeds whom: a record of one real forward pass.

Module hooks note every call with the identity of the tensors that go in and come out. Unlike
symbolic tracing this asks nothing of the model: any Python that runs can be recorded.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten


def tensors_in(value: Any) -> list[Tensor]:
    """The tensors among the leaves of nested tuples, lists and dicts, in order."""
    return [leaf for leaf in tree_flatten(value)[0] if isinstance(leaf, Tensor)]


@dataclass(frozen=True)
class Call:
    """One call of a module: its path, and the tensors that went in and came out."""

    path: str
    inputs: tuple[Tensor, ...]
    outputs: tuple[Tensor, ...]


@dataclass
class Dataflow:
    """Calls of one forward pass, in the order in which they ended."""

    calls: list[Call] = field(default_factory=list)

    def called(self, path: str) -> list[Call]:
        """All calls of the module at `path`."""
        return [call for call in self.calls if call.path == path]

    def feeds(self, producer: str, consumer: str) -> bool:
        """Whether the very tensor that `producer` returns is an input of `consumer` (both called once)."""
        first, second = self.called(producer), self.called(consumer)
        if len(first) != 1 or len(second) != 1:
            return False
        made = {id(tensor) for tensor in first[0].outputs}
        return any(id(tensor) in made for tensor in second[0].inputs)

    def shared_inputs(self, paths: list[str]) -> list[list[str]]:
        """Group modules that read the same first tensor, in order of their first call."""
        groups: dict[int, list[str]] = {}
        wanted = set(paths)
        for call in self.calls:
            if call.path in wanted and call.inputs:
                group = groups.setdefault(id(call.inputs[0]), [])
                if call.path not in group:
                    group.append(call.path)
        return list(groups.values())


def trace(model: nn.Module, run: Callable[[], object]) -> Dataflow:
    """Record the calls of all submodules of `model` while `run()` executes it once, without gradients.

    The record keeps the tensors alive, so that identities stay unique; drop it after use.
    """
    flow = Dataflow()

    def note(path: str) -> Callable[..., None]:
        def hook(_: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
            inputs, outputs = tuple(tensors_in((args, kwargs))), tuple(tensors_in(output))
            flow.calls.append(Call(path, inputs, outputs))

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
