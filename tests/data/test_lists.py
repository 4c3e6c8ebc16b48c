"""Lists of images: what is known of the official ones, faults in lists and files, and the data sets made of them."""

import json
import os
from functools import partial
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from helpers import Result, cpmix, ended, files, fix_of, make, must, refused, write_image

from cpmix_cli.data import lists, sources
from cpmix_cli.data.dataset import open_dataset
from cpmix_cli.models import PUBLISHED_WEIGHTS
from cpmix_cli.runtime import console
from cpmix_cli.runtime.errors import InputError

SPLITS = Path(os.environ.get("CPMIX_SPLITS", Path(__file__).parents[3] / "shared" / "data" / "splits"))
real = pytest.mark.skipif(not SPLITS.is_dir(), reason="no official lists at hand")

COUNTS = {"airfield": 120, "alley": 20, "zoo": 3}
NAMES = {split: f"Places_LT_{split}.txt" for split in ("train", "val", "test")}
SIZES = {"train": 143, "val": 3, "test": 6}
TINY = lists.OfficialLists("places-lt", NAMES, SIZES, num_classes=3, largest=120, smallest=3)


def write_lists(folder: Path) -> None:
    folder.mkdir(parents=True)
    for split, counts in (("train", COUNTS), ("val", dict.fromkeys(COUNTS, 1)), ("test", dict.fromkeys(COUNTS, 2))):
        place = "val" if split == "test" else "train"
        images = [(label, name, i) for label, (name, count) in enumerate(counts.items()) for i in range(count)]
        lines = [f"{place}/{name}/{split}{i:04d}.jpg {label}\n" for label, name, i in images]
        (folder / f"Places_LT_{split}.txt").write_text("".join(lines))


