"""The live view: its numbers against those of a whole epoch, and what a person sees on a real pseudo-terminal."""

import fcntl
import os
import pty
import re
import select
import signal
import struct
import subprocess
import sys
import termios
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import IO, Any

import pyte
import pytest
import torch
from helpers import COUNTS, CP, ERM, MIX, contents, data, fresh, plan_of, sums_of, terms_of

from cpmix_cli.runtime.console import EpochProgress, note, warn
from cpmix_cli.runtime.text import sparkline
from cpmix_cli.training.inputs import TrainingData
from cpmix_cli.training.live_view import LiveView
from cpmix_cli.training.metrics import epoch_line
from cpmix_cli.training.state import TrainingState
from cpmix_cli.training.step import Step


def looked_at(
    plan: Any, counts: list[int], confusion: list[list[float]], *, few_inclusive: bool = False, **at: int
) -> tuple[LiveView, TrainingState]:
    """A view of `counts` images a class, before a step is taken."""
    labels = torch.repeat_interleave(torch.arange(len(counts)), torch.tensor(counts))
    state = fresh()
    state.confusion = torch.tensor(confusion, dtype=torch.float64)
    state.sums = sums_of(plan)
    state.epoch, state.step = at.get("epoch", 1), at.get("step", 0)
    whole = TrainingData(data().batches, labels, torch.tensor(counts))
    step = Step(plan, whole, state)
    step.begin_epoch(state.epoch)
    return LiveView(plan, whole, state, step, ["cat", "dog", "lynx"][: len(counts)], few_inclusive), state


def test_groups_follow_the_few_border_of_the_data_set() -> None:
    """Of classes of 101, 20 and 2 images the one of 20 is medium, or few with --few-inclusive."""
    plan = plan_of(terms_of(erm=ERM), 9, batch=41)
    for few_inclusive, expected in ((False, ("50.00", "0.00")), (True, ("-", "25.00"))):
        view, state = looked_at(plan, [101, 20, 2], [[0.0] * 3] * 3, few_inclusive=few_inclusive, epoch=2)
        state.confusion += torch.tensor([[0, 0, 0], [10, 0, 0], [2, 0, 0]])
        state.step = 3
        rows = {row[0].strip(): row[1] for row in view.table()}
        assert (rows["medium"], rows["few"]) == expected


def test_the_view_of_an_epoch_equals_that_by_hand() -> None:
    """123 images in three steps: K grows by 10 + 5 + 1 in epoch 2, and by 3 in the first step of epoch 3."""
    plan = plan_of(terms_of(erm=ERM), 9, batch=41)
    view, state = looked_at(plan, [101, 20, 2], [[0, 0, 7], [0, 0, 0], [0, 0, 0]], epoch=2)
    state.confusion += torch.tensor([[0, 10, 0], [5, 0, 0], [1, 0, 0]])
    state.sums.values[:] = torch.tensor([6.0, 6.0, 9.0, 107.0, 16.0, 3.0, 0.0, 0.0])
    state.step = 3
    groups = [("  many", "90.10"), ("  medium", "75.00"), ("  few", "50.00")]  # 91/101, 15/20, 1/2
    expected = [("", "epoch 2"), ("loss", "2.0000"), ("train acc, %", "86.99"), *groups]  # 107/123
    pairs = [("  cat as dog", "10"), ("  dog as cat", "5"), ("  lynx as cat", "1")]
    assert view.table() == [*expected, ("images of one class as another", ""), *pairs]
    view.end_epoch()
    state.epoch, state.step = 3, 1
    state.confusion[2, 1] += 3
    state.sums.values[:] = torch.tensor([1.5, 1.5, 9.0, 38.0, 3.0, 1.0, 0.0, 0.0])
    table = view.table()
    assert table[:2] == [("", "epoch 2", "epoch 3 so far"), ("loss", "2.0000", "1.5000")]
    assert table[2] == ("train acc, %", "86.99", "92.68")
    assert table[-4:] == [  # those of now first, then those of the last epoch
        ("  lynx as dog", "0", "3"),
        ("  cat as dog", "10", "0"),
        ("  dog as cat", "5", "0"),
        ("  lynx as cat", "1", "0"),
    ]


