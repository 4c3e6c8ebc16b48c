"""A user's own images: layouts, formats, faults, and what is done with the trained network."""

import json
import os
import shlex
import shutil
import zlib
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from helpers import files, must, refused, write_photos
from PIL import Image

import cpmix_cli
from cpmix_cli.data.dataset import open_dataset
from cpmix_cli.data.decoding import UnreadableImages, read_squares
from cpmix_cli.data.stream import FileReader
from cpmix_cli.recipe.schema import Data
from cpmix_cli.runtime.errors import InputError


def build(root: Path, out: Path, *flags: object) -> None:
    must("build-lt", "image-folder", "--data-root", root, "--image-size", 16, "--out", out, *flags)


def png_of(width: int, height: int) -> bytes:
    """A PNG that claims a size and holds next to nothing."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return len(data).to_bytes(4, "big") + kind + data + zlib.crc32(kind + data).to_bytes(4, "big")

    header = width.to_bytes(4, "big") + height.to_bytes(4, "big") + bytes([8, 2, 0, 0, 0])
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")


def test_a_folder_is_kept_as_imbalanced_as_it_is(tmp_path: Path) -> None:
    write_photos(tmp_path / "photos", {"red": 60, "green": 12, "blue": 2})
    (tmp_path / "photos" / "blue" / "notes.txt").write_text("not an image")
    (tmp_path / "photos" / ".cache").mkdir()
    result = must("build-lt", "image-folder", "--data-root", tmp_path / "photos", "--out", tmp_path / "d")
    assert "1 file left out, no image by the name" in result.stderr
    dataset = open_dataset(tmp_path / "d")
    assert dataset.name == "image-folder-photos"
    assert dataset.class_names == ["blue", "green", "red"]
    # Held out: the smaller of 10 and 20 per cent, rounded: 0 of 2, 2 of 12, 10 of 60.
    assert dataset.class_counts.tolist() == [2, 10, 50]
    tests = dataset.samples("test")
    assert tests["label"].tolist() == [1] * 2 + [2] * 10
    together = [*dataset.samples("train")["path"], *tests["path"]]
    assert sorted(together) == sorted(f for f in files(tmp_path / "photos") if not f.endswith("txt"))
    assert dataset.shape == [64, 64, 3]
    assert dataset.record.recipe == "image-folder/cpmix"


def test_a_class_keeps_one_image_to_train_on(tmp_path: Path) -> None:
    write_photos(tmp_path / "p", {"red": 30, "blue": 3})
    build(tmp_path / "p", tmp_path / "d", "--test-per-class", 5)
    dataset = open_dataset(tmp_path / "d")
    assert dataset.class_counts.tolist() == [1, 25]
    assert dataset.samples("test")["label"].tolist() == [0] * 2 + [1] * 5


@pytest.mark.parametrize(
    ("flags", "added"),
    [
        (["--image-size", 64], ""),
        (["--image-size", 32], " --set model.name=resnet32"),
        (["--pack", 32], " --set model.name=resnet32"),
        (["--pack", 0], " --set data.normalisation=imagenet"),
        (["--pack", 0, "--image-size", 24], " --set model.name=resnet32 --set data.normalisation=imagenet"),
    ],
)
def test_the_next_command_has_what_the_default_recipe_lacks_for_the_images(
    flags: list[object], added: str, tmp_path: Path
) -> None:
    write_photos(tmp_path / "photos", {"red": 5, "blue": 3})
    built = must("build-lt", "image-folder", "--data-root", tmp_path / "photos", "--out", tmp_path / "d", *flags)
    command = built.stderr.splitlines()[-1].removeprefix("next: ")
    plain, _, changes = command.partition(" --set ")
    assert plain.startswith(f"cpmix train-stage1 --data {tmp_path / 'd'} --out ckpt/image-folder-photos")
    assert (changes and f" --set {changes}") == added
    words = shlex.split(command)[1:]
    must(*words, "--out", tmp_path / "run", "--epochs", 2)
    if added:
        result = refused(2, (), *words[: words.index("--set")], "--out", tmp_path / "other", "--dry-run")
        assert f"fix: give{added} as well, or give a recipe for this data set with --recipe\n" in result.stderr
    assert not (tmp_path / "other").exists()


def test_train_and_test_folders_become_the_splits(tmp_path: Path) -> None:
    write_photos(tmp_path / "p" / "train", {"red": 8, "green": 4})
    write_photos(tmp_path / "p" / "test", {"red": 3})
    build(tmp_path / "p", tmp_path / "d")
    dataset = open_dataset(tmp_path / "d")
    assert dataset.class_counts.tolist() == [4, 8]
    assert dataset.samples("test")["path"].tolist() == ["test/red/000.png", "test/red/001.jpg", "test/red/002.png"]
    build_again = ["build-lt", "image-folder", "--data-root", tmp_path / "p"]
    refused(2, "has its own test split", *build_again, "--test-per-class", 2)


def test_rho_takes_the_largest_profile_by_rank(tmp_path: Path) -> None:
    write_photos(tmp_path / "p", {"red": 10, "green": 40, "blue": 6})
    build(tmp_path / "p", tmp_path / "d", "--rho", 4, "--test-per-class", 1)
    # 39, 9 and 5 are left; by rank 39 / 1, 9 / (1/2), 5 / (1/4) allow 18 in the largest: 18, 9, 4.
    assert open_dataset(tmp_path / "d").class_counts.tolist() == [4, 18, 9]


def test_a_changed_folder_is_refused_as_another_data_set(tmp_path: Path) -> None:
    write_photos(tmp_path / "p", {"red": 6, "green": 6})
    build(tmp_path / "p", tmp_path / "d")
    again = must("build-lt", "image-folder", "--data-root", tmp_path / "p", "--image-size", 16, "--out", tmp_path / "d")
    assert "up to date" in again.stdout
    Image.new("RGB", (20, 20)).save(tmp_path / "p" / "red" / "new.png")
    flags = ["--data-root", tmp_path / "p", "--out", tmp_path / "d"]
    said = f"error: {tmp_path / 'd'} holds another data set:\n    red: 1 new image\n  fix: "
    refused(4, said, "build-lt", "image-folder", "--image-size", 16, *flags)
    refused(4, "image_size: 16 -> 64", "build-lt", "image-folder", *flags)


@pytest.mark.parametrize(
    ("counts", "extra", "message"),
    [
        ({}, None, "has no class sub-folders"),
        ({"red": 4}, None, 'has one class, "red"; a classifier needs two'),
        ({"red": 4, "green": 4, "blue": 0}, None, "1 class (blue) without an image"),
        ({"red": 4}, "test", "1 sub-folder (green) of no known class"),
    ],
)
def test_layouts_without_training_classes_are_refused(
    tmp_path: Path, counts: dict[str, int], extra: str | None, message: str
) -> None:
    root = tmp_path / "p"
    root.mkdir()
    write_photos(root / "train" if extra else root, counts if not extra else {"red": 4, "blue": 4})
    if extra:
        write_photos(root / extra, {"green": 1})
    before = files(root)
    refused(3, message, "build-lt", "image-folder", "--data-root", root, "--out", tmp_path / "d")
    assert (files(root), (tmp_path / "d").exists()) == (before, False)


@pytest.mark.parametrize(
    ("profile", "counts"),
    [("exponential", [16, 4, 1]), ("step", [16, 16, 1]), ("ranked", [16, 4, 1]), ("pareto", [16, 3, 1])],
)
def test_each_profile_gives_its_class_counts_and_folder_name(
    profile: str, counts: list[int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """16 images of each class at rho 16; the profile is in the folder's name where it is not the default."""
    monkeypatch.chdir(tmp_path)
    write_photos(tmp_path / "p" / "train", dict.fromkeys(("red", "green", "blue"), 16))
    write_photos(tmp_path / "p" / "test", dict.fromkeys(("red", "green", "blue"), 1))
    command = ["build-lt", "image-folder", "--data-root", "p", "--rho", 16, "--image-size", 8, "--profile", profile]
    numbers = must(*command, "--json").json
    suffix = "" if profile == "ranked" else f"-{profile}"
    assert numbers["folder"] == f"data/image-folder-p-lt-rho16{suffix}-8px"
    dataset = open_dataset(tmp_path / numbers["folder"])
    assert (dataset.class_counts.tolist(), dataset.record.profile) == (counts, profile)
    refused(4, "profile: ", *command[:-1], "step" if profile != "step" else "pareto", "--out", numbers["folder"])


