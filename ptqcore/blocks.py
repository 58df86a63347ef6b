"""The partition of a model into blocks that are quantized as one."""

from collections import defaultdict
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import cached_property

from torch import nn

from ptqcore.attachments import carry_over
from ptqcore.dataflow import Dataflow, Op, inside
from ptqcore.errors import ModelError, nearest
from ptqcore.modules import QuantModule, quantizable_layers, quantized_class, replace_module
from ptqcore.packed import QuantizedTensor
from ptqcore.placement import LAYERS
from ptqcore.spec import QuantSpec

MOST_LAYERS_IN_A_ROW = 3
MOST_LAYERS_AROUND_A_SKIP = 8
NETWORK_WISE = "network-wise"


@dataclass(frozen=True)
class Block:
    """A part of the model that is quantized as one: `path` names it inside `model`."""

    model: nn.Module
    path: str

    @property
    def module(self) -> nn.Module:
        """The block itself, as it now is."""
        return self.model.get_submodule(self.path)

    def layers(self) -> dict[str, nn.Module]:
        """Its float layers that can be quantized, by their path in the model."""
        return quantizable_layers(self.module, self.path)

    def quantized_layers(self) -> dict[str, QuantModule]:
        """Its quantized layers, by their path in the model."""
        named = self.module.named_modules(prefix=self.path)
        return {name: module for name, module in named if isinstance(module, QuantModule)}

    def quantize_layer(
        self, path: str, weight: QuantizedTensor, input_spec: QuantSpec | None
    ) -> QuantModule:
        """Replace the float layer at `path` by its quantized kind and return that.

        A static input quantizer is left without a range; steps call `Step.quantize_layer`, which
        sets it.

        Raises:
            ModelError: if the layer has no quantized kind.
        """
        layer = self.model.get_submodule(path)
        kind = quantized_class(layer)
        if kind is None:
            raise ModelError(f"layer {path!r} ({type(layer).__name__}) has no quantized kind")
        quantized = kind(layer, weight.spec, input_spec)
        quantized.set_weight(weight)
        quantized.train(layer.training)
        carry_over(layer, quantized)
        if path == "":
            raise ModelError(
                "a model that is one bare layer cannot be changed in place: wrap it in a module"
            )
        replace_module(self.model, path, quantized)
        return quantized


def find_blocks(
    model: nn.Module, flow: Dataflow, targets: set[str], glob: str | None = None
) -> list[Block]:
    """Partition a model into blocks, in the order in which they run; every target is in one of them.

    Without a glob a block is the outermost module around a residual addition that has at most 8
    target layers in a row (a residual block, a transformer layer), else a module of at most 3 layers
    in a row with no such addition inside (a stem, an inverted bottleneck without shortcut, a head).
    Modules that are called more than once, and what holds them, stay in one block.

    Args:
        model: the model.
        flow: one traced forward pass of it.
        targets: paths of the layers that will be quantized.
        glob: paths of the blocks, instead; `network-wise`: the whole model is one block.

    Raises:
        ModelError: if the glob matches nothing, or modules that are no blocks.
    """
    if glob is None:
        paths = _Partition(model, flow, targets).split("")
    else:
        paths = [""] if glob == NETWORK_WISE else _matching(model, flow, glob)
    return [Block(model, path) for path in paths]