def test_loss_and_accuracy_show_their_course_over_the_epochs() -> None:
    """Loss 4, 3, 2 in three epochs, and 1 so far in epoch 4; the accuracy of epoch 2 is unknown."""
    plan = plan_of(terms_of(erm=ERM), 9, batch=41)
    view, state = looked_at(plan, [101, 20, 2], [[0] * 3] * 3, epoch=4, step=1)
    accuracies = (0.25, None, 0.5)
    state.history = [{"loss": 4.0 - i, "train_accuracy": accuracy} for i, accuracy in enumerate(accuracies)]
    state.sums.values[:] = torch.tensor([1.0, 1.0, 9.0, 41.0, 0.0, 1.0, 0.0, 0.0])
    assert [row[0] for row in view.table()[1:3]] == ["loss          █▆▃▁", "train acc, %  ▁ ▃█"]


def test_a_sparkline_goes_from_the_lowest_to_the_highest_value() -> None:
    assert sparkline([0, 1, 2, 3, 4, 5, 6, 7], 10) == "▁▂▃▄▅▆▇█"
    assert sparkline([7, 7, 0, 0, 3.5, 3.5], 3) == "█▁▅"  # means of neighbours
    assert sparkline([2, 2], 9) == "▁▁"
    assert sparkline([None, 1, None, 2], 9) == " ▁ █"
    assert sparkline([], 9) == ""


LINE = {
    "epoch": 205,
    "learning_rate": 0.1,
    "loss": 4.7027,
    "train_accuracy": 0.8345,
    "num_confusions": 115846,
    "num_fallbacks": 0,
    "test_accuracy": None,
    "images_per_second": 4728.4,
    "seconds": 1234.5,
}
THREE = {"loss_erm": 0.5053, "loss_cp": 2.0858, "loss_mix": 2.1117}


@pytest.mark.parametrize(
    ("terms", "changes", "expected"),
    [
        (1, {"seconds": 47.2, "num_confusions": 588}, "lr=0.1 loss=4.703 acc=83.45% err=588 img/s=4728 s=47.2"),
        (1, {"learning_rate": 0.00012}, "lr=1.2e-4 loss=4.703 acc=83.45% err=115846 s=1234"),
        (1, {"learning_rate": 0.1}, "lr=0.1 loss=4.703 acc=83.45% err=115846 s=1234"),  # the same keys
        (1, {"test_accuracy": 0.41244}, "lr=0.1 loss=4.703 acc=83.45% test_acc=41.24% s=1234"),
        (3, {"seconds": 0.3}, "lr=0.1 loss=4.703 terms=0.51,2.09,2.11 acc=83.45% s=0.3"),
        (3, {"test_accuracy": 0.4, "num_fallbacks": 7}, "lr=0.1 loss=4.703 acc=83.45% test_acc=40.00% s=1234"),
        (1, {"num_confusions": None, "train_accuracy": None}, "lr=0.1 loss=4.703 img/s=4728 s=1234"),
    ],
)
def test_an_epoch_line_fits_80_columns(terms: int, changes: dict[str, Any], expected: str) -> None:
    plan = replace(plan_of(terms_of(**dict([("erm", ERM), ("cp", CP), ("mix", MIX)][:terms])), 300), phase="stage2")
    line = epoch_line(plan, {**LINE, **THREE, **changes})
    assert line == f"stage2 epoch=205/{plan.last_epoch} {expected}"
    assert len(line) <= 80


