"""Activations on a grid: what is done to the tensors at the edges of a model's functions.

`applying` runs any function (an observer, a quantizer, a learned step) on the tensors at given edges
while a module computes: layers, `x + y` and `torch.cat` alike, without changing the model's code.
"""

from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import cache, wraps
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_flatten, tree_unflatten

from ptqcore.dataflow import Running, Site, inside, tensors_in
from ptqcore.decompositions import decomposed
from ptqcore.modules import QuantModule
from ptqcore.placement import Edge
from ptqcore.quantizers import FakeQuant
from ptqcore.spec import QuantSpec

ATTRIBUTE = "activation_quantizers"

TensorFunction = Callable[[Tensor], Tensor]


@contextmanager
def applying(module: nn.Module, path: str, functions: Mapping[Edge, TensorFunction]) -> Iterator[None]:
    """Replace the tensor at each edge by a function of it while `module` runs.

    Functions that hide products of activations are then computed in steps, see `decompositions`.

    Args:
        module: the model, or a part of it that is called on its own.
        path: the module's path in the model.
        functions: what to do, by edge; edges elsewhere in the model are ignored.
    """
    if not functions:
        yield
        return
    mode = _EdgeMode(module, path, by_site(functions))
    handles = [
        register_module_forward_pre_hook(mode.enter),
        register_module_forward_hook(mode.leave, always_call=True),
        *[one.register_forward_hook(mode.leave_hooked, always_call=True) for one in mode.hooked],
    ]
    try:
        with mode, decomposed():
            yield
    finally:
        for handle in handles:
            handle.remove()


Actions = Mapping[Site, list[tuple[Edge, TensorFunction]]]


def by_site(functions: Mapping[Edge, TensorFunction]) -> Actions:
    """The functions of all edges at one site together."""
    found: dict[Site, list[tuple[Edge, TensorFunction]]] = defaultdict(list)
    for edge, function in functions.items():
        found[edge.site].append((edge, function))
    return found


def call(
    function: Callable[..., Any], args: Any, kwargs: Any, actions: list[tuple[Edge, TensorFunction]]
) -> Any:
    """Call a torch function with the actions of its site done to its inputs and outputs."""
    inputs = {edge.index: action for edge, action in actions if edge.side == "input"}
    outputs = {edge.index: action for edge, action in actions if edge.side == "output"}
    if inputs:
        args, kwargs = _changed((args, kwargs), inputs)
    result = function(*args, **kwargs)
    return change_outputs(result, (args, kwargs), outputs) if outputs else result


def output_tensors(result: Any, given: Any) -> list[Tensor]:
    """What a function made: the tensors that it returned, or, like `x[...] = y`, the one it wrote into."""
    return tensors_in(given)[:1] if result is None else tensors_in(result)


def change_outputs(result: Any, given: Any, actions: Mapping[int, TensorFunction]) -> Any:
    """What a function returned, with actions done to the tensors that it made, by their index."""
    if result is None:
        (written,) = output_tensors(result, given)
        written.copy_(actions[0](written.clone()))
        return None
    changed = _changed(result, actions)
    in_place = any(result is leaf for leaf in tree_flatten(given)[0])
    if in_place and not torch.is_grad_enabled():  # others may hold the tensor
        return result.copy_(changed)
    return changed


def _changed(tree: Any, actions: Mapping[int, TensorFunction]) -> Any:
    leaves, structure = tree_flatten(tree)
    places = [place for place, leaf in enumerate(leaves) if isinstance(leaf, Tensor)]
    for index, action in actions.items():
        leaves[places[index]] = action(leaves[places[index]])
    return tree_unflatten(leaves, structure)


