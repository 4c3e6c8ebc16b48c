"""Kills cpmix with SIGKILL again and again, gives the same command after each, and compares what comes out in the end.

    python tests/torture.py [--kills 220] [--seed 0]        (or: make torture)

Every command of the pipeline on digits and on the toy set is first run undisturbed; its optimizer steps and its system
calls on files are counted. Then the pipeline is run again, round after round, in new folders, and its processes are
killed: after a step of the optimizer, inside publishing (half a file written, before or after a call of fsync, link,
rename or unlink), or at some moment by the clock. The folders must then be equal to the undisturbed ones, file by file
and byte by byte, and nothing else may lie in them. At last, twenty processes build one data set at once.

Processes are forked from one that has imported torch, which takes the seconds; the commands are those of `cpmix`.
"""

import argparse
import contextlib
import hashlib
import json
import os
import random
import select
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

os.environ["OMP_NUM_THREADS"] = "1"  # a forked process cannot use the threads of the one it comes from

import matplotlib.figure
import sklearn.datasets  # noqa: F401
from helpers import contents, files

import cpmix_cli.commands.confusion_report
import cpmix_cli.commands.finetune
import cpmix_cli.commands.train_stage1
import cpmix_cli.commands.train_stage2  # noqa: F401
from cpmix_cli.artifacts.files import TEMPORARY
from cpmix_cli.cli import app
from cpmix_cli.runtime import signals
from cpmix_cli.training.step import Step

PIPELINES = {
    "digits": [
        "build-lt digits --out data",
        "train-stage1 --data data --out run --epochs 6",
        "train-stage2 --from run",
        "finetune --from run",
        "evaluate --from run",
        "confusion-report --from run",
    ],
    "toy": [
        "build-lt toy --subset-seed 1 --out data",
        "build-lt toy --out data --overwrite",
        "train-stage1 --data data --out run --epochs 6",
        "train-stage1 --data data --out run --epochs 8 --overwrite",
        "train-stage2 --from run",
        "evaluate --from run",
        "evaluate --from run --overwrite",
        "confusion-report --from run",
    ],
}
CALLS = ("fsync", "link", "replace", "unlink", "rename")
MAX_KILLS, MAX_KILLS_TRAINING = 3, 12  # of one command in one round, before it is left alone
PUBLISHING, STEP, CLOCK = "inside publishing", "after a step", "by the clock"


@dataclass
class Watched:
    """What a command did undisturbed."""

    num_steps: int = 0
    num_calls: int = 0
    seconds: float = 0.0


@dataclass
class Score:
    """What happened so far."""

    kills: Counter[str] = field(default_factory=Counter)
    by_command: Counter[str] = field(default_factory=Counter)
    after_first_step: int = 0
    resumes: int = 0
    differences: list[str] = field(default_factory=list)

    def is_enough(self, kills: int) -> bool:
        """So many kills, half of them after a first step, a quarter inside publishing."""
        parts = self.kills.total(), 2 * self.after_first_step, 4 * self.kills[PUBLISHING]
        return min(parts) >= kills


