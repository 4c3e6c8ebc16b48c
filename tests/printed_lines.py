"""Each fix: and next: line that a test prints is followed: `pytest --follow-lines`.

Lines of one kind, which differ in names and numbers alone, are followed once in a session: in a copy of the folder of
the test that prints the first of them. A command must succeed, and then the command that failed must not fail in the
same way. A sentence that names flags is followed by changing these flags.
"""

import contextlib
import hashlib
import os
import re
import shlex
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Protocol

root: Path | None = None
"""Folder of the running test; None where nothing is followed: in fixtures, which tests share, and in following."""
seen: Path | None = None
"""Folder with a file per kind of line that was followed, shared by all processes of a session; None: follow none."""
_LINE = re.compile(r"\s*(fix|next): (.+)")
_COMMAND = re.compile(r"((rm|mv) .+ && )?cpmix [a-z]|(rm|mv) .+$")
"""Commands that a line starts with. After a sentence, only the first form is one."""
_TRAINING = ("run", "train-stage1", "train-stage2", "finetune")
_FOLLOWED = (0, 75)
"""Exit codes of a command that did what it should: 75 is a saved state, and what status says of one."""


class Printed(Protocol):
    """What a command printed, such as Result of helpers.py."""

    code: int
    stdout: str
    stderr: str


def follow(arguments: Sequence[object], found: Printed, run: Callable[..., Printed], where: Path) -> None:
    """Follow the lines that a command printed, those of a kind that no test of the session printed before.

    Args:
        arguments: words of the command.
        found: what it printed.
        run: runs a command in this process.
        where: folder in which the command ran.

    Raises:
        AssertionError: a line does not do what it says.
    """
    if seen is None or root is None:
        return
    words = [str(word) for word in arguments]
    for line in (found.stdout + found.stderr).splitlines():
        matched = _LINE.fullmatch(line)
        if matched is None or not _is_new(words[:1], line):
            continue
        with _copy(where) as moved:
            if moved is None:
                continue
            text, again = moved(matched[2]), [moved(word) for word in words]
            if matched[1] == "next":
                _follow_next(text, run)
            else:
                _follow_fix(text, again, moved(_error_of(found)), run)


def _is_new(command: Sequence[str], line: str) -> bool:
    """Return whether no process has followed a line of this kind; mark it as followed."""
    assert seen is not None
    kind = re.sub(r"'?/[^\s,;:')]+'?", "/", line)
    kind = re.sub(r"[0-9a-f]{12,}|[\d.]+", "0", kind)
    name = hashlib.sha256(repr((command, kind)).encode(errors="surrogateescape")).hexdigest()
    try:
        (seen / name).open("x").close()
    except FileExistsError:
        return False
    return True


@contextmanager
def _copy(here: Path) -> Iterator[Callable[[str], str] | None]:
    """Copy the test's folder and go to the place of the folder `here` in the copy.

    Yields the function that moves the paths of a text into the copy; None if the folder cannot be copied.
    """
    global root
    assert root is not None
    own, root = root, None
    folder = Path(tempfile.mkdtemp(prefix="followed-"))
    inside, place = folder / "root", folder
    try:
        copied = subprocess.run(["cp", "-a", str(own), str(inside)], capture_output=True, check=False)
        if copied.returncode:  # the test lets no file be read, or written
            yield None
            return
        for path in inside.rglob("*"):
            if path.is_symlink() and (target := path.readlink()).is_relative_to(own):
                path.unlink()
                path.symlink_to(inside / target.relative_to(own))
        if here.is_relative_to(own):
            place = inside / here.relative_to(own)
        with contextlib.chdir(place):
            yield lambda text: text.replace(str(own), str(inside))
    finally:
        root = own
        shutil.rmtree(folder, ignore_errors=True)


def _error_of(found: Printed) -> str:
    return next((line for line in found.stderr.splitlines() if line.startswith("error:")), "")


def _follow_next(text: str, run: Callable[..., Printed]) -> None:
    """A next: line is a command that starts; phases are not trained to their end."""
    if text.startswith("fetch "):  # published weights
        return
    words = _words(text)
    assert words[0] == "cpmix", f"next: {text}"
    result = run(*words[1:], *(["--dry-run"] if words[1] in _TRAINING else []))
    # A file that the test has changed; or a phase to train again, of another recipe than the phase before it.
    if result.code == 3 and re.search("is damaged: its sha256 differs|was trained differently from", result.stderr):
        return
    assert result.code in _FOLLOWED, f"next: {text}\nends with {result.code}:\n{result.stderr}"


