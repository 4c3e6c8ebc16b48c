"""Publishing and reading: whole files, stable bytes, damage noticed."""

import errno
import json
import os
import re
import shutil
import socket
import subprocess
import threading
from contextlib import suppress
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from helpers import file_limit
from pydantic import ValidationError

from cpmix_cli.artifacts import files, records, tables
from cpmix_cli.artifacts.seals import read_header, read_sealed
from cpmix_cli.artifacts.tensors import publish_tensors, read_tensors, sealed_metadata
from cpmix_cli.runtime.errors import EnvironmentFault, InputError


def test_equal_tensors_give_equal_bytes_whatever_their_memory_order(tmp_path: Path) -> None:
    x = torch.arange(24.0).view(1, 2, 3, 4)
    first = publish_tensors(tmp_path / "a", {"x": x, "y": x[0, 0].clone()}, {"b": 1, "a": [2]})
    last = x.contiguous(memory_format=torch.channels_last)
    second = publish_tensors(tmp_path / "b", {"y": x[0, 0].clone(), "x": last}, {"a": [2], "b": 1})
    assert first == second
    tensors, metadata = read_tensors(tmp_path / "a", first)
    assert tensors["x"].equal(x)
    assert metadata == {"a": [2], "b": 1}


def test_a_sealed_file_is_checked_without_making_its_tensors(tmp_path: Path) -> None:
    kinds = (torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.int32, torch.uint8)
    tensors = {str(kind): torch.arange(6).view(2, 3).to(kind) for kind in kinds}
    tensors |= {"bool": torch.tensor([True, False]), "scalar": torch.tensor(1.5), "none": torch.zeros(0, 2)}
    path = tmp_path / "sealed"
    publish_tensors(path, tensors, sealed_metadata(tensors, {"epoch": 3}))
    metadata, values = read_sealed(path)
    assert values == {name: tensor.reshape(-1).view(torch.uint8).numpy().tobytes() for name, tensor in tensors.items()}
    shapes, _ = read_header(path)
    assert shapes == {name: list(tensor.shape) for name, tensor in tensors.items()}
    assert metadata["epoch"] == 3
    whole = path.read_bytes()
    for place in range(8, len(whole)):
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :])
        with pytest.raises(InputError, match="sealed is "):
            read_sealed(path)


def fail(monkeypatch: pytest.MonkeyPatch, name: str, number: int, code: int) -> None:
    """Let one of the calls of an os function fail, counted from 1."""
    real, calls = getattr(os, name), []

    def call(*args: object, **kwargs: object) -> object:
        calls.append(name)
        if len(calls) == number:
            raise OSError(code, os.strerror(code))
        return real(*args, **kwargs)

    monkeypatch.setattr(os, name, call)


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.EROFS])
@pytest.mark.parametrize(("call", "number"), [("open", 1), ("fsync", 1), ("replace", 1), ("fsync", 2)])
@pytest.mark.parametrize("old", [b"old", None])
def test_an_error_at_any_call_leaves_the_old_file_and_no_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str, number: int, code: int, old: bytes | None
) -> None:
    path = tmp_path / "model.safetensors"
    if old is not None:
        path.write_bytes(old)
    with monkeypatch.context() as patched:
        fail(patched, call, number, code)
        with pytest.raises(EnvironmentFault, match=f"cannot write {path}: {os.strerror(code)}") as caught:
            files.publish(path, b"new" * 1000)
    assert caught.value.exit_code == 4
    assert [p.name for p in tmp_path.iterdir()] == ([] if old is None else [path.name])
    assert old is None or path.read_bytes() == old
    if code in (errno.ENOSPC, errno.EDQUOT):
        assert re.search(r"3,000 bytes are needed, [\d,]+ are free on the disk", str(caught.value))
        assert ("quota" in str(caught.value)) == (code == errno.EDQUOT)
    files.publish(path, b"new")
    assert path.read_bytes() == b"new"