@pytest.fixture
def places(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with lists/ and images/ of three classes, which build-lt takes for the whole of places-lt."""
    write_lists(tmp_path / "official")
    make(tmp_path / "official", tmp_path / "p", size=16, distinct=2)
    monkeypatch.setitem(sources.SOURCES, "places-lt", partial(sources._official, TINY))
    monkeypatch.delenv("CPMIX_DATA_DIR", raising=False)
    return tmp_path / "p"


def build(places: Path, *flags: object) -> Result:
    return cpmix("build-lt", "places-lt", "--list-dir", places / "lists", "--data-root", places / "images", *flags)


def edit(places: Path, name: str, old: str, new: str) -> Path:
    path = places / "lists" / f"Places_LT_{name}.txt"
    path.write_text(path.read_text().replace(old, new))
    return path


@real
def test_places_lt_lists_have_the_published_counts() -> None:
    found = lists.read(SPLITS, lists.PLACES_LT, SPLITS)
    counts = np.bincount(found.pool.labels)
    assert [(counts > n).sum() for n in (100, 20, 19, 0)] == [131, 131 + 157, 131 + 163, 365]
    splits = {"train": found.pool, "val": found.val, "test": found.test}
    assert {name: len(split.paths) for name, split in splits.items() if split} == lists.PLACES_LT.num_images
    assert (found.class_names[0], found.class_names[-1]) == ("airfield", "zen_garden")
    assert found.pool.paths[0] == "train/airfield/00004851.jpg"


@real
def test_official_lists_have_the_published_sizes() -> None:
    for name, split, published in (
        ("ImageNet_LT_val.txt", "val", lists.IMAGENET_LT),
        ("ImageNet_LT_test.txt", "test", lists.IMAGENET_LT),
        ("iNaturalist18_val.txt", "test", lists.INATURALIST2018),
    ):
        assert published.lists[split] == name
        one = lists.read_list(SPLITS / name)
        counts = np.bincount(one.labels)
        assert (len(one.paths), len(counts)) == (published.num_images[split], published.num_classes)
        assert counts.min() == counts.max()
    with pytest.raises(InputError, match=r"cannot read .*ImageNet_LT_train\.txt: No such file"):
        lists.read(SPLITS, lists.IMAGENET_LT, SPLITS)


@pytest.mark.slow
@real
def test_a_wrong_root_causes_one_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The real lists, and a folder that holds something else."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "other").mkdir()
    said = "error: none of the 106,300 image files is there; the first would be other/train/airfield/"
    result = refused(3, said, "build-lt", "places-lt", "--list-dir", SPLITS, "--data-root", "other")
    lines = [line for line in result.stderr.splitlines() if "found image files" not in line]
    assert [line.partition(":")[0] for line in lines] == ["error", "  needed by", "  fix"]
    assert files(tmp_path) == []


@real
def test_a_list_that_lacks_a_line_is_refused(tmp_path: Path) -> None:
    for path in SPLITS.glob("Places_LT_*.txt"):
        (tmp_path / path.name).write_bytes(path.read_bytes())
    path = tmp_path / "Places_LT_train.txt"
    path.write_text(path.read_text().partition("\n")[2])
    build_short = ("build-lt", "places-lt", "--list-dir", tmp_path, "--data-root", tmp_path)
    message = f"{path} has 62,499 images; the published list has 62,500"
    refused(3, (message, "fix: fetch the list again"), *build_short)


def test_all_bad_lines_are_listed_by_number(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_text(
        "train/a/1.jpg 0\n\ntrain/a/1.jpg 1\n/abs/1.jpg 0\ntrain/../1.jpg 0\nnolabel.jpg\nb.jpg x\nb.jpg 1.0\n"
        "with space/c.jpg 1\r\n./d.jpg 0\n 5\n"
    )
    with pytest.raises(InputError) as caught:
        lists.read_list(path)
    assert caught.value.message.splitlines() == [
        f"{path} has 8 faults:",
        "    line 3: train/a/1.jpg stands on line 1 already",
        "    line 4: '/abs/1.jpg' is no plain path below the folder of the images",
        "    line 5: 'train/../1.jpg' is no plain path below the folder of the images",
        "    line 6: 'nolabel.jpg' is not 'PATH LABEL'",
        "    line 7: 'b.jpg x' is not 'PATH LABEL'",
        "    line 8: 'b.jpg 1.0' is not 'PATH LABEL'",
        "    line 10: './d.jpg' is no plain path below the folder of the images",
        "    line 11: ' 5' is not 'PATH LABEL'",
    ]
    path.write_text("a\x00.jpg 0\n")
    with pytest.raises(InputError, match=r"line 1: .a.+x00.jpg 0. is not .PATH LABEL."):
        lists.read_list(path)
    path.write_text("a/1.jpg 0\nwith space/c.jpg 1\r\n")
    found = lists.read_list(path)
    assert (found.paths, found.labels.tolist()) == (["a/1.jpg", "with space/c.jpg"], [0, 1])
    path.write_text("".join(f"{i}\n" for i in range(100)))
    with pytest.raises(InputError, match=r"has 100 faults:(\n.*){20}\n    \.\.\. and 80 more\n"):
        lists.read_list(path)
    for content in (b"\xef\xbb\xbfa/1.jpg 0\r\nb.jpg 1\r\n", b"a/1.jpg 0\rb.jpg 1\r", b"\n a/1.jpg\t0\n\nb.jpg  1"):
        path.write_bytes(content)
        found = lists.read_list(path)
        assert (found.paths, found.labels.tolist()) == (["a/1.jpg", "b.jpg"], [0, 1])
    for content, message in (
        (b"", "lists no image"),
        (b"\xff\xfe", "not UTF-8 text"),
        ("a.jpg \u0661".encode(), "line 1: 'a.jpg \u0661' is not 'PATH LABEL'"),
    ):
        path.write_bytes(content)
        with pytest.raises(InputError, match=message):
            lists.read_list(path)


@pytest.mark.parametrize(
    ("list_name", "old", "new", "message"),
    [
        ("train", "zoo/train0000.jpg 2", "zoo/train0000.jpg 3", "label 3; labels are 0 to 2"),
        ("train", "zoo/train0000.jpg 2", "zoo/train0000.jpg -1", "label -1; labels are 0 to 2"),
        ("train", "zoo/train0000.jpg 2", "zoo/train0000.jpg 1", "the smallest 2; in the published list 120 and 3"),
        ("train", "train/zoo/train0000.jpg 2", "val/zoo/test0000.jpg 2", "1 image of"),
        ("test", "val/zoo/test0000.jpg 2\n", "", "has 5 images; the published list has 6"),
        ("test", "val/zoo/test0001.jpg", "/val/zoo/test0001.jpg", "no plain path"),
    ],
)
def test_lists_with_bad_lines_are_refused(places: Path, list_name: str, old: str, new: str, message: str) -> None:
    path = edit(places, list_name, old, new)
    result = ended(build(places, "--out", places / "d", "--json"), 3, (message, str(path)))
    assert result.json["exit_code"] == 3
    assert not (places / "d").exists()


def test_a_class_without_a_training_image_is_refused(places: Path) -> None:
    edit(places, "train", "jpg 2", "jpg 1")
    ended(build(places), 3, "has no image of 1 of the 3 classes: 2")


def test_a_val_image_in_another_split_causes_a_warning(places: Path) -> None:
    edit(places, "val", "val0000.jpg 0", "train0000.jpg 0")
    ended(build(places, "--out", places / "d"), 0, "warning: 1 image of")


def test_official_lists_have_their_own_splits(places: Path) -> None:
    for split in ("val", "test"):
        ended(build(places, f"--{split}-per-class", 1), 2, f"places-lt has its own {split} split")


def test_unpacked_images_are_read_from_their_files(places: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(places)
    result = build(places)
    weights = "resnet152-394f9c45"  # the default recipe starts from them
    assert result.code == 0
    assert result.stderr.splitlines()[-1].startswith(f"next: fetch {weights}.pth from where it was published")
    train = f"train-stage1 --data data/places-lt --out ckpt/places-lt --init {weights}.safetensors\n"
    sha = PUBLISHED_WEIGHTS[f"{weights}.pth"]
    assert result.stderr.endswith(f", then: cpmix import-weights {weights}.pth --sha256 {sha} && cpmix {train}")
    assert result.stdout.splitlines()[-3:] == [
        "places-lt: 143 training, 3 val and 6 test images, 3 classes, largest 120, smallest 3 (ratio 40)",
        "groups: many (>100) 1, medium (20..100) 1, few (<20) 1 classes",
        "built: data/places-lt",
    ]
    folder = places / "data" / "places-lt"
    assert files(folder) == ["class_counts.parquet", "dataset.json", "test.parquet", "train.parquet", "val.parquet"]
    record = json.loads((folder / "dataset.json").read_text())
    expected = {"storage": "files", "shape": [256, 256, 3], "mean": [], "std": [], "recipe": "places-lt/cpmix"}
    assert {key: record[key] for key in expected} == expected
    assert record["classes"] == list(COUNTS)
    dataset = open_dataset(folder)
    assert dataset.splits == ["train", "val", "test"]
    assert np.bincount(dataset.labels("train")).tolist() == list(COUNTS.values())
    for split in dataset.splits:
        for path, label in zip(dataset.paths(split), dataset.labels(split).tolist(), strict=True):
            assert path.parent.name == record["classes"][label]
            assert path.is_file()
    elsewhere = folder.parent / "elsewhere"
    elsewhere.symlink_to(record["data_root"])
    moved = open_dataset(folder, data_root=elsewhere)
    assert str(moved.paths("val")[0]).startswith(f"{elsewhere}/train/")
    assert build(places, "--json").json["status"] == "up to date"
    assert build(places, "--verify", "--json").json["status"] == "up to date"
    no_statistics = 'data.normalisation = "dataset": of images that stay in their files no statistics are known'
    refused(2, no_statistics, "train-stage1", "--data", folder, "--recipe", "image-folder/cpmix", "--dry-run")
    ended(build(places, "--few-inclusive", "--out", folder), 4, "few_inclusive: False -> True")


@pytest.mark.parametrize("pack", [0, 16])
def test_a_renamed_path_changes_the_fingerprint(places: Path, pack: int) -> None:
    first = build(places, "--pack", pack, "--out", places / "a", "--json").json["fingerprint"]
    edit(places, "test", "zoo/test0001", "zoo/renamed")
    (places / "images" / "val" / "zoo" / "test0001.jpg").rename(places / "images" / "val" / "zoo" / "renamed.jpg")
    assert build(places, "--pack", pack, "--out", places / "b", "--json").json["fingerprint"] != first
    assert build(places, "--pack", pack, "--out", places / "a").code == 4


def test_few_inclusive_is_recorded_in_the_data_set(places: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(places)
    result = build(places, "--few-inclusive", "--image-size", 16)
    assert "groups: many (>100) 1, medium (21..100) 0, few (<=20) 2 classes" in result.stdout
    folder = places / "data" / "places-lt-16px-few-inclusive"
    assert pd.read_parquet(folder / "class_counts.parquet")["group"].tolist() == ["many", "few", "few"]
    record = json.loads((folder / "dataset.json").read_text())
    assert (record["few_inclusive"], record["shape"]) == (True, [16, 16, 3])


def test_a_data_root_may_hold_a_folder_per_source(places: Path) -> None:
    (places / "all").mkdir()
    (places / "images").rename(places / "all" / "places-lt")
    must("build-lt", "places-lt", "--list-dir", places / "lists", "--data-root", places / "all", "--out", places / "d")
    assert open_dataset(places / "d").data_root == places / "all" / "places-lt"


@pytest.mark.parametrize("pack", [0, 16])
def test_missing_and_unreadable_files_are_listed(places: Path, pack: int) -> None:
    images = places / "images" / "train"
    (images / "zoo" / "train0001.jpg").unlink()
    flags = ("--out", places / "d", "--pack", pack)
    missing = f"1 file cannot be read as an image:\n    {images}/zoo/train0001.jpg: No such file or directory\n"
    ended(build(places, *flags), 3, missing)
    assert not (places / "d-unreadable.txt").exists()
    for i in range(30):
        (images / "airfield" / f"train{i:04d}.jpg").unlink()
        (images / "airfield" / f"train{i:04d}.jpg").write_text("" if i == 0 else "no image")
    (images / "zoo" / "train0001.jpg").mkdir()
    message = ("31 files cannot be", f"{images}/airfield/train0000.jpg: empty", "zoo/train0001.jpg: not a file")
    ended(build(places, *flags), 3, message)
    (images / "zoo" / "train0001.jpg").rmdir()
    for path in (images / "zoo" / "train0001.jpg", images / "airfield" / "train0000.jpg"):
        path.unlink(missing_ok=True)
        write_image(path)
    said = ("29 files cannot be read", f"... and 9 more; {places / 'd-unreadable.txt'} lists all")
    result = ended(build(places, *flags), 3, said)
    assert result.stderr.count("not an image") == 20
    listed = (places / "d-unreadable.txt").read_text().splitlines()
    assert sorted(listed) == [f"{images}/airfield/train{i:04d}.jpg: not an image" for i in range(1, 30)]
    assert not (places / "d" / "dataset.json").exists()
    for i in range(1, 30):
        write_image(images / "airfield" / f"train{i:04d}.jpg")
    assert build(places, *flags).code == 0
    assert not (places / "d-unreadable.txt").exists()


def test_own_lists_are_accepted_at_any_size_and_rho(places: Path, tmp_path: Path) -> None:
    """Of whatever totals, at any size, and with an imbalance factor."""
    where = ["--list-dir", places / "lists", "--data-root", places / "images"]
    numbers = must("build-lt", "image-folder", *where, "--image-size", 16, "--out", tmp_path / "a", "--json").json
    assert (numbers["num_train"], numbers["num_test"], numbers["num_classes"]) == (143, 6, 3)
    assert open_dataset(tmp_path / "a").read("val")[0].shape == (3, 16, 16, 3)
    long_tailed = ("--pack", 16, "--rho", 10, "--out", tmp_path / "b")
    numbers = must("build-lt", "image-folder", *where, *long_tailed, "--json").json
    assert (numbers["num_train"], numbers["largest"], numbers["smallest"]) == (30 + 9 + 3, 30, 3)
    (places / "lists" / "my_train.txt").touch()
    refused(3, "has 2 lists for train: Places_LT_train.txt, my_train.txt", "build-lt", "image-folder", *where)
    refused(3, "no list *train.txt in", "build-lt", "image-folder", "--list-dir", places, *where[2:])


@pytest.mark.parametrize(
    ("train", "message", "fix"),
    [
        ("a/0.jpg 1\nb/0.jpg 2\n", "the largest label is 2, but {train} has 2 images", "number the classes from 0"),
        ("a/0.jpg 0\nb/0.jpg 99999999\n", "the largest label is 99999999, but {train}", "number the classes from 0"),
        ("a/0.jpg 1\nb/0.jpg 2\nb/1.jpg 1\n", "{train} has no image of 1 of the 3 classes: 0", "number the classes"),
        ("a/0.jpg 0\nb/0.jpg 0\n", "{train} has one class; a classifier needs two", "list images of another class"),
    ],
)
def test_own_lists_whose_labels_are_not_0_to_c_are_refused(tmp_path: Path, train: str, message: str, fix: str) -> None:
    (tmp_path / "train.txt").write_text(train)
    (tmp_path / "test.txt").write_text("a/9.jpg 0\n")
    build = ("build-lt", "image-folder", "--list-dir", tmp_path, "--data-root")
    result = refused(3, message.format(train=tmp_path / "train.txt"), *build, tmp_path)
    assert fix_of(result).startswith(fix)
    result = refused(3, f"no folder {tmp_path / 'none'}", *build, tmp_path / "none")
    assert fix_of(result) == "give the folder that holds the images with --data-root FOLDER"


def test_classes_get_folder_names_only_if_these_are_unique(tmp_path: Path) -> None:
    def names(train: str) -> list[str]:
        (tmp_path / "train.txt").write_text(train)
        (tmp_path / "test.txt").write_text("test/b/9.jpg 1\n")
        return lists.read_own(tmp_path, tmp_path).class_names

    assert names("x/a/1.jpg 0\ny/b/1.jpg 1\n") == ["a", "b"]
    assert names("x/b/1.jpg 0\ny/b/1.jpg 1\n") == ["0", "1"]
    assert names("x/a/1.jpg 0\nx/c/2.jpg 0\ny/b/1.jpg 1\n") == ["0", "1"]
    assert names("1.jpg 0\ny/b/1.jpg 1\n") == ["0", "1"]


def test_progress_prints_at_intervals(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    with console.Progress("packed train images", 10) as progress:
        progress.step(2)
        monkeypatch.setattr(progress, "_next", 0.0)
        progress.step(3)
    assert capsys.readouterr().err.startswith("packed train images: 5 of 10, ")
