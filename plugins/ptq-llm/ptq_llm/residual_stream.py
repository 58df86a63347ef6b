"""The residual stream of a model, found in its dataflow: what a rotation of the stream has to change.

Tensors whose channels must be rotated alike form a basis: those that additions, moves and scalar factors
connect. A linear function leads from one basis to another, and so does a norm. The residual stream is the
basis into which most of them write. No name of a module or of an architecture is known here.
"""

from collections import Counter, defaultdict
from collections.abc import Iterable
from dataclasses import dataclass

from torch import nn

from ptq_llm.norm_probe import Norm, find_norm
from ptqcore import Dataflow, Op

Place = tuple[str, str]
"""A parameter: the path of the module that has it, and its name there."""

_CASTS = {"to", "type", "type_as", "float", "half", "bfloat16", "double"}
_MOVE = _CASTS | {
    "cat",
    "chunk",
    "clone",
    "contiguous",
    "detach",
    "dropout",
    "expand",
    "flatten",
    "getitem",
    "index_add",
    "index_copy",
    "index_put",
    "index_select",
    "mean",
    "movedim",
    "narrow",
    "permute",
    "repeat",
    "reshape",
    "select",
    "setitem",
    "split",
    "squeeze",
    "stack",
    "sum",
    "transpose",
    "unbind",
    "unflatten",
    "unsqueeze",
    "view",
}
_MAKE_ZEROS = {"zeros_like", "new_zeros", "empty_like", "new_empty"}


class StreamError(Exception):
    """Why the residual stream cannot be rotated: half a sentence."""


@dataclass(frozen=True)
class Linear:
    """One call of a linear function: where its parameters are, what it reads and what it returns."""

    weight: Place
    bias: Place | None
    input: int
    output: int


@dataclass(frozen=True)
class ResidualStream:
    """What reads and makes the residual stream.

    tables: parameters [..., channels] that are added to it, row by row (embeddings) or as they are.
    writers: linear functions whose output is added to it.
    readers: linear functions that read it, each with the path of the norm between, if there is one.
    norms: the norms that read it, by path.
    """

    channels: int
    tables: list[Place]
    writers: list[Linear]
    readers: list[tuple[Linear, str | None]]
    norms: dict[str, Norm]


class Bases:
    """Which tensors have the same basis, and the functions that lead from one basis to another.

    linears, tables: the calls of linear functions, and of embeddings (place, output). norms: by path.
    normed: the calls of norms (path, input, output). why_fixed: basis → what makes it impossible to rotate
    it, half a sentence. members: basis → its tensors.
    """

    def __init__(self, model: nn.Module, flow: Dataflow) -> None:
        self.model, self.flow = model, flow
        self.linears: list[Linear] = []
        self.tables: list[tuple[Place, int]] = []
        self.norms: dict[str, Norm] = {}
        self.normed: list[tuple[str, int, int]] = []
        self._parents: dict[int, int] = {}
        self._fixed: dict[int, str] = {}
        self._producers = flow.producers()
        self._parameters = dict(model.named_parameters())
        self._find_norms()
        for op in flow.ops:
            if op.site.owner not in self.norms:
                self._add(op)
        self._parameters.clear()  # so that those that are replaced can be freed
        self.why_fixed = {self.of(number): why for number, why in self._fixed.items()}
        self.members: dict[int, list[int]] = defaultdict(list)
        for number in sorted({n for op in flow.ops for n in (*op.inputs, *op.outputs)} & flow.floating):
            self.members[self.of(number)].append(number)

    def of(self, number: int) -> int:
        """The basis of a tensor: a number that is the same for all tensors of it."""
        root = number
        while (parent := self._parents.get(root, root)) != root:
            root = parent
        while number != root:
            self._parents[number], number = root, self._parents[number]
        return root

    def stream(self) -> int | None:
        """The basis of the residual stream: that into which most functions write, two at least."""
        made = [linear.output for linear in self.linears]
        made += [output for _, output in self.tables] + [output for *_, output in self.normed]
        counts = Counter(map(self.of, made)).most_common(1)
        return counts[0][0] if counts and counts[0][1] > 1 else None

    def behind_norms(self) -> set[int]:
        """The bases of what norms return."""
        return {self.of(output) for *_, output in self.normed}

    def _find_norms(self) -> None:
        for path, module in self.model.named_modules():
            calls = self.flow.called(path)
            pairs = [(*call.inputs, *call.outputs) for call in calls]
            if list(module.children()) or any(len(pair) != 2 or pair[0] == pair[1] for pair in pairs):
                continue
            numbers = {number for pair in pairs for number in pair}
            channels = {self._last(number) for number in numbers}
            norm = find_norm(module, channels.pop()) if len(channels) == 1 else None
            if norm is not None and numbers <= self.flow.floating:
                self.norms[path] = norm
                self.normed += [(path, *pair) for pair in pairs]

    def _add(self, op: Op) -> None:
        """Note what a function does with the bases of its tensors."""
        given = [n for n in op.inputs if n in self.flow.floating]
        made = [n for n in op.outputs if n in self.flow.floating]
        if op.name == "linear":
            self._add_linear(op)
        elif op.name == "embedding" and (place := self._place(op.site.owner, given[0])):
            self.tables.append((place, made[0]))
        elif op.name in _MOVE or _adds_vectors(op, given):
            self._join([*given, *made], op)
        elif self._scales(op, given):
            self._join([number for number in (*given, *made) if self._last(number) > 1], op)
        elif op.name not in _MAKE_ZEROS:
            self._fix([*given, *made], op)

    def _add_linear(self, op: Op) -> None:
        owner, (x, weight, *bias) = op.site.owner, op.inputs
        place, bias_place = self._place(owner, weight), self._place(owner, bias[0]) if bias else None
        if place is None or (bias and bias_place is None):
            self._fix([x, *op.outputs], op)
        else:
            self.linears.append(Linear(place, bias_place, x, op.outputs[0]))

    def _scales(self, op: Op, given: list[int]) -> bool:
        """Whether a function multiplies or divides all channels of one tensor by one number."""
        vectors = [number for number in op.inputs if self._last(number) > 1]
        return (op.name == "mul" or (op.name == "div" and op.inputs[0] in vectors)) and (
            len(vectors) == 1 and vectors[0] in given
        )

    def _place(self, owner: str, number: int) -> Place | None:
        """Where a module has the parameter that a function read, cast or not."""
        while number not in self.flow.names:
            op = self._producers.get(number)
            if op is None or op.name not in _CASTS:
                return None
            number = op.inputs[0]
        parameter = self._parameters.get(self.flow.names[number])
        own = self.model.get_submodule(owner)._parameters.items()
        return next(
            ((owner, name) for name, value in own if value is not None and value is parameter), None
        )

    def _last(self, number: int) -> int:
        """How many channels a tensor has."""
        shape = self.flow.shapes[number]
        return shape[-1] if shape else 1

    def _join(self, numbers: list[int], op: Op) -> None:
        """One basis for all; where channels are cut or merged, it cannot be rotated."""
        if len({self._last(number) for number in numbers}) > 1:
            self._fix(numbers, op)
        for number in numbers[1:]:
            self._parents[self.of(number)] = self.of(numbers[0])

    def _fix(self, numbers: Iterable[int], op: Op) -> None:
        for number in numbers:
            self._fixed[number] = f"{op.site.owner or 'the model'} computes {op.name} of it"