def test_decayed_counts_are_compared_with_the_start_of_the_epoch() -> None:
    plan = replace(plan_of(terms_of(erm=ERM), 9, batch=41), confusion_decay=0.25)
    view, state = looked_at(plan, [101, 20, 2], [[0, 6, 0], [0, 0, 0], [0, 0, 0]], epoch=2)
    state.confusion *= 0.25  # engine.epoch_steps()
    state.confusion[0, 1] += 2
    state.step = 3
    assert view.table()[-1] == ("  cat as dog", "2")
    view.end_epoch()
    state.confusion *= 0.25
    state.confusion[1, 0] += 4
    state.epoch = 3
    assert view.table()[-2:] == [("  dog as cat", "0", "4"), ("  cat as dog", "2", "0")]


@pytest.mark.parametrize("changes", [{"collect_confusion": False}, {"confusion_start": 3}])
def test_without_counted_errors_groups_and_pairs_are_hidden(changes: dict[str, Any]) -> None:
    """Without counted errors no groups and no pairs."""
    plan = replace(plan_of(terms_of(erm=ERM), 9, batch=41), **changes)
    view, state = looked_at(plan, [101, 20, 2], [[0, 6, 0], [0, 0, 0], [0, 0, 0]], epoch=2)
    state.confusion[0, 1] += 2
    state.step = 3
    assert [row[0] for row in view.table()] == ["", "loss", "train acc, %"]


TERMS = {"stage 1": {"erm": ERM}, "stage 2": {"erm": ERM, "cp": CP, "mix": MIX}}
TERMS["gated"] = {"cmo": {**MIX, "probability": 0.5}}


@pytest.mark.parametrize("tables", TERMS.values(), ids=list(TERMS))
def test_errors_of_real_steps_equal_the_growth_of_k(tables: Any) -> None:
    """Of the images that are counted, as many are wrong as K has grown by; batch by batch."""
    plan = plan_of(terms_of(**tables), 100, batch=10)
    state = fresh()
    state.sums = sums_of(plan)
    step = Step(plan, data(), state)
    view = LiveView(plan, data(), state, step, ())
    for epoch in range(1, 6):
        state.epoch, state.step = epoch, 0
        state.sums.values.zero_()
        before = state.confusion.clone()
        step.begin_epoch(epoch)
        seen = torch.zeros(len(COUNTS), dtype=torch.float64)
        for number in range(3):
            step(number)
            state.step += 1
            draws = step.inputs.epoch.draws.terms[0]  # type: ignore[union-attr]
            labels = draws.labels[number][: 4 if number == 2 else 10]
            mixed = float(draws.mixing.gate[number, 0]) if "cmo" in tables else 0.0  # type: ignore[union-attr, index]
            seen += torch.bincount(labels, minlength=len(COUNTS)) * (1 - mixed)
            assert view._images().tolist() == seen.tolist()
        grown = (state.confusion - before).sum(1)
        assert (grown <= seen).all() and grown.sum() == state.sums["errors"]
        last = torch.bincount(labels, minlength=len(COUNTS)) * (1 - mixed)
        view._since = 2
        assert view._images().tolist() == last.tolist()
        view._since = 0


class Screen(pyte.Screen):
    """A terminal so high that nothing leaves it at the top."""

    def __init__(self, columns: int) -> None:
        self.ever: set[str] = set()  # lines that stood here until they were rubbed out, however briefly
        super().__init__(columns, 500)

    def erase_in_display(self, how: int = 0, *args: Any, **kwargs: Any) -> None:
        self.ever.update(line for line in self.display[self.cursor.y :] if line.strip())
        super().erase_in_display(how, *args, **kwargs)

    @property
    def text(self) -> list[str]:
        """Its lines; those at the foot that are empty left out."""
        return "\n".join(line.rstrip() for line in self.display).rstrip().split("\n")


