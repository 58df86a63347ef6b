"""Progress of long loops: lines in a log, an estimate from the first item on."""

import itertools

import pytest
from rich.progress import Task

from ptqcore import progress
from ptqcore.progress import TimeLeft, duration, time_left, track


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.4, "0 s"), (59, "59 s"), (60, "1 min 00 s"), (3599, "59 min 59 s"), (7620, "2 h 07 min")],
)
def test_durations_are_for_people(seconds, text):
    assert duration(seconds) == text


def test_what_is_left_takes_as_long_as_what_is_done():
    assert time_left(100, 1, 4) == "about 5 min 00 s left"
    assert time_left(100, 4, 4) == "about 0 s left"


@pytest.mark.parametrize(
    ("completed", "total", "shown"), [(1, 4, "about 15 min 00 s left"), (0, 4, ""), (3, None, "")]
)
def test_the_bar_has_an_estimate_after_one_slow_item(completed, total, shown):
    clock = itertools.chain([0.0], itertools.repeat(300.0))
    task = Task(0, "bench", total, completed, _get_time=lambda: next(clock))
    task.start_time = next(clock)
    assert TimeLeft().render(task).plain == shown


def test_the_log_has_a_line_every_ten_seconds_and_one_at_the_end(monkeypatch, capsys):
    """Four items of four seconds: the third ends after twelve."""
    clock = itertools.count(0, 4)
    monkeypatch.setattr(progress.time, "monotonic", lambda: float(next(clock)))
    assert list(track("abcd", "measuring")) == [*"abcd"]
    assert capsys.readouterr().err.splitlines() == [
        "measuring: 3/4 in 12 s, about 4 s left",
        "measuring: 4 done in 20 s",
    ]