class _EdgeMode(TorchFunctionMode):
    """hooked: modules with forward hooks of their own. What these compute belongs to the module, as in
    `dataflow.trace`, not to the module around it: the call ends behind them."""

    def __init__(self, module: nn.Module, path: str, actions: Actions) -> None:
        super().__init__()
        self._paths = {child: name for name, child in module.named_modules(prefix=path)}
        self._running = Running(path)
        self._actions = actions
        self.hooked = [child for child in self._paths if child._forward_hooks]
        self._ends_late = set(self.hooked)

    def enter(self, module: nn.Module, args: Any) -> None:
        path = self._paths.get(module)
        if path is not None:
            self._running.enter(path)

    def leave(self, module: nn.Module, args: Any, output: Any) -> None:
        if module in self._paths and module not in self._ends_late:
            self._running.leave()

    def leave_hooked(self, module: nn.Module, args: Any, output: Any) -> None:
        self._running.leave()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        actions = self._actions.get(self._running.site(func))
        if actions is None:
            return func(*args, **(kwargs or {}))
        return call(func, args, kwargs or {}, actions)


class ActivationQuantizers(nn.Module):
    """The quantizers of a model's edges, a child of the model, so that they are saved with it."""

    def __init__(self, specs: Mapping[Edge, QuantSpec]) -> None:
        super().__init__()
        self.names = {edge: str(edge).replace(".", "/") for edge in specs}
        for edge, spec in specs.items():
            self.add_module(self.names[edge], FakeQuant(spec))

    def forward(self, x: Any) -> Any:
        """x: a model that is a container calls all its children, and this is one of them."""
        return x

    def __getitem__(self, edge: Edge) -> FakeQuant:
        return self.get_submodule(self.names[edge])  # type: ignore[return-value]

    def specs(self) -> dict[Edge, QuantSpec]:
        """The grid of every edge."""
        return {edge: self[edge].spec for edge in self.names}

    def inside(self, path: str) -> dict[str, Tensor]:
        """Scales and zero points of the edges inside the module at `path`, by name."""
        names = [self.names[edge] for edge in self.names if inside(edge.site.owner, path)]
        return {
            f"{name}.{key}": value
            for name in names
            for key, value in self.get_submodule(name).state_dict().items()
        }

    def drop_unreached(self) -> list[Edge]:
        """Remove the quantizers that no calibration sample reached, and say which they were."""
        unreached = [edge for edge in self.names if not bool(self[edge].scale.isfinite().all())]  # type: ignore[union-attr]
        for edge in unreached:
            delattr(self, self.names.pop(edge))
        return unreached

    def functions(self) -> dict[Edge, TensorFunction]:
        """What `applying` takes."""
        return {edge: self[edge].forward for edge in self.names}

    def attach(self, model: nn.Module) -> None:
        """Make these the quantizers of a model: every forward pass of it applies them."""
        model.add_module(ATTRIBUTE, self)
        model.__class__ = _quantized(type(model))  # type: ignore[arg-type]


@cache
def _quantized(kind: type[nn.Module]) -> type[nn.Module]:
    """A subclass whose forward pass applies the model's activation quantizers."""

    @wraps(kind.forward)
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        with applying(self, "", getattr(self, ATTRIBUTE).functions()):
            return kind.forward(self, *args, **kwargs)

    return type(kind.__name__, (kind,), {"forward": forward, "__module__": kind.__module__})


def quantizers_of(model: nn.Module) -> ActivationQuantizers | None:
    """The quantizers attached to a model."""
    found = getattr(model, ATTRIBUTE, None)
    return found if isinstance(found, ActivationQuantizers) else None


@contextmanager
def detached(model: nn.Module) -> Iterator[None]:
    """Run the model without its activation quantizers, its layers in floating point."""
    quantizers, kind = quantizers_of(model), type(model)
    if quantizers is None:
        yield
        return
    layers = [module for module in model.modules() if isinstance(module, QuantModule)]
    model.__class__ = kind.__base__  # type: ignore[assignment]
    delattr(model, ATTRIBUTE)
    for layer in layers:
        layer.computes_in_codes = False
    try:
        yield
    finally:
        model.add_module(ATTRIBUTE, quantizers)
        model.__class__ = kind
        for layer in layers:
            layer.computes_in_codes = True