class Terminal:
    """A pseudo-terminal: this process is the person in front of it."""

    def __init__(self, columns: int, lines: int) -> None:
        self.screen = Screen(columns)
        self.sent = b""
        self._seen = 0
        self._stream = pyte.ByteStream(self.screen)
        self._person, self.program = pty.openpty()
        fcntl.ioctl(self.program, termios.TIOCSWINSZ, struct.pack("HHHH", lines, columns, 0, 0))

    def look(self) -> list[str]:
        """What stands on the screen when nothing more comes, or after half a second."""
        until = time.monotonic() + 0.5
        while time.monotonic() < until and select.select([self._person], [], [], 0.02)[0]:
            try:
                self.sent += os.read(self._person, 1 << 20)
            except OSError:  # nobody has it open any more
                break
        self._stream.feed(self.sent[self._seen :])
        self._seen = len(self.sent)
        return self.screen.text

    def resize(self, columns: int) -> None:
        """Make it so many columns wide: longer lines are broken, and the cursor stays at its text."""
        self.look()
        lines, row, broken, at = self.screen.text, self.screen.cursor.y, [], 0
        lines += [""] * (row + 1 - len(lines))
        for number, line in enumerate(lines):
            if number == row:
                at = len(broken)
            broken += [line[i : i + columns] for i in range(0, len(line), columns)] or [""]
        self.screen = Screen(columns)
        self._stream = pyte.ByteStream(self.screen)
        self._stream.feed("\r\n".join(broken).encode() + b"\x1b[%d;1H" % (at + 1))
        size = struct.pack("HHHH", 30, columns, 0, 0)
        fcntl.ioctl(self.program, termios.TIOCSWINSZ, size)

    def hang_up(self) -> None:
        os.close(self._person)


@pytest.fixture
def terminal(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., Terminal]]:
    """terminal(columns, lines): stderr of this process is one from there on."""
    opened: list[IO[str]] = []

    def opens(columns: int, lines: int, kind: str = "xterm-256color") -> Terminal:
        found = Terminal(columns, lines)
        for name in ("NO_COLOR", "FORCE_COLOR", "TTY_COMPATIBLE", "TTY_INTERACTIVE"):
            monkeypatch.delenv(name, raising=False)
        monkeypatch.setenv("TERM", kind)
        stream = os.fdopen(found.program, "w", errors="backslashreplace")
        opened.append(stream)
        monkeypatch.setattr(sys, "stderr", stream)
        monkeypatch.setattr(EpochProgress, "VIEW_SECONDS", 0.0)
        monkeypatch.setattr(EpochProgress, "VIEW_SHARE", float("inf"))
        return found

    yield opens
    for stream in opened:
        with suppress(OSError):  # hung up
            stream.close()


ROWS = [
    ("", "epoch 1", "epoch 2 so far"),
    ("loss", "2.0000", "1.5000"),
    ("images of one class as another", "", ""),
    ("  a class of very, very many words as another one of them", "10", "2"),
]


def progress(rows: Sequence[Sequence[str]] = ROWS) -> EpochProgress:
    shown = EpochProgress("stage1", 40, 0, 1, lambda: None)
    shown.look = lambda: rows
    return shown


@pytest.mark.parametrize("kind", ["", "dumb", "unknown"])
def test_a_terminal_that_cannot_move_its_cursor_has_no_view(terminal: Callable[..., Terminal], kind: str) -> None:
    found = terminal(100, 30, kind)
    progress().step(1)
    found.look()
    assert b"\x1b" not in found.sent


def test_the_width_is_that_of_the_terminal(terminal: Callable[..., Terminal], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "40")  # exported by a shell on another terminal
    found = terminal(100, 30)
    progress().step(1)
    assert [len(line) for line in found.look()[1:3]] == [76, 76]