def test_image_formats_and_modes_give_the_same_pixels(tmp_path: Path) -> None:
    """One picture, left half white, right half black, in every mode: the same pixels come out."""
    pixels = np.zeros((16, 16, 3), dtype=np.uint8)
    pixels[:, :8] = 255
    picture = Image.fromarray(pixels)
    grey16 = Image.fromarray(pixels[..., 0].astype(np.uint16) * 257)
    clear = picture.convert("RGBA")
    clear.putalpha(Image.fromarray(255 - pixels[..., 0]))  # the white half is transparent: white again on white
    rotated = Image.Exif()
    rotated[0x0112] = 3  # upside down: the camera says to turn it by 180 degrees
    picture.save(tmp_path / "a.png")
    picture.convert("CMYK").save(tmp_path / "b.tif")
    picture.convert("P").save(tmp_path / "c.png")
    picture.convert("1").save(tmp_path / "d.png")
    picture.convert("L").save(tmp_path / "e.bmp")
    grey16.save(tmp_path / "f.png")
    grey16.save(tmp_path / "g.tif")
    clear.save(tmp_path / "h.png")
    picture.rotate(180).save(tmp_path / "i.jpg", exif=rotated, quality=100, subsampling=0)
    paths = sorted(tmp_path.iterdir())
    assert len(paths) == 9
    for path, image in zip(paths, read_squares(paths, 16), strict=True):
        assert np.abs(image.astype(int) - pixels).max() <= 2, path
    grey = np.empty((16, 16, 1), dtype=np.uint8)
    FileReader(paths, grey.shape, Data(augment="none"), upright=True).read(0, None, grey)
    assert (grey == pixels[..., :1]).all()


