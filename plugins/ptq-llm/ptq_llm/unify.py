"""One kind of layer: weight matrices that transformers keeps in other forms become `nn.Linear`.

Methods and formats know linear layers. GPT-2 and its kin keep transposed ones (`Conv1D`), Falcon a
subclass that only rounds in another order, and mixtures of experts one parameter of three dimensions
for all experts of a layer. What a model computes stays the same.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only
from transformers.pytorch_utils import Conv1D

from ptq_llm import experts
from ptqcore import ModelError

_TOKENS = 16
_MOST_DIFFERENCE = 1e-6


@dataclass(frozen=True)
class Call:
    """What a module was given, and what it returned."""

    args: Any
    kwargs: Any
    output: Any

    def fits(self, layer: nn.Linear) -> bool:
        """Whether a linear layer can be called so, and returns the same kind of thing."""
        tensors = [x for x in (*self.args, self.output) if isinstance(x, Tensor)]
        if len(self.args) != 1 or self.kwargs or len(tensors) != 2:
            return False
        return tensors[0].shape[-1] == layer.in_features

    @torch.no_grad()
    def difference(self, module: nn.Module) -> float:
        """max|y' − y| / max|y| of what a module returns now; infinite if its shape is another."""
        found, expected = module(*self.args, **self.kwargs), self.output
        if found.shape != expected.shape:
            return torch.inf
        apart, largest = (x.double().abs().max() for x in (found - expected, expected))
        return float(apart / largest) if largest else float(apart)

    @property
    def tolerance(self) -> float:
        """1e-6 in float32; four roundings in shorter types."""
        return max(_MOST_DIFFERENCE, 4 * torch.finfo(self.output.dtype).eps)


def unify(model: Any) -> dict[str, str]:
    """Turn weight matrices into linear layers, in place.

    Every module that is changed must return for random tokens what it returned before, up to 1e-6 of
    the largest value (float32; four roundings in shorter types). Modules that random tokens do not
    reach, and parameters that no rule is for, are left as they are.

    Args:
        model: a model of transformers in evaluation mode, which `input_ids` alone can call.

    Returns:
        Path → what was done, or why it was left; nothing for what is a linear layer already.

    Raises:
        ModelError: if a changed module computes something else.
    """
    changes = {path: change for path, module in model.named_modules() if (change := _change(module))}
    report = _left(model, changes)
    mixed = _experts in changes.values()
    if mixed:
        experts.use(model, "eager")
    calls = _record(model, changes) if changes else {}
    if mixed:
        experts.use(model, experts.EACH_EXPERT)
    for path, change in changes.items():
        called = path in calls
        report[path] = change(model, path, calls[path]) if called else "left: random tokens do not reach it"
    return report


def needs_unifying(model: nn.Module) -> str | None:
    """The path of the first module that `unify` would change; None if there is none."""
    return next((path for path, module in model.named_modules() if _change(module)), None)


Change = Callable[[Any, str, Call], str]


def _change(module: nn.Module) -> Change | None:
    """What turns a module into linear layers; None if there is nothing to do."""
    if isinstance(module, Conv1D):
        return _conv1d
    if isinstance(module, nn.Linear) and type(module) is not nn.Linear:
        return _subclass
    return _experts if experts.has_experts(module) else None


def _conv1d(model: Any, path: str, call: Call) -> str:
    module = model.get_submodule(path)
    layer = experts.linear(module.weight.T.contiguous(), module.bias, Conv1D.__name__)
    _check(path, call, layer)
    model.set_submodule(path, layer)
    return "Conv1D: now a linear layer"


def _subclass(model: Any, path: str, call: Call) -> str:
    """A subclass of `nn.Linear` may compute anything; it is replaced if it computes what that does."""
    module = model.get_submodule(path)
    kind = type(module).__name__
    layer = experts.linear(module.weight, module.bias, kind)
    if not call.fits(layer) or call.difference(layer) > call.tolerance:
        return f"left: {kind} computes something else than a linear layer"
    model.set_submodule(path, layer)
    return f"{kind}: now a linear layer"


def _experts(model: Any, path: str, call: Call) -> str:
    module = model.get_submodule(path)
    count = experts.split_experts(module)
    _check(path, call, module)
    return f"{type(module).__name__}: now {count} experts of linear layers"


def _check(path: str, call: Call, changed: nn.Module) -> None:
    difference = call.difference(changed)
    if not difference <= call.tolerance:
        raise ModelError(
            f"{path} as linear layers computes something else: its output for random tokens differs by "
            f"{difference:.2g} of the largest value, at most {call.tolerance:.2g} was expected; such a "
            "model cannot be quantized"
        )


@torch.no_grad()
def _record(model: Any, paths: Iterable[str]) -> dict[str, Call]:
    """The calls of some modules while the model runs on random tokens: path → the last of them."""
    calls: dict[str, Call] = {}

    def watch(path: str) -> Callable[..., None]:
        def hook(_: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
            # Copies: some models add to an output in place.
            calls[path] = Call(*tree_map_only(Tensor, Tensor.clone, (args, kwargs, output)))

        return hook

    handles = [
        model.get_submodule(path).register_forward_hook(watch(path), with_kwargs=True) for path in paths
    ]
    known = model.get_input_embeddings().num_embeddings
    tokens = torch.randint(known, (1, _TOKENS), generator=torch.Generator().manual_seed(0))
    try:
        model(input_ids=tokens.to(model.device))
    finally:
        for handle in handles:
            handle.remove()
    return calls


def _left(model: nn.Module, changes: Iterable[str]) -> dict[str, str]:
    """The parameters of three dimensions or more that no rule is for; convolutions have such too."""
    report = {}
    for path, module in model.named_modules():
        if path in changes or type(module).__module__.startswith("torch.nn"):
            continue
        for name, parameter in module.named_parameters(recurse=False):
            if parameter.ndim > 2:
                kind = f"{type(module).__name__} has a parameter of {parameter.ndim} dimensions"
                report[f"{path}.{name}".strip(".")] = f"left: {kind}"
    return report
