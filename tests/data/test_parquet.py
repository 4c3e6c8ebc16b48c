"""build-lt parquet: image data sets of Hugging Face, with and without its metadata."""

import io
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from helpers import cpmix, ended, fix_of, must, process, refused
from PIL import Image

from cpmix_cli.data.dataset import Dataset, open_dataset
from cpmix_cli.data.decoding import square
from cpmix_cli.data.parquet import split_of
from cpmix_cli.data.parquet_rows import open_picture

STRUCT = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
NAMES = ["cat", "bobcat", "lynx"]


def encoded(seed: int, form: str = "PNG", mode: str = "RGB", **options: Any) -> bytes:
    """An image file of 10 x 12 pixels."""
    shape = (12, 10, {"L": 1, "RGB": 3, "RGBA": 4, "CMYK": 4}.get(mode, 1))
    pixels = np.random.default_rng(seed).integers(0, 255, shape, dtype=np.uint8)
    image = Image.fromarray(pixels.squeeze() if shape[2] == 1 else pixels, None if mode in ("P", "I;16") else mode)
    image = image.convert("P") if mode == "P" else image
    if mode == "I;16":
        image = Image.fromarray(pixels[..., 0].astype(np.uint16) * 257)
    buffer = io.BytesIO()
    image.save(buffer, form, **options)
    return buffer.getvalue()


def metadata(names: Sequence[str] = NAMES, column: str = "label") -> dict[str, str]:
    features = {"image": {"_type": "Image"}, column: {"names": list(names), "_type": "ClassLabel"}}
    return {"huggingface": json.dumps({"info": {"features": features}})}


def write(
    path: Path,
    labels: Sequence[Any],
    *,
    first: int = 0,
    images: Sequence[Any] | None = None,
    kind: pa.DataType = STRUCT,
    named: dict[str, str] | None = None,
    rows: int = 4,
    **columns: Any,
) -> Path:
    """Write a Parquet file of images with these labels, in row groups of `rows`."""
    content = [encoded(first + i) for i in range(len(labels))] if images is None else images
    values = [{"bytes": one, "path": f"{i}.jpg"} for i, one in enumerate(content)] if kind == STRUCT else content
    table = pa.table({"image": pa.array(values, kind), "label": labels, **columns})
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(table.replace_schema_metadata(named), path, row_group_size=rows)
    return path


def hub(root: Path, *, named: dict[str, str] | None = None) -> Path:
    """A data set with three shards of train, and one of validation and test each."""
    for i in range(3):
        write(root / "data" / f"train-{i:05}-of-00003.parquet", [0, 1, 0, 2, 0, 1], first=10 * i, named=named)
    write(root / "data" / "validation-00000-of-00001.parquet", [2, 1, 0], first=100, named=named)
    write(root / "data" / "test-00000-of-00001.parquet", [0, 1, 2], first=200, named=named)
    return root


def command(root: Path, *flags: object) -> tuple[object, ...]:
    return ("build-lt", "parquet", "--data-root", root, "--image-size", 8, "--out", root.parent / "out", *flags)


def built(root: Path, *flags: object) -> Dataset:
    must(*command(root, *flags))
    return open_dataset(root.parent / "out")


def counts(dataset: Dataset) -> dict[str, list[int]]:
    return {s: np.bincount(dataset.labels(s), minlength=dataset.num_classes).tolist() for s in dataset.splits}


# -- splits, shards and names ------------------------------------------------------------------------------------------


def test_a_data_set_has_its_names_and_splits(tmp_path: Path) -> None:
    root = hub(tmp_path / "cats", named=metadata())
    result = must(*command(root))
    assert result.stderr.splitlines()[:1] == [
        f"{root}: 5 files, images of the column 'image', labels of 'label': train 18, val 3, test 3"
    ]
    dataset = open_dataset(tmp_path / "out")
    assert dataset.class_names == NAMES
    assert counts(dataset) == {"train": [9, 6, 3], "val": [1, 1, 1], "test": [1, 1, 1]}
    assert dataset.record.recipe == "image-folder/cpmix"
    listed = dataset.samples("train")["path"].tolist()
    assert listed[:2] == [f"data/train-00000-of-00003.parquet/image/{i}" for i in range(2)]
    images = dataset.read("train")[0].numpy()
    expected = square(Image.open(io.BytesIO(encoded(10 + 3))), 8)  # row 3 of shard 1
    assert np.array_equal(images[6 + 3], np.asarray(expected))
    assert "up to date" in must(*command(root)).stdout