def _adds_vectors(op: Op, given: list[int]) -> bool:
    """Whether a function adds tensors, not a number to all channels."""
    return op.name in ("add", "sub") and len(given) == len(op.inputs) > 1


def find_stream(bases: Bases) -> ResidualStream:
    """The residual stream of a model.

    Raises:
        StreamError: if the stream cannot be rotated.
    """
    stream = bases.stream()
    if stream is None:
        raise StreamError("no two layers write into one stream")
    behind = _behind(bases, stream)
    for basis in (stream, *behind):
        _check(bases, basis)
    found = ResidualStream(
        channels=bases.flow.shapes[bases.members[stream][0]][-1],
        tables=_tables(bases, stream),
        writers=[linear for linear in bases.linears if bases.of(linear.output) == stream],
        readers=[
            (linear, behind.get(bases.of(linear.input)))
            for linear in bases.linears
            if bases.of(linear.input) in (stream, *behind)
        ],
        norms={path: bases.norms[path] for path in dict.fromkeys(behind.values())},
    )
    _check_roles(bases, found)
    return found


def _behind(bases: Bases, stream: int) -> dict[int, str]:
    """Basis of what a norm of the stream returns → path of the norm."""
    found: dict[int, str] = {}
    for path, given, output in bases.normed:
        basis = bases.of(output)
        if basis == stream:
            raise StreamError(f"what the norm {path!r} returns is added to it, gain and all")
        if bases.of(given) == stream and found.setdefault(basis, path) != path:
            raise StreamError(f"what the norms {found[basis]!r} and {path!r} return is added")
    for path, given, output in bases.normed:
        if (path in found.values() or bases.of(output) in found) and bases.of(given) != stream:
            raise StreamError(f"the norm {path!r} reads other tensors too")
    layers = [(linear.weight[0], linear.output) for linear in bases.linears]
    for owner, output in [*layers, *((place[0], output) for place, output in bases.tables)]:
        if bases.of(output) in found:
            raise StreamError(f"what {owner!r} returns is added to what a norm returns")
    return found


def _check(bases: Bases, basis: int) -> None:
    if basis in bases.why_fixed:
        raise StreamError(bases.why_fixed[basis])
    for call in bases.flow.called(""):
        if any(bases.of(number) == basis for number in call.outputs):
            raise StreamError("the model returns it")


def _tables(bases: Bases, stream: int) -> list[Place]:
    """The parameters that are added to the stream, through an embedding or as they are."""
    found = [place for place, output in bases.tables if bases.of(output) == stream]
    produced = set(bases.flow.producers())
    for number in bases.members[stream]:
        if number not in produced:
            owner, _, name = bases.flow.names.get(number, "").rpartition(".")
            if name not in bases.model.get_submodule(owner)._parameters:
                raise StreamError(f"{bases.flow.names.get(number, 'an input of the model')} is added to it")
            found.append((owner, name))
    return list(dict.fromkeys(found))


def _check_roles(bases: Bases, stream: ResidualStream) -> None:
    """Every parameter must have one role, whichever call reads it."""
    roles: dict[Place, set[object]] = defaultdict(set)
    norms = {linear: norm or "" for linear, norm in stream.readers}
    writers = set(stream.writers)
    for linear in bases.linears:
        roles[linear.weight].add((norms.get(linear), linear in writers))
    for place in stream.tables:
        roles[place].add("table")
    for place, found in roles.items():
        if len(found) > 1:
            raise StreamError(f"{'.'.join(place)} is used in two ways")
