"""What people see on a real pseudo-terminal: tables of commands fit it, and elsewhere each row is one line."""

import fcntl
import os
import pty
import struct
import subprocess
import sys
import termios
from collections.abc import Sequence
from pathlib import Path

import pytest
from helpers import must

from cpmix_cli.runtime.text import width_of


def on_a_terminal(columns: int, *words: object) -> list[str]:
    """The lines that a command writes to a terminal of so many columns."""
    person, program = pty.openpty()
    fcntl.ioctl(program, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))
    command = [sys.executable, "-m", "cpmix_cli", *map(str, words)]
    environment = {k: v for k, v in os.environ.items() if k not in ("COLUMNS", "LINES")} | {"TERM": "xterm"}
    process = subprocess.Popen(command, env=environment, stdin=program, stdout=program, stderr=program)
    os.close(program)
    sent = b""
    while True:
        try:
            sent += os.read(person, 1 << 16)
        except OSError:  # the command has ended
            break
    os.close(person)
    assert process.wait() == 0, sent
    return sent.decode().split("\r\n")


@pytest.mark.slow
@pytest.mark.parametrize("columns", [60, 80])
def test_tables_fit_the_terminal(columns: int, digits_run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(digits_run.parent)
    commands: Sequence[Sequence[object]] = (
        ("status", "run", "--curves"),
        ("compare", "run"),
        ("evaluate", "--from", "run"),
        ("methods",),
        ("recipes",),
        ("recipes", "--budget"),
    )
    for words in commands:
        lines = on_a_terminal(columns, *words)
        assert [line for line in lines if width_of(line) > columns and "next: " not in line] == [], words
        # Every word and number of the lines for a pipe stands there whole, in the same number.
        shown, whole = (sorted(" ".join(found).replace("-", " ").split()) for found in (lines, plain(words)))
        assert [word for word in whole if word not in shown and words != ("recipes",)] == [], words


def plain(words: Sequence[object]) -> list[str]:
    return must(*words).stdout.splitlines()