def test_the_middle_of_a_wide_image_is_kept(tmp_path: Path) -> None:
    pixels = np.zeros((10, 30, 3), dtype=np.uint8)
    pixels[:, 10:20] = 200
    Image.fromarray(pixels).save(tmp_path / "wide.png")
    assert (read_squares([tmp_path / "wide.png"], 10) == 200).all()


def test_every_unreadable_file_is_named(tmp_path: Path) -> None:
    write_photos(tmp_path / "p" / "train", {"red": 4, "green": 4})
    write_photos(tmp_path / "p" / "test", {"red": 1})
    bad = tmp_path / "p" / "train" / "red"
    Image.fromarray(np.ones((4, 4), dtype=np.float32)).save(bad / "float.tif")
    (bad / "empty.jpg").touch()
    (bad / "text.png").write_text("no image")
    (bad / "001.jpg").write_bytes((bad / "001.jpg").read_bytes()[:-40])
    (bad / "000.png").write_bytes((bad / "000.png").read_bytes()[:-200])
    (bad / "bomb.png").write_bytes(png_of(100_000, 100_000))
    (bad / "large.png").write_bytes(png_of(10_000, 10_000))
    (bad / "gone.png").symlink_to(tmp_path / "nowhere.png")
    (bad / "loop.png").symlink_to(bad / "loop.png")
    os.mkfifo(bad / "pipe.jpg")
    (bad / "folder.jpg").mkdir()  # no image by its name
    (tmp_path / "p" / "test" / "red" / "bad.gif").write_bytes(b"GIF89a")
    build_bad = ["build-lt", "image-folder", "--data-root", tmp_path / "p", "--out", tmp_path / "d"]
    result = refused(3, "11 files cannot be read as an image", *build_bad)
    reasons = {
        bad / "float.tif": "32-bit pixels",
        bad / "empty.jpg": "not an image",
        bad / "text.png": "not an image",
        bad / "001.jpg": "image file is truncated",
        bad / "000.png": "image file is truncated",
        bad / "bomb.png": "more than 89,478,485 pixels",
        bad / "large.png": "more than 89,478,485 pixels",
        bad / "gone.png": "No such file",
        bad / "loop.png": "Too many levels of symbolic links",
        bad / "pipe.jpg": "it is a pipe, not a file",
        tmp_path / "p" / "test" / "red" / "bad.gif": "",
    }
    assert {path for path, why in reasons.items() if f"\n    {path}: {why}" not in result.stderr} == set()
    assert not (tmp_path / "d").exists()
    with pytest.raises(UnreadableImages):
        read_squares([bad / "empty.jpg"], 8)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with photos, and a network that tells their colours apart; the data set and the photos are there."""
    root = tmp_path_factory.mktemp("folder")
    write_photos(root / "photos", {"red": 40, "green": 20, "blue": 10})
    build(root / "photos", root / "data")
    recipe = ["--recipe", "digits/cross-entropy", "--epochs", 5, "--set", "optimizer.batch_size=16"]
    must("train-stage1", "--data", root / "data", "--out", root / "run", *recipe)
    must("evaluate", "--from", root / "run", "--phase", "stage1")
    return root


def test_predict_needs_only_the_run_folder(trained: Path, tmp_path: Path) -> None:
    """From the run folder alone: it is moved, and the data set stays behind."""
    write_photos(tmp_path / "new", {"red": 3, "green": 2, "blue": 1}, seed=5)
    run = tmp_path / "moved"
    shutil.copytree(trained / "run" / "stage1", run / "stage1")
    red = tmp_path / "new" / "red" / "001.jpg"
    result = must("predict", red, tmp_path / "new" / "green", "--from", run, "--phase", "stage1")
    words = [line.split() for line in result.stdout.splitlines()]
    assert words[0] == ["image", "class", "confidence"]
    assert [w[:2] for w in words[2:]] == [
        [str(red), "red"],
        [str(tmp_path / "new" / "green" / "000.png"), "green"],
        [str(tmp_path / "new" / "green" / "001.jpg"), "green"],
    ]
    out = tmp_path / "predictions.parquet"
    command = ["predict", tmp_path / "new", "--from", run, "--phase", "stage1", "--top", 2, "--out", out]
    numbers = must(*command, "--json").json
    assert numbers["num_images"] == 6
    table = pd.read_parquet(out)
    assert table.columns.tolist() == ["path", "rank", "class_id", "class_name", "confidence"]
    assert table["rank"].tolist() == [1, 2] * 6
    first = table[table["rank"] == 1]
    assert first["class_name"].tolist() == [Path(p).parent.name for p in first["path"]]
    for prediction, (_, rows) in zip(numbers["predictions"], table.groupby("path", sort=False), strict=True):
        assert [c["class"] for c in prediction["classes"]] == rows["class_name"].tolist()
    refused(4, f"{out} exists", *command)
    must(*command, "--overwrite")


def test_predict_refuses_unreadable_and_missing_images(trained: Path, tmp_path: Path) -> None:
    (tmp_path / "broken.png").write_text("no image")
    (tmp_path / "none").mkdir()
    run = ["--from", trained / "run", "--phase", "stage1"]
    for place, message in (
        (tmp_path / "broken.png", "broken.png: not an image"),
        (tmp_path / "missing.png", "no such file"),
        (tmp_path / "none", "has the name of an image"),
    ):
        refused(3, message, "predict", place, *run)
    refused(3, "holds no finished", "predict", tmp_path / "broken.png", "--from", tmp_path)


def test_a_network_of_points_takes_no_images(toy_run: Path, tmp_path: Path) -> None:
    Image.new("RGB", (4, 4)).save(tmp_path / "a.png")
    refused(3, "takes no images", "predict", tmp_path / "a.png", "--from", toy_run)
    refused(3, "takes no images", "export", "--from", toy_run)
    with pytest.raises(InputError, match=r"was trained on points \(toy-lt-rho20\) and takes no images"):
        cpmix_cli.load(toy_run)


def test_evaluate_accepts_another_folder_as_test_data(trained: Path, tmp_path: Path) -> None:
    write_photos(tmp_path / "more", {"red": 4, "blue": 2}, seed=9)
    shutil.copy(trained / "photos" / "green" / "000.png", tmp_path / "more" / "blue" / "green.png")  # one error
    command = ["evaluate", "--from", trained / "run", "--phase", "stage1", "--out", tmp_path / "o"]
    numbers = must(*command, "--test-data", tmp_path / "more", "--json").json
    assert numbers["folder"] == str(tmp_path / "o" / "evaluation" / "stage1-more")
    assert (numbers["num_test"], numbers["num_classes_without_test"]) == (7, 1)
    assert numbers["top1"] == pytest.approx(100 * 6 / 7, abs=0.01)
    assert numbers["balanced_accuracy"] == pytest.approx((100 + 200 / 3) / 2, abs=0.01)
    written = ["logits.safetensors", "metrics.json", "per_class.parquet", "predictions.parquet"]
    assert files(tmp_path / "o" / "evaluation" / "stage1-more") == [*written, "run.json", "samples.parquet"]
    assert must(*command, "--test-data", tmp_path / "more", "--json").json["status"] == "up to date"
    edited = tmp_path / "more" / "red" / "000.png"
    edited.write_bytes(edited.read_bytes()[:-1] + b"\0")  # the last checksum: as long as before, and as legible
    assert must(*command, "--test-data", tmp_path / "more", "--json").json["status"] == "done"
    # The data set's own test split, given as a folder, is the plain evaluation again.
    plain = json.loads((trained / "run" / "evaluation" / "stage1" / "metrics.json").read_text())
    again = must(*command, "--test-data", trained / "data", "--label", "own", "--json").json
    assert {k: again[k] for k in plain} == plain
    (tmp_path / "more" / "violet").mkdir()
    refused(3, "1 sub-folder (violet) of no known class", *command, "--test-data", tmp_path / "more")


def test_test_data_of_another_kind_is_refused(trained: Path, digits: Path, toy: Path, toy_run: Path) -> None:
    run = ["evaluate", "--from", trained / "run", "--phase", "stage1", "--test-data"]
    refused(3, "has samples of shape (8, 8, 1), the network takes (16, 16, 3)", *run, digits)
    refused(3, (), *run, trained / "nowhere")
    refused(3, "a network of points takes no images", "evaluate", "--from", toy_run, "--test-data", trained / "photos")


def test_misclassified_lists_paths_of_wrong_predictions(trained: Path, tmp_path: Path) -> None:
    write_photos(tmp_path / "more", {"red": 2, "blue": 2}, seed=9)
    wrong = tmp_path / "more" / "blue" / "green.png"
    shutil.copy(trained / "photos" / "green" / "000.png", wrong)
    run = ["--from", trained / "run", "--phase", "stage1"]
    must("evaluate", *run, "--test-data", tmp_path / "more", "--label", "files")
    result = must("misclassified", *run, "--label", "files")
    assert result.stdout.splitlines()[2].split()[:3] == [str(wrong), "blue", "green"]
    assert result.stdout.splitlines()[3] == "1 misclassified image"
    cell = must("misclassified", *run, "--label", "files", "--true", "blue", "--predicted", 1, "--json").json
    assert [i["image"] for i in cell["images"]] == [str(wrong)]
    assert must("misclassified", *run, "--label", "files", "--true", "red", "--json").json["images"] == []
    refused(
        2, "fix: give --true blue, or one of green, red", "misclassified", *run, "--label", "files", "--true", "bleu"
    )
    refused(3, "--label none", "misclassified", *run, "--label", "none")
