"""predict: probabilities, unsure images, sorted copies."""

import os
import re
import shutil
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from helpers import exact_contents, files, must, pipeline, refused, setting, unchanged, write_image, write_photos

from cpmix_cli.evaluation.sorted_copies import folder_names


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A network that tells red from green, with a val split."""
    root = tmp_path_factory.mktemp("photos")
    write_photos(root / "photos", {"red": 30, "green": 30})
    build = ("build-lt", "image-folder", "--data-root", root / "photos", "--image-size", 16, "--val-per-class", 4)
    must(*build, "--out", root / "data")
    recipe = ("--recipe", "digits/cross-entropy", "--epochs", 6)
    must("train-stage1", "--data", root / "data", "--out", root / "run", *recipe)
    must("evaluate", "--from", root / "run", "--threshold-for", "precision=0.9")
    return root


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """Red and green images, and a link to one that is neither."""
    write_photos(tmp_path / "in", {"red": 3, "green": 2}, seed=5)
    write_image(tmp_path / "elsewhere" / "yellow.png", (150, 150, 40))
    (tmp_path / "in" / "link.png").symlink_to(tmp_path / "elsewhere" / "yellow.png")
    return tmp_path / "in"


def test_probabilities_are_a_column_per_class(root: Path, photos: Path, tmp_path: Path) -> None:
    predict = ("predict", photos, "--from", root / "run", "--probabilities")
    for name in ("p.parquet", "p.csv", "p.json"):
        must(*predict, "--out", tmp_path / name)
        must(*predict, "--out", tmp_path / name, "--overwrite")
    table = pd.read_parquet(tmp_path / "p.parquet")
    assert table.columns[-2:].tolist() == ["probability_green", "probability_red"]
    shares = table[["probability_green", "probability_red"]].to_numpy()
    np.testing.assert_allclose(shares.sum(1), 1, rtol=1e-6)
    assert shares.max(1).tolist() == table["confidence"].tolist()
    assert shares.argmax(1).tolist() == table["class_id"].tolist()
    for other in (pd.read_csv(tmp_path / "p.csv"), pd.read_json(tmp_path / "p.json")):
        pd.testing.assert_frame_equal(other, table, check_dtype=False)
    found = must(*predict, "--json").json["predictions"]
    assert [row["probabilities"] for row in found] == [
        {"green": pytest.approx(green, abs=1e-6), "red": pytest.approx(red, abs=1e-6)} for green, red in shares.tolist()
    ]
    refused(2, "--probabilities has no place on a terminal", *predict)
    refused(2, "--probabilities gives all classes, so --top has no effect", *predict, "--json", "--top", 2)


def test_unsure_images_are_marked_and_keep_their_class(root: Path, photos: Path, tmp_path: Path) -> None:
    predict = ("predict", photos, "--from", root / "run")
    plain = must(*predict, "--json").json["predictions"]
    shares = [row["classes"][0]["confidence"] for row in plain]
    limit = sum(sorted(set(shares))[:2]) / 2
    number = sum(share < limit for share in shares)
    found = must(*predict, "--unsure-below", limit, "--json", "--out", tmp_path / "p.csv").json
    assert found["num_unsure"] == number
    assert [{k: v for k, v in row.items() if k != "unsure"} for row in found["predictions"]] == plain
    expected = [row["classes"][0]["confidence"] < limit for row in plain]
    assert [row["unsure"] for row in found["predictions"]] == expected
    assert pd.read_csv(tmp_path / "p.csv")["unsure"].tolist() == expected
    shown = must(*predict, "--unsure-below", limit).stdout.splitlines()
    assert shown[0].split() == ["image", "class", "confidence", "unsure"]
    assert sum(line.endswith("  unsure") for line in shown[1:-1]) == number
    assert shown[-1] == f"{number} of 6 images unsure: below {limit}"
    assert must(*predict, "--unsure-below", 0, "--json").json["num_unsure"] == 0
    for wrong in ("1.5", "nan", "-1"):
        refused(2, f"--unsure-below {wrong} is no confidence from 0 to 1", *predict, f"--unsure-below={wrong}")
    refused(3, "low is neither a number nor a thresholds.parquet", *predict, "--unsure-below", "low")


def test_thresholds_of_evaluate_say_what_is_unsure(root: Path, photos: Path, tmp_path: Path) -> None:
    run = Path(shutil.copytree(root / "run", tmp_path / "run"))
    path = run / "evaluation" / "stage1" / "thresholds.parquet"
    limits = pd.read_parquet(path).set_index("class_name")["threshold"].fillna(np.inf)
    predict = ("predict", photos, "--from", run, "--out", tmp_path / "p.parquet", "--unsure-below", path)
    must(*predict)
    table = pd.read_parquet(tmp_path / "p.parquet")
    expected = table["confidence"].to_numpy() < limits[table["class_name"]].to_numpy(np.float32)
    assert table["unsure"].tolist() == expected.tolist()
    must("train-stage1", "--data", root / "data", "--out", run, "--recipe", "digits/cross-entropy", "--overwrite")
    refused(3, "thresholds.parquet is of another checkpoint", *predict, "--overwrite")


def test_images_are_copied_into_a_folder_per_class(root: Path, photos: Path, tmp_path: Path) -> None:
    out = tmp_path / "sorted"
    shutil.copy(photos / "red" / "000.png", photos / "green" / "000.png")  # two of one name in one class
    odd = os.fsdecode(b"odd\xff.png")
    shutil.copy(photos / "red" / "000.png", photos / "red" / odd)
    sort = ("predict", photos, "--from", root / "run", "--sort-into", out)
    with unchanged(photos, tmp_path / "elsewhere"):
        found = must(*sort, "--json").json
        assert found["sorted"] == "done"
        classes = {row["path"]: row["classes"][0]["class"] for row in found["predictions"]}
        copied = [name for name in files(out) if not name.startswith(".")]
        assert len(copied) == len(classes) == 7
        assert {f"red/{odd}", "red/000.png", "red/000-2.png", "green/001.jpg"} < set(copied)
        for path, name in classes.items():
            if path.endswith("link.png"):
                assert (out / name / "link.png").read_bytes() == Path(path).read_bytes()
                assert not (out / name / "link.png").is_symlink()
        assert (out / "green/001.jpg").stat().st_mtime == (photos / "green" / "001.jpg").stat().st_mtime
        assert must(*sort, "--json").json["sorted"] == "up to date"
        before = exact_contents(out)
        refused(4, f"{out} holds copies of another command", *sort, "--unsure-below", 1, "--json")
        assert exact_contents(out) == before
        found = must(*sort, "--unsure-below", 1, "--overwrite", "--json").json["predictions"]
    assert {name.split("/")[0] for name in files(out) if not name.startswith(".")} == {
        "unsure" if row["unsure"] else row["classes"][0]["class"] for row in found
    }
    assert any((out / "unsure").iterdir())
    assert files(tmp_path) == sorted(
        p.relative_to(tmp_path).as_posix() for p in tmp_path.rglob("*") if p.is_file() and ".cpmix-tmp" not in str(p)
    )


@pytest.mark.parametrize("change", ["a file of theirs", "a moved copy", "an edited copy", "a link", "no list"])
def test_a_user_s_files_in_the_sorted_folder_are_kept(root: Path, photos: Path, tmp_path: Path, change: str) -> None:
    out = tmp_path / "sorted"
    sort = ("predict", photos, "--from", root / "run", "--sort-into", out)
    must(*sort)
    if change == "a file of theirs":
        (out / "red" / "notes.txt").write_text("mine")
    elif change == "a moved copy":
        (out / "green" / "001.jpg").rename(out / "red" / "moved.jpg")
    elif change == "an edited copy":
        (out / "green" / "001.jpg").write_bytes(b"mine")
    elif change == "a link":
        (out / "red" / "more").symlink_to(photos)
    else:
        (out / ".cpmix-sorted.parquet").unlink()
    with unchanged(tmp_path):
        for flags in ((), ("--overwrite",)):
            refused(4, f"error: {out} has ", *sort, *flags)


def test_a_deleted_copy_is_made_again_with_overwrite(root: Path, photos: Path, tmp_path: Path) -> None:
    out = tmp_path / "sorted"
    sort = ("predict", photos, "--from", root / "run", "--sort-into", out)
    must(*sort)
    before = exact_contents(out)
    (out / "green" / "001.jpg").unlink()
    refused(4, "or not all of this one's", *sort)
    assert f"copied: 2 folders of images in {out}\n" in must(*sort, "--overwrite").stdout
    assert f"up to date: 2 folders of images in {out}\n" in must(*sort).stdout
    assert exact_contents(out) == before


def test_sorted_copies_lie_outside_of_the_images(root: Path, photos: Path, tmp_path: Path) -> None:
    sort = ("predict", photos, "--from", root / "run", "--sort-into")
    (tmp_path / "file").touch()
    with unchanged(tmp_path):
        for place in (photos, photos / "sorted", tmp_path):
            refused(2, "are not apart, so copies would be sorted again", *sort, place)
        refused(4, f"{tmp_path / 'file'} is not a folder", *sort, tmp_path / "file")


def test_left_copies_of_a_killed_command_are_removed(root: Path, photos: Path, tmp_path: Path) -> None:
    out = tmp_path / "sorted"
    sort = ("predict", photos, "--from", root / "run", "--sort-into", out)
    must(*sort)
    from cpmix_cli.artifacts.files import temporary_for

    left = Path(str(temporary_for(out)).replace(f"-{os.getpid()}-", "-4194999-"))  # larger than any pid
    write_image(left / "red" / "000.png")
    must(*sort)
    assert not left.exists()


def test_folder_names_differ_and_can_be_made() -> None:
    names = ["cat", "a/b", "a_b", "..", "", ".cpmix-sorted.parquet", "unsure", "x" * 300, "x" * 301, "unsure"]
    found = folder_names(names)
    assert found[:7] == ["cat", "a_b", "a_b-2", "_..", "_", "_.cpmix-sorted.parquet", "unsure"]
    assert found[7:] == ["x" * 255, "x" * 253 + "-2", "unsure-2"]


@pytest.mark.slow
def test_an_earlier_phase_that_is_better_on_val_is_told_unless_a_phase_is_named(tmp_path: Path) -> None:
    data, run, image = tmp_path / "data", tmp_path / "run", write_image(tmp_path / "a.png")
    must("build-lt", "digits", "--val-per-class", 5, "--out", data)
    pipeline(data, run, "--epochs", 6, *setting("lr=1000.0", table="finetune"))
    told = "is better than finetune on val, balanced accuracy "
    assert told not in must("predict", image, "--from", run).stderr  # val was not measured
    numbers = {
        phase: must("evaluate", "--from", run, "--phase", phase, "--split", "val", "--json").json["balanced_accuracy"]
        for phase in ("stage1", "stage2", "finetune")
    }
    assert numbers["finetune"] < max(numbers["stage1"], numbers["stage2"])
    best = max(("stage2", "stage1"), key=lambda phase: numbers[phase])
    line = f"warning: {best} {told}{numbers[best]:.2f} against {numbers['finetune']:.2f}; to take it: --phase {best}\n"
    assert line in must("predict", image, "--from", run).stderr
    assert told not in must("predict", image, "--from", run, "--phase", "finetune").stderr
    assert told not in must("predict", image, "--from", run / "finetune").stderr
    assert told not in must("predict", image, "--from", run, "--phase", best).stderr


def test_a_shown_confidence_is_rounded_once(root: Path, tmp_path: Path) -> None:
    for number in range(50):
        write_image(tmp_path / "in" / f"{number:02}.png", (80 + 2 * number, 180 - 2 * number, 40))
    out = tmp_path / "out.parquet"
    shown = must("predict", tmp_path / "in", "--from", root / "run", "--top", 2, "--out", out).stdout
    cells = re.findall(r"([\d.]+ %)", shown)
    assert cells == [f"{100 * p:.1f} %" for p in pd.read_parquet(out)["confidence"].astype(float)]
