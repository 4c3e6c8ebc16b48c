"""What lies in a user's folder of images: nothing is left out, added or moved between splits without a line of it."""

import os
import shutil
import subprocess
import sys
import unicodedata
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers import edit_record, files, follow_fix, must, refused, write_image
from PIL import Image

from cpmix_cli.artifacts.records import read_fields
from cpmix_cli.artifacts.tables import publish_table, split_schema
from cpmix_cli.artifacts.tensors import publish_tensors
from cpmix_cli.data.dataset import open_dataset
from cpmix_cli.data.decoding import ENDINGS, FORMATS, open_rgb, square
from cpmix_cli.data.image_folder import split_of

_numbers = iter(range(1_000_000))


def fill(folder: Path, *names: str, count: int = 6, ending: str = "png") -> None:
    """Write images that are all different."""
    for name in names:
        for i in range(count):
            pixels = np.random.default_rng(next(_numbers)).integers(0, 255, (12, 12, 3), dtype=np.uint8)
            write_image(folder / name / f"{i:03}.{ending}", pixels)


def command(root: Path, *flags: object) -> list[object]:
    return ["build-lt", "image-folder", "--data-root", root, "--image-size", 8, "--out", f"{root}-out", *flags]


def built(root: Path, *flags: object) -> dict[str, Any]:
    """Build a data set and return its JSON result, with the class names and all paths of each split."""
    result = must(*command(root, *flags), "--json")
    dataset = open_dataset(Path(f"{root}-out"))
    paths = {split: dataset.samples(split)["path"].tolist() for split in dataset.splits}
    return {**result.json, "classes": dataset.class_names, "paths": paths, "stderr": result.stderr}


def refused_build(root: Path, messages: str | tuple[str, ...], *flags: object) -> None:
    """The folder is refused before anything is written."""
    refused(3, messages, *command(root, *flags))
    assert not Path(f"{root}-out").exists()


@pytest.mark.parametrize(
    ("train", "val", "test"),
    [
        ("Train", None, "Test"),
        ("Training", None, "Testing"),
        ("TRAIN", "VALID", "TEST"),
        ("train_set", "validation", "test set"),
        ("train", "Dev", "test"),
    ],
)
def test_split_folders_of_any_spelling_are_the_splits(tmp_path: Path, train: str, val: str | None, test: str) -> None:
    root = tmp_path / "p"
    fill(root / train, "cat", "dog")
    for folder in filter(None, (val, test)):
        fill(root / folder, "cat", "dog", count=2)
    found = built(root)
    assert found["classes"] == ["cat", "dog"]
    assert found["num_train"] == 12
    assert {path.split("/")[0] for path in found["paths"]["test"]} == {test}
    assert {path.split("/")[0] for path in found["paths"].get("val", [])} == ({val} if val else set())
    assert "no folder of test images" not in found["stderr"]


@pytest.mark.parametrize("folder", ["val", "Valid", "validation", "DEV"])
def test_without_a_test_folder_the_val_images_are_the_test_split(tmp_path: Path, folder: str) -> None:
    root = tmp_path / "p"
    fill(root / "train", "cat", "dog")
    fill(root / folder, "cat", "dog", count=2)
    for flags in ([], ["--layout", "splits"]):
        found = built(root, *flags)
        assert (
            f"no folder of test images: the 4 images of {folder}/ are the test split; --val-per-class N"
            in (found["stderr"])
        )
        assert (found["num_train"], found["paths"].keys()) == (12, {"train", "test"})
        assert {path.split("/")[0] for path in found["paths"]["test"]} == {folder}
    found = built(root, "--val-per-class", 2, "--overwrite")
    assert (found["num_train"], found["num_val"], found["num_test"]) == (8, 4, 4)
    assert {path.split("/")[0] for path in found["paths"]["val"]} == {"train"}
    found = built(root, "--test-per-class", 1, "--overwrite")
    assert (found["num_train"], found["num_val"], found["num_test"]) == (10, 4, 2)
    assert {path.split("/")[0] for path in found["paths"]["val"]} == {folder}
    assert "no folder of test images" not in found["stderr"]
    assert built(root, "--layout", "classes", "--overwrite")["classes"] == sorted([folder, "train"])


def test_names_that_only_resemble_splits_are_classes(tmp_path: Path) -> None:
    assert [split_of(name) for name in ("trainer", "testis", "valley", "contest", "devil")] == [None] * 5
    fill(tmp_path / "p", "trainer", "valley")
    assert built(tmp_path / "p")["classes"] == ["trainer", "valley"]


