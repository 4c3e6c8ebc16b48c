"""build-lt for real: exact files, contents, output and refusals."""

import json
import os
from itertools import product
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest
import torch
from helpers import exact_contents, files, must, png, refused, write_cifar

from cpmix_cli.artifacts import records
from cpmix_cli.data.dataset import open_dataset

SPLITS, ENDS = ("test", "train"), ("parquet", "safetensors")
REAL = Path(os.environ.get("CPMIX_CIFAR100", Path(__file__).parents[3] / "shared" / "data" / "cifar100"))


def test_build_lt_digits_writes_the_default_data_set(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    result = must("build-lt", "digits")
    folder = tmp_path / "data" / "digits-lt-rho20"
    assert files(folder) == ["class_counts.parquet", "dataset.json", *(f"{s}.{e}" for s, e in product(SPLITS, ENDS))]
    assert "0     124 ########################################\n" in result.stdout
    assert "9       6 ##\n" in result.stdout
    assert "417 training and 500 test images, 10 classes, largest 124, smallest 6" in result.stdout
    assert "many (>100) 1, medium (20..100) 5, few (<20) 4 classes" in result.stdout
    assert result.stderr == ("next: cpmix train-stage1 --data data/digits-lt-rho20 --out ckpt/digits-lt-rho20\n")
    dataset = open_dataset(folder)
    images, labels = dataset.read("train")
    assert images.shape == (417, 8, 8, 1)
    assert images.max() == 255
    assert torch.bincount(labels).tolist() == dataset.class_counts.tolist()
    assert torch.bincount(dataset.read("test")[1]).tolist() == [50] * 10
    counts = pd.read_parquet(folder / "class_counts.parquet")
    assert list(counts.columns) == ["class_id", "class_name", "num_train", "num_test", "group"]
    assert counts["num_train"].tolist() == [int(124 * 20 ** (-i / 9)) for i in range(10)]


def test_building_again_reports_up_to_date_and_changes_nothing(tmp_path: Path) -> None:
    first = must("build-lt", "toy", "--rho", 50, "--out", tmp_path / "toy", "--json")
    before = exact_contents(tmp_path / "toy")
    second = must("build-lt", "toy", "--rho", 50, "--out", tmp_path / "toy", "--json")
    assert (first.json["status"], second.json["status"]) == ("built", "up to date")
    assert {**first.json, "status": ""} == {**second.json, "status": ""}
    assert first.json["num_train"] == 2 * 1000 + 2 * 20
    assert exact_contents(tmp_path / "toy") == before


def test_building_again_gives_the_same_bytes(toy: Path, tmp_path: Path) -> None:
    must("build-lt", "toy", "--out", tmp_path / "again")
    assert exact_contents(tmp_path / "again") == exact_contents(toy)


def test_another_data_set_in_the_folder_is_refused_and_kept(tmp_path: Path) -> None:
    must("build-lt", "toy", "--out", tmp_path)
    before = (tmp_path / "dataset.json").read_bytes()
    refused(4, "rho: 20 -> 100.0", "build-lt", "toy", "--rho", 100, "--out", tmp_path)
    assert (tmp_path / "dataset.json").read_bytes() == before
    must("build-lt", "toy", "--rho", 100, "--out", tmp_path, "--overwrite")
    assert json.loads((tmp_path / "dataset.json").read_text())["rho"] == 100


def test_toy_has_the_counts_means_and_deviation_of_the_paper(toy: Path) -> None:
    dataset = open_dataset(toy)
    assert dataset.class_counts.tolist() == [1000, 1000, 50, 50]
    points, labels = dataset.read("test")
    assert torch.bincount(labels).tolist() == [1000] * 4
    means = torch.stack([points[labels == c].mean(0) for c in range(4)])
    centres = torch.tensor([[0, 1], [1, 0], [-1, 0], [0, -1]], dtype=torch.float32)
    torch.testing.assert_close(means, centres, atol=0.05, rtol=0)
    deviation = torch.cat([points[labels == c] - means[c] for c in range(4)]).std(0)
    torch.testing.assert_close(deviation, torch.full((2,), 0.4), atol=0.02, rtol=0)


NO_CIFAR = "no cifar-100-python.tar.gz, cifar-100-python/ or train-*.parquet in cifar100 or ."


@pytest.mark.parametrize(
    ("flags", "code", "message"),
    [
        (["digit"], 2, "fix: give digits, or one of cifar10, "),
        (["digits", "--download"], 2, "no public copy to fetch (those with one: cifar10, cifar100, fashion-mnist)"),
        (["digits", "--image-size", "32"], 2, "the images of digits have one size"),
        (["digits", "--profile", "step"], 2, "--profile: digits has its own"),
        (["digits", "--pack", "8"], 2, "digits does not come as image files"),
        (["digits", "--list-dir", "."], 2, "digits does not come as image files"),
        (["image-folder"], 3, "--data-root FOLDER"),
        (["image-folder", "--data-root", "none"], 3, "cannot read none"),
        (["image-folder", "--profile", "paretto", "--rho", "2"], 2, "fix: give --profile pareto, or one of "),
        (["image-folder", "--profile", "pareto"], 2, "--profile: without --rho all images are kept"),
        (["places-lt", "--rho", "10"], 2, "places-lt is as long-tailed as its lists say"),
        (["places-lt", "--profile", "pareto"], 2, "places-lt has its own"),
        (["places-lt", "--subset-seed", "3"], 2, "places-lt has the images that its lists say"),
        (["places-lt", "--pack", "32", "--image-size", "16"], 2, "--pack says the size"),
        (["places-lt", "--pack", "4"], 2, "--pack 4 is no side of packed images"),
        (["places-lt", "--download"], 2, "places-lt has no public copy to fetch"),
        (["places-lt", "--data-root", "."], 3, "--list-dir DIR"),
        (["places-lt", "--list-dir", "."], 3, "places-lt needs the folder that holds the images"),
        (["digits", "--rho", "0.5"], 2, "--rho 0.5 is no imbalance factor"),
        (["digits", "--rho", "1000"], 3, "leaves no image in 3 classes"),
        (
            ["digits", "--val-per-class", "124"],
            3,
            "--val-per-class 124 leaves no image to train on in 1 class (images per class): 8 (174, 50 for the test)",
        ),
        (["digits", "--val-capped"], 2, "fix: give --rho and --val-per-class as well, or drop the flag"),
        (["toy", "--test-per-class", "5"], 2, "toy has its own test split"),
        (["cifar100"], 3, "--data-root FOLDER"),
        (["cifar100", "--data-root", "."], 3, NO_CIFAR),
    ],
)
def test_bad_flags_and_sources_are_refused_and_write_nothing(
    flags: list[str], code: int, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("CPMIX_DATA_DIR", raising=False)
    monkeypatch.chdir(tmp_path)
    refused(code, message, "build-lt", *flags)
    assert files(tmp_path) == []


def test_the_hugging_face_layout_of_cifar_is_read(tmp_path: Path) -> None:
    write_cifar(tmp_path)
    result = must("build-lt", "cifar10", "--rho", 4, "--data-root", tmp_path, "--out", tmp_path / "o")
    assert "ratio 4)" in result.stdout
    dataset = open_dataset(tmp_path / "o")
    assert dataset.class_counts.tolist() == [12, 10, 8, 7, 6, 5, 4, 4, 3, 3]
    chosen = pd.read_parquet(tmp_path / "o" / "train.parquet")
    table = pq.read_table(tmp_path / "train-00000-of-00001.parquet").to_pydict()
    images, _ = dataset.read("train")
    for image, position, label in zip(images, chosen["source_index"], chosen["label"], strict=True):
        assert table["label"][position] == label
        assert png(image) == table["img"][position]["bytes"]


def test_a_test_image_in_the_training_set_causes_a_warning(tmp_path: Path) -> None:
    write_cifar(tmp_path)
    train = pq.read_table(tmp_path / "train-00000-of-00001.parquet")
    pq.write_table(train.slice(0, 3), tmp_path / "test-00000-of-00001.parquet")
    result = must("build-lt", "cifar10", "--data-root", tmp_path, "--out", tmp_path / "o")
    assert "warning: 3 of 3 test images are identical to a training image" in result.stderr


def test_damaged_sources_are_refused(tmp_path: Path) -> None:
    write_cifar(tmp_path)
    path = tmp_path / "train-00000-of-00001.parquet"
    build = ["build-lt", "cifar10", "--data-root", tmp_path, "--out", tmp_path / "o"]
    table = pq.read_table(path)
    path.write_bytes(path.read_bytes()[:-5000])
    refused(3, f"{path} is not a readable Parquet file", *build)
    bad = pa.table({"img": [{"bytes": b"GIF", "path": None}] * 10, "label": list(range(10))})
    pq.write_table(bad, path)
    refused(3, f"image 0 of {path} cannot be decoded", *build)
    pq.write_table(bad.rename_columns(["image", "label"]), path)
    refused(3, "expected img, as struct<bytes: binary, path: string> or binary", *build)
    pq.write_table(table.filter(pc.not_equal(table["label"], 4)), path)
    refused(3, "classes without a training image: class_4", *build)
    assert not (tmp_path / "o").exists()


@pytest.mark.slow
@pytest.mark.cifar
@pytest.mark.skipif(not REAL.is_dir(), reason="no CIFAR-100 parquet files at hand")
def test_real_cifar100_lt_has_the_published_counts_and_images(tmp_path: Path) -> None:
    result = must("build-lt", "cifar100", "--rho", 200, "--data-root", REAL, "--out", tmp_path, "--json")
    numbers = result.json
    assert (numbers["num_train"], numbers["num_test"]) == (9502, 10000)
    assert (numbers["largest"], numbers["smallest"]) == (500, 2)
    assert numbers["groups"] == {"many": 30, "medium": 31, "few": 39}
    record = records.read_fields(tmp_path / "dataset.json")
    assert record["classes"][:3] == ["apple", "aquarium_fish", "baby"]
    chosen = pd.read_parquet(tmp_path / "train.parquet")
    source = pq.read_table(next(REAL.glob("train-*.parquet")), columns=["fine_label"])
    labels = source["fine_label"].to_numpy()
    apples = np.flatnonzero(labels == 0)
    assert chosen["source_index"][:6].tolist() == apples[[90, 254, 283, 445, 461, 15]].tolist()
