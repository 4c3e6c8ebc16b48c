"""CIFAR in the Parquet layout of Hugging Face: its shards, columns and encodings, and pyarrow without threads."""

import io
import json
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from helpers import fix_of, must, process, refused, run_commands
from PIL import Image

from cpmix_cli.data import cifar
from cpmix_cli.data.dataset import open_dataset
from cpmix_cli.recipe.loading import recipe_names

TRAIN, TEST = "train-00000-of-00001.parquet", "test-00000-of-00001.parquet"
STRUCT = pa.struct([("bytes", pa.binary()), ("path", pa.string())])


def encoded(seed: int) -> bytes:
    buffer = io.BytesIO()
    pixels = np.random.default_rng(seed).integers(0, 255, (32, 32, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


def shard(path: Path, rows: int = 20, first: int = 0, *, img: pa.DataType = STRUCT, row_group_size: int = 1000) -> Path:
    """Write a shard with images of the seeds `first`, `first` + 1, ... and the labels 0 to 9 in turn."""
    images = [encoded(first + i) for i in range(rows)]
    values = [{"bytes": image, "path": None} for image in images] if pa.types.is_struct(img) else images
    path.parent.mkdir(parents=True, exist_ok=True)
    table = pa.table({"img": pa.array(values, img), "label": [i % 10 for i in range(rows)]})
    pq.write_table(table, path, row_group_size=row_group_size)
    return path


def build(root: Path) -> Sequence[object]:
    return "build-lt", "cifar10", "--rho", 1, "--data-root", root, "--out", root.parent / "out"


def built(root: Path) -> list[bytes]:
    """Build the data set and return the pixels of its training images in the order of the source."""
    result = must(*build(root))
    assert f"warning: {root}" in result.stderr or "a part of cifar10" in result.stderr
    dataset = open_dataset(root.parent / "out")
    images, _ = dataset.read("train")
    order = np.argsort(dataset.samples("train")["source_index"])
    return [images[int(i)].numpy().tobytes() for i in order]


def pixels(*seeds: int) -> list[bytes]:
    return [np.asarray(Image.open(io.BytesIO(encoded(seed)))).tobytes() for seed in seeds]


def test_the_default_recipes_are_there() -> None:
    assert [published.recipe for published in (cifar.CIFAR10, cifar.CIFAR100)] == [
        *("cifar10-lt/cpmix", "cifar100-lt/cpmix-tuned")
    ]
    assert {cifar.CIFAR10.recipe, cifar.CIFAR100.recipe} <= set(recipe_names())


# -- columns and encodings ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "img",
    [
        STRUCT,
        pa.struct([("path", pa.string()), ("bytes", pa.large_binary())]),
        pa.struct([("bytes", pa.binary())]),
        pa.binary(),
        pa.large_binary(),
        pa.binary_view(),
        pa.dictionary(pa.int32(), pa.binary()),
    ],
    ids=str,
)
@pytest.mark.parametrize("row_group_size", [7, 1000])
def test_dictionaries_of_any_number_of_row_groups_are_read_in_order(
    tmp_path: Path, img: pa.DataType, row_group_size: int
) -> None:
    path = shard(tmp_path / "in" / TRAIN, img=img, row_group_size=row_group_size)
    shard(tmp_path / "in" / TEST, 10, 9000, img=img)
    assert "RLE_DICTIONARY" in pq.read_metadata(path).row_group(0).column(0).encodings
    assert built(tmp_path / "in") == pixels(*range(20))


@pytest.mark.parametrize(
    ("img", "kind"),
    [
        (pa.array(["x"] * 20), "string"),
        (pa.array([{"path": "x"}] * 20), "struct<path: string>"),
        (pa.array([{"bytes": "x", "path": "x"}] * 20), "struct<bytes: string, path: string>"),
        (pa.array([[b"x"]] * 20), "list<element: binary>"),
    ],
)
def test_an_image_column_of_another_type_is_refused_with_both_types(tmp_path: Path, img: pa.Array, kind: str) -> None:
    pq.write_table(pa.table({"img": img, "label": [i % 10 for i in range(20)]}), tmp_path / TRAIN)
    shard(tmp_path / TEST)
    message = f"{tmp_path / TRAIN} has the column img as {kind}; expected img, as struct<bytes: binary, path: string>"
    refused(3, message, *build(tmp_path))


@pytest.mark.parametrize(("label", "kind"), [("cat", "string"), (1.0, "double"), (True, "bool")])
def test_labels_of_another_type_are_refused_with_both_types(tmp_path: Path, label: object, kind: str) -> None:
    pq.write_table(pa.table({"img": [encoded(0)] * 20, "label": [label] * 20}), tmp_path / TRAIN)
    shard(tmp_path / TEST)
    refused(3, f"{tmp_path / TRAIN} has the column label as {kind}; expected int64", *build(tmp_path))


@pytest.mark.parametrize(
    ("first", "step", "message"),
    [
        (0, 11, "labels 0 to 10; expected 0 to 9"),
        (-1, 10, "labels -1 to 8; expected 0 to 9"),
        (0, 9, "9 classes; cifar10 has 10"),
    ],
)
def test_labels_out_of_range_are_told_by_their_range(tmp_path: Path, first: int, step: int, message: str) -> None:
    labels = [first + i % step for i in range(22)]
    pq.write_table(pa.table({"img": [encoded(0)] * 22, "label": labels}), tmp_path / TRAIN)
    shard(tmp_path / TEST, 22)
    refused(3, f"{tmp_path / TRAIN} has {message}", *build(tmp_path))


def name_classes(path: Path, names: Sequence[object]) -> None:
    """Add Hugging Face's metadata to a shard."""
    features = {"label": {"names": names, "_type": "ClassLabel"}}
    metadata = {"huggingface": json.dumps({"info": {"features": features}})}
    pq.write_table(pq.read_table(path).replace_schema_metadata(metadata), path)


@pytest.mark.parametrize(
    ("names", "message"),
    [
        ([*"abcdefghi", "x\ud800"], "unreadable Hugging Face metadata: 'utf-8' codec can't encode"),
        ([*"abcdefghi", "a"], "unreadable Hugging Face metadata: a class name occurs twice"),
        ([*"abcdefghi"], "has 9 classes; cifar10 has 10"),
    ],
)
def test_class_names_that_cannot_be_are_refused(tmp_path: Path, names: list[str], message: str) -> None:
    name_classes(shard(tmp_path / TRAIN), names)
    shard(tmp_path / TEST)
    refused(3, [str(tmp_path / TRAIN), message], *build(tmp_path))


def test_shards_that_number_the_classes_in_another_order_are_refused(tmp_path: Path) -> None:
    name_classes(shard(tmp_path / TRAIN), [*"abcdefghij"])
    name_classes(shard(tmp_path / TEST), [*"bacdefghij"])
    refused(3, f"{tmp_path / TEST} names other classes than the shards before it, or in", *build(tmp_path))


# -- shards ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("folder", ["", "data", "plain_text", "cifar10", "cifar10/plain_text"])
@pytest.mark.parametrize("ending", ["", "-0123456789abcdef"])
def test_the_folders_and_names_of_hugging_face_are_found(tmp_path: Path, folder: str, ending: str) -> None:
    place = tmp_path / "in" / folder
    shard(place / f"train-00001-of-00002{ending}.parquet", first=20)
    shard(place / f"train-00000-of-00002{ending}.parquet")
    shard(place / TEST, first=9000)
    assert built(tmp_path / "in") == pixels(*range(40))


def test_the_files_of_converted_sets_are_shards_by_their_numbers(tmp_path: Path) -> None:
    """Hugging Face's branch refs/convert/parquet has plain_text/train/0000.parquet."""
    place = tmp_path / "in" / "plain_text"
    shard(place / "train" / "0001.parquet", first=20)
    shard(place / "test" / "0000.parquet", first=9000)
    names = "train-00000-of-00002.parquet"
    refused(3, f"{place} lacks 1 shard of train: {names}", *build(tmp_path / "in"))
    shard(place / "train" / "0000.parquet")
    assert built(tmp_path / "in") == pixels(*range(40))


@pytest.mark.parametrize("name", ["train.parquet", "cifar10-train.parquet", "cifar10-train-00000-of-00001.parquet"])
def test_the_only_file_of_a_split_is_a_shard_when_it_is_renamed_as_advised(tmp_path: Path, name: str) -> None:
    shard(tmp_path / "in" / name)
    shard(tmp_path / "in" / TEST, first=9000)
    result = refused(3, f"{name} is no shard by its name", *build(tmp_path / "in"))
    run_commands(fix_of(result).partition("rename it: ")[2])
    assert built(tmp_path / "in") == pixels(*range(20))


def test_a_link_to_the_same_folder_is_no_second_set(tmp_path: Path) -> None:
    shard(tmp_path / "in" / TRAIN)
    shard(tmp_path / "in" / TEST, first=9000)
    (tmp_path / "in" / "data").symlink_to(".")
    assert built(tmp_path / "in") == pixels(*range(20))


def cached(snapshot: Path, name: str, blob: str, first: int) -> None:
    """A shard of Hugging Face's cache: a link to a blob of the data set's folder, which is named after its content."""
    place = snapshot / "plain_text" / name
    place.parent.mkdir(parents=True, exist_ok=True)
    shard(snapshot.parents[1] / "blobs" / blob, first=first)
    place.symlink_to(f"../../../blobs/{blob}")


def test_the_cache_of_hugging_face_is_read_at_each_of_its_folders(tmp_path: Path) -> None:
    hub = tmp_path / "hub"
    snapshots = hub / "datasets--uoft-cs--cifar10" / "snapshots"
    for revision in ("0123", "4567"):  # of the second one, only the README differs
        cached(snapshots / revision, TRAIN, "aaaa", 0)
        cached(snapshots / revision, TEST, "bbbb", 9000)
    for place in (hub, snapshots.parent, snapshots / "4567", snapshots / "0123" / "plain_text"):
        assert "a part of cifar10" in must(*build(place), "--out", tmp_path / "out").stderr
    cached(snapshots / "89ab", TRAIN, "cccc", 100)
    cached(snapshots / "89ab", TEST, "bbbb", 9000)
    message = f"*train*.parquet in {snapshots}/0123/plain_text and in {snapshots}/89ab/plain_text"
    refused(3, [message, "--data-root FOLDER"], *build(hub))
    must(*build(snapshots / "89ab" / "plain_text"), "--out", tmp_path / "other")
    (snapshots.parent / "blobs" / "cccc").unlink()
    refused(3, f"{snapshots}/89ab/plain_text/{TRAIN}", *build(snapshots / "89ab"))


def test_a_missing_shard_is_named(tmp_path: Path) -> None:
    shard(tmp_path / "train-00000-of-00003.parquet")
    shard(tmp_path / TEST)
    names = "train-00001-of-00003.parquet, train-00002-of-00003.parquet"
    refused(3, f"{tmp_path} lacks 2 shards of train: {names}", *build(tmp_path))
    shard(tmp_path / "train-00001-of-00003.parquet", first=20)
    shard(tmp_path / "train-00002-of-00003.parquet", first=40)
    (tmp_path / TEST).rename(tmp_path / "test-00001-of-00002.parquet")
    refused(3, f"{tmp_path} lacks 1 shard of test: test-00000-of-00002.parquet", *build(tmp_path))


@pytest.mark.parametrize(
    ("copy", "message"),
    [
        ("train-00000-of-00001 (1).parquet", "train-00000-of-00001 (1).parquet is no shard by its name"),
        ("Copy of train-00000-of-00001.parquet", "Copy of train-00000-of-00001.parquet is no shard by its name"),
        ("train-00000-of-00001-copy.parquet", "train-00000-of-00001-copy.parquet is no shard by its name"),
        ("train-00001-of-00001.parquet", "train-00001-of-00001.parquet is no shard by its name"),
        ("train.parquet", "train.parquet is no shard by its name"),
        ("train-00000-of-00001-0123456789abcdef.parquet", "are the same shard of train"),
        ("train-00001-of-00002.parquet", "are of different sets of shards"),
        ("data/train-00000-of-00001.parquet", "cifar10 lies twice"),
        ("cifar10/train-00000-of-00001.parquet", "cifar10 lies twice"),
    ],
)
def test_a_second_copy_of_a_shard_is_refused_and_named(tmp_path: Path, copy: str, message: str) -> None:
    content = shard(tmp_path / TRAIN).read_bytes()
    shard(tmp_path / TEST)
    (tmp_path / copy).parent.mkdir(exist_ok=True)
    (tmp_path / copy).write_bytes(content)
    result = refused(3, [message, str((tmp_path / copy).parent)], *build(tmp_path))
    assert not (tmp_path.parent / "out").exists()
    assert f" {TRAIN}" not in fix_of(result)  # to rename it would replace the other


def test_one_shard_under_two_numbers_is_refused(tmp_path: Path) -> None:
    first, second = (tmp_path / f"train-0000{i}-of-00002.parquet" for i in range(2))
    second.write_bytes(shard(first).read_bytes())
    shard(tmp_path / TEST)
    refused(3, f"{second} has the content of {first.name}: a shard is twice there", *build(tmp_path))


def test_fewer_images_than_published_cause_a_warning_and_more_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shard(tmp_path / "in" / TRAIN)
    shard(tmp_path / "in" / TEST, 10, 9000)
    warning = "in has 20 train and 10 test images, a part of cifar10, which has 50,000 and 10,000"
    assert warning in must(*build(tmp_path / "in")).stderr
    monkeypatch.setattr(cifar, "_NUM_IMAGES", {"train": 20, "test": 10})
    assert "a part of" not in must(*build(tmp_path / "in"), "--overwrite").stderr
    monkeypatch.setattr(cifar, "_NUM_IMAGES", {"train": 20, "test": 9})
    message = f"{tmp_path / 'in'} has 10 test images; cifar10 has 9"
    refused(3, message, *build(tmp_path / "in"), "--overwrite")


def test_an_image_that_cannot_be_decoded_is_named_by_its_shard(tmp_path: Path) -> None:
    shard(tmp_path / "train-00000-of-00002.parquet")
    second = shard(tmp_path / "train-00001-of-00002.parquet", first=20)
    table = pq.read_table(second)
    images = [*table["img"].to_pylist()[:3], {"bytes": b"GIF", "path": None}, *table["img"].to_pylist()[4:]]
    pq.write_table(table.set_column(0, "img", pa.array(images, STRUCT)), second)
    shard(tmp_path / TEST, first=9000)
    refused(3, f"image 3 of {second} cannot be decoded: not an image", *build(tmp_path))


def test_a_git_lfs_pointer_is_called_one(tmp_path: Path) -> None:
    shard(tmp_path / TEST)
    pointer = b"version https://git-lfs.github.com/spec/v1\noid sha256:" + b"0" * 64 + b"\nsize 119705255\n"
    for name in (TRAIN, cifar.CIFAR10.archive):
        (tmp_path / name).write_bytes(pointer)
        result = refused(3, f"{tmp_path / name} is a Git LFS pointer, not the file itself", *build(tmp_path))
        assert "  fix: run git lfs pull in its repository" in result.stderr


# -- threads -----------------------------------------------------------------------------------------------------------


def damaged(path: Path) -> None:
    data, page = bytearray(path.read_bytes()), pq.read_metadata(path).row_group(0).column(0).data_page_offset
    data[page : page + 16] = b"\xff" * 16
    path.write_bytes(data)


def undamaged(path: Path) -> None:
    pass


READ_BOTH = """
import os, sys
from pathlib import Path
import numpy, pandas, pyarrow.parquet
from cpmix_cli.artifacts.tables import read_table
from cpmix_cli.data import cifar
from cpmix_cli.runtime.errors import InputError
before = len(os.listdir("/proc/self/task"))
outcomes = []
for read in (lambda: cifar.read([Path(sys.argv[1])], cifar.CIFAR10), lambda: read_table(Path(sys.argv[2]))):
    try:
        read()
        outcomes.append("read")
    except InputError:
        outcomes.append("refused")
print(*outcomes, len(os.listdir("/proc/self/task")) - before)
"""


@pytest.mark.parametrize(("change", "outcome"), [(undamaged, "read read 0"), (damaged, "refused refused 0")])
def test_reading_parquet_starts_no_thread_that_could_abort_the_exit(
    tmp_path: Path, change: Callable[[Path], None], outcome: str
) -> None:
    """A thread of pyarrow that outlives an error aborts the process (signal 6) if it frees the file at exit."""
    train = shard(tmp_path / TRAIN, 50, row_group_size=10)
    shard(tmp_path / TEST, 10, 9000)
    table = tmp_path / "table.parquet"
    pq.write_table(pa.table({name: np.random.default_rng(0).random(5000) for name in "abcdefgh"}), table)
    change(train)
    change(table)
    result = process(tmp_path, table, code=READ_BOTH, env={"OMP_NUM_THREADS": "4"})
    assert (result.code, result.stdout) == (0, f"{outcome}\n"), result.stderr