@pytest.mark.parametrize(
    ("folders", "messages"),
    [
        (["cat", "dog", "test"], ("'test' beside 'cat', 'dog'", "--layout classes")),
        (["test/cat", "val/cat"], ("no folder of training images", "--layout classes")),
        (["bus", "car", "train/steam", "train/diesel"], ("sub-folders: diesel, steam", "bus, car", "--layout splits")),
        (["bus", "train", "test"], ("no sub-folders", "--layout classes")),
        (["train/cat", "training/cat"], ("'train' and 'training', two folders of one split",)),
        (["train/cat", "test/cat", "Testing/cat"], ("'Testing' and 'test'",)),
        (
            ["cat/train", "cat/test", "dog/train"],
            ("p/cat has 'test', 'train' inside", "p/train/cat", "--layout classes"),
        ),
        (["a/train/cat", "a/test/cat", "b/dog"], ("p/a has 'test', 'train' inside", "--data-root", "--layout classes")),
        (["train/train/cat", "test/test/cat"], ("p/train has no classes inside but train", "move the classes up")),
    ],
)
def test_folders_that_may_be_splits_or_classes_are_refused_with_both_ways_out(
    tmp_path: Path, folders: list[str], messages: tuple[str, ...]
) -> None:
    fill(tmp_path / "p", *folders)
    refused_build(tmp_path / "p", messages)
    found = built(tmp_path / "p", "--layout", "classes")
    assert found["classes"] == sorted({folder.split("/")[0] for folder in folders})


def test_a_class_may_be_called_train(tmp_path: Path) -> None:
    fill(tmp_path / "p", "bus", "car", "train")
    assert built(tmp_path / "p")["classes"] == ["bus", "car", "train"]


def test_folders_beside_the_splits_are_named(tmp_path: Path) -> None:
    fill(tmp_path / "p", "train/cat", "train/dog", "test/cat", "extra/owl")
    found = built(tmp_path / "p")
    assert "warning: " in found["stderr"]
    assert "6 files left out, beside the folder of the training images, and no split: extra/" in found["stderr"]
    fill(tmp_path / "q", "bus", "train/steam", "train/diesel")
    found = built(tmp_path / "q", "--layout", "splits")
    assert found["classes"] == ["diesel", "steam"]
    assert "no split: bus/" in found["stderr"]


def test_classes_that_hold_the_same_sub_folders_are_said_to_look_like_splits(tmp_path: Path) -> None:
    fill(tmp_path / "p", "seg_a/cat", "seg_a/dog", "seg_b/cat", "seg_b/dog")
    assert "seg_a, seg_b are taken as classes, and all hold the sub-folders cat, dog" in built(tmp_path / "p")["stderr"]


def test_the_table_counts_every_file_of_the_folder(tmp_path: Path) -> None:
    root = tmp_path / "p"
    fill(root, "cat", "dog", "cat/@eaDir", "dog/.thumbnails", "$RECYCLE.BIN", "__MACOSX/cat")
    fill(root, "cat/more", count=2, ending="jfif")
    for name in ("cat/notes.txt", "cat/Thumbs.db", "dog/.DS_Store", "readme.md"):
        (root / name).write_text("no image")
    result = must(*command(root, "--rho", 2))
    lines = result.stdout.splitlines()
    table = lines[lines.index(next(line for line in lines if line.startswith("files "))) :]
    assert [line.split("  ")[0] for line in table[2:9]] == [
        "train",
        "test",
        "not in the long-tailed subset",
        "left out: thumbnails, recycle bins and notes of other programs",
        "left out: not in the folder of a class",
        "left out: no image by the name",
        "left out: hidden, its name begins with a dot",
    ]
    numbers = must(*command(root, "--rho", 2), "--json").json["files"]
    assert numbers["found"] == len(files(root)) == 6 * 6 + 2 + 4
    assert sum(numbers["used"].values()) + numbers["not_chosen"] + sum(numbers["left_out"].values()) == numbers["found"]
    listed = (tmp_path / "p-out" / "left_out.txt").read_text().splitlines()
    assert "cat/notes.txt\tno image by the name" in listed
    assert "cat/@eaDir/\tthumbnails, recycle bins and notes of other programs" in listed


def test_a_class_folder_with_a_data_set_or_a_run_in_it_stays_a_class(tmp_path: Path, toy_run: Path) -> None:
    root = tmp_path / "p"
    fill(root, "cat", "dog", "owl")
    must("build-lt", "image-folder", "--data-root", root, "--image-size", 8, "--out", root / "cat")
    shutil.copytree(toy_run, root / "dog", dirs_exist_ok=True)
    write_image(root / "dog" / "confusion" / "stage1" / "matrix.png")
    found = built(root)
    assert found["classes"] == ["cat", "dog", "owl"]
    assert sum(found["files"]["used"].values()) == 18
    for line in ("no image by the name: cat/class_counts.parquet", "written by cpmix: dog/confusion/, dog/evaluation/"):
        assert line in found["stderr"]


def test_possible_classes_among_system_folders_are_named_in_a_warning(tmp_path: Path) -> None:
    fill(tmp_path / "p", "cat", "dog", "dog/@eaDir")
    assert "\nwarning: " not in built(tmp_path / "p")["stderr"].replace("\nwarning: 2 of 2 classes with few", "")
    fill(tmp_path / "q", "cat", "dog", "recycled")
    message = "warning: {}: 6 files left out, thumbnails, recycle bins and notes of other programs: recycled/"
    assert message.format(tmp_path / "q") in built(tmp_path / "q")["stderr"]


def test_images_of_sub_folders_are_said_to_be_of_the_class_above(tmp_path: Path) -> None:
    fill(tmp_path / "p", "animals/cat", "animals/dog", "cars")
    said = "images of sub-folders are of the class above: animals (cat, dog)\n"
    assert said in built(tmp_path / "p")["stderr"]