def test_the_view_is_drawn_below_the_log_lines(terminal: Callable[..., Terminal]) -> None:
    found = terminal(100, 30)
    shown = progress()
    shown.step(1)
    first = found.look()
    assert first[0] == ""  # here the cursor rests
    assert first[1].startswith("stage1 ━─") and first[1].endswith("─ 1/40 steps") and len(first[1]) == 76
    assert first[2].endswith("   epoch 1  epoch 2 so far") and len(first[2]) == 76
    assert first[3].split() == ["loss", "2.0000", "1.5000"]
    assert first[5].startswith("  a class of very, very man… as another one of them  ") and first[5].split()[-2:] == [
        "10",
        "2",
    ]
    note("stage1 epoch=1/2 loss=2.0000")
    shown.step(10)
    assert found.look()[0] == "stage1 epoch=1/2 loss=2.0000"
    assert found.look()[2].endswith("10/40 steps, under 1 s left")
    assert re.match("stage1 (━+)(─+) ", found.look()[2])
    assert [found.look()[1], *found.look()[3:]] == [first[0], *first[2:]]
    note("stage1 epoch=2/2 loss=1.5000")
    shown.close()
    assert found.look() == ["stage1 epoch=1/2 loss=2.0000", "stage1 epoch=2/2 loss=1.5000"]
    assert not found.screen.cursor.hidden


