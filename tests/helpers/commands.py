"""cpmix in this process and in processes of its own, and what a command leaves behind."""

import json
import os
import shlex
import signal
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from cpmix_cli.cli import app
from cpmix_cli.runtime import signals

without_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a CUDA device")


@dataclass
class Result:
    """What a command left behind."""

    code: int
    stdout: str
    stderr: str

    @property
    def json(self) -> dict[str, Any]:
        return json.loads(self.stdout)


def cpmix(*arguments: object) -> Result:
    """Run a command in this process; a traceback fails the test."""
    result = CliRunner().invoke(app, [str(a) for a in arguments])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return Result(result.exit_code, result.stdout, result.stderr)


def must(*arguments: object) -> Result:
    result = cpmix(*arguments)
    assert result.code == 0, result.stderr
    return result


def refused(code: int, messages: str | Sequence[str], *arguments: object) -> Result:
    """Run a command that has to end with this exit code and with each message on stderr."""
    return ended(cpmix(*arguments), code, messages)


def ended(result: Result, code: int, messages: str | Sequence[str] = ()) -> Result:
    """Check the exit code of a command and that stderr has each message and no traceback; returns its result."""
    assert result.code == code, result.stderr
    for message in (messages,) if isinstance(messages, str) else messages:
        assert message in result.stderr
    assert "Traceback" not in result.stderr
    return result


def fix_of(result: Result) -> str:
    """The command or change on the fix: line of an error."""
    (fix,) = [line.removeprefix("  fix: ") for line in result.stderr.splitlines() if line.startswith("  fix: ")]
    return fix


def follow_fix(result: Result) -> str:
    """Run the commands on the fix: line of an error, as a user would paste them; returns the line."""
    run_commands(fix_of(result))
    return fix_of(result)


def run_commands(line: str) -> None:
    """Run commands of a shell, joined by &&; cpmix in this process."""
    for command in line.split(" && "):
        name, *words = shlex.split(command)
        assert name in ("cpmix", "mv", "rm"), command
        must(*words) if name == "cpmix" else subprocess.run([name, *words], check=True)


def process(*arguments: object, code: str = "", **options: Any) -> Result:
    """Run cpmix, or some Python code, in a process of its own; the options are those of subprocess.run()."""
    options["env"] = {**os.environ, **options.get("env", {})}
    command = [sys.executable, *(("-c", code) if code else ("-m", "cpmix_cli")), *map(str, arguments)]
    found = subprocess.run(command, capture_output=True, text=True, **options)
    return Result(found.returncode, found.stdout, found.stderr)


def signalled(number: signal.Signals, at: str, *arguments: object) -> Result:
    """Run cpmix in a process of its own and send it a signal after the first line of stderr that has `at`."""
    command = [sys.executable, "-m", "cpmix_cli", *map(str, arguments)]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True) as running:
        assert running.stderr is not None
        any(at in line for line in running.stderr)
        running.send_signal(number)
        stderr = running.stderr.read()
    return Result(running.returncode, "", stderr)


def setting(*values: object, table: str = "") -> list[str]:
    """Flags --set for changes such as "optimizer.lr=0.1", or "lr=0.1" of the table "optimizer"."""
    prefix = f"{table}." if table else ""
    return [word for value in values for word in ("--set", f"{prefix}{value}")]


def trained(data: Path, run: Path, *flags: object) -> Path:
    """Train stage 1 and evaluate the run; returns the run's folder."""
    must("train-stage1", "--data", data, "--out", run, *flags)
    must("evaluate", "--from", run)
    return run


def pipeline(data: Path, run: Path, *flags: object) -> None:
    must("train-stage1", "--data", data, "--out", run, *flags)
    must("train-stage2", "--from", run)
    must("finetune", "--from", run)
    must("evaluate", "--from", run)
    must("confusion-report", "--from", run)


def forget_signals() -> None:
    """Make this process one that has had no signal and trains nothing."""
    signals._pending, signals._has_state = None, False


def run_to_the_end(*arguments: object) -> int:
    """Give a command again until it is done; returns how often it was interrupted."""
    for interruptions in range(1000):
        forget_signals()
        result = cpmix(*arguments)
        if result.code == 0:
            return interruptions
        assert result.code == 75, result.stderr
        assert "SIGTERM received" in result.stderr
    raise AssertionError("it never ends")


HOOKED = """
import os, signal, sys
{hook}
from cpmix_cli.__main__ import main
main()
"""


def hooked(hook: str, *arguments: object) -> Result:
    """cpmix in a process of its own, and its own process group, with code that runs first."""
    return process(*arguments, code=HOOKED.format(hook=hook), start_new_session=True)


def on_event(event: str, test: str, number: signal.Signals, seconds: float = 0.0) -> str:
    """A hook that sends a signal to the group, and waits, when Python is about to do something for the first time."""
    return (
        "import time\n"
        "left = [1]\n"
        "def hook(event, args):\n"
        f"    if event == {event!r} and left and ({test}):\n"
        "        left.clear()\n"
        f"        os.killpg(0, {int(number)})\n"
        f"        time.sleep({seconds})\n"
        "sys.addaudithook(hook)"
    )
