"""Lets every write, fsync, rename, link, new folder and open for writing of each command fail once.

    python tests/faults.py [--every 1] [CASE ...]

A command must end with exit code 0, 3 or 4 and without a traceback, whichever call fails. Under --overwrite, the old
output is then byte by byte what it was (or a training phase has published the first state of the new one). The same
command again must end in the bytes of an undisturbed run, and nothing else may lie in the folder.
"""

import argparse
import errno
import hashlib
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

os.environ["OMP_NUM_THREADS"] = "1"

import torch
from helpers import write_image
from torture import digests, in_child

from cpmix_cli.cli import app
from cpmix_cli.runtime import signals

PIPELINE = [
    "build-lt digits --out data",
    "build-lt image-folder --data-root photos --pack 16 --test-per-class 1 --out shards",
    "build-lt image-folder --data-root photos --pack 0 --test-per-class 1 --out listed",
    "train-stage1 --data data --out run --epochs 3 --set optimizer.batch_size=512",
    "train-stage2 --from run",
    "finetune --from run",
    "evaluate --from run",
    "confusion-report --from run",
    "predict --from run photo.png --out predicted.csv",
    "import-weights weights.pth --sha256 {sha} --out weights.safetensors",
    "compare run --out table.csv",
    "compare run --append results.csv",
]
OUTPUTS = {
    "build-lt digits": ["data", "run"],
    "build-lt image-folder --data-root photos --pack 16": ["shards"],
    "build-lt image-folder --data-root photos --pack 0": ["listed"],
    "train-stage1": ["run"],
    "train-stage2": ["run/stage2", "run/finetune", "run/evaluation", "run/confusion"],
    "finetune": ["run/finetune", "run/evaluation", "run/confusion"],
    "evaluate": ["run/evaluation", "run/confusion"],
    "confusion-report": ["run/confusion"],
    "predict": ["predicted.csv"],
    "import-weights": ["weights.safetensors"],
    "compare run --out": ["table.csv"],
    "compare run --append": ["results.csv"],
}
"""Start of a line -> its outputs, and what depends on them."""
OVERWRITES = {
    "build-lt digits": "--overwrite --subset-seed 1",
    "build-lt image-folder": "--overwrite --subset-seed 1",
    "train-stage1": "--overwrite --seed 1",
    "confusion-report": "--overwrite --images 3",
}
"""Start of a line -> flags that replace its output by another; others make it anew as it was."""
CODES = {"write": errno.ENOSPC, "open": errno.ENOSPC, "fsync": errno.EIO, "mkdir": errno.ENOSPC}


@dataclass
class Case:
    """A command over a folder in which it is to be run."""

    name: str
    line: str
    remove: list[str]
    """Outputs that are deleted before; none with --overwrite."""

    @property
    def overwrites(self) -> bool:
        return "--overwrite" in self.line


@dataclass
class Outcome:
    """What happened in the attempts of a case."""

    points: int = 0
    """Calls that can fail."""
    tried: int = 0
    refused: int = 0
    """Attempts that did not end with code 0."""
    kept: int = 0
    """Of these, those after which an old output is whole."""
    faults: list[str] = field(default_factory=list)


