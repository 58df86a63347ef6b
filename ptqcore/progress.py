"""Progress of long loops: a bar with an estimate on a terminal, plain log lines elsewhere."""

import sys
import time
from collections.abc import Iterable, Iterator, Sized
from typing import TypeVar

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    Task,
    TextColumn,
    TimeElapsedColumn,
)
from rich.text import Text

from ptqcore import distributed

T = TypeVar("T")

_SECONDS_BETWEEN_LINES = 10.0


def say(text: str) -> None:
    """Print one line for the user on standard error, where progress is shown too.

    Of several processes that do one run, the first alone says something.
    """
    if distributed.is_first():
        print(text, file=sys.stderr, flush=True)


def track(items: Iterable[T], label: str, total: int | None = None) -> Iterator[T]:
    """Yield the items and show how far the loop is and how long it will still take.

    Args:
        items: what to loop over.
        label: what the loop does, for example `measuring`.
        total: number of items, where `len(items)` does not tell it.
    """
    count = total if total is not None else len(items) if isinstance(items, Sized) else None
    console = Console(stderr=True)
    if not distributed.is_first():
        yield from items
    elif console.is_terminal:
        yield from _bar(items, label, count, console)
    else:
        yield from _lines(items, label, count)


def _bar(items: Iterable[T], label: str, total: int | None, console: Console) -> Iterator[T]:
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeLeft(),
    )
    with Progress(*columns, console=console) as progress:
        yield from progress.track(items, total=total, description=label)


class TimeLeft(ProgressColumn):
    """An estimate from the first item on, however long one takes: that of rich forgets after 30 seconds."""

    def render(self, task: Task) -> Text:
        """What the bar shows of a task."""
        if not task.completed or not task.total or task.elapsed is None:
            return Text("")
        return Text(time_left(task.elapsed, task.completed, task.total))


def time_left(seconds: float, done: float, total: float) -> str:
    """How long the rest will take if it goes on as in the seconds so far."""
    return f"about {duration(seconds / done * (total - done))} left"


def _lines(items: Iterable[T], label: str, total: int | None) -> Iterator[T]:
    start = shown = time.monotonic()
    done = 0
    for item in items:
        yield item
        done += 1
        now = time.monotonic()
        if now - shown >= _SECONDS_BETWEEN_LINES and done != total:
            shown = now
            left = f", {time_left(now - start, done, total)}" if total else ""
            say(f"{label}: {done}{f'/{total}' if total else ''} in {duration(now - start)}{left}")
    say(f"{label}: {done} done in {duration(time.monotonic() - start)}")


def duration(seconds: float) -> str:
    """Seconds as `12 s`, `3 min 05 s` or `2 h 07 min`."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"
