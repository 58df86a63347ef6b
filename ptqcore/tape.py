"""The tape: what one sample does between and around the blocks of a model, recorded in one pass."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import count
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import TreeSpec, tree_flatten, tree_unflatten
from torch.utils.weak import WeakTensorKeyDictionary

from ptqcore import edges
from ptqcore.blocks import Block
from ptqcore.dataflow import Running, Site, tensors_in
from ptqcore.decompositions import decomposed
from ptqcore.edges import TensorFunction
from ptqcore.on_disk import in_memory
from ptqcore.outline import Outline, standing_in
from ptqcore.placement import Edge
from ptqcore.store import Store


@dataclass(frozen=True)
class Reference:
    """Stands for a tensor that flows, in the leaves of a recorded call."""

    number: int


@dataclass
class Node:
    """One entry of the tape: a block (`function` is None), or a function between blocks."""

    leaves: list[Any]
    structure: TreeSpec
    function: Callable[..., Any] | None = None
    site: Site | None = None
    outputs: tuple[int, ...] = ()

    def does_as(self, other: "Node") -> bool:
        """Whether it is the same call, of the same constants and of tensors from the same places."""
        return (
            (self.site, self.outputs, self.structure) == (other.site, other.outputs, other.structure)
            and self.function is other.function
            and all(map(_same, self.leaves, other.leaves))
        )


def _same(one: Any, other: Any) -> bool:
    if isinstance(one, Tensor) and isinstance(other, Tensor):
        return one is other or (one.dtype == other.dtype and torch.equal(one, other))
    if isinstance(one, (Tensor, Reference)) or isinstance(other, (Tensor, Reference)):
        return isinstance(one, Reference) and one == other
    return one is other or bool(one == other)


@dataclass
class Tape:
    """What one sample does: its nodes, and the tensors that flow, by number, as they now are."""

    nodes: list[Node] = field(default_factory=list)
    flowing: dict[int, Tensor] = field(default_factory=dict)
    exact: dict[int, Tensor] = field(default_factory=dict)

    def arguments(
        self,
        node: Node,
        exact: bool = False,
        copy: bool = False,
        stream: Mapping[int, Tensor] | None = None,
    ) -> Any:
        """Args and kwargs of a node; `exact` takes the full-precision stream, `stream` any other."""
        if stream is None:
            stream = self.exact if exact else self.flowing
        leaves = [
            in_memory(stream[leaf.number]) if isinstance(leaf, Reference) else leaf for leaf in node.leaves
        ]
        if copy:
            leaves = [
                new.clone() if isinstance(old, Reference) else new
                for old, new in zip(node.leaves, leaves, strict=True)
            ]
        return tree_unflatten(leaves, node.structure)

    @cached_property
    def _last_read(self) -> dict[int, int]:
        return {
            leaf.number: position
            for position, node in enumerate(self.nodes)
            for leaf in node.leaves
            if isinstance(leaf, Reference)
        }

    def does_as(self, other: "Tape") -> bool:
        """Whether another tape has the same calls; what flows into the first may differ."""
        return len(self.nodes) == len(other.nodes) and all(
            one.does_as(node) for one, node in zip(self.nodes, other.nodes, strict=True)
        )

    def forget(self, position: int) -> None:
        """Drop the tensors that no node from `position` on reads."""
        for stream in (self.flowing, self.exact):
            for number in [n for n in stream if self._last_read.get(n, -1) < position]:
                del stream[number]


class _Captured(Exception):  # noqa: N818 - a signal that ends a forward pass, not an error
    pass


class TapeRecorder(TorchFunctionMode):
    """Writes the tape of one sample.

    `early` is done to the tensors in front of the first block. With `outlines`, one for each block, blocks
    are not computed; else `outlines` are found, of blocks that return new tensors alone.
    """

    def __init__(
        self,
        blocks: list[Block],
        exact: bool,
        store: Store,
        early: Mapping[Edge, TensorFunction],
        outlines: Sequence[Outline] = (),
    ) -> None:
        super().__init__()
        self.tape = Tape()
        self.outlines: list[Outline | None] = list(outlines)
        self._standing_in = dict(zip((block.module for block in blocks), outlines, strict=False))
        self._early = edges.by_site(early)
        self._blocks, self._keep_exact, self._store = blocks, exact, store
        self._running = Running()
        self._inside = False
        self._done = 0
        self._numbers = WeakTensorKeyDictionary()
        self._unused = count()

    def record(self, run: Callable[[], object]) -> None:
        model = self._blocks[0].model
        self._constants = {id(tensor) for tensor in (*model.parameters(), *model.buffers())}
        wanted = {block.module: index for index, block in enumerate(self._blocks)}
        handles = []
        for path, module in model.named_modules():
            handles.append(
                module.register_forward_pre_hook(
                    self._enter(path, wanted.get(module)), with_kwargs=True, prepend=True
                )
            )
            handles.append(
                module.register_forward_hook(
                    self._leave(wanted.get(module)), with_kwargs=True, always_call=True
                )
            )
        try:
            with standing_in(self._standing_in), self, decomposed():
                run()
        except _Captured:
            pass
        finally:
            for handle in handles:
                handle.remove()

    def _number(self, tensor: Tensor) -> int:
        if tensor not in self._numbers:
            self._numbers[tensor] = next(self._unused)
        return int(self._numbers[tensor])

    def _enter(self, path: str, index: int | None) -> Callable[..., None]:
        def hook(_: nn.Module, args: Any, kwargs: Any) -> None:
            if index is not None:
                self._start_block(index, args, kwargs)
            self._running.enter(path)

        return hook

    def _leave(self, index: int | None) -> Callable[..., None]:
        def hook(_: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
            self._running.leave()
            if index is None or output is None:
                return
            node = self.tape.nodes[-1]
            if not self._standing_in:
                self.outlines.append(self._outline(output))
            node.outputs = tuple(self._number(tensor) for tensor in tensors_in(output))
            self._inside = False
            if index == len(self._blocks) - 1:
                raise _Captured

        return hook

    def _outline(self, output: Any) -> Outline | None:
        known = any(x in self._numbers or id(x) in self._constants for x in tensors_in(output))
        return None if known else Outline.of(output)

    def _start_block(self, index: int, args: Any, kwargs: Any) -> None:
        if index != self._done:
            raise _Captured  # the tape stays short, which `Walk` reports
        self._done += 1
        self._inside = True
        leaves, structure = tree_flatten((args, kwargs))
        if index == 0:
            for leaf in tensors_in(leaves):
                if id(leaf) in self._constants:
                    continue
                self.tape.flowing[self._number(leaf)] = self._store.keep(leaf.clone())
            if self._keep_exact:
                self.tape.exact = {n: self._store.keep(x.clone()) for n, x in self.tape.flowing.items()}
        self.tape.nodes.append(Node(self._referring(leaves), structure))

    def _referring(self, leaves: list[Any]) -> list[Any]:
        return [
            Reference(self._number(leaf)) if isinstance(leaf, Tensor) and leaf in self._numbers else leaf
            for leaf in leaves
        ]

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        site = self._running.site(func)
        if not self._done:
            early = [] if self._running.idle else self._early.get(site, [])
            return edges.call(func, args, kwargs or {}, early)
        if self._inside:
            return func(*args, **(kwargs or {}))
        leaves, structure = tree_flatten((args, kwargs or {}))
        referring = self._referring(leaves)
        output = func(*args, **(kwargs or {}))
        made = tensors_in(output)
        flows = any(isinstance(leaf, Reference) for leaf in referring)
        if flows and (made or output is None):
            numbers = tuple(self._number(tensor) for tensor in made)
            self.tape.nodes.append(Node(referring, structure, func, site, numbers))
        return output