def test_files_are_published_without_links_and_folder_syncs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "x"
    files.publish(path, b"old")
    fail(monkeypatch, "link", 1, errno.EPERM)
    fail(monkeypatch, "fsync", 2, errno.EINVAL)
    files.publish(path, b"new")
    assert [p.read_bytes() for p in tmp_path.iterdir()] == [b"new"]


@pytest.mark.parametrize("copied", [True, False])
def test_without_links_a_failed_sync_of_the_folder_leaves_a_whole_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, copied: bool
) -> None:
    """The old one, or, if it could not be copied before, the new one."""
    path = tmp_path / "x"
    files.publish(path, b"old")
    fail(monkeypatch, "link", 1, errno.EPERM)
    fail(monkeypatch, "fsync", 2, errno.EIO)
    if not copied:
        monkeypatch.setattr(shutil, "copyfile", lambda *_, **__: (_ for _ in ()).throw(OSError(errno.ENOSPC, "full")))
    with pytest.raises(EnvironmentFault, match="Input/output error"):
        files.publish(path, b"new")
    assert [p.read_bytes() for p in tmp_path.iterdir()] == [b"old" if copied else b"new"]


@pytest.mark.parametrize("links", [True, False])
@pytest.mark.parametrize("call", ["replace", "rename", "link", "fsync", "unlink", "open"])
def test_files_are_replaced_together_or_not_at_all(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str, links: bool
) -> None:
    names = ["run.json", "a", "b"]
    old = {name: f"old {name}".encode() for name in names}
    for name, data in old.items():
        (tmp_path / name).write_bytes(data)
    if not links:
        monkeypatch.setattr(os, "link", lambda *_, **__: (_ for _ in ()).throw(OSError(errno.EPERM, "no links")))
    record = tmp_path / "run.json"
    for number in range(1, 9):
        with monkeypatch.context() as patched, files.staging(tmp_path) as place:
            new = {name: f"new {name} {number}".encode() for name in ("a", "b", "c", "run.json")}
            for name, data in new.items():
                (place / name).write_bytes(data)
            fail(patched, call, number, errno.EIO)
            with suppress(EnvironmentFault):
                files.replace_together(record, [(place / name, tmp_path / name) for name in new])
                old = new
        found = {path.name: path.read_bytes() for path in tmp_path.iterdir() if files.TEMPORARY not in path.name}
        assert found == old
    assert old["a"] == b"new a 8"  # there are fewer calls than that


def test_a_name_may_be_as_long_as_the_file_system_allows(tmp_path: Path) -> None:
    path = tmp_path / ("n" * 255)
    files.publish(path, b"")
    assert files.read_bytes(path) == b""


def test_temporary_files_of_a_dead_process_are_removed(tmp_path: Path) -> None:
    path = tmp_path / "w.safetensors"
    own = files.temporary_for(path)
    host, digest = own.name.removeprefix(files.TEMPORARY).rsplit("-", 2)[0], own.name.rsplit("-", 1)[1]
    dead, alive = (f"{files.TEMPORARY}{host}-{pid}-{digest}" for pid in (2**22 - 1, os.getppid()))
    other = f"{files.TEMPORARY}{host}-{2**22 - 1}-00000000"
    for name in (dead, f"{dead}-before", alive, other):
        (tmp_path / name).write_bytes(b"half")
    files.publish_out(path, b"whole")
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted([alive, other, path.name])


def test_room_check_counts_the_file_size_limit_too(tmp_path: Path) -> None:
    files.check_place(tmp_path, 1000, largest_file=1000)
    said = r"1,000 bytes are needed, a file may have 900 here \(ulimit -f\)"
    with file_limit(900):
        files.check_place(tmp_path, 5000, largest_file=900)
        with pytest.raises(EnvironmentFault, match=said):
            files.check_place(tmp_path, 5000, largest_file=1000)


def test_publishing_over_a_folder_fails_and_keeps_it(tmp_path: Path) -> None:
    (tmp_path / "taken").mkdir()
    with pytest.raises(EnvironmentFault, match="cannot write"):
        files.publish(tmp_path / "taken", b"new")
    assert [p.name for p in tmp_path.iterdir()] == ["taken"]