def test_files_with_several_pictures_are_named(tmp_path: Path) -> None:
    root = tmp_path / "p"
    fill(root, "cat", "dog", ending="png")
    pages = [Image.new("L", (9, 9), shade) for shade in (0, 100, 200)]
    names = [root / "cat" / name for name in ("a.gif", "b.tif", "c.png", "d.webp", "e.jpg")]
    for name, kind in zip(names, ("GIF", "TIFF", "PNG", "WEBP", "GIF"), strict=True):
        pages[0].save(name, kind, save_all=True, append_images=pages[1:])
    lines = built(root)["stderr"].splitlines()
    at = lines.index("warning: only the first picture is used of 5 files with animations or pages:")
    assert sorted(lines[at + 1 : at + 6]) == [f"    {name}" for name in names]


def test_links_that_lead_nowhere_are_refused(tmp_path: Path) -> None:
    fill(tmp_path / "p", "cat", "dog")
    (tmp_path / "p" / "owl").symlink_to("/nowhere/owl")
    refused_build(tmp_path / "p", (f"cannot read {tmp_path}/p/owl: it is a link to /nowhere/owl, which is not there",))
    (tmp_path / "p" / "cat" / "more").symlink_to("/nowhere/more")
    refused_build(tmp_path / "p", ("p/owl: it is a link to /nowhere/owl, which is not there",))
    found = built(tmp_path / "p", "--skip-unreadable")
    assert found["classes"] == ["cat", "dog"]
    assert "owl: it is a link to /nowhere/owl" in found["stderr"]
    fill(tmp_path / "q", "train/cat", "train/dog")
    (tmp_path / "q" / "test").symlink_to("/nowhere/test")
    refused_build(tmp_path / "q", ("q/test: it is a link to /nowhere/test",))


def test_links_within_the_folder_are_named_and_not_followed(tmp_path: Path) -> None:
    root = tmp_path / "p"
    fill(root, "cat", "dog", ".store")
    fill(tmp_path / "disk", "owl", "elk")
    for link, target in (
        ("cat/up", root),
        ("cat/self", root / "cat"),
        ("dog/cats", root / "cat"),
        ("bird", tmp_path / "disk" / "owl"),
        ("dog/owls", tmp_path / "disk" / "owl"),
        ("elk", tmp_path / "disk"),
        ("stored", root / ".store"),
    ):
        (root / link).symlink_to(target)
    found = built(root)
    assert found["classes"] == ["bird", "cat", "dog", "stored"]
    assert found["files"]["used"] == {"train": 20, "test": 4}
    assert (
        "5 files left out, a link to a folder that is read already: elk, cat/self, cat/up, dog/cats, dog/owls"
        in (found["stderr"])
    )


def test_sub_folders_that_cannot_be_read_are_refused(tmp_path: Path) -> None:
    """Root reads everything, so its privilege is dropped for the scan."""
    fill(tmp_path / "p", "cat", "dog", "dog/more", "owl")
    (tmp_path / "p" / "dog" / "more").chmod(0)
    (tmp_path / "p" / "owl").chmod(0)
    drop = ["--bounding-set=-dac_override,-dac_read_search", "--inh-caps=-dac_override,-dac_read_search"]
    words = ["setpriv", *drop] if os.geteuid() == 0 else []
    text = "import sys; from pathlib import Path; from cpmix_cli.data.image_folder import scan\n"
    text += "found = scan(Path(sys.argv[1]), skip_unreadable=len(sys.argv) > 2)\nprint(found.left_out)"
    scan = [*words, sys.executable, "-c", text, str(tmp_path / "p")]
    result = subprocess.run(scan, capture_output=True, text=True, check=False)
    assert "2 files or folders cannot be read:" in result.stderr
    for name in ("dog/more", "owl"):
        assert f"{tmp_path}/p/{name}: Permission denied" in result.stderr
    (tmp_path / "p" / "owl").chmod(0o755)
    skipped = subprocess.run([*scan, "skip"], capture_output=True, text=True, check=True)
    assert "'cannot be read': {'dog/more/: Permission denied'" in skipped.stdout
    (tmp_path / "p" / "dog" / "more").chmod(0o755)