@pytest.mark.parametrize(("columns", "lines"), [(40, 24), (60, 15), (76, 6), (20, 5), (100, 3), (30, 1)])
def test_the_view_is_cut_to_a_small_terminal(columns: int, lines: int, terminal: Callable[..., Terminal]) -> None:
    found = terminal(columns, lines)
    shown = progress()
    above = [""] if lines > 3 else []
    rows = min(len(ROWS), max(0, lines - 4))
    for done in (10, 20):
        shown.step(done)
        screen = found.look()
        assert all(len(line) <= columns for line in screen)
        assert screen[: len(above)] == above and f"{done}/40" in screen[len(above)]
        assert len(screen) == len(above) + 1 + (rows if rows != 3 else 2)  # no heading alone
    note("x" * 100)
    shown.step(30)
    wrapped = ["x" * columns] * (100 // columns) + ["x" * (100 % columns)] * (100 % columns > 0)
    assert found.look()[: len(wrapped)] == wrapped
    shown.close()
    assert found.look() == wrapped
    assert not found.screen.cursor.hidden


@pytest.mark.parametrize("narrow", [75, 39])
def test_a_terminal_that_gets_narrower_keeps_no_second_view(narrow: int, terminal: Callable[..., Terminal]) -> None:
    """Its lines are broken anew, as VTE, kitty, iTerm2 and tmux do, and the cursor stays at its text."""
    found = terminal(100, 30)
    shown = progress()
    note("stage1 epoch=1/2 loss=2.0000")
    for number, columns in enumerate((100, narrow, 60)):
        found.resize(columns)
        note(f"{number}")  # the view of before is drawn again below it
        assert "".join(found.look()).count("/40") == (number > 0)
        shown.step(number + 2)
        text = "".join(found.look())
        assert text.count("so far") == text.count("/40") == 1 and f"{number + 2}/40" in text
        assert all(len(line) <= columns for line in found.look())
    shown.close()
    assert found.look() == ["stage1 epoch=1/2 loss=2.0000", "0", "1", "2"]


def test_what_other_programs_write_stays_once_and_the_view_too(terminal: Callable[..., Terminal]) -> None:
    """A library in C writes to the terminal itself; a person types Enter."""
    found = terminal(80, 24)
    shown = progress()
    shown.step(1)
    for text in (b"[W] a library says something\n", b"\n"):
        os.write(sys.stderr.fileno(), text)
        shown.step(2)
    lines = found.look()
    assert lines[0].startswith("[W] a library says something")
    assert len([line for line in lines if "so far" in line or "/40" in line]) == 2
    shown.close()
    assert found.look() == ["[W] a library says something"]


def test_python_warnings_in_pieces_are_above_the_view(terminal: Callable[..., Terminal]) -> None:
    found = terminal(80, 24)
    shown = progress()
    shown.step(1)
    sys.stderr.write("one line")
    sys.stderr.write(", in two\nand another\n")
    lines = found.look()
    assert lines[:3] == ["one line, in two", "and another", ""] and "1/40 steps" in lines[3]
    shown.close()
    assert found.look() == ["one line, in two", "and another"]


def test_a_terminal_of_another_encoding_shows_no_line_twice(terminal: Callable[..., Terminal]) -> None:
    """What it cannot show is written in ASCII: blocks as marks, letters as escapes, which count as they are long."""
    found = terminal(80, 24)
    sys.stderr.reconfigure(encoding="ascii")  # type: ignore[union-attr]
    rows = [("", "epoch 1"), ("loss  █▄▁", "2.0000"), ("", ""), ("  \u5bff\u53f8" * 9 + " as \xfc", "7")]
    shown = progress(rows)
    for done in (10, 20):
        shown.step(done)
    lines = found.look()
    assert lines[1].startswith("stage1 ####") and "- 20/40 steps" in lines[1]
    assert lines[3].split() == ["loss", "@=.", "2.0000"]
    assert lines[5].startswith("  \\u5bff\\u53f8") and "~ as \\xfc" in lines[5] and len(lines) == 6
    shown.close()
    assert found.look() == [""]


def test_wide_letters_are_counted_as_two_columns(terminal: Callable[..., Terminal]) -> None:
    found = terminal(60, 24)
    shown = progress([("", "epoch 1"), ("  \u5bff\u53f8\u5bff\u53f8 as \u30e9\u30fc\u30e1\u30f3" * 3, "7")])
    for done in (10, 20):
        shown.step(done)
    assert [line for line in found.look() if "/40" in line] == [found.look()[1]] and len(found.look()) == 4
    assert found.look()[3].endswith("7") and "…" in found.look()[3]
    shown.close()


def test_a_dumb_terminal_gets_log_lines_only(terminal: Callable[..., Terminal]) -> None:
    found = terminal(80, 24, "dumb")
    shown = progress()
    assert not shown.has_view
    shown.step(1)
    note("stage1 epoch=1/2 loss=2.0000")
    shown.close()
    assert found.look() == ["stage1 epoch=1/2 loss=2.0000"]


def test_no_color_removes_the_colours(terminal: Callable[..., Terminal], monkeypatch: pytest.MonkeyPatch) -> None:
    for wanted in (True, False):
        found = terminal(80, 24)
        if not wanted:
            monkeypatch.setenv("NO_COLOR", "1")
        shown = progress()
        shown.step(1)
        found.look()
        assert bool(re.search(rb"\x1b\[[\d;]*(3[0-8]|9[0-7])[;m]", found.sent)) == wanted
        shown.close()


def test_control_codes_and_markup_in_names_are_escaped(terminal: Callable[..., Terminal]) -> None:
    found = terminal(80, 24)
    shown = progress([("", "epoch 1"), ("  a\x1b[2Jb\nc\td as [bold]x[/bold] :cat:", "7")])
    note("a\x1b[2Jb [bold] :cat:")
    shown.step(1)
    lines = found.look()
    assert lines[0] == r"a\x1b[2Jb [bold] :cat:"
    assert lines[-1].startswith(r"  a\x1b[2Jb\nc\td as [bold]x[/bold] :cat:  ")
    shown.close()


def test_warnings_are_printed_above_the_view(terminal: Callable[..., Terminal]) -> None:
    found = terminal(80, 24)
    shown = progress()
    shown.step(1)
    warn("[the] clock is wrong")
    shown.step(2)
    assert found.look()[0] == "warning: [the] clock is wrong"
    shown.close()
    assert found.look() == ["warning: [the] clock is wrong"]


def test_a_closed_terminal_does_not_stop_the_run(terminal: Callable[..., Terminal]) -> None:
    found = terminal(80, 24)
    shown = progress()
    shown.step(1)
    stream = sys.stderr
    found.hang_up()
    for done in range(2, 40):
        shown.step(done)
        note("nobody reads it")
    assert not shown.has_view
    assert sys.stderr is not stream  # that of this run, and no proxy of rich's
    shown.close()


def test_the_view_is_drawn_at_intervals(terminal: Callable[..., Terminal], monkeypatch: pytest.MonkeyPatch) -> None:
    terminal(80, 24)
    monkeypatch.setattr(EpochProgress, "VIEW_SECONDS", 3600.0)
    looks = []
    shown = progress()
    shown.look = lambda: looks.append(1) or ROWS  # type: ignore[func-returns-value]
    for done in range(1, 40):
        shown.step(done)
    assert len(looks) == 1
    shown.close()


RUN = """
import sys
from cpmix_cli.runtime import signals
signals.install()
from cpmix_cli import cli
from cpmix_cli.runtime import console
console.set_up()
console.EpochProgress.VIEW_SECONDS, console.EpochProgress.VIEW_SHARE = 0.0, float("inf")
for line in sys.argv[1:]:
    cli.app(line.split("|"), prog_name="cpmix", standalone_mode=False)
assert "tensorboard" not in sys.modules  # half a second, for --tracker alone
"""


def started(found: Terminal, *lines: tuple[object, ...]) -> "subprocess.Popen[bytes]":
    """Commands one after the other in a process of its own, whose stderr is the terminal."""
    words = ["|".join(map(str, line)) for line in lines]
    environment = {k: v for k, v in os.environ.items() if k not in ("COLUMNS", "LINES", "NO_COLOR", "FORCE_COLOR")}
    streams = {"stdin": found.program, "stdout": subprocess.DEVNULL, "stderr": found.program}
    environment["TERM"] = "xterm-256color"
    process = subprocess.Popen([sys.executable, "-c", RUN, *words], env=environment, **streams)
    os.close(found.program)
    return process


@pytest.mark.slow
@pytest.mark.long
def test_a_run_that_is_watched_gives_the_same_bytes(digits: Path, digits_run: Path, tmp_path: Path) -> None:
    found, run = Terminal(90, 40), tmp_path / "watched"
    commands = [
        ("train-stage1", "--data", digits, "--out", run, "--epochs", 6),
        ("train-stage2", "--from", run),
        ("finetune", "--from", run),
    ]
    process = started(found, *commands)
    while process.poll() is None:
        found.look()
    while (screen := found.look()) != found.look():
        pass
    assert process.returncode == 0, screen
    for phase in ("stage1", "stage2", "finetune"):
        assert contents(run / phase) == contents(digits_run / phase)
    epochs = [line.split()[:2] for line in screen if " epoch=" in line]
    assert epochs == [
        *(["stage1", f"epoch={e}/4"] for e in (1, 2, 3, 4)),
        *(["stage2", f"epoch={e}/6"] for e in (5, 6)),
        ["finetune", "epoch=1/1"],
    ]
    assert not [line for line in screen if "so far" in line or "─" in line]
    assert not found.screen.cursor.hidden
    labels = {re.split(r"\s{2,}", line.strip())[0].rstrip("▁▂▃▄▅▆▇█ ") for line in found.screen.ever}
    assert labels >= {"loss", "erm", "cp", "mix", "train acc, %", "many", "medium", "few"}
    assert any(re.fullmatch(r"\d as \d", label) for label in labels)


@pytest.mark.slow
@pytest.mark.long
def test_a_signal_leaves_the_terminal_clean(digits: Path, tmp_path: Path) -> None:
    found = Terminal(90, 40)
    process = started(found, ("train-stage1", "--data", digits, "--out", tmp_path / "run", "--epochs", 900))
    while not any("so far" in line for line in found.look()) and process.poll() is None:
        pass
    assert not found.screen.cursor.hidden  # a second signal or a SIGKILL leaves it no time
    process.send_signal(signal.SIGINT)
    while process.poll() is None:  # a terminal that nobody reads would hold it up
        found.look()
    screen = found.look()
    assert "interrupted: SIGINT received; stage1 is saved at epoch" in "".join(screen), screen
    assert not [line for line in screen if "so far" in line or "─" in line]
    assert not found.screen.cursor.hidden
