"""Results files: rows that compare --append adds, files that it refuses, and the tables that results makes of them."""

import csv
import json
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from helpers import fix_of, must, refused

from cpmix_cli.results.comparison import evaluations_of
from cpmix_cli.results.measured_row import row_of
from cpmix_cli.results.results_file import COLUMNS, append, read_results

FLAGS = ("--recipe", "digits/cross-entropy", "--epochs", 3)


def record(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "run.json").read_text())
    return found


@pytest.fixture(scope="module")
def run(digits: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Cross entropy on digits, evaluated before and after its finetune, as typed in a shell."""
    run = tmp_path_factory.mktemp("results") / "ce run"
    with pytest.MonkeyPatch.context() as patch:
        for words in (
            ("train-stage1", "--data", digits, "--out", run, *FLAGS),
            ("evaluate", "--from", run),
            ("finetune", "--from", run),
            ("evaluate", "--from", run),
        ):
            patch.setattr("sys.argv", ["/bin/cpmix", *map(str, words)])
            must(*words)
    return run


def test_append_writes_one_row_per_evaluation(run: Path, digits: Path, tmp_path: Path) -> None:
    path = tmp_path / "new" / "results.csv"
    result = must("compare", run, "--append", path, "--study", "short, mine")
    assert f"compare: 2 rows appended to {path}, 0 already there\n" in result.stderr
    assert result.stdout == must("compare", run).stdout
    train = f"cpmix train-stage1 --data {digits} --out '{run}' --recipe digits/cross-entropy --epochs 3"
    evaluate = f"cpmix evaluate --from '{run}'"
    expected = []
    for phase, epochs, leading, middle in (
        ("stage1", "3", ["stage1"], ""),
        ("finetune", "3+1", ["stage1", "finetune"], f" && cpmix finetune --from '{run}'"),
    ):
        own = record(run / phase)
        numbers = json.loads((run / "evaluation" / phase / "metrics.json").read_text())
        seconds = sum(record(run / name)["training_seconds"] for name in leading)
        versions, commit = own["versions"], own["versions"].pop("commit") or ""
        cells = [
            *("short, mine", "Cross Entropy", "digits/cross-entropy", own["outputs"]["recipe.toml"]),
            *("digits-lt-rho20", "20", "0", epochs, phase, "", "test"),
            *(f"{numbers[key]:.2f}" for key in ("top1", "many", "medium", "few", "ece")),
            *(str(417 * (3 if phase == "stage1" else 4)), f"{seconds:.1f}", "cpu", str(own["threads"]), "fp32"),
            ", ".join(f"{name} {versions[name]}" for name in ("torch", "python", "cpmix")),
            *(commit, f"{train}{middle} && {evaluate}", own["outputs"]["model.safetensors"][:12], "", ""),
        ]
        expected.append(cells)
    with path.open(newline="") as file:
        header, *rows = csv.reader(file)
    assert header == list(COLUMNS)
    for cells, (column, theirs) in zip(rows, zip(["-"] * 2, expected, strict=True), strict=True):
        place = header.index("training_seconds")
        # run.json has the time of the whole phase, the row the sum over its epochs.
        assert float(cells.pop(place)) == pytest.approx(float(theirs.pop(place)), abs=0.3), column
        assert cells == theirs
    assert path.read_bytes().count(b"\n") == 3
    assert [entry.name for entry in path.parent.iterdir()] == ["results.csv"]  # no lock, no temporary file


def test_an_evaluation_is_appended_once_and_rows_of_others_keep_their_bytes(run: Path, tmp_path: Path) -> None:
    path = tmp_path / "results.csv"
    must("compare", run / "stage1", "--append", path)
    assert [row["study"] for row in read_results(path)] == ["digits-lt-rho20"]
    mine = path.read_bytes().replace(b",digits-lt-rho20,20,", b',"digits-lt-rho20","20",')  # as another program writes
    path.write_bytes(mine)
    result = must("compare", run, "--append", path, "--json")
    assert result.json["append"] == {"file": str(path), "appended": 1, "present": 1}
    assert path.read_bytes().startswith(mine)
    before = path.read_bytes()
    assert "0 rows appended" in must("compare", run, "--append", path, "--study", "again").stderr
    assert path.read_bytes() == before
    assert [row["phase"] for row in read_results(path)] == ["stage1", "finetune"]


def test_damaged_files_are_refused_before_anything_is_written(run: Path, tmp_path: Path) -> None:
    path, out = tmp_path / "results.csv", tmp_path / "table.txt"
    must("compare", run / "stage1", "--append", path)
    good = path.read_bytes()
    restore = "  fix: correct the line, or restore the file from a copy\n"
    other = "  fix: give another file; compare --append creates it with its header\n"
    top1 = f"{json.loads((run / 'evaluation' / 'stage1' / 'metrics.json').read_text())['top1']:.2f}"
    for damaged, message, fix in (
        (good.replace(b"recipe_sha256", b"sha256"), 'column 4 of its header is "sha256", not "recipe_sha256"', other),
        (good.replace(b",note", b"", 1), 'column 27 of its header is "", not "note"', other),
        (b"", 'column 1 of its header is "", not "study"', other),
        (good + b"a,b\n", f"{path}, line 3 has 2 cells, the header has 27", restore),
        (good.replace(top1.encode(), b"120"), f'{path}, line 2: top1 "120" is no value of that column', restore),
        (good.replace(b",stage1,", b",stage9,"), f'{path}, line 2: phase "stage9" is no value of that column', restore),
        (good[:-1], f"{path}, line 2 is cut off: it has no line end", restore),
        (good[:-1] + b'"', f"{path} is no CSV file", restore),
        (good.replace(b"fp32", b"\xff"), f"{path} is no CSV file", restore),
    ):
        assert damaged != good
        path.write_bytes(damaged)
        assert refused(3, message, "compare", run, "--append", path, "--out", out).stderr.endswith(fix), message
        assert path.read_bytes() == damaged
        assert sorted(entry.name for entry in tmp_path.iterdir()) == ["results.csv"]
    refused(3, f"cannot read {tmp_path}: it is a folder", "compare", run, "--append", tmp_path)
    result = refused(2, "--study is of --append", "compare", run, "--study", "mine")
    assert result.stderr.endswith("  fix: give the results file too: --append FILE\n")


APPEND = """
import sys
from pathlib import Path
from cpmix_cli.results.results_file import COLUMNS, append
for number in range(8):
    row = dict.fromkeys(COLUMNS, "") | dict(study="s", method=sys.argv[1], data="d", phase="stage1", split="test")
    append(Path("results.csv"), [row | {"checkpoint": f"{sys.argv[1]}{number:011d}"}])
"""


def test_processes_that_append_at_once_lose_no_row(tmp_path: Path) -> None:
    running = [subprocess.Popen([sys.executable, "-c", APPEND, name], cwd=tmp_path) for name in "abc"]
    assert [each.wait() for each in running] == [0, 0, 0]
    rows = read_results(tmp_path / "results.csv")
    assert len(rows) == 24
    for name in "abc":
        assert [row["checkpoint"] for row in rows if row["method"] == name] == [f"{name}{n:011d}" for n in range(8)]


def test_a_missing_phase_leaves_the_cells_about_training_empty(run: Path, digits: Path, tmp_path: Path) -> None:
    first, second, path = tmp_path / "first", tmp_path / "second", tmp_path / "results.csv"
    must("train-stage1", "--data", digits, "--out", first, "--recipe", "digits/cpmix", "--epochs", 2)
    must("train-stage2", "--from", first, "--out", second)
    must("evaluate", "--from", second)
    (first / "stage1" / "run.json").unlink()
    (first / "stage1").rename(tmp_path / "gone")
    must("compare", second, "--append", path)
    (row,) = read_results(path)
    unknown = {column for column, cell in row.items() if not cell}
    training = {"image_passes", "training_seconds", "device", "threads", "versions", "commit", "command"}
    assert unknown == {"label", "paper", "note", *training}
    assert row["epochs"] == "1+1"


def row(**cells: str) -> dict[str, str]:
    return dict.fromkeys(COLUMNS, "") | {"method": "m", "data": "d", "phase": "stage1", "split": "test"} | cells


ROWS = (
    row(study="a b", seed="0", epochs="4+2", phase="stage2", top1="10.00", few="1.00", paper="12.5*", note="row_1"),
    row(study="a b", seed="0", epochs="4+2+1", phase="finetune", top1="20.00"),
    row(study="a b", seed="1", epochs="4+2", phase="stage2", top1="13.00", few="2.00", paper="12.5*"),
    row(study="a b", seed="1", epochs="4", top1="7.00"),
    row(study="other", seed="0", epochs="4", top1="1.00"),
    row(study="a b", seed="0", epochs="4+2", phase="stage2", top1="11.00"),  # a second run of seed 0
    row(study="a b", method="n", seed="0", epochs="4+1", phase="finetune", top1="30.00"),
)


def test_a_large_imbalance_factor_is_a_number_of_the_file(run: Path, tmp_path: Path) -> None:
    (measured,), _ = evaluations_of(run, "stage1")
    append(tmp_path / "results.csv", [row_of(replace(measured, data="d-lt-rho1e+07"), None)])
    assert [found["rho"] for found in read_results(tmp_path / "results.csv")] == ["10000000"]


@pytest.fixture
def table(tmp_path: Path) -> Path:
    path = tmp_path / "results.csv"
    assert append(path, ROWS) == (7, 0)
    return path


def test_results_shows_a_table_per_study(table: Path) -> None:
    assert must("results", table).stdout.splitlines() == [
        "a b",
        "method  seed  epochs  phase     top-1   few  paper",
        "------  ----  ------  --------  -----  ----  -----",
        "m          0  4+2     stage2    10.00  1.00  12.5*",
        "m          0  4+2+1   finetune  20.00",
        "m          1  4+2     stage2    13.00  2.00  12.5*",
        "m          1  4       stage1     7.00",
        "m          0  4+2     stage2    11.00",
        "n          0  4+1     finetune  30.00",
        "all: data d, split test",
        "",
        "other",
        "method  top-1",
        "------  -----",
        "m        1.00",
        "all: data d, seed 0, epochs 4, phase stage1, split test",
    ]
    assert must("results", table, "--json").json == {"command": "results", "rows": list(ROWS)}


def test_update_makes_the_tables_of_a_text(table: Path, tmp_path: Path) -> None:
    text = tmp_path / "text.md"
    text.write_text(
        "Before.\n"
        "<!-- results: study=a b columns=method,seed,epochs,top1,few,paper,note,+top1,+few -->\n| old |\n"
        "<!-- end of results -->\nBetween.\n"
        "<!-- results: study=a b columns=epochs,method,phase,top1,few -->\n<!-- end of results -->\n"
        "    <!-- results: study=x columns=y --> is an example.\n"
    )
    assert must("results", table, "--update", text).stdout == f"{text}: 2 tables, updated\n"
    assert text.read_text() == (
        "Before.\n"
        "<!-- results: study=a b columns=method,seed,epochs,top1,few,paper,note,+top1,+few -->\n"
        "| method | seed | epochs | top-1 | few | paper | note | + finetune: top-1 | few |\n"
        "| --- | ---: | --- | ---: | ---: | ---: | --- | ---: | ---: |\n"
        "| m | 0 | 4+2 | 10.00 | 1.00 | 12.5\\* | row\\_1 | 20.00 |  |\n"
        "| m | 1 | 4+2 | 13.00 | 2.00 | 12.5\\* |  |  |  |\n"
        "| m | 1 | 4 | 7.00 |  |  |  |  |  |\n"
        "| m | 0 | 4+2 | 11.00 |  |  |  |  |  |\n"
        "| n | 0 |  |  |  |  |  | 30.00 |  |\n"
        "<!-- end of results -->\nBetween.\n"
        "<!-- results: study=a b columns=epochs,method,phase,top1,few -->\n"
        "| epochs | method | phase | top-1 | few |\n"
        "| --- | --- | --- | ---: | ---: |\n"
        "| 4+2 | m | stage2 | 11.50 ± 2.12 | 1.50 ± 0.71 |\n"
        "| 4+2+1 | m | finetune | 20.00 |  |\n"
        "| 4 | m | stage1 | 7.00 |  |\n"
        "| 4+2 | m | stage2 | 11.00 |  |\n"
        "| 4+1 | n | finetune | 30.00 |  |\n"
        "<!-- end of results -->\n"
        "    <!-- results: study=x columns=y --> is an example.\n"
    )
    before = text.stat().st_mtime_ns
    result = must("results", table, "--update", text, "--json")
    assert result.json == {"command": "results", "file": str(text), "tables": 2, "changed": False}
    assert text.stat().st_mtime_ns == before
    of_windows = text.read_bytes().replace(b"\n", b"\r\n").replace(b" results -->\r", b" results -->  \r")
    text.write_bytes(of_windows)
    assert must("results", table, "--update", text).stdout == f"{text}: 2 tables, up to date\n"
    assert text.read_bytes() == of_windows


@pytest.mark.parametrize(
    ("text", "message", "fix"),
    [
        ("no mark\n", "text.md marks no table", "write lines <!-- results: study=NAME columns="),
        ("\n<!-- results: study=other columns=top1 -->\n", "line 2: this table has no end", "add a line <!-- end of"),
        (
            "<!-- results: study=other columns=top1 -->\n" * 2 + "<!-- end of results -->\n",
            "line 1: this table has no end",
            "add a line <!-- end of results --> below the table",
        ),
        ("<!-- results: other -->\n", "line 1: <!-- results: other --> does not name a study and", "write it as <!--"),
        (
            "<!-- results: study=othr columns=top1 -->\n<!-- end of results -->\n",
            'line 1: the results file has no study "othr". Did you mean "other"?',
            "name one of the file's studies",
        ),
        (
            "<!-- results: study=other columns=method,+top -->\n<!-- end of results -->\n",
            'line 1: no column "top". Did you mean "top1"?',
            "name columns of the file",
        ),
        ("caf\udce9", "text.md is no UTF-8 text", "save it as UTF-8"),
    ],
)
def test_texts_with_wrong_marks_are_refused_and_kept(
    table: Path, tmp_path: Path, text: str, message: str, fix: str
) -> None:
    path = tmp_path / "text.md"
    path.write_text(text, errors="surrogateescape")
    result = refused(3, message, "results", table, "--update", path)
    assert fix_of(result).startswith(fix)
    assert path.read_text(errors="surrogateescape") == text


def test_the_tables_of_the_measured_results_are_those_of_the_results_file(tmp_path: Path) -> None:
    recipes = Path(__file__).parents[2] / "recipes"
    copy = Path(shutil.copy(recipes / "RESULTS.md", tmp_path))
    result = must("results", recipes / "results.csv", "--update", copy, "--json").json
    assert copy.read_text() == (recipes / "RESULTS.md").read_text(), "cpmix results recipes/results.csv --update ..."
    studies = {row["study"] for row in read_results(recipes / "results.csv")}
    assert studies == set(re.findall(r"^<!-- results: study=(\S+)", copy.read_text(), re.MULTILINE))
    assert result["tables"] == len(studies)