def _follow_fix(text: str, words: Sequence[str], error: str, run: Callable[..., Printed]) -> None:
    """A fix: line is a command, or a sentence that ends with one, or names flags to change."""
    if text.startswith("wait "):
        return
    _, colon, commands = ("", "", text) if _COMMAND.match(text) else text.rpartition(": ")
    found = _COMMAND.match(commands)
    if found is not None and not (colon and found[3]) and not re.search(r"\b[A-Z]{3,}\b|https?:", text):
        for command in commands.split(" && "):
            name, *rest = _words(command)
            if name == "cpmix":
                result = run(*rest, *(["--dry-run"] if rest[0] == "run" else []))
                code, printed = result.code, result.stderr
            else:
                moved = subprocess.run([name, *rest], capture_output=True, text=True, check=False)
                code, printed = moved.returncode, moved.stderr
            # What a sentence only proposes may meet the next fault of the same file, which has a fix of its own. So may
            # status, which is proposed to see what is wrong.
            allowed = (*_FOLLOWED, 3) if colon or command.startswith("cpmix status ") else _FOLLOWED
            assert code in allowed, f"{error}\nfix: {text}\n{command} ends with {code}:\n{printed}"
        # status shows more, and changes nothing; nor does the same command with the plugin, each time it is given.
        changes_nothing = text.startswith("cpmix status ") or (" --plugin " in text and "--plugin" not in words)
        if not colon and not changes_nothing:
            _must_differ(error, text, words, run)
        return
    for flags in _changes(text, words):
        _must_differ(error, text, flags, run)


def _words(command: str) -> list[str]:
    """Return the words of a command as a shell passes them on."""
    shell = ["bash", "-c", f"printf '%s\\0' {command}"]
    return os.fsdecode(subprocess.run(shell, capture_output=True, check=True).stdout).split("\0")[:-1]


def _must_differ(error: str, text: str, words: Sequence[str], run: Callable[..., Printed]) -> None:
    """The command must not end with the error that it ended with before. Phases are not trained again."""
    if words[0] == "bench":  # it measures for a minute
        return
    result = run(*words, *(["--dry-run"] if words[0] in _TRAINING and "--dry-run" not in words else []))
    followed = f"{error}\nfix: {text}\n{shlex.join(words)} ends with {result.code}:\n{result.stderr}"
    assert not error or error not in result.stderr.splitlines(), followed


def _changes(text: str, words: Sequence[str]) -> Iterator[list[str]]:
    """Return the command lines that a sentence asks for: one for each alternative whose flags have values to type."""
    for part in re.split(r"; |, or |, and | or (?=drop|give|choose|use|write|replace|leave)", text):
        flags = [flag for flag in map(_typed, re.findall(_FLAG, part)) if flag]
        if instead := re.fullmatch(r"give (\S+) in place of (\S+)", part):
            kept = [instead[1] if word == instead[2] else word for word in words]
        elif "drop" in part:
            kept = _without_typed(words, part) if flags else list(words)
        elif re.match(r"give|choose|use|or replace|replace|leave|if|for|go on", part):
            kept = list(words)
            for flag in flags:
                kept = [*(kept if flag[0] == "--set" else _without(kept, flag[0])), *flag]
        else:
            continue
        if kept != list(words):
            yield kept


_FLAG = r"--[a-z][a-z-]+(?: '[^']*'| [^\s;:]+)?"
_WORDS = {"as", "is", "one", "or", "and", "a", "the", "says", "alone", "lists"}


def _typed(flag: str) -> list[str]:
    """Return a flag of a sentence with its value; an empty list if its value is a placeholder, such as FOLDER."""
    name, _, value = flag.rstrip(".,)").partition(" ")
    value = value.strip("'")
    if value in _WORDS or not value:
        return [name]
    return [] if value.isupper() else [name, value]


def _without_typed(words: Sequence[str], part: str) -> list[str]:
    """Return the words without the flags, and their values, that a part of a sentence names."""
    kept: list[str] = []
    values = 0
    for word, following in zip(words, [*words[1:], "--"], strict=True):
        if values:
            values = 0
        elif word.startswith("--") and re.search(rf"{re.escape(word.partition('=')[0])}(?![\w-])", part):
            has_value = "=" not in word and not following.startswith("--")
            if word == "--set" and following.partition("=")[0] not in part:
                kept.append(word)
                continue
            values = int(has_value)
        else:
            kept.append(word)
    return kept


def _without(words: Sequence[str], name: str) -> list[str]:
    """Return the words without a flag and its value."""
    return _without_typed(words, name)
