"""What the dataflow map says of norms and linear layers: who reads what, and what lies between."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from functools import cached_property

from torch import nn

from ptqcore import Block, Dataflow, Op

_HANDS_ON = {
    "clone",
    "contiguous",
    "detach",
    "flatten",
    "float",
    "getitem",
    "index_select",
    "reshape",
    "squeeze",
    "to",
    "type",
    "type_as",
    "unsqueeze",
    "view",
}
_MIXES_TOKENS = {"baddbmm", "einsum", "matmul", "scaled_dot_product_attention", "softmax"}
_LOOKS_ONLY = {
    "device",
    "dim",
    "dtype",
    "empty_like",
    "new_empty",
    "new_zeros",
    "ones_like",
    "shape",
    "size",
    "zeros_like",
}


@dataclass
class Readers:
    """Who reads a tensor: linear layers, other parameters, and anything else at all."""

    layers: list[str] = field(default_factory=list)
    parameters: list[str] = field(default_factory=list)
    anything_else: bool = False


class FlowQuestions:
    """Answers from one traced forward pass; tensors are named by their numbers in it."""

    def __init__(self, model: nn.Module, flow: Dataflow) -> None:
        self.model, self.flow = model, flow
        self.consumers, self.producers = flow.consumers(), flow.producers()
        self.order = {call.path: index for index, call in enumerate(flow.calls)}
        self.returned = {number for call in flow.called("") for number in call.outputs}
        self._linear = {op.site.owner: op for op in reversed(flow.ops) if op.name == "linear"}

    @cached_property
    def norms(self) -> dict[int, str]:
        """The tensor that a norm returns → its path, for every norm that is called once.

        A norm is what has one gain per channel of its output.
        """
        found = {}
        for path, module in self.model.named_modules():
            weight = module._parameters.get("weight")
            calls = self.flow.called(path)
            if weight is None or weight.ndim != 1 or len(calls) != 1 or len(calls[0].outputs) != 1:
                continue
            (output,) = calls[0].outputs
            if self.flow.shapes[output][-1:] == tuple(weight.shape):
                found[output] = path
        return found

    def in_order(self, paths: Iterable[str]) -> list[str]:
        """Those of some modules that are called, in the order of their calls."""
        return sorted((path for path in paths if path in self.order), key=self.order.__getitem__)

    def input(self, path: str) -> int | None:
        """The tensor that a linear layer reads in its first call."""
        op = self._linear.get(path)
        return None if op is None else op.inputs[0]

    def source(self, number: int | None) -> int | None:
        """The tensor that another one is, before functions that hand its channels on."""
        while number is not None and number not in self.norms:
            op = self.producers.get(number)
            if op is None or op.name not in _HANDS_ON or not self._keeps_channels(op.inputs[0], number):
                break
            number = op.inputs[0]
        return number

    def layer_that_returns(self, number: int | None) -> str | None:
        """The linear layer, called once, whose output a tensor is."""
        op = None if number is None else self.producers.get(number)
        if op is None or op.name != "linear" or len(self.flow.called(op.site.owner)) != 1:
            return None
        return op.site.owner

    def readers(self, number: int) -> Readers:
        """Who reads a tensor, if only behind functions that hand its channels on."""
        found = Readers(anything_else=number in self.returned)
        for op in self.consumers.get(number, []):
            if op.name == "linear" and op.inputs[0] == number:
                self._add_reader(op.site.owner, op.inputs[1], found)
            elif op.name in _HANDS_ON and all(self._keeps_channels(number, out) for out in op.outputs):
                for output in op.outputs:
                    below = self.readers(output)
                    found.layers += [path for path in below.layers if path not in found.layers]
                    found.parameters += below.parameters
                    found.anything_else |= below.anything_else
            elif op.name not in _LOOKS_ONLY:
                found.anything_else = True
        return found

    def sinks(self, paths: Iterable[str], block: Block) -> list[str]:
        """The linear layers of the block that first read what other layers of it lead to."""
        layers, given = block.layers(), set(paths)
        left = [n for op in self.flow.ops if op.site.owner in given for n in op.outputs]
        found, seen = [], set(left)
        while left:
            for op in self.consumers.get(left.pop(), []):
                if op.name == "linear" and op.site.owner in layers:
                    found.append(op.site.owner)
                elif within(op.site.owner, block.path):
                    left += [number for number in op.outputs if number not in seen]
                    seen.update(op.outputs)
        return self.in_order(set(found) - given)

    def parent(self, paths: Iterable[str], block: Block) -> str:
        """The innermost module of the block around some of its layers that is called once."""
        split = [path.split(".") for path in paths]
        shared = 0
        while len({tuple(parts[: shared + 1]) for parts in split}) == 1 and shared < len(split[0]) - 1:
            shared += 1
        path = ".".join(split[0][:shared])
        while path != block.path and len(self.flow.called(path)) != 1:
            path = path.rpartition(".")[0]
        return path

    def before(self, paths: Sequence[str], block: Block) -> list[str]:
        """The linear layers of the block that are called before the first of some of them, in order."""
        first = self.order[paths[0]]
        return [path for path in self.in_order(block.layers()) if self.order[path] < first]

    def layers_before(self, path: str, layers: Iterable[str]) -> list[str]:
        """Those of some linear layers from which a layer's input is computed without another between,
        the last called first."""
        owners = {op.site.owner for op in self._ops_before(self.input(path)) if op.name == "linear"}
        return self.in_order(owners.intersection(layers))[::-1]

    def behind_attention(self, path: str) -> bool:
        """Whether tokens are mixed between the last linear layers and a layer's input."""
        return any(op.name in _MIXES_TOKENS for op in self._ops_before(self.input(path)))

    def _add_reader(self, owner: str, weight: int, found: Readers) -> None:
        if type(self.model.get_submodule(owner)) is nn.Linear:
            if owner not in found.layers:
                found.layers.append(owner)
            return
        while weight not in self.flow.names and weight in self.producers:
            weight = self.producers[weight].inputs[0]  # a parameter in another dtype
        if weight in self.flow.names:
            found.parameters.append(self.flow.names[weight])
        else:
            found.anything_else = True

    def _keeps_channels(self, before: int, after: int) -> bool:
        shapes = self.flow.shapes
        return shapes[before][-1:] == shapes[after][-1:]

    def _ops_before(self, number: int | None) -> list[Op]:
        """What a tensor is computed by, back to linear layers."""
        left, seen = [] if number is None else [number], {}
        while left:
            op = self.producers.get(left.pop())
            if op is not None and op.site not in seen:
                seen[op.site] = op
                left += () if op.name == "linear" else op.inputs
        return list(seen.values())


def within(path: str, block: str) -> bool:
    """Whether a path names a module or something below it."""
    return path == block or path.startswith(f"{block}.") or not block
