"""Changes of a model's parameters that keep its function, tried before they are made for good.

A trial computes the new parameters of a module when it is called, and forgets them when it returns: so
that whatever fails has changed nothing, and no copy of the model is needed.
"""

from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from ptqcore import Attachment, attach

_MOST_AT_ONCE = 2**22  # numbers in double precision

Change = Callable[[Tensor], Tensor]
"""x [..., n] → x [..., n], row by row, in double precision."""


@dataclass
class ModuleRewrite:
    """What becomes of one module. All changes are computed in double precision, in their order.

    rows: parameter → changes along its last dimension. columns: along its first. values: new values.
    moved_in: bias → (weight, v): W v is added to the bias before anything else, for a constant v [in] that
    is in the module's input no longer. attachment: what its input goes through.
    """

    rows: dict[str, list[Change]] = field(default_factory=lambda: defaultdict(list))
    columns: dict[str, list[Change]] = field(default_factory=lambda: defaultdict(list))
    values: dict[str, Tensor] = field(default_factory=dict)
    moved_in: dict[str, tuple[str, Tensor]] = field(default_factory=dict)
    attachment: Attachment | None = None

    @property
    def names(self) -> list[str]:
        """The parameters that change."""
        return list(dict.fromkeys([*self.rows, *self.columns, *self.values, *self.moved_in]))

    @torch.no_grad()
    def parameters(self, module: nn.Module) -> dict[str, nn.Parameter]:
        """The new parameters of the module."""
        found = {}
        for name in self.names:
            old = module.get_parameter(name)
            value = self.values.get(name, old.detach())
            if name in self.moved_in:
                weight, vector = self.moved_in[name]
                value = value.double() + _times(module.get_parameter(weight), vector)
            value = _changed(value, self.rows.get(name, []), self.columns.get(name, []), old.dtype)
            found[name] = nn.Parameter(value, requires_grad=False)
        return found


class Rewrites:
    """What becomes of a model's modules, by path."""

    def __init__(self) -> None:
        self.modules: dict[str, ModuleRewrite] = defaultdict(ModuleRewrite)

    def add(self, others: "Rewrites") -> None:
        """Make other changes, too, behind these."""
        for path, other in others.modules.items():
            own = self.modules[path]
            for mine, theirs in ((own.rows, other.rows), (own.columns, other.columns)):
                for name, changes in theirs.items():
                    mine[name] += changes
            own.values |= other.values
            own.moved_in |= other.moved_in
            own.attachment = own.attachment or other.attachment

    @contextmanager
    def trial(self, model: nn.Module) -> Iterator[None]:
        """Within, the model computes as if all of this were done."""
        handles = []
        for path, rewrite in self.modules.items():
            hooks = _Trial(rewrite)
            module = model.get_submodule(path)
            handles += [
                module.register_forward_pre_hook(hooks.before),
                module.register_forward_hook(hooks.after, always_call=True),
            ]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    @torch.no_grad()
    def make(self, model: nn.Module) -> None:
        """Change the model for good: parameters that it shared between modules are shared no longer."""
        for path, rewrite in self.modules.items():
            module = model.get_submodule(path)
            for name, parameter in rewrite.parameters(module).items():
                module.register_parameter(name, parameter)
            if rewrite.attachment is not None:
                attach(module, rewrite.attachment)


class _Trial:
    """The hooks that change a module for the time of a call."""

    def __init__(self, rewrite: ModuleRewrite) -> None:
        self.rewrite = rewrite
        self.kept: list[dict[str, nn.Parameter | None]] = []

    def before(self, module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        self.kept.append(dict(module._parameters))
        module._parameters.update(self.rewrite.parameters(module))
        if self.rewrite.attachment is None:
            return args
        return (self.rewrite.attachment(args[0]), *args[1:])

    def after(self, module: nn.Module, args: Any, output: Any) -> None:
        module._parameters.update(self.kept.pop())


def _times(weight: Tensor, vector: Tensor) -> Tensor:
    """W v [out] in double precision, some rows at a time."""
    rows = max(1, _MOST_AT_ONCE // weight.shape[1])
    return torch.cat([part.double() @ vector.to(part.device) for part in weight.split(rows)])


def _changed(value: Tensor, rows: list[Change], columns: list[Change], dtype: torch.dtype) -> Tensor:
    """A parameter after changes along its last dimension, then along its first; where the first stays, some
    rows at a time."""
    found = torch.empty(value.shape, dtype=dtype, device=value.device)
    in_parts = value.ndim > 1 and not columns
    size = max(1, _MOST_AT_ONCE // max(1, value.shape[1:].numel())) if in_parts else len(value)
    for part, place in zip(value.split(size), found.split(size), strict=True):
        changed = part.double()
        for change in rows:
            changed = change(changed)
        for change in columns:
            changed = change(changed.T).T
        place.copy_(changed)
    return found
