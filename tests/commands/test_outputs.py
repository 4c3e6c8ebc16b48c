"""Where results go: paths from home, formats by the name of --out, two test sets of one name."""

from pathlib import Path

import pandas as pd
import pytest
from helpers import files, must, process, refused, write_photos


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A network of one epoch that tells red from green."""
    root = tmp_path_factory.mktemp("photos")
    write_photos(root / "photos", {"red": 12, "green": 12})
    must("build-lt", "image-folder", "--data-root", root / "photos", "--image-size", 16, "--out", root / "data")
    recipe = ("--recipe", "digits/cross-entropy", "--epochs", 1)
    must("train-stage1", "--data", root / "data", "--out", root / "run", *recipe)
    return root / "run"


def test_predictions_are_csv_or_parquet_by_the_name_of_out(run: Path, tmp_path: Path) -> None:
    predict = ("predict", run.parent / "photos" / "red", "--from", run, "--top", 2, "--out")
    must(*predict, tmp_path / "p.csv")
    must(*predict, tmp_path / "p.parquet")
    written, table = pd.read_csv(tmp_path / "p.csv"), pd.read_parquet(tmp_path / "p.parquet")
    pd.testing.assert_frame_equal(written, table, check_dtype=False)
    assert len(table) == 24
    result = refused(2, f"error: --out {tmp_path / 'p.txt'} ends in none of .parquet,", *predict, tmp_path / "p.txt")
    assert "  fix: give a name such as --out predictions.csv\n" in result.stderr
    refused(4, "p.csv exists", *predict, tmp_path / "p.csv")
    must(*predict, tmp_path / "p.json")
    pd.testing.assert_frame_equal(pd.read_json(tmp_path / "p.json"), table, check_dtype=False)
    for name in ("p.csv", "p.parquet", "p.json"):
        must(*predict, tmp_path / name, "--overwrite")
        (tmp_path / name).write_text("path,class\nmy own")
        refused(4, f"{name} exists", *predict, tmp_path / name, "--overwrite")
    assert files(tmp_path) == ["p.csv", "p.json", "p.parquet"]


def test_two_test_sets_of_one_name_make_two_evaluations(run: Path, tmp_path: Path) -> None:
    numbers = {"a": {"red": 3, "green": 2}, "b": {"red": 4, "green": 4}, "c": {"red": 1, "green": 5}}
    for place, counts in numbers.items():
        write_photos(tmp_path / place / "new photos", counts, seed=ord(place))
    evaluate = ("evaluate", "--from", run, "--out", tmp_path / "out", "--json", "--test-data")
    labels = {"a": "new-photos", "b": "b-new-photos", "c": "c-new-photos"}
    for status in ("done", "up to date"):
        for place, counts in numbers.items():
            found = must(*evaluate, tmp_path / place / "new photos").json
            folder = tmp_path / "out" / "evaluation" / f"stage1-{labels[place]}"
            assert (found["status"], found["folder"], found["num_test"]) == (status, str(folder), sum(counts.values()))
    # A folder keeps its evaluation when its images change, and when it moves with them.
    (tmp_path / "a" / "new photos" / "red" / "000.png").unlink()
    found = must(*evaluate, tmp_path / "a" / "new photos").json
    assert (found["folder"], found["num_test"]) == (str(tmp_path / "out" / "evaluation" / "stage1-new-photos"), 4)
    (tmp_path / "a").rename(tmp_path / "moved")
    assert must(*evaluate, tmp_path / "moved" / "new photos").json["status"] == "up to date"
    assert len(list((tmp_path / "out" / "evaluation").iterdir())) == 3


@pytest.mark.parametrize("words", [["--out=~/my data"], pytest.param(["--out", "~/my data"], marks=pytest.mark.slow)])
def test_a_tilde_is_the_home_of_the_user(tmp_path: Path, words: list[str]) -> None:
    """A shell leaves --out=~/x as it is, and any path in quotes."""
    (tmp_path / "home").mkdir()
    (tmp_path / "here").mkdir()
    options = {"cwd": tmp_path / "here", "env": {"HOME": str(tmp_path / "home"), "PYTHONPATH": str(Path.cwd())}}
    result = process("build-lt", "toy", *words, **options)
    assert f"built: {tmp_path / 'home' / 'my data'}\n" in result.stdout
    assert (tmp_path / "home" / "my data" / "dataset.json").is_file()
    assert files(tmp_path / "here") == []
    result = process("train-stage1", "--data=~/my data", "--out=~nobody-of-this-name/run", "--epochs", 2, **options)
    assert result.code == 0, result.stderr
    assert (tmp_path / "here" / "~nobody-of-this-name" / "run" / "stage1" / "run.json").is_file()