class Failing:
    """A file whose first write writes half and fails."""

    def __init__(self, file: Any) -> None:
        self._file = file

    def __enter__(self) -> "Failing":
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._file, name)

    def write(self, data: Any) -> int:
        self._file.write(data[: len(data) // 2])
        self._file.flush()
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def hook(root: Path, notify: Callable[[bytes], object], fatal: int) -> None:
    """Report each call on files below `root`, and let the `fatal`th fail, counted from 1 (0: none)."""
    count = 0

    def counts(*paths: Any) -> bool:
        nonlocal count
        if not any(Path(os.path.abspath(os.fspath(path))).is_relative_to(root) for path in paths):  # noqa: PTH100
            return False
        count += 1
        notify(b"c")
        return count == fatal

    def fails(name: str) -> OSError:
        code = CODES.get(name, (errno.EIO, errno.ENOSPC)[fatal % 2])
        return OSError(code, os.strerror(code))

    def wrapped(name: str, real: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        paths = [os.readlink(f"/proc/self/fd/{args[0]}")] if name == "fsync" else args[:1]  # noqa: PTH115
        if counts(*paths):
            raise fails(name)
        return real(*args, **kwargs)

    for name in ("fsync", "link", "replace", "rename", "mkdir"):
        setattr(os, name, partial(wrapped, name, getattr(os, name)))
    real_open = Path.open

    def opened(path: Path, mode: str = "r", *args: Any, **kwargs: Any) -> Any:
        if not set(mode) & set("wxa"):
            return real_open(path, mode, *args, **kwargs)
        if counts(path):
            raise fails("open")
        file = real_open(path, mode, *args, **kwargs)
        return Failing(file) if counts(path) else file

    Path.open = opened  # type: ignore[method-assign]


def cpmix(folder: Path, line: str, fatal: int, notify: Callable[[bytes], object]) -> int:
    os.chdir(folder)
    signals.install()
    hook(folder, notify, fatal)
    sys.argv = ["cpmix", *line.split()]
    app(prog_name="cpmix")
    return 0


def run(folder: Path, line: str, log: Path, fatal: int = 0) -> tuple[int, int]:
    """Run a command in a child; returns its exit code and its number of calls."""
    log.write_text("")
    pid, reports = in_child(partial(cpmix, folder, line, fatal), log)
    calls = 0
    while events := os.read(reports, 4096):
        calls += len(events)
    os.close(reports)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), calls


def begin(root: Path, log: Path, words: list[str]) -> list[Case]:
    """Run the pipeline in ROOT/base, as far as it is needed.

    Returns:
        The cases with one of the words, or all: each command on what it needs, and over its own output.
    """
    base = root / "base"
    for name, colour in (("dark", (20, 20, 60)), ("light", (220, 230, 200))):
        for number in range(4):
            write_image(base / "photos" / name / f"{number}.png", tuple(c + number for c in colour))
    write_image(base / "photo.png", size=(8, 8))
    torch.save({"layer.weight": torch.ones(3, 2)}, base / "weights.pth")
    sha = hashlib.sha256((base / "weights.pth").read_bytes()).hexdigest()
    lines = [line.format(sha=sha) for line in PIPELINE]
    cases: list[Case] = []
    for line in lines:
        start = next(start for start in OUTPUTS if line.startswith(start))
        name = " ".join(word for word in start.split() if word not in ("--data-root", "photos"))
        cases.append(Case(name, line, OUTPUTS[start]))
        if "--append" not in line:
            flags = next((flags for start, flags in OVERWRITES.items() if line.startswith(start)), "--overwrite")
            cases.append(Case(f"{name} --overwrite", f"{line} {flags}", []))
    chosen = [case for case in cases if not words or any(word in case.name for word in words)]
    last = max(number for number, line in enumerate(lines) if any(case.line.startswith(line) for case in chosen))
    for line in lines[: last + 1]:
        if run(base, line, log)[0]:
            sys.exit(f"{line} failed undisturbed:\n{log.read_text()}")
    return [replace(case, remove=[name for name in case.remove if (base / name).exists()]) for case in chosen]


def copy(root: Path, case: Case) -> Path:
    folder = root / "try"
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(root / "base", folder, symlinks=True)
    for name in case.remove:
        path = folder / name
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    return folder


def visible(hashes: dict[str, str]) -> dict[str, str]:
    """Leave out what a later command removes: locks, and temporary files."""
    return {name: found for name, found in hashes.items() if "/.cpmix-" not in f"/{name}"}


def sweep(root: Path, case: Case, log: Path, every: int, first: int = 1) -> Outcome:
    """Let each `every`th call of a case fail, from the `first`."""
    outcome = Outcome()
    folder = copy(root, case)
    before = digests(folder, log)
    code, outcome.points = run(folder, case.line, log)
    if code:
        sys.exit(f"{case.line} failed undisturbed:\n{log.read_text()}")
    expected = digests(folder, log)
    for fatal in range(first, outcome.points + 1, every):
        outcome.tried += 1
        folder = copy(root, case)
        code, _ = run(folder, case.line, log, fatal)
        said = log.read_text()
        where = f"{case.name}, call {fatal} of {outcome.points}"
        if code not in (0, 3, 4) or "Traceback" in said:
            outcome.faults.append(f"{where}: exit {code}\n{said}")
            continue
        if code:
            outcome.refused += 1
            is_old = visible(digests(folder, log)) == before
            outcome.kept += is_old
            if case.overwrites and not is_old and not _has_new_state(root / "base", folder, case):
                outcome.faults.append(f"{where}: the old output is gone\n{said}")
            again, _ = run(folder, case.line, log)
            if again:
                outcome.faults.append(f"{where}: again: exit {again}\n{said}{log.read_text()}")
                continue
        found = digests(folder, log)
        if not code:  # a call that may fail: the next command removes what is left
            found = visible(found)
        differing = [name for name in sorted(found.keys() | expected.keys()) if found.get(name) != expected.get(name)]
        if differing:
            outcome.faults.append(f"{where}: other files than undisturbed: {', '.join(differing)}\n{said}")
    return outcome


def _has_new_state(base: Path, folder: Path, case: Case) -> bool:
    """Return whether a phase is one that is not done and has a state of its own; False for other commands."""
    phase = {"train-stage1": "stage1", "train-stage2": "stage2", "finetune": "finetune"}.get(case.line.split()[0])
    states = [place / f"run/{phase}/training_state.safetensors" for place in (base, folder)]
    if phase is None or (folder / f"run/{phase}/run.json").exists():
        return False
    old, new = (state.read_bytes() for state in states)  # their times differ
    return old != new


def main() -> int:
    """Returns 0 when no attempt went wrong."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("cases", nargs="*", help="only cases with one of these words")
    parser.add_argument("--every", type=int, default=1, help="only every Nth call of a case")
    options = parser.parse_args()
    started, wrong = time.monotonic(), 0
    total = Outcome()
    with tempfile.TemporaryDirectory(prefix="cpmix-faults-") as place:
        root = Path(place).resolve()
        (root / "base").mkdir()
        log = root / "log"
        for number, case in enumerate(begin(root, log, options.cases)):
            found = sweep(root, case, log, options.every, 1 + number % options.every)
            wrong += len(found.faults)
            total.tried, total.refused = total.tried + found.tried, total.refused + found.refused
            sys.stdout.write(
                f"{case.name}: {found.tried} of {found.points} calls failed; {found.refused} refused, "
                f"{found.kept} with the old files; wrong: {len(found.faults)}\n"
            )
            sys.stdout.write("".join(f"  {fault}\n" for fault in found.faults))
            sys.stdout.flush()
    seconds = time.monotonic() - started
    sys.stdout.write(f"calls: {total.tried}, refused: {total.refused}, wrong: {wrong}, {seconds:.0f} s\n")
    return int(wrong > 0)


if __name__ == "__main__":
    sys.exit(main())