def test_without_metadata_the_labels_are_the_names(tmp_path: Path) -> None:
    assert built(hub(tmp_path / "plain")).class_names == ["0", "1", "2"]
    write(tmp_path / "text" / "train.parquet", ["dog", "ant"] * 3)
    must(*command(tmp_path / "text", "--overwrite"))
    assert open_dataset(tmp_path / "out").class_names == ["ant", "dog"]
    write(tmp_path / "odd" / "train.parquet", [7, 30] * 3)
    must(*command(tmp_path / "odd", "--overwrite"))
    assert open_dataset(tmp_path / "out").class_names == ["7", "30"]


README = """---
license: mit
dataset_info:
  features:
  - name: image
    dtype: image
  - name: label
    dtype:
      class_label:
        names:
          '0': cat
          '1': 'o''cat'
          '2': "b: \\"x\\""
  splits:
  - name: train
    num_bytes: 123.0
    num_examples: 20
  - name: test
    num_bytes: 123
    num_examples: 3
---
# Cats
"""


def test_the_readme_gives_names_and_counts(tmp_path: Path) -> None:
    root = hub(tmp_path / "cats")
    (root / "README.md").write_text(README)
    result = must(*command(root))
    assert open_dataset(tmp_path / "out").class_names == ["cat", "o'cat", 'b: "x"']
    assert f"warning: {root} has 18 train images; its README.md says 20\n" in result.stderr
    assert "test images; its README" not in result.stderr


@pytest.mark.parametrize(
    ("path", "split"),
    [
        ("data/train-00000-of-00002.parquet", "train"),
        ("plain_text/validation-00000-of-00001.parquet", "val"),
        ("default/valid/0000.parquet", "val"),
        ("my_dev.parquet", "val"),
        ("testing/x.parquet", "test"),
        ("evaluation.parquet", "test"),
        ("eval-1.parquet", "test"),
        ("test_config/training.parquet", "train"),
        ("contest/latest.parquet", "train"),
    ],
)
def test_split_words_are_whole_words_of_files_and_folders(path: str, split: str) -> None:
    assert split_of(Path(path)) == split


def test_missing_shards_are_named(tmp_path: Path) -> None:
    root = hub(tmp_path / "cats")
    (root / "data" / "train-00001-of-00003.parquet").unlink()
    message = f"{root}/data lacks 1 shard of train: train-00001-of-00003.parquet\n"
    refused(3, message, *command(root))
    (root / "data" / "train-00002-of-00003.parquet").rename(root / "data" / "train-00001-of-00002.parquet")
    refused(3, "are of different sets of shards of train", *command(root))
    write(tmp_path / "n" / "train" / "0001.parquet", [0, 1])
    refused(3, "lacks 1 shard of train: 0000.parquet", *command(tmp_path / "n"))


def test_two_configurations_are_refused_and_one_is_taken(tmp_path: Path) -> None:
    for name in ("large", "small"):
        write(tmp_path / "set" / name / "train-00000-of-00001.parquet", [0, 1] * 3)
    result = refused(3, "has 2 sets of the same splits", *command(tmp_path / "set"))
    assert fix_of(result) == f"give one of them: --data-root {tmp_path}/set/large"
    must("build-lt", "parquet", "--data-root", tmp_path / "set" / "large", "--out", tmp_path / "out")


def test_validation_is_the_test_split_where_there_is_none(tmp_path: Path) -> None:
    root = hub(tmp_path / "cats")
    (root / "data" / "test-00000-of-00001.parquet").unlink()
    assert "the 3 images of the validation split are the test split" in must(*command(root)).stderr
    held = built(root, "--test-per-class", 1, "--overwrite")
    assert counts(held) == {"train": [8, 5, 2], "val": [1, 1, 1], "test": [1, 1, 1]}