@pytest.mark.skipif(os.geteuid() != 0, reason="mounting takes root")
def test_a_full_disk_keeps_the_old_file(tmp_path: Path) -> None:
    small = tmp_path / "small"
    small.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "none", str(small)], capture_output=True).returncode:
        pytest.skip("this machine lets nobody mount")
    try:
        files.publish(small / "x", b"old")
        said = r"No space left on device: 100,000 bytes are needed, [\d,]+ are free"
        with pytest.raises(EnvironmentFault, match=said):
            files.publish(small / "x", bytes(100_000))
        assert [p.read_bytes() for p in small.iterdir()] == [b"old"]
    finally:
        subprocess.run(["umount", str(small)], check=True)


def test_a_recorded_file_that_shows_late_is_waited_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files, "LATE_SECONDS", 10.0)
    path = tmp_path / "late"
    showing = threading.Timer(0.5, path.write_bytes, (b"here",))
    showing.start()
    assert files.read_bytes(path, files.sha256(b"here")) == b"here"
    showing.join()
    path.unlink()
    with pytest.raises(InputError, match="No such file"):
        files.read_bytes(path)  # no record names it: not waited for


@pytest.mark.parametrize("kind", ["folder", "pipe", "socket", "device", "loop", "dangling link"])
def test_paths_that_are_not_regular_files_are_refused_at_once(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "x"
    with socket.socket(socket.AF_UNIX) as listening:
        match kind:
            case "folder":
                path.mkdir()
            case "pipe":
                os.mkfifo(path)
            case "socket":
                listening.bind(str(path))
            case "device":
                path.symlink_to("/dev/zero")
            case "loop":
                path.symlink_to(path)
            case "dangling link":
                path.symlink_to(tmp_path / "nowhere")
        for read in (files.read_bytes, read_tensors, read_header, records.read_fields):
            with pytest.raises(InputError, match=f"cannot read {path}"):
                read(path)


def test_mode_follows_the_umask(tmp_path: Path) -> None:
    before = os.umask(0o027)
    try:
        files.publish(tmp_path / "x", b"")
    finally:
        os.umask(before)
    assert (tmp_path / "x").stat().st_mode & 0o777 == 0o640


@pytest.mark.parametrize("content", [b"", b"\x80\x04K\x01.", b"\xff" * 64])
def test_files_of_another_format_are_refused(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "x"
    path.write_bytes(content)
    with pytest.raises(InputError, match="not a valid safetensors"):
        read_tensors(path)
    with pytest.raises(InputError, match="not a valid Parquet"):
        tables.read_table(path)


class Named(records.Record):
    """A record for tests."""

    name: str
    size: int = 3


def test_records_are_validated_and_immutable(tmp_path: Path) -> None:
    """Fields that nobody reads are no fault: another release may have written more."""
    path = tmp_path / "named.json"
    records.publish_record(path, {"format": records.FORMAT, "name": "x", "else": 1})
    named = records.read_record(path, Named)
    assert (named.name, named.size) == ("x", 3)
    with pytest.raises(ValidationError, match="frozen"):
        named.name = "y"  # type: ignore[misc]
    for fields, place in (({}, "name"), ({"name": 7}, "name"), ({"name": "x", "size": "3"}, "size")):
        records.publish_record(path, {"format": records.FORMAT, **fields})
        with pytest.raises(InputError, match=f"named.json has an invalid value: {place}: "):
            records.read_record(path, Named)


def test_confusion_tables_are_sparse_and_read_back(tmp_path: Path) -> None:
    counts = torch.zeros(4, 4, dtype=torch.float64)
    counts[0, 3], counts[2, 1] = 7, 1
    path = tmp_path / "pairs.parquet"
    columns = tables.confusion_columns(counts.numpy())
    tables.publish_table(path, tables.CONFUSION_SCHEMA, columns)
    table = tables.read_table(path, tables.CONFUSION_SCHEMA)
    assert table.to_numpy().tolist() == [[0, 3, 7], [2, 1, 1]]
    assert (tables.confusion_counts(table, 4) == counts.numpy()).all()
    with pytest.raises(InputError, match="expected sample_id"):
        tables.read_table(path, tables.split_schema(by_path=False))


def raw_safetensors(header: str, data: bytes) -> bytes:
    return len(header).to_bytes(8, "little") + header.encode() + data


def test_a_tensor_stored_twice_is_refused(tmp_path: Path) -> None:
    """safetensors itself takes the last one without a word."""
    entry = '"x":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}'
    path = tmp_path / "x.safetensors"
    path.write_bytes(raw_safetensors(f"{{{entry}}}", bytes(4)))
    assert read_tensors(path)[0]["x"].tolist() == [0.0]
    path.write_bytes(raw_safetensors(f"{{{entry},{entry}}}", bytes(4)))
    with pytest.raises(InputError, match=r"x\.safetensors is not a valid safetensors file: .*twice"):
        read_tensors(path)


@pytest.mark.parametrize(
    ("shape", "offsets", "size"),
    [([1], [0, 8], 4), ([2**40], [0, 2**42], 4), ([-1], [0, 4], 4), ([1], [4, 0], 4), ([1], [0, 4], 400)],
)
def test_a_header_that_lies_about_its_data_is_refused(
    tmp_path: Path, shape: list[int], offsets: list[int], size: int
) -> None:
    header = json.dumps({"x": {"dtype": "F32", "shape": shape, "data_offsets": offsets}})
    path = tmp_path / "x.safetensors"
    path.write_bytes(raw_safetensors(header, bytes(size)))
    with pytest.raises(InputError, match="not a valid safetensors"):
        read_tensors(path)


@pytest.mark.parametrize("text", ["[" * 100_000, '{"a":' * 100_000])
def test_deep_nesting_is_refused(tmp_path: Path, text: str) -> None:
    path = tmp_path / "x"
    path.write_bytes(raw_safetensors(text, b""))
    for read in (read_tensors, read_header):
        with pytest.raises(InputError, match="not a valid safetensors"):
            read(path)
    path.write_text(text)
    with pytest.raises(InputError, match="not a JSON record of cpmix"):
        records.read_fields(path)


def test_any_changed_byte_of_a_record_is_noticed(tmp_path: Path) -> None:
    """Also one that leaves the JSON equal, such as another space."""
    path = tmp_path / "run.json"
    records.publish_record(path, {"format": records.FORMAT, "name": "caf\udce9", "numbers": [1, 2.5, None]})
    whole = path.read_bytes()
    assert records.read_fields(path)["name"] == "caf\udce9"
    for place in range(len(whole)):
        for value in (9, 10, 13, 32, whole[place] ^ 1, whole[place] ^ 32):
            if value != whole[place]:
                path.write_bytes(whole[:place] + bytes([value]) + whole[place + 1 :])
                with pytest.raises(InputError):
                    records.read_fields(path)


PAIRS = {"true_class": [0, 1], "predicted_class": [1, 0], "count": [3, 4]}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"count": [3, 0]}, r"row 2 .*count 0\): count must be at least 1"),
        ({"count": [-1, 4]}, r"row 1 .*count must be at least 1"),
        ({"true_class": [0, 2]}, "classes are 0 to 1"),
        ({"predicted_class": [-1, 0]}, "classes are 0 to 1"),
        ({"true_class": [1, 1]}, "the two classes of a pair must differ"),
        ({"true_class": [0, 0], "predicted_class": [1, 1]}, r"row 2 .*the pair occurs twice"),
    ],
)
def test_impossible_confusion_pairs_are_refused(tmp_path: Path, changes: dict[str, list[int]], message: str) -> None:
    path = tmp_path / "pairs.parquet"
    sha = tables.publish_table(path, tables.CONFUSION_SCHEMA, {**PAIRS, **changes})
    with pytest.raises(InputError, match=message):
        tables.read_confusions(path, sha, 2)


