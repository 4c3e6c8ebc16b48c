"""Names of classes, files, runs and recipes with control codes, line ends, direction marks and formulas."""

import csv
import io
import json
import re
import subprocess
import tomllib
from pathlib import Path
from xml.etree import ElementTree

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from helpers import Result, cpmix, edit_record, must, refused, write_image

from cpmix_cli.artifacts.files import sha256
from cpmix_cli.runtime.text import csv_cell, on_a_line, quoted, toml_text

UNSAFE = re.compile(
    "[\x00-\x09\x0b-\x1f\x7f-\x9f\xad\u061c\u180e\u200b\u200e\u200f\u2028-\u202e\u2060-\u206f\ufeff\ufff9-\ufffb\ufffe\uffff"
    "\U000e0000-\U000e007f]"
)
FORGED = re.compile(r"^ *(next|fix|error|warning|done): *rm", re.MULTILINE)
CLASSES = ["=2+5", "-1.5", "@a\x1b[31m\u202eb\nnext: rm -rf x", "$x_1$ <b>&amp;\x85\x07"]
CLASSES += ["</script>$\\frac{--> \u200b\ufeff\uffff\U000e0041", "\U0001f468\u200d\U0001f469 \u0645\u06cc\u200c\u062e"]
RUN = "=run\u2028\t\n  fix: rm\u2066 \x9b2J'"
"""A folder of a run."""


def safe(text: str) -> str:
    assert not UNSAFE.findall(text)
    assert not FORGED.search(text)
    return text


def safely(*arguments: object) -> Result:
    result = must(*arguments)
    safe(result.stdout + result.stderr)
    return result


def cells(text: str) -> list[str]:
    """Cells of a CSV that are no numbers, after a check that none is a formula."""
    found = [cell for row in csv.reader(io.StringIO(safe(text), newline="")) for cell in row if cell]
    texts = [cell for cell in found if not re.fullmatch(r"[+-]?[\d.]+(e[+-]?\d+)?", cell)]
    assert not [cell for cell in texts if cell[0] in "=+-@"]
    return texts


