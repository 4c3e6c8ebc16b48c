"""Publishing and reading: whole files, stable bytes, damage noticed."""

import os
from pathlib import Path

import pytest
import torch

from cpmix_cli import artifacts
from cpmix_cli.errors import EnvironmentFault, InputError


def test_equal_tensors_give_equal_bytes_whatever_their_memory_order(tmp_path: Path) -> None:
    x = torch.arange(24.0).view(1, 2, 3, 4)
    first = artifacts.publish_tensors(tmp_path / "a", {"x": x, "y": x[0, 0].clone()}, {"b": 1, "a": [2]})
    last = x.contiguous(memory_format=torch.channels_last)
    second = artifacts.publish_tensors(tmp_path / "b", {"y": x[0, 0].clone(), "x": last}, {"a": [2], "b": 1})
    assert first == second
    tensors, metadata = artifacts.read_tensors(tmp_path / "a", first)
    assert tensors["x"].equal(x)
    assert metadata == {"a": [2], "b": 1}


def test_a_failed_write_leaves_the_old_file_and_no_other(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    artifacts.publish(path, b"old")
    if os.geteuid() == 0:  # root may write anywhere, so the failure is a folder in the file's place
        target = tmp_path / "taken"
        target.mkdir()
        with pytest.raises(EnvironmentFault, match="cannot write"):
            artifacts.publish(target, b"new")
        assert target.is_dir()
    else:
        tmp_path.chmod(0o500)
        with pytest.raises(EnvironmentFault, match="cannot write"):
            artifacts.publish(path, b"new")
        tmp_path.chmod(0o700)
    assert path.read_bytes() == b"old"
    assert not [p for p in tmp_path.iterdir() if p.name.startswith(".cpmix-tmp")]


def test_mode_follows_the_umask(tmp_path: Path) -> None:
    before = os.umask(0o027)
    try:
        artifacts.publish(tmp_path / "x", b"")
    finally:
        os.umask(before)
    assert (tmp_path / "x").stat().st_mode & 0o777 == 0o640


def test_a_flipped_bit_is_noticed(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    sha = artifacts.publish_tensors(path, {"x": torch.ones(8)})
    data = bytearray(path.read_bytes())
    data[-3] ^= 1
    path.write_bytes(data)
    with pytest.raises(InputError, match=r"x\.safetensors is damaged"):
        artifacts.read_tensors(path, sha)


@pytest.mark.parametrize("content", [b"", b"\x80\x04K\x01.", b"\xff" * 64])
def test_what_is_no_safetensors_or_parquet_is_refused(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "x"
    path.write_bytes(content)
    with pytest.raises(InputError, match="not a valid safetensors"):
        artifacts.read_tensors(path)
    with pytest.raises(InputError, match="not a valid Parquet"):
        artifacts.read_table(path)


def test_an_edited_record_is_noticed(tmp_path: Path) -> None:
    path = tmp_path / "run.json"
    artifacts.publish_record(path, {"format": artifacts.FORMAT, "phase": "stage1"})
    assert artifacts.read_record(path) == {"format": artifacts.FORMAT, "phase": "stage1"}
    path.write_text(path.read_text().replace("stage1", "stage2"))
    with pytest.raises(InputError, match="was changed"):
        artifacts.read_record(path)
    artifacts.publish_record(path, {"format": 99})
    with pytest.raises(InputError, match="format 99"):
        artifacts.read_record(path)


def test_confusion_tables_are_sparse_and_read_back(tmp_path: Path) -> None:
    counts = torch.zeros(4, 4, dtype=torch.float64)
    counts[0, 3], counts[2, 1] = 7, 1
    path = tmp_path / "pairs.parquet"
    columns = artifacts.confusion_columns(counts)
    artifacts.publish_table(path, artifacts.CONFUSION_SCHEMA, columns)
    table = artifacts.read_table(path, artifacts.CONFUSION_SCHEMA)
    assert table.to_numpy().tolist() == [[0, 3, 7], [2, 1, 1]]
    assert artifacts.confusion_tensor(table, 4).equal(counts.long())
    with pytest.raises(InputError, match="expected sample_id"):
        artifacts.read_table(path, artifacts.split_schema(by_path=False))
