"""What flows into and out of each module of a denoiser depends on: found by changing one thing at a time.

Values decide, not the way they are computed: what is multiplied by zero, or read for its shape alone, is
no dependency.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils._pytree import tree_flatten
from torch.utils.weak import WeakTensorKeyDictionary

from ptq_diffusion.calls import DenoiserCall, at_least_float32, other_times
from ptqcore import ModelError, digest_of, tensors_in

_ROUNDS = 3
_SEED = 0

Dependencies = frozenset[str]
"""Some of `sample`, `condition` and `timestep`."""


@dataclass(frozen=True)
class ProbedCall:
    """What the tensors of one call of a module depend on, and all its other arguments together."""

    inputs: tuple[Dependencies, ...]
    outputs: tuple[Dependencies, ...]
    others: Dependencies

    @property
    def given(self) -> Dependencies:
        """What anything that the module was called with depends on."""
        return self.others.union(*self.inputs)


def has_weight(module: nn.Module) -> bool:
    """Whether a module is a layer: it has a weight of two or more dimensions, and does not just show that
    of a layer inside it."""
    if not _shows_weight(module):
        return False
    return "weight" in module._parameters or not any(
        _shows_weight(part) for part in module.modules() if part is not module
    )


def _shows_weight(module: nn.Module) -> bool:
    weight = getattr(module, "weight", None)
    return isinstance(weight, Tensor) and weight.ndim >= 2


def probe(model: nn.Module, call: DenoiserCall) -> dict[str, list[ProbedCall]]:
    """The calls of every module in a forward pass, by path, and what they depend on.

    The sample, the conditions and the time are changed in turn, each several times, and each change starts
    from what the ones before it left. The model computes in evaluation mode and in single precision at
    least; parameters that are all zero, as networks before training have them, are random. The model itself
    stays as it is.

    Raises:
        ModelError: if a layer gets values that are not numbers, behind which nothing could be seen.
    """
    generator = torch.Generator().manual_seed(_SEED)
    state = _state(model, generator)
    start = current = call.as_float32()
    with evaluating(model), torch.no_grad():
        before = _run(model, state, current)
        found = {path: [_Changes(one) for one in calls] for path, calls in before.items()}
        for turn in range(_ROUNDS):
            for variable in ("sample", "condition", "timestep"):
                if variable == "sample":
                    current = current.with_sample(generator)
                elif variable == "timestep":
                    current = current.with_timestep(other_times(start.times, turn, _ROUNDS))
                elif current.conditions:
                    current = current.with_condition(generator)
                else:
                    continue
                after = _run(model, state, current)
                _note(found, before, after, variable)
                before = after
    return {path: [change.result() for change in changes] for path, changes in found.items()}


@dataclass(frozen=True)
class _Seen:
    """Digests of the tensors of a call, and its other arguments."""

    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    others: str

    @property
    def all(self) -> tuple[str, ...]:
        return (self.others, *self.inputs, *self.outputs)


@dataclass
class _Changes:
    """What was seen to change what a call of a module has."""

    seen: _Seen
    by: list[set[str]] = field(init=False)

    def __post_init__(self) -> None:
        self.by = [set() for _ in self.seen.all]

    def note(self, variable: str, before: _Seen, after: _Seen) -> None:
        """A change of the variable has turned one call into the other."""
        if not len(before.all) == len(after.all) == len(self.by):
            self.note_all(variable)
            return
        for by, then, now in zip(self.by, before.all, after.all, strict=True):
            if then != now:
                by.add(variable)

    def note_all(self, variable: str) -> None:
        """All that the call has depends on the variable."""
        for by in self.by:
            by.add(variable)

    def result(self) -> ProbedCall:
        others, *tensors = map(frozenset, self.by)
        count = len(self.seen.inputs)
        return ProbedCall(tuple(tensors[:count]), tuple(tensors[count:]), others)


def _note(
    found: dict[str, list[_Changes]],
    before: dict[str, list[_Seen]],
    after: dict[str, list[_Seen]],
    variable: str,
) -> None:
    for path, changes in found.items():
        then, now = before.get(path, []), after.get(path, [])
        if len(then) == len(now):
            for change, one, other in zip(changes, then, now, strict=False):
                change.note(variable, one, other)
        else:  # how often the module runs depends on it
            for change in changes:
                change.note_all(variable)


def _run(model: nn.Module, state: dict[str, Tensor], call: DenoiserCall) -> dict[str, list[_Seen]]:
    """What every module is called with and returns."""
    found: dict[str, list[_Seen]] = {}
    digests = _Digests()
    given: list[tuple[tuple[str, ...], str]] = []

    def enter(path: str, layer: bool) -> Callable[..., None]:
        def hook(_: nn.Module, args: Any, kwargs: Any) -> None:
            leaves = tree_flatten((args, kwargs))[0]
            tensors = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
            if layer and any(bool(tensor.isnan().any()) for tensor in tensors):
                raise ModelError(
                    f"layer {path!r} gets values that are not numbers (NaN) when the sample, the "
                    "conditions or the time change: call the model with values of the usual size"
                )
            plain = [leaf for leaf in leaves if isinstance(leaf, int | float | str)]
            given.append((digests.of(tensors), repr(plain)))

        return hook

    def leave(path: str) -> Callable[..., None]:
        def hook(_: nn.Module, args: Any, output: Any) -> None:
            inputs, others = given.pop()
            found.setdefault(path, []).append(_Seen(inputs, digests.of(tensors_in(output)), others))

        return hook

    handles = []
    for path, module in model.named_modules():
        handles.append(module.register_forward_pre_hook(enter(path, has_weight(module)), with_kwargs=True))
        handles.append(module.register_forward_hook(leave(path)))
    try:
        functional_call(model, state, (), dict(call.copied().values))
    finally:
        for handle in handles:
            handle.remove()
    return found


class _Digests:
    """Digests of tensors; those that modules hand on as they are, are read once."""

    def __init__(self) -> None:
        self._known = WeakTensorKeyDictionary()

    def of(self, tensors: list[Tensor]) -> tuple[str, ...]:
        return tuple(map(self._of, tensors))

    def _of(self, tensor: Tensor) -> str:
        version, digest = self._known.get(tensor, (None, ""))
        if version != tensor._version:
            digest = digest_of(tensor)
            self._known[tensor] = (tensor._version, digest)
        return digest


def _state(model: nn.Module, generator: torch.Generator) -> dict[str, Tensor]:
    """Copies of the parameters and buffers to compute with: no parameter is all zero."""
    state = {}
    for name, parameter in model.named_parameters():
        value = parameter.detach()
        if value.is_floating_point() and not bool(value.any()):
            columns = value.numel() // value.shape[0] if value.ndim and value.numel() else 1
            value = (torch.randn(value.shape, generator=generator) / columns**0.5).to(value)
        state[name] = at_least_float32(value)
    for name, buffer in model.named_buffers():
        state[name] = at_least_float32(buffer.clone())  # a forward pass may write into it
    return state


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode, and afterwards the mode that each module was in."""
    modes = [(module, module.training) for module in model.modules()]
    for module, _ in modes:
        module.training = False
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training