class HalfWritten:
    """A temporary file that kills its process when half of it is written."""

    def __init__(self, file: Any) -> None:
        self._file = file

    def __enter__(self) -> "HalfWritten":
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def write(self, data: bytes) -> None:
        self._file.write(data[: len(data) // 2])
        self._file.flush()
        die()


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def hook_calls(notify: Callable[[bytes], object], fatal: int) -> None:
    """Report every call that publishing makes on files; die at the `fatal`th, counted from 1 (0: never).

    A call has three moments: half a file written (instead of it), before it, and after it; they take turns.
    """
    count = 0

    def wrapped(real: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        nonlocal count
        count += 1
        notify(b"c")
        if count == fatal and count % 2:
            die()
        result = real(*args, **kwargs)
        if count == fatal:
            die()
        return result

    for name in CALLS:
        setattr(os, name, partial(wrapped, getattr(os, name)))
    real_open = Path.open

    def opened(path: Path, mode: str = "r", *args: Any, **kwargs: Any) -> Any:
        nonlocal count
        file = real_open(path, mode, *args, **kwargs)
        if path.name.startswith(TEMPORARY) and mode == "xb":
            count += 1
            notify(b"c")
            if count == fatal:
                return HalfWritten(file)
        return file

    Path.open = opened  # type: ignore[method-assign]


def in_child(work: Callable[[Callable[[bytes], object]], int], log: Path) -> tuple[int, int]:
    """Fork; the child does `work` with a function to report by. Returns its pid and the reading end of the reports."""
    reading, writing = os.pipe()
    pid = os.fork()
    if pid:
        os.close(writing)
        return pid, reading
    os.close(reading)
    code = 99
    try:
        out = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        os.dup2(out, 1)
        os.dup2(out, 2)
        code = work(partial(os.write, writing))
    except SystemExit as leaving:
        code = int(str(leaving.code or 0))
    except BaseException:
        import traceback

        traceback.print_exc()
    finally:
        sys.stdout.flush()
        os._exit(code)


def cpmix(folder: Path, line: str, fatal: int, notify: Callable[[bytes], object]) -> int:
    os.chdir(folder)
    signals.install()
    real_step = Step.__call__

    def step(self: Step, number: int) -> None:
        real_step(self, number)
        notify(b"s")

    Step.__call__ = step  # type: ignore[method-assign]
    hook_calls(notify, fatal)
    sys.argv = ["cpmix", *line.split()]
    app(prog_name="cpmix")
    return 0


def watch(folder: Path, line: str, log: Path) -> Watched:
    found, started = Watched(), time.monotonic()
    pid, reports = in_child(partial(cpmix, folder, line, 0), log)
    while events := os.read(reports, 4096):
        found.num_steps += events.count(b"s")
        found.num_calls += events.count(b"c")
    os.close(reports)
    _, status = os.waitpid(pid, 0)
    if status != 0:
        sys.exit(f"{line} failed undisturbed:\n{log.read_text()}")
    found.seconds = time.monotonic() - started
    return found


def attempt(folder: Path, line: str, log: Path, plan: tuple[str, float], score: Score) -> bool:
    """Run a command and kill it as planned; True when it came to its end first."""
    kind, when = plan
    log.write_text("")
    pid, reports = in_child(partial(cpmix, folder, line, int(when) if kind == PUBLISHING else 0), log)
    deadline = time.monotonic() + (when if kind == CLOCK else 600)
    steps, killed = 0, False
    while True:
        ready, _, _ = select.select([reports], [], [], max(0.0, deadline - time.monotonic()))
        if not ready and not killed:
            os.kill(pid, signal.SIGKILL)
            killed = True
        events = os.read(reports, 1)
        if not events:
            break
        steps += events == b"s"
        if kind == STEP and steps == int(when) and not killed:
            deadline = time.monotonic() + (when % 1) * 0.02  # somewhere in the next step or two
    os.close(reports)
    _, status = os.waitpid(pid, 0)
    score.resumes += "goes on after" in log.read_text()
    if os.WIFSIGNALED(status):
        score.kills[kind] += 1
        score.by_command[line.split()[0]] += 1
        score.after_first_step += steps > 0
        return False
    if status != 0:
        score.differences.append(f"{line}: exit {os.waitstatus_to_exitcode(status)}\n{log.read_text()}")
    return True


def choose(rng: random.Random, watched: Watched) -> tuple[str, float]:
    """When the next process dies."""
    kinds = [PUBLISHING, PUBLISHING, CLOCK] if not watched.num_steps else [PUBLISHING, STEP, STEP, STEP, CLOCK]
    kind = rng.choice(kinds)
    if kind == PUBLISHING:
        return kind, rng.randint(1, watched.num_calls)
    if kind == STEP:
        return kind, rng.randint(1, max(1, watched.num_steps // 2)) + rng.random()
    return kind, rng.uniform(0, watched.seconds)


def digests(folder: Path, log: Path) -> dict[str, str]:
    """Hash of every file's contents, found in a child: reading Parquet starts threads, and those do not fork."""

    def work(notify: Callable[[bytes], object]) -> int:
        hashes = {name: hashlib.sha256(data).hexdigest() for name, data in contents(folder).items()}
        notify(json.dumps({name: hashes.get(name, "") for name in files(folder)}).encode())
        return 0

    pid, reports = in_child(work, log)
    data = b""
    while part := os.read(reports, 65536):
        data += part
    os.close(reports)
    os.waitpid(pid, 0)
    return dict(json.loads(data))


def twenty_at_once(folder: Path, log: Path) -> list[str]:
    """Twenty processes build one data set: what each said last."""
    folder.mkdir()
    logs = [log.with_name(f"build{i}.log") for i in range(20)]
    children = [in_child(partial(cpmix, folder, "build-lt digits --out data", 0), each) for each in logs]
    for pid, reports in children:
        while os.read(reports, 4096):
            pass
        os.close(reports)
        os.waitpid(pid, 0)
    said = [[line for line in each.read_text().splitlines() if line.endswith(": data")] for each in logs]
    return [lines[-1] if lines else each.read_text() for lines, each in zip(said, logs, strict=True)]


def main() -> int:
    """Returns 0 when nothing differs."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    told = "at least so many, half of them after a first step, a quarter inside publishing"
    parser.add_argument("--kills", type=int, default=220, help=told)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    rng = random.Random(options.seed)
    matplotlib.figure.Figure()  # finds its fonts once, not in every child
    score, started = Score(), time.monotonic()
    with tempfile.TemporaryDirectory(prefix="cpmix-torture-") as place:
        root = Path(place)
        log = root / "log"
        watched: dict[tuple[str, str], Watched] = {}
        expected = {}
        for name, lines in PIPELINES.items():
            (root / name).mkdir()
            for line in lines:
                watched[name, line] = watch(root / name, line, log)
            expected[name] = digests(root / name, log)
        rounds = 0
        while not score.is_enough(options.kills) and not score.differences:
            rounds += 1
            for name, lines in PIPELINES.items():
                folder = root / f"{name}-{rounds}"
                folder.mkdir()
                for line in lines:
                    tries = 0
                    most = MAX_KILLS_TRAINING if watched[name, line].num_steps else MAX_KILLS
                    while tries < most and not score.is_enough(options.kills):
                        tries += 1
                        if attempt(folder, line, log, choose(rng, watched[name, line]), score):
                            break
                    attempt(folder, line, log, (CLOCK, 600), score)
                found = digests(folder, log)
                for file in sorted(found.keys() | expected[name].keys()):
                    if found.get(file) != expected[name].get(file):
                        what = "left over" if file not in expected[name] else "other"
                        what = what if file in found else "missing"
                        score.differences.append(f"{folder.name}/{file}: {what}")
                with contextlib.suppress(OSError):
                    shutil.rmtree(folder)
        said = Counter(twenty_at_once(root / "twenty", log))

    show = sys.stdout.write
    show(f"kills: {score.kills.total()} ({', '.join(f'{n} {kind}' for kind, n in sorted(score.kills.items()))})\n")
    show(f"  after a first step: {score.after_first_step}\n")
    show(f"  of {', '.join(f'{line} {n}' for line, n in sorted(score.by_command.items()))}\n")
    show(f"resumes: {score.resumes}\n")
    show(f"rounds: {rounds} of both pipelines, {time.monotonic() - started:.0f} s\n")
    show(f"differences: {len(score.differences)}\n")
    for difference in score.differences:
        show(f"  {difference}\n")
    show(f"twenty build-lt at once: {', '.join(f'{n} {line}' for line, n in sorted(said.items()))}\n")
    return int(bool(score.differences) or said != {"built: data": 1, "up to date: data": 19})


if __name__ == "__main__":
    sys.exit(main())