def test_what_cpmix_wrote_into_the_folder_is_no_class(
    tmp_path: Path, toy_run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = tmp_path / "p"
    fill(root, "cat", "dog")
    (root / "cat" / "dataset.json").write_text('{"labels": []}')  # a user's own
    monkeypatch.chdir(root)
    build = ["build-lt", "image-folder", "--data-root", ".", "--image-size", 8]
    must(*build)
    shutil.copytree(toy_run, root / "ckpt")
    write_image(root / "ckpt" / "confusion" / "stage1" / "matrix.png")
    result = must(*build)
    assert "up to date: data/image-folder-p-8px" in result.stdout
    assert "left out: written by cpmix" in result.stdout
    assert "ckpt/, data/image-folder-p-8px/" in result.stdout
    assert open_dataset(Path("data/image-folder-p-8px")).class_names == ["cat", "dog"]


@pytest.mark.parametrize("flags", [[], ["--pack", 8], ["--pack", 0]])
def test_images_that_change_places_are_noticed(tmp_path: Path, flags: list[object]) -> None:
    root = tmp_path / "p"
    fill(root, "cat", "dog", count=4, ending="bmp")
    build = ["build-lt", "image-folder", "--data-root", root, "--out", tmp_path / "d", *flags]
    must(*build)
    before = (tmp_path / "d" / "dataset.json").read_bytes()
    names = [root / "cat" / "000.bmp", root / "dog" / "000.bmp"]
    for name, time in zip(names, (1e9, 2e9), strict=True):
        os.utime(name, (time, time))
    # Other times of the same pictures, as of a copy: the packed pixels or the recorded hashes tell.
    assert "comparing all images" in must(*build).stderr
    names[0].rename(tmp_path / "x")
    names[1].rename(names[0])
    (tmp_path / "x").rename(names[1])
    refused(4, (f"2 images changed since {tmp_path / 'd'} was built:", *map(str, names), "--overwrite"), *build)
    assert (tmp_path / "d" / "dataset.json").read_bytes() == before
    trial = ["train-stage1", "--data", tmp_path / "d", "--recipe", "digits/cross-entropy", "--epochs", 1, "--dry-run"]
    if 0 in flags:
        trial += ["--set", "data.normalisation=imagenet"]
        assert "changed since" in must(*trial, "--out", tmp_path / "r").stderr
    must(*build, "--overwrite")
    assert "up to date" in must(*build).stdout
    assert "changed since" not in must(*trial, "--out", tmp_path / "r").stderr


@pytest.mark.parametrize("pack", [[], ["--pack", 8], ["--pack", 0]])
def test_what_changed_in_a_folder_is_said_by_class(tmp_path: Path, pack: list[object]) -> None:
    root = tmp_path / "p"
    fill(root, "bobcat", "cat", "dog", count=8, ending="bmp")
    build = ["build-lt", "image-folder", "--data-root", root, "--out", tmp_path / "d", *pack]
    must(*build)
    for number in range(2):
        (root / "bobcat" / f"00{number}.bmp").unlink()
    shutil.copy(root / "cat" / "003.bmp", root / "bobcat" / "003.bmp")
    for number in range(5):
        shutil.copy(root / "bobcat" / "004.bmp", root / "bobcat" / f"new{number}.bmp")
    (root / "cat" / "001.bmp").unlink()
    (root / "dog" / "001.bmp").touch()  # another time, the same picture
    fill(root, "wolf", count=3, ending="bmp")
    expected = f"error: {tmp_path / 'd'} holds another data set:\n    bobcat: 5 new images, 2 gone, 1 changed\n"
    expected += "    wolf: 3 new images\n    cat: 1 gone image\n  fix: write elsewhere with --out FOLDER"
    refused(4, expected, *build)
    must(*build, "--overwrite")
    assert "up to date" in must(*build).stdout


def test_images_that_rho_left_out_are_not_new(tmp_path: Path) -> None:
    root = tmp_path / "p"
    fill(root, "cat", "dog", count=8)
    build = ["build-lt", "image-folder", "--data-root", root, "--out", tmp_path / "d", "--rho", 4]
    must(*build)
    fill(root, "cat/more", count=2)
    refused(4, "holds another data set:\n    cat: 2 new images\n  fix: ", *build)


@pytest.mark.parametrize("pack", [[], ["--pack", 8], ["--pack", 0]])
def test_images_of_own_lists_that_change_are_noticed(tmp_path: Path, pack: list[object]) -> None:
    fill(tmp_path / "p", "cat", "dog", count=4)
    for split, numbers in (("train", (0, 1)), ("test", (2, 3))):
        lines = [f"{name}/{i:03}.png {label}\n" for label, name in enumerate(("cat", "dog")) for i in numbers]
        (tmp_path / f"{split}.txt").write_text("".join(lines))
    build = ["build-lt", "image-folder", "--list-dir", tmp_path, "--data-root", tmp_path / "p", "--out", tmp_path / "d"]
    must(*build, *pack)
    assert "comparing" not in must(*build, *pack).stderr
    changed = tmp_path / "p" / "dog" / "003.png"
    write_image(changed, (1, 2, 3), (16, 16))
    refused(4, f"1 image changed since {tmp_path / 'd'} was built:\n    {changed}\n", *build, *pack)


def test_replaced_images_in_their_files_are_named_by_each_command_that_reads_them(tmp_path: Path) -> None:
    root, data, run = tmp_path / "p", tmp_path / "d", tmp_path / "r"
    fill(root, "train/cat", "train/dog", "test/cat", "test/dog", "val/cat", "val/dog", ending="bmp")
    build = ["build-lt", "image-folder", "--data-root", root, "--out", data, "--pack", 0, "--image-size", 12]
    must(*build)
    train = ["train-stage1", "--data", data, "--out", run, "--recipe", "digits/cpmix", "--epochs", 2]
    train += ["--set", "data.normalisation=imagenet"]
    evaluate = ["evaluate", "--from", run]
    must(*train)
    must(*evaluate)
    for split in ("train", "val", "test"):
        shutil.copy(root / split / "cat" / "001.bmp", root / split / "dog" / "002.bmp")
        (root / split / "cat" / "003.bmp").touch()  # another time, the same picture
    said = {
        split: f"warning: 1 of 12 {split} images in {root} changed since {data} was built; the same build-lt command "
        f"with --overwrite takes them as they are:\n    {root}/{split}/dog/002.bmp\n"
        for split in ("train", "val", "test")
    }
    for command, splits in (
        (train, ("train",)),  # up to date
        ([*train, "--overwrite", "--eval-every", 1], ("train", "test")),
        (["train-stage2", "--from", run, "--dry-run"], ("train",)),
        (["finetune", "--from", run, "--phase", "stage1", "--dry-run"], ("train",)),
        (evaluate, ("test",)),
        (evaluate, ("test",)),  # up to date
        ([*evaluate, "--split", "val"], ("val",)),
        ([*evaluate, "--test-data", data], ("test",)),
    ):
        stderr = must(*command).stderr
        assert {split for split in said if said[split] in stderr} == set(splits), command
        assert stderr.count("changed since") >= len(splits)
    shutil.copytree(root, tmp_path / "copy")
    must(*build, "--overwrite")
    refused(3, "holds another data set", *evaluate)
    must(*train, "--overwrite")
    assert "changed since" not in must(*evaluate, "--data-root", tmp_path / "copy").stderr


@pytest.mark.parametrize("flags", [[], ["--pack", 8], ["--pack", 0]])
def test_images_in_two_classes_and_in_two_splits_are_named(tmp_path: Path, flags: list[object]) -> None:
    root = tmp_path / "p"
    fill(root, "train/cat", "train/dog", "test/cat", "val/cat")
    shutil.copy(root / "train" / "cat" / "000.png", root / "train" / "dog" / "copy.png")
    shutil.copy(root / "train" / "cat" / "001.png", root / "test" / "cat" / "copy.png")
    shutil.copy(root / "val" / "cat" / "002.png", root / "test" / "cat" / "more.png")
    (root / "train" / "cat" / "link.png").symlink_to("004.png")
    build = ["build-lt", "image-folder", "--data-root", root, "--out", tmp_path / "d", *flags]
    lines = must(*build).stderr.splitlines()
    for warning, pair in (
        ("1 image is in another class too:", "train/dog/copy.png = {}/train/cat/000.png"),
        ("1 of 8 test images is identical to a training image:", "test/cat/copy.png = {}/train/cat/001.png"),
        ("1 of 8 test images is identical to a val image:", "test/cat/more.png = {}/val/cat/002.png"),
        ("1 image is in the same class and split more than once:", "train/cat/004.png = {}/train/cat/link.png"),
    ):
        assert lines[lines.index(f"warning: {warning}") + 1] == f"    {root}/{pair.format(root)}"


def test_unicode_forms_of_one_name_are_one_class(tmp_path: Path) -> None:
    root = tmp_path / "p"
    composed, decomposed = (unicodedata.normalize(form, "café") for form in ("NFC", "NFD"))
    fill(root, composed, decomposed, "bar")
    found = built(root)
    assert found["classes"] == ["bar", decomposed]
    assert found["num_train"] + found["num_test"] == 18
    assert "2 folders of the name café, in two Unicode forms, are one class" in unicodedata.normalize(
        "NFC", found["stderr"]
    )


def test_linked_folders_that_are_read_already_are_named(tmp_path: Path) -> None:
    fill(tmp_path / "store", "cat", "dog")
    for split in ("train", "test"):
        (tmp_path / "p" / split).mkdir(parents=True)
        (tmp_path / "p" / split / "cat").symlink_to(tmp_path / "store" / "cat")
    message = "p/test has no class sub-folders; left out as links to folders that are read already: test/cat"
    refused_build(tmp_path / "p", message)
    (tmp_path / "q").mkdir()
    for split in ("train", "test"):
        (tmp_path / "q" / split).symlink_to(tmp_path / "store")
    message = (
        "q has 'test', and no folder of training images; left out as links to folders that are read already: train"
    )
    refused_build(tmp_path / "q", message)


def test_a_split_or_class_that_cannot_be_read_is_refused(tmp_path: Path) -> None:
    root = tmp_path / "p"
    fill(root, "train/cat", "train/dog", "test/cat")
    for path in (root / "test" / "cat").iterdir():
        path.write_text("no image")
    refused_build(root, "no test image can be read", "--skip-unreadable")
    for path in (root / "train" / "dog").iterdir():
        path.write_text("no image")
    refused_build(root, ("classes without a training image: dog", "fix: add images"), "--skip-unreadable")


def test_classes_whose_names_hardly_differ_are_named(tmp_path: Path) -> None:
    root = tmp_path / "p"
    pairs = {"Cat": "cat", "dog": "dog ", "hot dog": "hot_dog", "\ufb01sh": "fish", "owl": "owl\u200b"}
    fill(root, *pairs, *pairs.values(), "elk")
    found = built(root)
    assert len(found["classes"]) == 11
    for name in ("'Cat' and 'cat'", "'dog' and 'dog '", "'hot dog' and 'hot_dog'", "'owl' and 'owl\\u200b'"):
        assert name in found["stderr"]
    assert "elk" not in found["stderr"].partition("hardly differ")[2].partition("\n")[0]


def test_a_class_of_another_spelling_in_the_test_folder_is_refused(tmp_path: Path) -> None:
    root = tmp_path / "p"
    fill(root, "train/Cat", "train/hot dog", "train/elk", "test/cat", "test/hot_dog", "test/elk")
    message = "2 sub-folders (cat, hot_dog) of no known class; the classes are spelled Cat, hot dog"
    follow_fix(refused(3, f"{root}/test has {message}", *command(root)))
    assert built(root)["classes"] == ["Cat", "elk", "hot dog"]
    fill(tmp_path / "q", "train/Cat", "train/dog", "test/Cat", "test/cat", "test/violet")
    message = "(cat, violet) of no known class; the classes are spelled Cat"
    refused_build(tmp_path / "q", (message, "name the sub-folders after"))


def test_classes_without_a_test_image_are_named(tmp_path: Path) -> None:
    fill(tmp_path / "p", "cat", "dog")
    fill(tmp_path / "p", "owl", count=2)
    assert "warning: 1 class has no test image: owl (0)\n" in built(tmp_path / "p")["stderr"]
    fill(tmp_path / "q", "cat", "dog")
    refused_build(tmp_path / "q", ("no folder of training images", "call it train"), "--layout", "splits")


def test_classes_with_too_few_images_are_named_with_their_numbers(tmp_path: Path) -> None:
    root = tmp_path / "p"
    fill(root, "cat", "dog", count=10)
    fill(root, "elk", count=3)
    fill(root, "owl", count=1)
    warning = built(root)["stderr"]
    assert "warning: 1 class has only one training image: owl (1)\n" in warning
    assert "warning: 1 class has no test image: owl (0)\n" in warning
    warning = built(root, "--test-per-class", 5, "--overwrite")["stderr"]
    assert "warning: 2 classes have only one training image: elk (1), owl (1)\n" in warning
    assert "2 classes have fewer than 5 test images, as one image stays to train on: elk (2), owl (0)\n" in warning
    shutil.rmtree(f"{root}-out")
    message = "--val-per-class 3 leaves no image to train on in 2 classes (images per class): elk (3, 1 for the test), "
    refused_build(root, (f"{message}owl (1, 0 for the test)", "fix: drop --val-per-class"), "--val-per-class", 3)
    shutil.rmtree(root / "owl")
    refused_build(root, "fix: give --val-per-class 1 or less", "--val-per-class", 3)
    assert built(root, "--val-per-class", 1)["smallest"] == 1


def test_a_folder_without_a_test_image_is_refused(tmp_path: Path) -> None:
    fill(tmp_path / "p", "a", "b", count=2)
    refused_build(tmp_path / "p", ("no test image", "give --test-per-class 1"))
    assert built(tmp_path / "p", "--test-per-class", 1)["num_test"] == 2
    fill(tmp_path / "q", "a", "b", count=1)
    refused_build(tmp_path / "q", ("no test image", "add images"))


def test_a_split_without_images_is_not_evaluated(digits: Path, digits_run: Path, tmp_path: Path) -> None:
    """Older versions built data sets without a test image; the accuracy of none is no number."""
    data = Path(shutil.copytree(digits, tmp_path / "data"))
    empty: dict[str, Any] = {"sample_id": [], "label": [], "source_index": []}
    pixels = {"images": torch.zeros(0, 8, 8, 1, dtype=torch.uint8), "labels": torch.zeros(0, dtype=torch.int64)}
    changed = {
        "test.parquet": publish_table(data / "test.parquet", split_schema(False), empty),
        "test.safetensors": publish_tensors(data / "test.safetensors", pixels),
    }
    record = read_fields(data / "dataset.json")
    edit_record(data / "dataset.json", files={**record["files"], **changed})
    before = files(digits_run)
    message = (f"{data} has no test image", "--test-data FOLDER")
    refused(3, message, "evaluate", "--from", digits_run, "--data", data, "--overwrite")
    assert files(digits_run) == before


def test_bad_files_of_new_images_are_left_out_on_request(tmp_path: Path) -> None:
    root, new = tmp_path / "p", tmp_path / "new"
    fill(root, "cat", "dog", ending="jpg")
    fill(new, "cat", "dog", count=3, ending="jpg")
    built(root)
    must(
        "train-stage1",
        "--data",
        f"{root}-out",
        "--recipe",
        "digits/cross-entropy",
        "--epochs",
        1,
        "--out",
        tmp_path / "r",
    )
    cut = new / "cat" / "001.jpg"
    cut.write_bytes(cut.read_bytes()[:-20])
    (new / "dog" / "notes.md").write_text("no image")
    shutil.copy(new / "dog" / "000.jpg", new / "dog" / "a.jfif")
    run = ["--from", tmp_path / "r", "--phase", "stage1"]
    for command in (["predict", new, *run], ["evaluate", *run, "--test-data", new]):
        refused(3, (f"{cut}", "fix: "), *command)
        result = must(*command, "--skip-unreadable", "--json")
        assert f"1 file left out, cannot be decoded:\n    {cut}: " in result.stderr
        assert f"{new}: 1 file left out, no image by the name: dog/notes.md" in result.stderr
        assert result.json["num_images" if command[0] == "predict" else "num_test"] == 6
    refused(2, f"{root}-out holds its images itself", "evaluate", *run, "--skip-unreadable")
    for name in ("cat", "dog"):
        for path in (new / name).iterdir():
            path.write_bytes(b"no image")
    refused(3, "cannot be read as an image", "predict", new, *run, "--skip-unreadable")


@pytest.mark.parametrize("flags", [[], ["--pack", 8], ["--pack", 0]])
def test_unreadable_files_are_left_out_on_request(tmp_path: Path, flags: list[object]) -> None:
    root = tmp_path / "p"
    fill(root, "cat", "dog", ending="jpg")
    cut, gone = root / "cat" / "000.jpg", root / "dog" / "gone.jpg"
    cut.write_bytes(cut.read_bytes()[:-20])
    gone.symlink_to("/nowhere.jpg")
    build = ["build-lt", "image-folder", "--data-root", root, "--out", tmp_path / "d", *flags]
    refused(3, ("cannot be read as an image", "or leave them out: --skip-unreadable"), *build)
    for status in ("built", "up to date"):
        result = must(*build, "--skip-unreadable", "--verify", "--json")
        assert result.json["status"] == status
        assert result.json["files"]["left_out"] == {"cannot be read": 2}
        assert result.json["files"]["found"] == 13
        assert result.json["num_train"] + result.json["num_test"] == 11
        if status == "built":
            assert "2 files left out, cannot be read: cat/000.jpg: " in result.stderr


def cut_short(*paths: Path) -> str:
    """Cut files short; returns the lines of an error about them."""
    lines = []
    for path in paths:
        path.write_bytes(path.read_bytes()[:-20])
        lines.append(f"\n    {path}: image file is truncated (")
    return lines[0] if len(lines) == 1 else f"error: {len(lines)} files cannot be read as an image:{lines[0]}"


@pytest.mark.parametrize("pack", [0, 8])
def test_files_that_are_empty_and_no_images_are_named_at_once(tmp_path: Path, pack: int) -> None:
    root = tmp_path / "p"
    fill(root, "cat", "dog")
    (root / "cat" / "empty.jpg").touch()
    (root / "dog" / "page.jpg").write_text("<html>not found</html>")
    messages = ("error: 2 files cannot", f"{root}/cat/empty.jpg: empty", f"{root}/dog/page.jpg: not an image")
    refused(3, messages, "build-lt", "image-folder", "--data-root", root, "--out", tmp_path / "d", "--pack", pack)


def test_verify_decodes_images_in_their_files_before_it_builds(tmp_path: Path) -> None:
    root = tmp_path / "p"
    fill(root, "train/cat", "train/dog", "test/cat", ending="jpg")
    message = cut_short(root / "test" / "cat" / "001.jpg")
    build = ["build-lt", "image-folder", "--data-root", root, "--out", tmp_path / "d", "--pack", 0]
    refused(3, (message, "leave them out: --skip-unreadable"), *build, "--verify")
    assert not (tmp_path / "d").exists()
    must(*build)
    for flag in ("--verify", "--skip-unreadable"):
        refused(3, (message, "leave them out: --overwrite --skip-unreadable"), *build, flag)
    assert must(*build, "--overwrite", "--skip-unreadable", "--json").json["num_test"] == 5


def test_images_in_their_files_that_become_unreadable_are_all_named(tmp_path: Path) -> None:
    root, data, run = tmp_path / "p", tmp_path / "d", tmp_path / "r"
    fill(root, "train/cat", "train/dog", "test/cat", "test/dog", ending="jpg")
    must("build-lt", "image-folder", "--data-root", root, "--out", data, "--pack", 0, "--image-size", 12)
    trains = ["train-stage1", "--data", data, "--out", run, "--recipe", "digits/cross-entropy", "--epochs", 1]
    trains += ["--set", "data.normalisation=imagenet"]
    must(*trains)
    whole = must("evaluate", "--from", run, "--json").json
    # Two test images are cut off, later a third is gone.
    lost = [root / "test" / "cat" / "001.jpg", root / "test" / "dog" / "000.jpg", root / "test" / "dog" / "002.jpg"]
    cut_short(*lost[:2])
    shutil.copy(lost[0].with_name("002.jpg"), lost[0].with_name("003.jpg"))
    replaced = must("evaluate", "--from", run, "--skip-unreadable").stderr
    assert "3 of 12 test images" in replaced
    assert f"\n    {lost[0].with_name('003.jpg')}\n" in replaced
    lost[2].unlink()
    messages = tuple(f"\n    {path}: " for path in lost)
    refused(3, ("error: 3 files cannot", *messages, "--skip-unreadable"), "evaluate", "--from", run, "--overwrite")
    result = must("evaluate", "--from", run, "--skip-unreadable", "--json")
    assert "3 files left out, cannot be decoded:" in result.stderr
    assert all(message in result.stderr for message in messages)
    # It is no plain evaluation: that of all images stays, and stands beside it.
    assert result.json["folder"] == str(run / "evaluation" / "stage1-readable")
    assert (whole["folder"], whole["num_test"], result.json["num_test"]) == (str(run / "evaluation" / "stage1"), 12, 9)
    assert must("evaluate", "--from", run, "--skip-unreadable", "--json").json["status"] == "up to date"
    wrong = must("misclassified", "--from", run, "--label", "readable", "--json").json
    assert wrong["num_images"] == round(9 * (1 - result.json["top1"] / 100))
    assert {image["image"] for image in wrong["images"]} <= set(map(str, root.glob("test/*/*.jpg"))) - set(
        map(str, lost)
    )
    assert len(must("compare", run, "--json").json["rows"]) == 2
    # The same of training images.
    broken = [root / "train" / name / "003.jpg" for name in ("cat", "dog")]
    cut_short(*broken)
    messages = ("error: 2 files cannot", *(f"\n    {path}: " for path in broken), "--overwrite --skip-unreadable")
    for flags in ([], ["--dry-run"]):
        refused(3, messages, *trains, "--overwrite", *flags)
    new = tmp_path / "new"
    shutil.copytree(root / "train", new)
    copies = [new / name / "003.jpg" for name in ("cat", "dog")]
    messages = ("error: 2 files cannot", *(f"\n    {path}: " for path in copies))
    for command in (["predict", new], ["evaluate", "--test-data", new]):
        refused(3, messages, *command, "--from", run)


def test_flags_of_image_files_are_refused_without_them(tmp_path: Path) -> None:
    refused(2, "--skip-unreadable: digits does not come as image files", "build-lt", "digits", "--skip-unreadable")
    refused(2, "--layout: digits has no class sub-folders", "build-lt", "digits", "--layout", "classes")
    refused(2, "--rho inf is no imbalance factor", *command(tmp_path, "--rho", "inf", "--profile", "pareto"))


@pytest.mark.parametrize(("counts", "rho", "advised"), [((49, 49), 50, 49), ((21, 1, 1), 50, 1), ((60, 9, 8), 99, 60)])
def test_the_advised_imbalance_factor_works(tmp_path: Path, counts: tuple[int, ...], rho: int, advised: int) -> None:
    root = tmp_path / "p"
    for name, count in zip("abc", counts, strict=False):
        fill(root, f"train/{name}", count=count)
        fill(root, f"test/{name}", count=1)
    refused_build(root, (f"--rho {advised}",), "--rho", rho)
    assert built(root, "--rho", advised)["smallest"] >= 1


def test_thin_images_are_scaled_in_little_memory() -> None:
    """As if they were scaled whole: a line of 40,000 pixels would take 10 GB."""
    ramp = np.repeat(np.arange(40_000, dtype=np.uint32)[None, :, None] * 255 // 40_000, 3, axis=2).astype(np.uint8)
    for image in (Image.fromarray(ramp), Image.fromarray(ramp).transpose(Image.Transpose.ROTATE_90)):
        pixels = np.asarray(square(image, 256))
        assert pixels.shape == (256, 256, 3)
        assert set(np.unique(pixels).tolist()) <= {126, 127, 128}


def test_twelve_bits_in_sixteen_are_as_bright_as_eight(tmp_path: Path) -> None:
    grey = np.arange(256, dtype=np.uint16).reshape(16, 16)
    Image.fromarray(grey * 16).save(tmp_path / "12.png")
    Image.fromarray(grey * 257).save(tmp_path / "16.tif")
    (tmp_path / "16.pgm").write_bytes(b"P5 16 16 65535\n" + (grey * 257).astype(">u2").tobytes())
    (tmp_path / "12.pgm").write_bytes(b"P5 16 16 4095\n" + (grey * 16).astype(">u2").tobytes())
    for path in tmp_path.iterdir():
        assert np.abs(np.asarray(open_rgb(path, upright=True))[..., 0] - grey.astype(int)).max() <= 1, path


def test_the_orientation_is_read_from_broken_exif(tmp_path: Path) -> None:
    entries = [(0x112, 3, 1, b"\6\0\0\0"), (0x11A, 11, 1, b"\0\0\xc0\x7f")]  # turned by 90 degrees; a resolution of NaN
    body = b"".join(
        a.to_bytes(2, "little") + b.to_bytes(2, "little") + c.to_bytes(4, "little") + d for a, b, c, d in entries
    )
    exif = b"Exif\0\0II*\0\x08\0\0\0" + len(entries).to_bytes(2, "little") + body + bytes(4)
    write_image(tmp_path / "a.jpg", (200, 10, 10), (32, 24))
    whole = (tmp_path / "a.jpg").read_bytes()
    (tmp_path / "a.jpg").write_bytes(whole[:2] + b"\xff\xe1" + (len(exif) + 2).to_bytes(2, "big") + exif + whole[2:])
    assert open_rgb(tmp_path / "a.jpg", upright=True).size == (24, 32)
    assert open_rgb(tmp_path / "a.jpg", upright=False).size == (32, 24)


def test_every_ending_that_pillow_knows_of_a_format_is_an_image() -> None:
    Image.init()
    known = {ending for ending, name in Image.registered_extensions().items() if name in FORMATS}
    assert known - ENDINGS <= {".pfm", ".avifs", ".icb", ".vda", ".vst"}
