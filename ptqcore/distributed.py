"""More hands: the processes that `torchrun` starts do one run together, with the result of one.

Every process runs the same code. What they do not all do alike, they do through this room: the samples are
shared out (`Share`), and so is what can be solved piece by piece (`divided`). All processes must come to
each exchange, and in the same order. Without `torchrun` there is one process, and nothing is exchanged.

Exchanges are of nested lists, tuples and dicts of tensors and plain values, bit by bit, as JSON and bytes.
"""

from __future__ import annotations

import atexit
import json
import os
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from itertools import islice
from typing import TYPE_CHECKING, Any, TypeVar

from ptqcore.errors import DistributedError

if TYPE_CHECKING:  # the command line starts without torch
    from torch import Tensor

T = TypeVar("T")
R = TypeVar("R")

_LONGEST_WAIT = timedelta(days=30)  # while the first process measures
_SHORT = 1024  # bytes that one message holds
_GRACE = 10.0  # seconds in which torchrun ends a process whose peer has ended


def rank() -> int:
    """The number of this process; 0 for the first, and for an only one."""
    return int(os.environ["RANK"]) if _is_launched() else 0


def is_first() -> bool:
    """Whether this process is the one that writes files and tells the user what goes on."""
    return rank() == 0


def size() -> int:
    """How many processes do the run together, once they have met."""
    if not _is_launched():
        return 1
    from torch import distributed

    return distributed.get_world_size() if distributed.is_initialized() else 1


