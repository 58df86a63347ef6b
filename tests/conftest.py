"""The command line, run in this process."""

import sys

import pytest

from ptqcore import cli


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