def test_flags_of_image_folder_work(tmp_path: Path) -> None:
    root = tmp_path / "one"
    write(root / "train.parquet", [0] * 12 + [1] * 9 + [2] * 6)
    flags = ("--rho", 4, "--profile", "ranked", "--test-per-class", 1, "--val-per-class", 1, "--pack", 8)
    words = ("build-lt", "parquet", "--data-root", root, "--out", tmp_path / "out", *flags)
    must(*words)
    dataset = open_dataset(tmp_path / "out")
    assert counts(dataset) == {"train": [10, 5, 2], "val": [1, 1, 1], "test": [1, 1, 1]}
    assert dataset.storage == "shards"
    (tmp_path / "out" / "train-00000.shard").unlink()
    assert "packing 1 missing shard of train again" in must(*words).stderr
    must(*words, "--verify")


# -- columns and encodings ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "kind",
    [
        pa.struct([("path", pa.string()), ("bytes", pa.binary())]),
        pa.struct([("bytes", pa.large_binary())]),
        pa.binary(),
        pa.large_binary(),
        pa.dictionary(pa.int32(), pa.binary()),
        pa.struct([("bytes", pa.dictionary(pa.int32(), pa.binary()))]),
    ],
    ids=str,
)
def test_every_form_of_the_image_column_gives_the_same_data_set(tmp_path: Path, kind: pa.DataType) -> None:
    """Dictionaries cross row groups, which pyarrow cannot join."""
    images = [encoded(i) for i in (0, 1, 2, 3, 4, 0, 6, 7, 8, 9)]
    labels = [0, 1] * 5
    write(tmp_path / "a" / "train.parquet", labels, images=images)
    expected = built(tmp_path / "a").fingerprint
    values = [{"bytes": image} for image in images] if pa.types.is_struct(kind) else images
    if pa.types.is_struct(kind) and pa.types.is_dictionary(kind.field("bytes").type):
        column = pa.StructArray.from_arrays([pa.array(images).dictionary_encode()], names=["bytes"])
    else:
        column = pa.array(images).dictionary_encode() if pa.types.is_dictionary(kind) else pa.array(values, kind)
    (tmp_path / "b").mkdir()
    table = pa.table({"label": labels, "image": column})
    pq.write_table(table, tmp_path / "b" / "train.parquet", row_group_size=3)
    assert built(tmp_path / "b", "--overwrite").fingerprint == expected


@pytest.mark.parametrize(
    ("form", "mode"),
    [("JPEG", "RGB"), ("JPEG", "L"), ("JPEG", "CMYK"), ("PNG", "P"), ("PNG", "RGBA"), ("PNG", "I;16"), ("WEBP", "RGB"),
     ("TIFF", "RGB")],
)  # fmt: skip
def test_images_are_decoded_by_content_in_every_mode(tmp_path: Path, form: str, mode: str) -> None:
    write(tmp_path / "s" / "train.parquet", [0, 1] * 3, images=[encoded(i, form, mode) for i in range(6)])
    assert built(tmp_path / "s").shape == [8, 8, 3]


