"""The machine around a run: no network, no home, odd paths, logs that nobody reads, no terminal."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from helpers import Result, contents, cpmix, ended, must, pipeline, refused, unchanged, write_image

ARMED = [False]


def refuse_sockets(event: str, args: object) -> None:
    if ARMED[0] and event.startswith("socket.") and event != "socket.gethostname":
        raise AssertionError(f"the network was asked for: {event} {args}")


sys.addaudithook(refuse_sockets)  # there is no way to take one away


@pytest.fixture
def no_network() -> Iterator[None]:
    ARMED[0] = True
    yield
    ARMED[0] = False


SESSION = """
import sys
from cpmix_cli.__main__ import main
arguments = iter(sys.argv[1:])
for count in map(int, arguments):
    sys.argv = ["cpmix", *(next(arguments) for _ in range(count))]
    try: main()
    except SystemExit as leaving: code = leaving.code or 0
    print("exit", code, flush=True)
"""


def session(*lines: tuple[object, ...], **environment: str) -> tuple[list[int], bytes, bytes]:
    """Command lines one after the other in a process of its own: exit codes, stdout and stderr."""
    arguments = [os.fsencode(str(word)) for line in lines for word in (len(line), *line)]
    command = [sys.executable, "-c", SESSION, *arguments]
    result = subprocess.run(command, capture_output=True, env={**os.environ, **environment})
    assert result.returncode == 0, result.stderr.decode()
    said = result.stdout.splitlines()
    codes = [int(line.split()[1]) for line in said if line.startswith(b"exit ")]
    return codes, b"\n".join(line for line in said if not line.startswith(b"exit ")), result.stderr


@pytest.mark.slow
def test_commands_open_no_network_socket(tmp_path: Path, no_network: None) -> None:
    must("build-lt", "digits", "--out", tmp_path / "data")
    pipeline(tmp_path / "data", tmp_path / "run", "--epochs", 3)
    must("status", tmp_path / "run")
    must("predict", "--help")
    must("methods", "--json")


@pytest.mark.slow
def test_a_home_and_caches_that_cannot_be_written_change_nothing(toy: Path, toy_run: Path, tmp_path: Path) -> None:
    names = ("HOME", "XDG_CACHE_HOME", "XDG_CONFIG_HOME", "XDG_DATA_HOME", "TORCH_HOME", "HF_HOME", "MPLCONFIGDIR")
    run = tmp_path / "run"
    codes, _, stderr = session(
        ("train-stage1", "--data", toy, "--out", run),
        ("train-stage2", "--from", run),
        ("evaluate", "--from", run),
        ("confusion-report", "--from", run),
        **dict.fromkeys(names, "/dev/null/nowhere"),
    )
    assert codes == [0, 0, 0, 0], stderr.decode()
    assert b"nowhere" not in stderr
    assert b"atplotlib" not in stderr
    found, expected = contents(run), contents(toy_run)
    assert found.pop("stage1/recipe.toml") == expected.pop("stage1/recipe.toml")
    assert found == expected


NAMES = {
    "spaces": "with two  spaces",
    "newline": "new\nline",
    "quotes": 'it\'s "quoted" $HOME `x`; #',
    "long": "n" * 200,
    "unicode": "Zürich-東京",
    "escape": "red\x1b[31m",
    "dash": "-rf",
}


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_unusual_path_names_are_accepted(name: str, tmp_path: Path) -> None:
    place = tmp_path / NAMES[name]
    data, run = place / "data", place / "run"
    must("build-lt", "toy", "--out", data)
    must("train-stage1", "--data", data, "--out", run, "--epochs", 4)
    result = must("train-stage2", "--from", run, "--json")
    assert result.json["folder"] == str(run / "stage2")
    must("evaluate", "--from", run)
    report = must("confusion-report", "--from", run)
    assert "\x1b" not in report.stdout + report.stderr
    assert must("status", run, "--json").json["runs"][0]["status"] == "done"


@pytest.mark.slow
@pytest.mark.long
def test_a_path_that_is_not_utf_8_is_accepted(tmp_path: Path) -> None:
    place = Path(os.fsdecode(os.fsencode(tmp_path) + b"/caf\xe9"))
    data, run = place / "data", place / "run"
    codes, stdout, stderr = session(
        ("build-lt", "toy", "--out", data),
        ("train-stage1", "--data", data, "--out", run, "--epochs", 4),
        ("train-stage2", "--from", run),
        ("evaluate", "--from", run),
        ("confusion-report", "--from", run),
        ("status", run),
        ("evaluate", "--from", place / "none"),
    )
    assert codes == [0, 0, 0, 0, 0, 0, 3], stderr.decode()
    assert stdout.count(rb"caf\udce9") >= 6
    codes, stdout, _ = session(("evaluate", "--from", run, "--json"))
    assert json.loads(stdout)["folder"] == str(run / "evaluation" / "stage2")
    other = Path(shutil.copytree(run, os.fsdecode(os.fsencode(place) + b"/r\xff")))
    codes, _, stderr = session(("confusion-report", "--from", other, "--compare", run, "--overwrite"))
    assert codes == [0], stderr.decode()
    assert "r\\udcff" in (other / "confusion" / "index.html").read_text()


def shell(line: str, **places: object) -> Result:
    """Run a line of the shell in which {cpmix} and places are filled in, with buffered streams, as users have them."""
    text = line.format(cpmix=f"{sys.executable} -m cpmix_cli", **places)
    buffered = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
    found = subprocess.run(["bash", "-c", f"set -o pipefail; {text}"], capture_output=True, text=True, env=buffered)
    return Result(found.returncode, found.stdout, found.stderr)


TRAIN = "{cpmix} train-stage1 --data {toy} --out {run} --epochs 20"


@pytest.mark.slow
@pytest.mark.parametrize("into", ["2>&1 | head -1", "2> >(head -1)", ">&-", "2>&-", ">&- 2>&-", "2>/dev/full"])
def test_a_log_that_cannot_be_written_does_not_stop_a_run(into: str, toy: Path, tmp_path: Path) -> None:
    ended(shell(f"{TRAIN} {into}", toy=toy, run=tmp_path / "run"), 0)
    assert (tmp_path / "run" / "stage1" / "run.json").is_file()


@pytest.mark.slow
def test_a_result_that_nobody_reads_is_an_error_only_on_a_full_disk(toy_run: Path) -> None:
    result = shell("{cpmix} status {run} | head -0", run=toy_run)
    assert (result.code, result.stderr) == (0, "")
    result = ended(shell("{cpmix} status {run} >/dev/full", run=toy_run), 4)
    assert result.stderr == (
        "error: cannot write the result to standard output: No space left on device\n"
        "  fix: free the disk that the output goes to, or send it elsewhere; then run the same command again\n"
    )
    ended(shell("{cpmix} status {run} --json >/dev/full", run=toy_run), 4)


@pytest.mark.slow
def test_without_a_terminal_no_control_codes_are_written(toy: Path, tmp_path: Path) -> None:
    """Whatever the environment says of colours."""
    _, stdout, stderr = session(
        ("train-stage1", "--data", toy, "--out", tmp_path / "run", "--epochs", 4),
        ("train-stage1", "--help"),
        ("train-stage1", "--nonsense"),
        ("status", tmp_path / "run"),
        FORCE_COLOR="1",
        CLICOLOR_FORCE="1",
        TERM="xterm-256color",
    )
    assert b"has no flag --nonsense" in stderr
    assert not {0x1B, 0x0D} & set(stdout + stderr)


def test_control_codes_in_names_are_escaped(tmp_path: Path) -> None:
    for name in ("a\x1b[31mred", "b\x07\x9b2J"):
        for i in range(3):
            write_image(tmp_path / "mine" / name / f"{i}.png", (i, 0, 0))
    result = must("build-lt", "image-folder", "--data-root", tmp_path / "mine", "--out", tmp_path / "data")
    assert r"a\x1b[31mred" in result.stdout
    assert r"b\x07\x9b2J" in result.stdout
    assert not {"\x1b", "\x07", "\x9b"} & set(result.stdout + result.stderr)


def test_a_dry_run_takes_a_step_of_every_phase(digits: Path, digits_run: Path, tmp_path: Path) -> None:
    flags = ("--data", digits, "--out", tmp_path / "new", "--epochs", 6, "--dry-run")
    found = must("train-stage1", *flags, "--json").json
    assert found["phases_tried"] == ["stage1", "stage2", "finetune"]
    assert (found["status"], found["epochs"], found["steps_per_epoch"]) == ("dry run", 4, 7)
    found = must("train-stage1", *flags, "--recipe", "digits/cross-entropy", "--json").json
    assert found["phases_tried"] == ["stage1", "finetune"]
    refused(5, "needed by: stage2", "train-stage1", *flags, "--set", "stage2.terms.cp.weight=3e38")
    said = "optimizer.lr = 1e+300: Input should be less than"
    refused(2, said, "train-stage1", *flags, "--set", "optimizer.lr=1e300")
    with unchanged(digits_run):
        for command in ("train-stage2", "finetune"):
            result = must(command, "--from", digits_run, "--overwrite", "--dry-run")
            assert "all checks passed, a step of" in result.stdout
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("flags", ["--help", "--version", "methods", "train-stage1 --help"])
def test_help_that_nobody_reads_is_an_error_only_on_a_full_disk(flags: str) -> None:
    result = shell("{cpmix} {flags} | head -0", flags=flags)
    assert (result.code, result.stderr) == (0, "")
    ended(shell("{cpmix} {flags} >/dev/full", flags=flags), 4, "No space left on device")


def test_a_deleted_working_directory_is_reported(tmp_path: Path) -> None:
    result = shell("cd {gone} && rmdir {gone} && PYTHONPATH={here} {cpmix} methods", gone=tmp_path, here=Path.cwd())
    ended(result, 4, "the working directory is not there any more")


@pytest.mark.parametrize("line", ["train-stage2 --from", "status", "build-lt toy --out"])
def test_a_name_longer_than_a_file_can_have_is_refused(line: str, tmp_path: Path) -> None:
    result = cpmix(*line.split(), tmp_path / ("n" * 300))
    assert result.code in (3, 4)
    assert "nnn" in result.stdout + result.stderr