def test_a_column_with_a_null_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "pairs.parquet"
    pq.write_table(pa.table({k: pa.array(v, type=pa.int64()) for k, v in {**PAIRS, "count": [3, None]}.items()}), path)
    with pytest.raises(InputError, match="expected true_class int32"):
        tables.read_table(path, tables.CONFUSION_SCHEMA)


def test_a_table_that_unpacks_without_end_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "pairs.parquet"
    columns = {name: np.zeros(2_000_000, dtype=np.int64) for name in PAIRS}
    tables.publish_table(path, tables.CONFUSION_SCHEMA, columns)
    with pytest.raises(InputError, match=r"would unpack from [\d,]+ to 32,000,000 bytes"):
        tables.read_table(path, tables.CONFUSION_SCHEMA)


@pytest.mark.slow
def test_a_name_stored_many_times_is_refused(tmp_path: Path) -> None:
    """50 kilobytes that would be 600 megabytes of text."""
    path = tmp_path / "class_counts.parquet"
    columns = {"class_id": range(600), "class_name": ["n" * 1_000_000] * 600, "group": ["few"] * 600}
    tables.publish_table(path, tables.CLASS_COUNTS_SCHEMA, {**columns, "num_train": [1] * 600, "num_test": [1] * 600})
    assert path.stat().st_size < 100_000
    with pytest.raises(InputError, match=r"class_counts.parquet would unpack from [\d,]+ to 600,"):
        tables.read_table(path, tables.CLASS_COUNTS_SCHEMA)