def test_exif_rotation_is_followed(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 3
    turned = encoded(1, exif=exif)
    write(tmp_path / "s" / "train.parquet", [0, 1] * 2, images=[encoded(1), turned, encoded(2), encoded(3)])
    dataset = built(tmp_path / "s", "--test-per-class", 1)
    images = {
        Path(path).name: image
        for split in ("train", "test")
        for path, image in zip(dataset.samples(split)["path"], dataset.read(split)[0].numpy(), strict=True)
    }
    upright = Image.open(io.BytesIO(encoded(1))).rotate(180)
    assert np.array_equal(images["1"], np.asarray(square(upright, 8)))


def test_null_and_broken_images_are_named_by_their_rows(tmp_path: Path) -> None:
    file = tmp_path / "s" / "train-00000-of-00001.parquet"
    broken = {3: None, 5: b"", 6: b"no image"}
    write(file, [0, 1] * 5, images=[broken.get(i, encoded(i)) for i in range(10)])
    result = refused(3, "3 files cannot be read as an image:\n", *command(tmp_path / "s"))
    assert f"    {file}/image/3: no image: its bytes are null, as of files that were not embedded\n" in result.stderr
    result = must(*command(tmp_path / "s", "--skip-unreadable"))
    for row, why in ((3, "no image: its bytes are null"), (5, "empty"), (6, "not an image")):
        assert f"{file.name}/image/{row}: {why}" in result.stderr
    assert f"{tmp_path / 's'}: 3 files left out, cannot be read: " in result.stderr
    assert sum(map(sum, counts(open_dataset(tmp_path / "out")).values())) == 7


def test_columns_are_chosen_with_flags(tmp_path: Path) -> None:
    mask = pa.array([{"bytes": encoded(50 + i), "path": None} for i in range(6)], STRUCT)
    write(tmp_path / "s" / "train.parquet", [0, 1] * 3, mask=mask, fine_label=[2, 3] * 3)
    result = refused(2, "has 2 columns of images: image, mask\n", *command(tmp_path / "s"))
    assert fix_of(result) == "give --image-column image or give --image-column mask"
    chosen = ("--image-column", "mask")
    result = refused(2, "has 2 columns of labels: label, fine_label\n", *command(tmp_path / "s", *chosen))
    assert fix_of(result) == "give --label-column label or give --label-column fine_label"
    dataset = built(tmp_path / "s", *chosen, "--label-column", "fine_label")
    assert dataset.class_names == ["2", "3"]
    assert dataset.samples("train")["path"][0].startswith("train.parquet/mask/")
    (tmp_path / "out" / "train.safetensors").write_bytes(b"x")
    fix = fix_of(refused(3, "damaged", *command(tmp_path / "s", *chosen, "--label-column", "fine_label")))
    assert "--image-column mask --label-column fine_label" in fix
    refused(2, "--label-column x: ", *command(tmp_path / "s", "--label-column", "x", *chosen))


@pytest.mark.parametrize(
    ("labels", "kind", "message"),
    [
        ([[0], [1]], STRUCT, "has the column label as list<element: int64>: several labels per image"),
        ([0.5, 1.5], STRUCT, "has no column of labels by its name; its columns are image struct<"),
        ([0, 1], pa.string(), "has no column of encoded images"),
        ([0, -1], STRUCT, "1 of 2 rows have no label, the first is row 1 of "),
        ([0, None], STRUCT, "1 of 2 rows have no label, the first is row 1 of "),
        ([0, 0], STRUCT, "has one class, '0'; a classifier needs two"),
        ([], STRUCT, ""),
    ],
)
def test_columns_that_do_not_fit_are_refused(tmp_path: Path, labels: Any, kind: pa.DataType, message: str) -> None:
    images = ["a.jpg", "b.jpg"] if kind == pa.string() else None
    write(tmp_path / "s" / "train.parquet", labels, kind=kind, images=images)
    result = refused(3, message, *command(tmp_path / "s"))
    assert "fix: " in result.stderr
    assert not (tmp_path / "out").exists()


def test_files_that_images_are_in_are_no_images(tmp_path: Path) -> None:
    write(tmp_path / "s" / "train.parquet", [0, 1], kind=pa.string(), images=["a.jpg", "b.jpg"])
    said = "has the column image as string: names of files, which are not in it"
    refused(3, said, *command(tmp_path / "s", "--image-column", "image"))


def test_a_test_split_without_labels_is_left_out_alone(tmp_path: Path) -> None:
    root = hub(tmp_path / "cats", named=metadata())
    write(root / "data" / "test-00000-of-00001.parquet", [-1, -1, -1], first=200, named=metadata())
    result = must(*command(root))
    assert "warning: the test split is left out: 3 of 3 rows have no label, the first is row 0 of " in result.stderr
    assert counts(open_dataset(tmp_path / "out")) == {"train": [9, 6, 3], "test": [1, 1, 1]}


def test_labels_beyond_the_names_and_other_names_are_refused(tmp_path: Path) -> None:
    write(tmp_path / "s" / "train-00000-of-00002.parquet", [0, 1, 3], named=metadata())
    write(tmp_path / "s" / "train-00001-of-00002.parquet", [0, 1, 2], named=metadata())
    refused(3, "has the label 3 in row 2; 3 classes are named, 0 to 2", *command(tmp_path / "s"))
    write(tmp_path / "s" / "train-00000-of-00002.parquet", [0, 1, 2], named=metadata(NAMES[::-1]))
    refused(3, "names other classes than the shards before it", *command(tmp_path / "s"))
    write(tmp_path / "s" / "train-00000-of-00002.parquet", [0, 1, 2], named={"huggingface": "{"})
    refused(3, "has unreadable Hugging Face metadata", *command(tmp_path / "s"))


def test_lfs_pointers_and_folders_without_files_are_told(tmp_path: Path) -> None:
    root = hub(tmp_path / "cats")
    pointer = root / "data" / "train-00002-of-00003.parquet"
    pointer.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n")
    result = refused(3, f"{pointer} is a Git LFS pointer, not the file itself", *command(root))
    assert fix_of(result) == "run git lfs pull in its repository"
    (tmp_path / "empty").mkdir()
    refused(3, f"no .parquet file in {tmp_path}/empty or below", *command(tmp_path / "empty"))
    refused(2, "--pack 0: images of Parquet files are read in their order", "build-lt", "parquet", "--pack", 0)
    refused(2, "--label-column: image-folder has no columns", "build-lt", "image-folder", "--label-column", "x")


# -- damage and memory -------------------------------------------------------------------------------------------------


def test_other_files_are_another_data_set(tmp_path: Path) -> None:
    root = hub(tmp_path / "cats")
    must(*command(root))
    write(root / "data" / "train-00002-of-00003.parquet", [0, 1, 0, 2, 0, 1], first=99)
    refused(
        4,
        "holds another data set:\n    0: 3 changed images\n    1: 2 changed images\n    2: 1 changed image\n",
        *command(root),
    )


def test_damaged_files_end_with_an_input_error(tmp_path: Path, generator: torch.Generator) -> None:
    """Whatever a damaged file makes pyarrow raise; helpers.cpmix() raises what is no error of cpmix."""
    file = write(tmp_path / "s" / "train.parquet", [0, 1] * 10, named=metadata(NAMES[:2]))
    whole, codes = file.read_bytes(), []
    places = torch.randint(len(whole), (20,), generator=generator).tolist()
    places += [len(whole) - i for i in torch.randint(1, 900, (20,), generator=generator).tolist()]
    for at in places:
        for damaged in (whole[:at] + bytes([whole[at] ^ 0x55]) + whole[at + 1 :], whole[:at]):
            file.write_bytes(damaged)
            codes.append(cpmix(*command(tmp_path / "s", "--overwrite")).code)
    assert set(codes) <= {0, 2, 3}
    assert set(codes[1::2]) == {3}


@pytest.mark.slow
@pytest.mark.long
def test_a_row_group_larger_than_the_memory_is_read(tmp_path: Path) -> None:
    """600 MB of images in one row group, and 250 MB of memory more than cpmix takes for a small set."""
    file = tmp_path / "s" / "train.parquet"
    file.parent.mkdir()
    noise = np.random.default_rng(0)
    images = [encoded(i) + noise.bytes(3_000_000) for i in range(50)]  # PNG readers stop at the end of the image
    schema = pa.schema({"image": pa.binary(), "label": pa.int64()})
    with pq.ParquetWriter(file, schema, use_dictionary=False, compression="none") as writer:
        rows = 200
        column = pa.chunked_array(
            [pa.array([images[i % 50] for i in range(k, k + 50)], pa.binary()) for k in range(0, rows, 50)]
        )
        writer.write_table(
            pa.table({"image": column, "label": [i % 2 for i in range(rows)]}, schema), row_group_size=rows
        )
    del images, column
    assert pq.ParquetFile(file).metadata.row_group(0).total_byte_size > 500_000_000
    peak = "import resource, sys; from cpmix_cli.__main__ import main\ntry: main()\nexcept SystemExit: pass\n"
    peak += "print('PEAK', resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)"
    small = write(tmp_path / "small" / "train.parquet", [0, 1] * 100).parent
    peaks = []
    for root in (small, file.parent):
        words = list(map(str, ("cpmix", *command(root, "--overwrite"))))
        result = process(code=f"import sys; sys.argv = {words!r}\n{peak}")
        ended(result, 0)
        peaks.append(int(result.stdout.split("PEAK")[1]) * 1024)
    assert peaks[1] - peaks[0] < 250_000_000, peaks


def test_rows_are_read_in_any_order_and_once_in_their_own(tmp_path: Path) -> None:
    file = write(tmp_path / "train.parquet", list(range(30)), rows=7)
    for row in [*range(30), 29, 3, 14, 0, 8, 8, 28]:
        with open_picture(file / "image" / str(row)) as opened:
            assert opened.read() == encoded(row), row
    with pytest.raises(ValueError, match="the file has 30 rows"):
        open_picture(file / "image" / "30")
