"""Runs in this process: the command line, and runs that end while something is learned."""

import sys
from types import SimpleNamespace

import pytest

from ptqcore import Objective, cli, midway


@pytest.fixture
def ptq(monkeypatch, capsys):
    """Run `ptq ARGUMENTS`: exit code, standard output, standard error."""

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["ptq", *map(str, arguments)])
        capsys.readouterr()
        code = 0
        try:
            cli.main()
        except SystemExit as end:
            code = end.code or 0
        return code, *capsys.readouterr()

    return run


class Stopped(BaseException):
    """The end of a run, from within."""


@pytest.fixture
def updates(monkeypatch):
    """Counts the updates of all problems, writes the state after each, and stops the run before one."""
    seen = SimpleNamespace(count=0, stop_at=None, Stopped=Stopped)

    def before(self, updates):
        if seen.count == seen.stop_at:
            raise Stopped
        seen.count += 1

    monkeypatch.setattr(Objective, "before", before)
    monkeypatch.setattr(midway, "SECONDS", 0.0)
    return seen
