"""A model that is changed for a while, and then what it was."""

from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

from ptqcore.errors import ModelError
from ptqcore.fingerprint import digest_of


@contextmanager
def restored(model: nn.Module) -> Iterator[None]:
    """Whatever replaces modules, parameters, hooks or classes inside, afterwards the old ones are back.

    No tensor is copied: they may be replaced, but not written into.

    Raises:
        ModelError: if they were written into all the same.
    """
    before = digest_of(dict(model.state_dict()))
    known = [_Kept(module) for module in model.modules()]
    try:
        yield
    finally:
        for one in known:
            one.put_back()
    if digest_of(dict(model.state_dict())) != before:
        raise ModelError("the model's own tensors were written into, so that it cannot be used again")


class _Kept:
    """What a module holds: its attributes, and what is in those that are plain dictionaries."""

    def __init__(self, module: nn.Module) -> None:
        self.module, self.kind = module, type(module)
        self.attributes: dict[str, Any] = dict(vars(module))
        tables = [value for value in self.attributes.values() if type(value) in (dict, OrderedDict)]
        self.contents = [(table, dict(table)) for table in tables]

    def put_back(self) -> None:
        """Handles of hooks know the dictionaries themselves, so these stay the same."""
        self.module.__class__ = self.kind
        own = vars(self.module)
        own.clear()
        own.update(self.attributes)
        for table, content in self.contents:
            table.clear()
            table.update(content)
