"""Random numbers of code that asks for no generator of its own: in every part of a run the same, whatever
ran before it in this process."""

import random
from collections.abc import Iterator
from contextlib import contextmanager
from zlib import crc32

import numpy as np
import torch


def seed(run: int, part: str) -> None:
    """Begin a part of a run: seed torch, numpy and Python.

    Args:
        run: the run's seed, below 2³².
        part: its name, for example a block's path.
    """
    number = run * 2**31 + crc32(part.encode())
    torch.manual_seed(number)
    random.seed(number)
    np.random.seed(number % 2**32)


@contextmanager
def put_back() -> Iterator[None]:
    """Whatever is seeded and drawn inside, afterwards all three generators are what they were."""
    python, numpy = random.getstate(), np.random.get_state()
    try:
        with torch.random.fork_rng(devices=[]):
            yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)