@pytest.fixture(scope="module")
def nasty(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with images `in` and an evaluated run, all with such names."""
    place = tmp_path_factory.mktemp("nasty")
    for c, name in enumerate(CLASSES):
        for i in range(12):
            write_image(place / "in" / name / f"@{i}\n  fix: rm.png", (60 * c, 7 * i, 0))
    built = safely(
        *("build-lt", "image-folder", "--data-root", place / "in", "--out", place / "data", "--image-size", 8)
    )
    assert r"@a\x1b[31m\u202eb\nnext: rm -rf x" in built.stdout
    recipe = place / "r\u202e\n  fix: rm.toml"
    recipe.write_text('extends = "digits/cpmix"\n[about]\nmethod = "=1+1\\u202e\\nnext: rm"\nkind = "mixing"\n')
    flags = ("--recipe", recipe, "--epochs", 4)
    for command in (
        ("train-stage1", "--data", place / "data", "--out", place / RUN, *flags),
        ("train-stage2", "--from", place / RUN),
        ("finetune", "--from", place / RUN),
        ("evaluate", "--from", place / RUN),
    ):
        safely(*command)
    return place


@pytest.mark.slow
def test_no_table_on_a_terminal_has_a_name_as_it_is(nasty: Path) -> None:
    run = nasty / RUN
    for command in (
        ("status", run),
        ("misclassified", "--from", run),
        ("predict", nasty / "in", "--from", run),
        ("compare", run),
        ("methods",),
    ):
        safely(*command)
        safe(must(*command, *([] if command == ("methods",) else ["--json"])).stdout)


@pytest.mark.slow
def test_no_file_for_other_programs_has_a_name_as_it_is(nasty: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = nasty / RUN
    safely("confusion-report", "--from", run)
    page = safe((run / "confusion" / "index.html").read_text())
    assert r"@a\x1b[31m\u202eb\nnext: rm -rf x" in page
    assert r"@a\\x1b[31m\\u202eb\\nnext: rm -rf x" in page
    drawings = list(run.glob("confusion/*/*.svg"))
    assert len(drawings) == 3  # without ten groups: the data set has fewer than 20 classes
    drawn = "".join(safe(path.read_text()) for path in drawings)
    assert r"@a\x1b[31m\u202e…nnext: rm -rf x" in drawn  # as on the page, without its middle
    for path in drawings:
        ElementTree.parse(path)
    assert "</script>$" not in page
    for form in ("markdown", "latex"):
        safely("compare", run, "--format", form)
    monkeypatch.chdir(nasty)  # a relative path begins with =
    assert r"'=run\u2028\t\n  fix: rm\u2066 \x9b2J'" in cells(safely("compare", RUN, "--format", "csv").stdout)
    assert r"'=1+1\u202e\nnext: rm" in cells(safely("compare", run, "--format", "csv").stdout)
    write_image(nasty / "=in.png", (1, 2, 3))
    safely("predict", "=in.png", nasty / "in", "--from", run, "--out", "predictions.csv")
    predicted = cells((nasty / "predictions.csv").read_text())
    assert "'=in.png" in predicted
    assert {"'=2+5", r"'@a\x1b[31m\u202eb\nnext: rm -rf x"} & set(predicted)
    text = safe((run / "stage1" / "recipe.toml").read_text())
    assert 'method = "=1+1\\u202e\\nnext: rm"' in text
    safely("recipes", run / "stage1" / "recipe.toml")
    results = nasty / "results.csv"
    for appended in (1, 0):
        result = must("compare", run, "--append", results, "--study", "@SUM(1)\u202e", "--json")
        assert result.json["append"]["appended"] == appended
    assert r"'@SUM(1)\u202e" in cells(results.read_text())
    safely("results", results)


@pytest.mark.slow
def test_the_next_command_is_the_same_command_in_a_shell(nasty: Path) -> None:
    result = must("evaluate", "--from", nasty / RUN, "--overwrite")
    (line,) = [x for x in result.stderr.splitlines() if x.startswith("next: ")]
    command = line.removeprefix("next: ")
    shell = f"cpmix() {{ printf '%s\\0' \"$@\"; }}; {command}"
    words = subprocess.run(["bash", "-c", shell], capture_output=True, text=True, check=True).stdout.split("\0")
    assert words[1:] == ["--from", str(nasty / RUN), ""]


NAME = "x\x1b[2J\u202e\n  fix: rm -rf x\nnext: rm"


@pytest.mark.parametrize(
    "arguments",
    [
        ("evaluate", "--from", NAME),
        ("evaluate", NAME),
        ("status", NAME),
        (NAME,),
        ("evaluate", f"--{NAME}"),
        ("build-lt", NAME),
        ("build-lt", "image-folder", "--data-root", NAME),
        ("build-lt", "cifar10", "--data-root", NAME, "--profile", NAME),
        ("build-lt", "digits", "--rho", NAME),
        ("train-stage1", "--data", NAME, "--recipe", NAME, "--out", NAME),
        ("recipes", NAME),
        ("recipes", "digits/cpmix", NAME),
        ("compare", NAME, "--append", NAME),
        ("predict", NAME, "--from", NAME),
        ("export", "--from", NAME, "--out", NAME),
        ("export", "--from", NAME),
        ("import-weights", NAME, "--sha256", NAME),
        ("figure", "3", NAME, "--out", NAME),
    ],
    ids=lambda arguments: " ".join(on_a_line(str(word))[:10] for word in arguments),
)
def test_no_error_repeats_a_name_as_it_is(
    arguments: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    result = cpmix(*arguments)
    assert result.code in (2, 3, 4)
    safe(result.stdout + result.stderr)
    assert re.fullmatch(r"error: .*(\n    .*)*(\n  needed by: .*)?(\n  fix: .*)?\n", result.stderr), result.stderr


def test_settings_and_wrong_class_names_are_shown_on_a_line(digits_run: Path, digits: Path, tmp_path: Path) -> None:
    for arguments in (
        ("misclassified", "--from", digits_run, "--true", NAME),
        ("train-stage1", "--data", digits, "--out", tmp_path / "o", "--set", f"{NAME}=1"),
        ("train-stage1", "--data", digits, "--out", tmp_path / "o", "--set", f"model.name='{NAME}'"),
        ("evaluate", "--from", digits_run, "--phase", NAME),
        ("evaluate", "--from", digits_run, "--test-data", tmp_path / NAME),
    ):
        result = cpmix(*arguments)
        assert result.code in (2, 3), result.stderr
        safe(result.stdout + result.stderr)


@pytest.mark.parametrize(
    ("value", "cell"),
    [
        ("=2+5", "'=2+5"),
        ("+cmd|' /C calc'!A0", "'+cmd|' /C calc'!A0"),
        ("-2+5", "'-2+5"),
        ("@SUM(1)", "'@SUM(1)"),
        (" =2+5", "' =2+5"),
        ("\uff1d2+5", "'\uff1d2+5"),
        ("\t=2+5", r"\t=2+5"),
        ("a\r\nb", r"a\r\nb"),
        ("-1.5", "-1.5"),
        ("+3e-5", "+3e-5"),
        (-1.5, -1.5),
        (None, None),
        ("", ""),
        ("a=b-c", "a=b-c"),
    ],
)
def test_a_csv_cell_is_a_formula_never_and_a_number_if_it_was_one(value: object, cell: object) -> None:
    assert csv_cell(value) == cell
    assert csv_cell(cell) == cell


@pytest.mark.parametrize(
    "word", ["plain", "two words", "it's", "a\\n", RUN, NAME, "\x80\u202e\U0001f600é'\\", "\ufeff\uffff\U000e0041'", ""]
)
def test_quoted_words_are_the_same_in_a_shell(word: str) -> None:
    safe(quoted(word))
    shell = f"printf '%s\\0' {quoted(word, word)}"
    found = subprocess.run(["bash", "-c", shell], capture_output=True, check=True, env={"LC_ALL": "C.UTF-8"}).stdout
    assert found == f"{word}\0{word}\0".encode()


def test_a_path_that_begins_like_a_flag_is_no_flag_in_a_command() -> None:
    assert quoted("status", Path("-x"), Path("a/-x"), "--from", Path("--out/x y")) == (
        "status ./-x a/-x --from './--out/x y'"
    )


def test_a_toml_text_keeps_its_value_without_names_as_they_are() -> None:
    for name in CLASSES:
        text = json.dumps(name, ensure_ascii=False)
        assert tomllib.loads(f"x = {safe(toml_text(text))}")["x"] == name


def test_the_evaluation_of_a_folder_with_the_longest_name_has_a_shorter_one(digits_run: Path, tmp_path: Path) -> None:
    images = tmp_path / ("é" * 120 + "n" * 15)
    for c in range(10):
        write_image(images / str(c) / "0.png", (25 * c, 0, 0))
    must("evaluate", "--from", digits_run, "--test-data", images)
    result = refused(2, "is no file name of at most 100", "evaluate", "--from", digits_run, "--label", "x" * 101)
    assert "  fix: give a name such as --label run-2\n" in result.stderr


# -- lists that lead out of their folder -------------------------------------------------------------------------------


@pytest.mark.parametrize("path", ["../x.png", "/etc/passwd", "a/../../x.png", "a/..", "a//b.png", "./a.png", ""])
def test_a_list_of_a_data_set_that_leads_out_of_its_folder_is_refused(tmp_path: Path, path: str) -> None:
    for name in ("a", "b"):
        for i in range(4):
            write_image(tmp_path / "in" / name / f"{i}.png", (i, 0, 0))
    write_image(tmp_path / "x.png")
    data = tmp_path / "data"
    build = ("build-lt", "image-folder", "--data-root", tmp_path / "in", "--out", data, "--pack", 0)
    must(*build)
    table = pq.read_table(data / "train.parquet")
    paths = [path, *table["path"].to_pylist()[1:]]
    pq.write_table(table.set_column(2, table.schema.field("path"), pa.array(paths)), data / "train.parquet")
    recorded = json.loads((data / "dataset.json").read_text())["files"]
    sha = sha256((data / "train.parquet").read_bytes())
    edit_record(data / "dataset.json", files={**recorded, "train.parquet": sha})
    message = f"{data / 'train.parquet'}, row 1 (sample_id 0, label 0, path {path}): no path below the folder of images"
    train = ("train-stage1", "--data", data, "--out", tmp_path / "run", "--set", "data.normalisation=imagenet")
    refused(3, message, *train)
    refused(3, message, *build, "--verify")
