"""confusion-report --label: evaluations of other test data and splits have their own reports; misclassified --out."""

import base64
import io
import json
import re
import shutil
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from helpers import exact_contents, files, must, refused, unchanged, write_photos
from PIL import Image


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A network that tells red from green but not blue, with a val split, evaluated on several sets."""
    root = tmp_path_factory.mktemp("photos")
    write_photos(root / "photos", {"red": 30, "green": 30, "blue": 8})
    build = ("build-lt", "image-folder", "--data-root", root / "photos", "--image-size", 16, "--val-per-class", 3)
    must(*build, "--out", root / "data")
    recipe = ("--recipe", "digits/cross-entropy", "--epochs", 2)
    must("train-stage1", "--data", root / "data", "--out", root / "run", *recipe)
    write_photos(root / "more", {"blue": 6, "red": 2}, seed=9)
    must(*build[:-2], "--out", root / "other", "--subset-seed", 1)
    evaluate = ("evaluate", "--from", root / "run", "--phase", "stage1")
    must(*evaluate)
    must(*evaluate, "--split", "val")
    must(*evaluate, "--test-data", root / "more")
    must(*evaluate, "--test-data", root / "other", "--label", "other")
    must("confusion-report", "--from", root / "run", "--phase", "stage1")
    return root


def page_images(page: str) -> tuple[dict[str, object], Image.Image]:
    """The list of the thumbnails of a page, and their sheet."""
    data = json.loads(re.search(r'<script type="application/json"[^>]*>(.*?)</script>', page, re.DOTALL)[1])  # type: ignore[index]
    images = data["images"]
    return images, Image.open(io.BytesIO(base64.b64decode(images["sprite"].partition(",")[2])))


def test_each_labelled_evaluation_has_a_report_of_its_own(root: Path) -> None:
    run = root / "run"
    index = (run / "confusion" / "index.html").read_bytes()
    for label in ("val", "more", "other"):
        folder = run / "confusion" / f"stage1-{label}"
        found = must("confusion-report", "--from", run, "--phase", "stage1", "--label", label, "--json").json
        assert (found["status"], found["folder"], found["page"]) == ("done", str(folder), str(folder / "index.html"))
        table = pd.read_parquet(run / "evaluation" / folder.name / "predictions.parquet")
        cells = pd.read_parquet(folder / "confusion_matrix.parquet")
        assert cells["count"].tolist() == table.groupby(["label", "predicted"]).size().tolist()
        assert found["num_wrong"] == (table["label"] != table["predicted"]).sum()
        page = (folder / "index.html").read_text()
        assert f"<title>Confusion of image-folder-photos-16px-val3, stage1-{label}</title>" in page.replace("\n", "")
        for link in re.findall(r'href="([\w.]+\.(?:png|svg))"', page):
            assert (folder / link).is_file()
        again = must("confusion-report", "--from", run, "--phase", "stage1", "--label", label, "--json").json
        assert again["status"] == "up to date"
    assert (run / "confusion" / "index.html").read_bytes() == index


def test_thumbnails_are_those_of_the_evaluated_images(root: Path) -> None:
    run = root / "run"
    must("confusion-report", "--from", run, "--phase", "stage1", "--label", "more")
    page = (run / "confusion" / "stage1-more" / "index.html").read_text()
    images, sheet = page_images(page)
    table = pd.read_parquet(run / "evaluation" / "stage1-more" / "predictions.parquet")
    wrong = int((table["label"] != table["predicted"]).sum())
    assert wrong > 0
    colours = {0: (20, 60, 210), 1: (30, 200, 60), 2: (220, 40, 30)}  # classes in alphabetical order
    true = np.frombuffer(base64.b64decode(str(images["true_class"])), "<i4")
    assert len(true) == wrong
    pixels, side = np.asarray(sheet.convert("RGB"), float), int(str(images["side"]))
    for place, label in enumerate(true.tolist()):
        tile = pixels[:side, place * side : (place + 1) * side]
        assert np.abs(tile.mean((0, 1)) - colours[label]).max() < 40


@pytest.mark.slow
def test_a_report_of_moved_images_names_the_evaluation(root: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(root, tmp_path / "copy"))
    run = copy / "run"
    evaluate = ("evaluate", "--from", run, "--phase", "stage1", "--data", copy / "data", "--label")
    must(*evaluate, "gone", "--test-data", copy / "more")
    (copy / "more").rename(copy / "moved")
    report = ("confusion-report", "--from", run, "--phase", "stage1", "--data", copy / "data", "--label")
    refused(3, "more/blue", *report, "gone")
    must(*report, "gone", "--images", 0)


@pytest.mark.slow
def test_a_report_on_a_deleted_data_set_names_the_evaluation(digits_run: Path, tmp_path: Path) -> None:
    must("build-lt", "digits", "--subset-seed", 1, "--out", tmp_path / "other")
    must("evaluate", "--from", digits_run, "--test-data", tmp_path / "other")
    report = ("confusion-report", "--from", digits_run, "--label", "other")
    must(*report)
    shutil.rmtree(tmp_path / "other")
    must(*report)  # up to date: nothing is read
    refused(3, "finetune-other are not found: ", *report, "--overwrite")


def test_labels_without_an_evaluation_and_foreign_pages_are_refused(root: Path, tmp_path: Path) -> None:
    report = ("confusion-report", "--from", root / "run", "--phase", "stage1", "--label")
    result = refused(3, "no evaluation ", *report, "none")
    assert "fix: cpmix evaluate --from " in result.stderr
    refused(2, '--label "../stage1" is no label of an evaluation', *report, "../stage1")
    page = tmp_path / "out" / "confusion" / "stage1-val" / "index.html"
    page.parent.mkdir(parents=True)
    page.write_text("mine")
    with unchanged(tmp_path):
        refused(4, "cpmix did not write", *report, "val", "--out", tmp_path / "out")


def test_compared_runs_are_of_the_same_label(root: Path, tmp_path: Path) -> None:
    shutil.copytree(root / "run", tmp_path / "run")
    report = ("confusion-report", "--from", root / "run", "--phase", "stage1", "--compare", tmp_path / "run" / "stage1")
    folder = tmp_path / "out" / "confusion" / "stage1-val"
    must(*report, "--label", "val", "--out", tmp_path / "out")
    assert files(tmp_path / "out" / "confusion")[0].startswith("stage1-val/")
    assert (folder / "index.html").is_file()
    kept = must(*report[:5], "--label", "val", "--out", tmp_path / "out", "--json").json
    assert (kept["status"], kept["compared_with"]) == ("up to date", [str(tmp_path / "run" / "stage1")])
    shutil.rmtree(tmp_path / "run" / "evaluation" / "stage1-val")
    refused(3, "no evaluation ", *report, "--label", "val", "--out", tmp_path / "out")


def test_a_damaged_labelled_report_is_named_with_the_command_that_mends_it(root: Path, tmp_path: Path) -> None:
    run = Path(shutil.copytree(root / "run", tmp_path / "run"))
    report = ("confusion-report", "--from", run, "--phase", "stage1", "--data", root / "data", "--label", "val")
    must(*report)
    before = exact_contents(run / "confusion" / "stage1-val")
    (run / "confusion" / "stage1-val" / "confusion_matrix.parquet").write_bytes(b"")
    refused(3, f"fix: run the confusion-report command that wrote {run / 'confusion' / 'stage1-val'} again", *report)
    must(*report, "--overwrite")
    del before["run.json"]
    assert before.items() <= exact_contents(run / "confusion" / "stage1-val").items()


def test_misclassified_writes_all_cells_with_paths_or_indices(root: Path, digits_run: Path, tmp_path: Path) -> None:
    for run, label in ((root / "run", ("--phase", "stage1", "--label", "more")), (digits_run, ())):
        wrong = ("misclassified", "--from", run, *label)
        listed = must(*wrong, "--json").json["images"]
        assert listed
        for name in ("w.parquet", "w.csv", "w.json"):
            assert f"done: {tmp_path / name}\n" in must(*wrong, "--out", tmp_path / name, "--overwrite").stdout
        table = pd.read_parquet(tmp_path / "w.parquet")
        own = table["path"] if run == root / "run" else table["source_index"]
        assert own.tolist() == [row["image"] for row in listed]
        assert table["true_name"].tolist() == [row["true"] for row in listed]
        assert table["predicted_name"].tolist() == [row["predicted"] for row in listed]
        assert (table["true_class"] != table["predicted_class"]).all()
        evaluation = run / "evaluation" / ("stage1-more" if label else "finetune")
        known = pd.read_parquet(evaluation / "predictions.parquet").set_index("sample_id").loc[table["sample_id"]]
        assert known["label"].tolist() == table["true_class"].tolist()
        assert known["confidence"].tolist() == table["confidence"].tolist()
        for other in (pd.read_csv(tmp_path / "w.csv"), pd.read_json(tmp_path / "w.json")):
            for column in ("sample_id", "true_class", "predicted_class"):
                assert other[column].tolist() == table[column].tolist()
            np.testing.assert_allclose(other["confidence"], table["confidence"])
        refused(4, "w.csv exists", *wrong, "--out", tmp_path / "w.csv")
    (tmp_path / "w.csv").write_text("sample_id,path\n1,mine\n")
    refused(4, "cpmix did not write it", *wrong, "--out", tmp_path / "w.csv", "--overwrite")
    refused(2, "ends in none of", *wrong, "--out", tmp_path / "w.xlsx")


def test_misclassified_writes_a_table_without_rows(root: Path, tmp_path: Path) -> None:
    wrong = ("misclassified", "--from", root / "run", "--phase", "stage1", "--label", "more", "--true", "green")
    assert must(*wrong, "--json").json["images"] == []
    for name in ("w.parquet", "w.csv", "w.json"):
        must(*wrong, "--out", tmp_path / name)
    assert (tmp_path / "w.csv").read_text().startswith("sample_id,path,source_index,")
    assert len(pd.read_parquet(tmp_path / "w.parquet")) == 0
    assert json.loads((tmp_path / "w.json").read_text()) == []