@pytest.mark.parametrize(("num_classes", "largest"), [(256, 1), (400, 8), (1000, 200)])
def test_confusions_of_every_class_with_every_other_are_read(
    tmp_path: Path, num_classes: int, largest: int, generator: torch.Generator
) -> None:
    """The most regular table that we write is read, and no larger one."""
    path = tmp_path / "pairs.parquet"
    counts = torch.randint(1, largest + 1, (num_classes, num_classes), generator=generator).fill_diagonal_(0)
    sha = tables.publish_table(path, tables.CONFUSION_SCHEMA, tables.confusion_columns(counts.numpy()))
    table = tables.read_confusions(path, sha, num_classes)
    assert (tables.confusion_counts(table, num_classes) == counts.numpy()).all()
    with pytest.raises(InputError, match=r"pairs.parquet has [\d,]+ rows by its footer; at most 81 are possible"):
        tables.read_confusions(path, sha, 9)


@pytest.mark.parametrize("codec", ["zstd", "gzip"])
def test_a_page_that_unpacks_without_end_is_refused(tmp_path: Path, codec: str) -> None:
    """One class name of 100 megabytes in a few kilobytes: counted only after it was unpacked."""
    path = tmp_path / "class_counts.parquet"
    row = {"class_id": [0], "class_name": ["n" * 100_000_000], "num_train": [1], "num_test": [1], "group": ["few"]}
    pq.write_table(pa.table(row, schema=tables.CLASS_COUNTS_SCHEMA), path, compression=codec)
    assert path.stat().st_size < 200_000
    with pytest.raises(InputError, match=f"class_counts.parquet is compressed with {codec.upper()}"):
        tables.read_table(path, tables.CLASS_COUNTS_SCHEMA)


def test_a_record_is_not_read_beyond_its_bounds(tmp_path: Path) -> None:
    path = tmp_path / "run.json"
    path.write_text("[" + "[]," * 1_000_000 + "[]]")
    with pytest.raises(InputError, match="a file of its kind has at most 2,000,000"):
        records.read_fields(path)


@pytest.mark.parametrize(
    ("column", "values", "message"),
    [
        ("class_id", [1, 0], "class ids must be 0, 1, 2"),
        ("num_train", [5, 0], "num_train must be at least 1"),
        ("num_test", [5, -1], "num_test must be at least 0"),
    ],
)
def test_class_counts_out_of_range_are_refused(tmp_path: Path, column: str, values: list[int], message: str) -> None:
    counts = {"class_id": [0, 1], "class_name": ["a", "b"], "num_train": [5, 1], "num_test": [1, 1]}
    path = tmp_path / "class_counts.parquet"
    table = {**counts, "group": ["few", "few"], column: values}
    sha = tables.publish_table(path, tables.CLASS_COUNTS_SCHEMA, table)
    with pytest.raises(InputError, match=message):
        tables.read_class_counts(path, sha)
