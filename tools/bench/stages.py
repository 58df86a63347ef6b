"""CPU-seconds of the stages of one process, and how often it called a network in them."""

import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from typing import Any

from torch import nn

REST = "everything else"


class Stages:
    """A clock of CPU time with one hand for each stage: a stage inside another pauses it.

    seconds: stage → CPU-seconds of all threads of the process. calls, rows: stage → passes of a network
    that were begun, and the samples in them.
    """

    def __init__(self) -> None:
        self.seconds: dict[str, float] = defaultdict(float)
        self.calls: dict[str, int] = defaultdict(int)
        self.rows: dict[str, int] = defaultdict(int)
        self._open = [REST]
        self._since = time.process_time()

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        """What is computed inside is of this stage."""
        self._note()
        self._open.append(name)
        try:
            yield
        finally:
            self._note()
            self._open.pop()

    def charge(self, owner: type, method: str, name: str) -> None:
        """From now on a method of a class is of a stage, wherever it is called."""
        function: Callable[..., Any] = getattr(owner, method)

        @wraps(function)
        def charged(*args: Any, **kwargs: Any) -> Any:
            with self(name):
                return function(*args, **kwargs)

        setattr(owner, method, charged)

    @contextmanager
    def counting(self, network: nn.Module) -> Iterator[None]:
        """Count the passes of a network, each to the stage in which it begins."""

        def count(_: nn.Module, args: Any, kwargs: Any) -> None:
            first = args[0] if args else next(iter(kwargs.values()))
            self.calls[self._open[-1]] += 1
            self.rows[self._open[-1]] += len(first)

        handle = network.register_forward_pre_hook(count, with_kwargs=True)
        try:
            yield
        finally:
            handle.remove()

    def _note(self) -> None:
        now = time.process_time()
        self.seconds[self._open[-1]] += now - self._since
        self._since = now
