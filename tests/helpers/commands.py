"""The command line, called in this process."""

import sys

import pytest

from agl_trl.cli import app


def command(monkeypatch, capsys, *arguments) -> tuple[int, str, str]:
    monkeypatch.setattr(sys, "argv", ["agl-trl", *map(str, arguments)])
    with pytest.raises(SystemExit) as exit_info:
        app.main()
        sys.exit(0)
    captured = capsys.readouterr()
    errors = [line for line in captured.err.splitlines() if not line.startswith("\r") and "it/s]" not in line and line]
    return exit_info.value.code or 0, captured.out, "\n".join(errors)  # without progress bars