def on_this_machine() -> int:
    """How many of them share this machine's memory."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", "1")) if size() > 1 else 1


def name() -> str:
    """What to call this process in front of a sentence: nothing, if it is the first."""
    return "" if is_first() else f"process {rank() + 1} of {os.environ['WORLD_SIZE']}: "


def _is_launched() -> bool:
    return "TORCHELASTIC_RUN_ID" in os.environ and os.environ.get("WORLD_SIZE", "1") != "1"


def join() -> None:
    """Meet the other processes that `torchrun` has started, unless that was done already.

    Tensors on CPUs go through Gloo, those on GPUs through NCCL, one GPU for each process of a machine.
    """
    if not _is_launched():
        return
    import torch
    from torch import distributed

    if distributed.is_initialized():
        return
    gpus = torch.cuda.is_available() and distributed.is_nccl_available()
    if gpus:
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]) % torch.cuda.device_count())
    distributed.init_process_group("cpu:gloo,cuda:nccl" if gpus else "gloo", timeout=_LONGEST_WAIT)
    atexit.register(_part)


def _part() -> None:
    from torch import distributed

    if distributed.is_initialized():
        distributed.destroy_process_group()


def leave() -> None:
    """End this process without an error once all have come here; nothing, if it is an only one.

    What C++ tears down at the end of a process, threads of Gloo among it, aborts one now and then: it is
    left to the system.
    """
    if size() > 1:
        wait()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(0)


def wait() -> None:
    """Wait until every process has come here."""
    everywhere(None)


def everywhere(value: T) -> list[T]:
    """What every process has in the place of `value`, in the order of processes.

    Args:
        value: nested lists, tuples and dicts of tensors and plain values.

    Raises:
        DistributedError: if another process has ended.
    """
    if size() == 1:
        return [value]
    tensors: list[Tensor] = []
    outline = json.dumps(_outlined(value, tensors)).encode()
    with _meeting():
        return [
            value if number == rank() else _filled(json.loads(text), iter(found))
            for number, (text, found) in enumerate(_exchanged(outline, tensors))
        ]


@contextmanager
def _meeting() -> Iterator[None]:
    """An exchange, which fails if one of the processes is gone."""
    try:
        yield
    except RuntimeError as error:
        time.sleep(_GRACE)
        raise DistributedError(
            "another process of this run has ended: see what it said, or whether memory was short"
        ) from error


def check_same(what: str, value: Callable[[], Any]) -> None:
    """Make sure that all processes have come to the same value, where there are several.

    Raises:
        DistributedError: naming what is not the same.
    """
    if size() == 1:
        return
    first, *others = everywhere(value())
    if any(other != first for other in others):
        raise DistributedError(
            f"the processes have come to different {what}: run all of them on machines of one kind, with "
            "as many threads each"
        )


def add_up(tensors: Sequence[Tensor]) -> None:
    """Replace tensors of one dtype, in place, by their sums over all processes: the same bits in each."""
    if size() == 1 or not tensors:
        return
    import torch
    from torch import distributed

    flat = torch.cat([tensor.reshape(-1) for tensor in tensors])
    with _meeting():
        distributed.all_reduce(flat)
    parts = torch.split(flat, [tensor.numel() for tensor in tensors])
    for tensor, part in zip(tensors, parts, strict=True):
        tensor.copy_(part.view(tensor.shape))


def divided(
    items: Sequence[T], solve: Callable[[T], R], cost: Callable[[T], float] | None = None
) -> list[R]:
    """`[solve(item) for item in items]`, each item solved by one process and known to all of them.

    `solve` must depend on nothing that differs between processes, and change nothing that is looked at
    afterwards. Its results are nested lists, tuples and dicts of tensors and plain values.

    Args:
        items: the same in every process.
        solve: what is to be computed.
        cost: how much work an item is, to give every process as much; by default all are the same.
    """
    if size() == 1 or len(items) < 2:
        return [solve(item) for item in items]
    owners = _owners([1.0 if cost is None else cost(item) for item in items], size())
    mine = {place: solve(items[place]) for place, owner in enumerate(owners) if owner == rank()}
    found = {place: result for part in everywhere(mine) for place, result in part.items()}
    return [found[place] for place in range(len(items))]


def _owners(costs: Sequence[float], count: int) -> list[int]:
    """Which of so many processes solves each item: the dearest first, to whom has least to do."""
    work, owners = [0.0] * count, [0] * len(costs)
    for place in sorted(range(len(costs)), key=lambda place: -costs[place]):
        owners[place] = work.index(min(work))
        work[owners[place]] += costs[place]
    return owners


@dataclass(frozen=True)
class Share:
    """Which of all calibration samples a process has: every so-manieth.

    total: how many samples there are. rank, ranks: the process, of how many that share them out. With one,
    it has all of them, and there is nothing to exchange.
    """

    total: int
    rank: int = 0
    ranks: int = 1

    @classmethod
    def of(cls, total: int, shared: bool) -> Share:
        """The share of this process, of samples that are shared out or that every process has."""
        return cls(total, rank(), size()) if shared and size() > 1 else cls(total)

    @property
    def numbers(self) -> range:
        """The numbers of its samples, in order."""
        return range(self.rank, self.total, self.ranks)

    def everywhere(self, value: T) -> list[T]:
        """What each process that has a share has in the place of `value`."""
        return [value] if self.ranks == 1 else everywhere(value)

    def in_order(self, found: Iterable[T]) -> Iterator[T]:
        """What all processes found for their samples, in the order of samples, the same in every process.

        Each of them must take as many values as the others. Values are asked for one at a time, and only
        when they are wanted: between two of them the processes compute one sample each.

        Args:
            found: what this process finds, for each of its samples or for the first of them.
        """
        if self.ranks == 1:
            yield from found
            return
        mine = iter(found)
        while any(parts := everywhere(list(islice(mine, 1)))):
            for part in parts:
                yield from part


def _exchanged(outline: bytes, tensors: list[Tensor]) -> Iterator[tuple[bytes, list[Tensor]]]:
    """The outline and the tensors of every process."""
    import torch
    from torch import distributed

    for number, text in enumerate(_texts(outline)):
        mine = number == rank()
        found = tensors if mine else [_empty(*kind) for kind in _kinds(json.loads(text))]
        for place, tensor in enumerate(found):
            if tensor.numel():
                found[place] = tensor = tensor.detach().contiguous()
                distributed.broadcast(tensor.reshape(-1).view(torch.uint8), src=number)
        yield text, found


def _texts(text: bytes) -> list[bytes]:
    """The text of every process: in one message where all are short, else in two."""
    lengths, texts = [], []
    for packet in _gathered(len(text).to_bytes(8, "little") + text[:_SHORT].ljust(_SHORT, b" ")):
        lengths.append(int.from_bytes(packet[:8], "little"))
        texts.append(packet[8:])
    if max(lengths) > _SHORT:
        texts = _gathered(text.ljust(max(lengths), b" "))
    return [text[:length] for text, length in zip(texts, lengths, strict=True)]


def _gathered(packet: bytes) -> list[bytes]:
    """Packets of one length of all processes."""
    import torch
    from torch import distributed

    mine = torch.frombuffer(bytearray(packet), dtype=torch.uint8)
    found = [torch.empty_like(mine) for _ in range(size())]
    distributed.all_gather(found, mine)
    return [each.numpy().tobytes() for each in found]


def _empty(dtype: str, shape: list[int], device: str) -> Tensor:
    import torch

    return torch.empty(shape, dtype=getattr(torch, dtype), device=device)


def _outlined(value: Any, tensors: list[Tensor]) -> Any:
    """A value as JSON, its tensors described there and appended to a list."""
    import torch

    if isinstance(value, torch.Tensor):
        tensors.append(value)
        dtype = str(value.dtype).removeprefix("torch.")
        return {"tensor": [dtype, list(value.shape), value.device.type]}
    if isinstance(value, dict):
        pairs = [[_outlined(key, tensors), _outlined(one, tensors)] for key, one in value.items()]
        return {"dict": pairs}
    if isinstance(value, list | tuple):
        kind = "list" if isinstance(value, list) else "tuple"
        return {kind: [_outlined(one, tensors) for one in value]}
    if value is None or isinstance(value, bool | int | float | str):
        return value
    raise TypeError(f"processes cannot exchange a {type(value).__name__}")


def _kinds(outline: Any) -> Iterator[Any]:
    """The descriptions of the tensors in an outline, in order."""
    if isinstance(outline, list):
        for one in outline:
            yield from _kinds(one)
    elif isinstance(outline, dict):
        ((kind, content),) = outline.items()
        if kind == "tensor":
            yield content
        else:
            yield from _kinds(content)


def _filled(outline: Any, tensors: Iterator[Tensor]) -> Any:
    """The value that an outline describes, with these tensors."""
    if not isinstance(outline, dict):
        return outline
    ((kind, content),) = outline.items()
    if kind == "tensor":
        return next(tensors)
    if kind == "dict":
        return {_filled(key, tensors): _filled(one, tensors) for key, one in content}
    found = [_filled(one, tensors) for one in content]
    return found if kind == "list" else tuple(found)