class _Partition:
    def __init__(self, model: nn.Module, flow: Dataflow, targets: set[str]) -> None:
        self.flow, self.targets = flow, targets
        self.children: dict[str, list[str]] = defaultdict(list)
        for path, _ in model.named_modules():
            if path and any(inside(target, path) for target in targets):
                self.children[path.rpartition(".")[0]].append(path)
        self.variable = flow.variable() & flow.floating
        self.producers = flow.producers()
        self._known_depths: dict[str, dict[int, int]] = {}

    def split(self, path: str) -> list[str]:
        """The blocks of a module, in the order of their calls."""
        parts = self._parts(path)
        if path in self.targets or any(len(self.flow.called(part)) != 1 for part in parts):
            return [path]
        if path and self._is_block(path, parts):
            return [path]
        blocks = [block for part in parts for block in self.split(part)]
        if path == "":
            order = {call.path: index for index, call in enumerate(self.flow.calls)}
            blocks.sort(key=lambda block: order.get(block, 0))
        return blocks

    def _parts(self, path: str) -> list[str]:
        """The children of a module that hold targets; of lists, which are never called, their members."""
        parts = []
        for child in self.children[path]:
            uncalled = not self.flow.called(child) and child not in self.targets
            parts += self._parts(child) if uncalled else [child]
        return parts

    def _is_block(self, path: str, parts: list[str]) -> bool:
        layers = [target for target in self.targets if inside(target, path)]
        if len(layers) == 1:
            return True
        if len(parts) == 1:
            return False
        depth = self._depth(path)
        if path in self._skips and depth <= MOST_LAYERS_AROUND_A_SKIP:
            return True
        smaller = any(skip != path and inside(skip, path) for skip in self._skips)
        return depth <= MOST_LAYERS_IN_A_ROW and not smaller

    def _ops(self, path: str) -> list[Op]:
        return [op for op in self.flow.ops if inside(op.site.owner, path)]

    def _depths(self, path: str) -> dict[int, int]:
        """Tensor number → target layers on the longest way to it from the module's inputs."""
        if path in self._known_depths:
            return self._known_depths[path]
        depths: dict[int, int] = {}
        for op in self._ops(path):
            depth = max((depths.get(number, 0) for number in op.inputs), default=0)
            if op.name in LAYERS and op.site.owner in self.targets:
                depth += 1
            depths.update(dict.fromkeys(op.outputs, depth))
        self._known_depths[path] = depths
        return depths

    def _depth(self, path: str) -> int:
        return max(self._depths(path).values(), default=0)

    @cached_property
    def _skips(self) -> set[str]:
        """The smallest modules around each addition of something to what was computed from it."""
        additions = [op for op in self.flow.ops if op.name == "add" and len(self._operands(op)) > 1]
        return {path for op in additions if (path := self._smallest_around(op)) is not None}

    def _operands(self, op: Op) -> list[int]:
        return [number for number in dict.fromkeys(op.inputs) if number in self.variable]

    def _smallest_around(self, addition: Op) -> str | None:
        path = addition.site.owner
        while path:
            if len(self.flow.called(path)) == 1 and self._is_skip(addition, path):
                return path
            path = path.rpartition(".")[0]
        return None

    def _is_skip(self, addition: Op, path: str) -> bool:
        """Whether the operands come from a common input of the module, one of them through a target."""
        depths = self._depths(path)
        operands = self._operands(addition)
        if not any(depths.get(number, 0) for number in operands):
            return False
        first, *others = (self._sources(number, path) for number in operands)
        return all(first & other for other in others)

    def _sources(self, number: int, path: str) -> set[int]:
        """The inputs of a module from which a tensor inside it is computed."""
        found, seen, left = set(), set(), [number]
        while left:
            current = left.pop()
            if current in seen or current not in self.variable:
                continue
            seen.add(current)
            producer = self.producers.get(current)
            if producer is None or not inside(producer.site.owner, path):
                found.add(current)
            else:
                left.extend(producer.inputs)
        return found


def _matching(model: nn.Module, flow: Dataflow, glob: str) -> list[str]:
    paths = [path for path, _ in model.named_modules() if path]
    parts = glob.count(".")
    matched = {path for path in paths if fnmatchcase(path, glob) and path.count(".") == parts}
    if not matched:
        raise ModelError(f"recipe key 'blocks' is {glob!r} and matches no module{nearest(glob, paths)}")
    order = [call.path for call in flow.calls if call.path in matched]
    if not order:
        raise ModelError(
            f"recipe key 'blocks' is {glob!r}, but none of the modules it matches is called: "
            "name the modules themselves, not the list that holds them"
        )
    for path in order:
        if order.count(path) > 1:
            raise ModelError(
                f"recipe key 'blocks' is {glob!r}, but {path!r} is called {order.count(path)} times: "
                "a block is called once, name a module that holds all its calls"
            )
    return order
