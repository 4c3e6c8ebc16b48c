"""Sources: the published CIFAR archives and their pickles, IDX files, downloads."""

import contextlib
import gzip
import hashlib
import http.server
import io
import pickle
import tarfile
import threading
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from helpers import Canary, files, must, refused

from cpmix_cli.data import cifar
from cpmix_cli.data.download import REMOTES, download
from cpmix_cli.data.sources import DEBIAN_FASHION, FASHION_NAMES
from cpmix_cli.runtime.errors import EnvironmentFault, InputError

NAMES = ["cat", "dog"]


def batch(first: int, size: int, extra: object = None) -> bytes:
    """A batch file of `size` images whose pixels count up from `first`, labels 0, 1, 0, ..."""
    data = (np.arange(size * 3072) + first).astype(np.uint8).reshape(size, 3072)
    content = {"data": data, "labels": [i % 2 for i in range(size)], "batch_label": "a batch", "extra": extra}
    return pickle.dumps(content, protocol=2)


def md5(data: bytes) -> str:
    return hashlib.md5(data, usedforsecurity=False).hexdigest()


def published(batches: dict[str, bytes]) -> tuple[cifar.CifarArchive, bytes]:
    """A small set laid out as CIFAR-10 is, and its archive."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as archive:
        for name, data in batches.items():
            member = tarfile.TarInfo(f"cifar-10-batches-py/{name}")
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))
    hashes = {name: md5(data) for name, data in batches.items()}
    layout = replace(
        cifar.CIFAR10,
        num_classes=2,
        sha256=hashlib.sha256(buffer.getvalue()).hexdigest(),
        train={name: hashes[name] for name in ("data_batch_1", "data_batch_2")},
        test={"test_batch": hashes["test_batch"]},
        meta={"batches.meta": hashes["batches.meta"]},
    )
    return layout, buffer.getvalue()


@pytest.fixture
def batches() -> dict[str, bytes]:
    return {
        "data_batch_1": batch(0, 3),
        "data_batch_2": batch(77, 3),
        "test_batch": batch(5, 2),
        "batches.meta": pickle.dumps({"label_names": NAMES}, protocol=2),
    }


def test_archive_and_unpacked_folder_give_the_same(batches: dict[str, bytes], tmp_path: Path) -> None:
    layout, archive = published(batches)
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / layout.archive).write_bytes(archive)
    folder = tmp_path / "b" / layout.folder
    folder.mkdir(parents=True)
    for name, data in batches.items():
        (folder / name).write_bytes(data)
    for place in (tmp_path / "a", tmp_path / "b", folder):
        found = cifar.read([tmp_path / "nowhere", place], layout)
        assert found.class_names == NAMES
        assert found.pool.labels.tolist() == [0, 1, 0, 0, 1, 0]
        assert found.test is not None and found.test.labels.tolist() == [0, 1]
        images = found.pool.take(np.array([4, 0])).load()
        assert (images.shape, images.dtype) == ((2, 32, 32, 3), np.uint8)
        # Row 1 of the second batch: planes of red, green, blue, each row by row.
        for row, column, channel in ((0, 0, 0), (3, 7, 1), (31, 31, 2)):
            assert images[0, row, column, channel] == (77 + 3072 + 1024 * channel + 32 * row + column) % 256


def test_other_bytes_are_refused_before_anything_is_unpickled(batches: dict[str, bytes], tmp_path: Path) -> None:
    """The canary sits in the archive and in the folder; neither has the published hash."""
    layout, _ = published(batches)
    canary = pickle.dumps(Canary(tmp_path / "alive"), protocol=2)
    _, archive = published({**batches, "batches.meta": canary})
    (tmp_path / layout.archive).write_bytes(archive)
    with pytest.raises(InputError, match="is not the published file: its sha256 is"):
        cifar.read([tmp_path], layout)
    (tmp_path / layout.archive).unlink()
    folder = tmp_path / layout.folder
    folder.mkdir()
    (folder / "batches.meta").write_bytes(canary)
    with pytest.raises(InputError, match=r"batches.meta of .* is not the published file: its MD5 is"):
        cifar.read([tmp_path], layout)
    assert not (tmp_path / "alive").exists()


@pytest.mark.parametrize("place", ["meta", "inside"])
def test_a_pickle_that_holds_more_than_data_is_not_run(batches: dict[str, bytes], tmp_path: Path, place: str) -> None:
    """Even under the right hash: the unpickler itself knows no other name."""
    canary = Canary(tmp_path / "alive")
    if place == "meta":
        batches["batches.meta"] = pickle.dumps(canary, protocol=2)
    else:
        batches["data_batch_1"] = batch(0, 3, extra=canary)
    layout, archive = published(batches)
    (tmp_path / layout.archive).write_bytes(archive)
    with pytest.raises(InputError, match="contains other objects than data, so it is not loaded: it asks for"):
        cifar.read([tmp_path], layout)
    assert not (tmp_path / "alive").exists()


def test_pinned_hashes_have_their_full_length() -> None:
    for layout in (cifar.CIFAR10, cifar.CIFAR100):
        assert len(layout.sha256) == 64
        assert all(len(h) == 32 for hashes in (layout.train, layout.test, layout.meta) for h in hashes.values())
    assert all(len(sha) == 64 and size > 0 for remotes in REMOTES.values() for sha, size in remotes.values())


def test_layouts_agree_with_torchvision_s() -> None:
    from torchvision.datasets import CIFAR10, CIFAR100

    for own, other in ((cifar.CIFAR10, CIFAR10), (cifar.CIFAR100, CIFAR100)):
        assert [list(item) for item in own.train.items()] == other.train_list
        assert [list(item) for item in own.test.items()] == other.test_list
        assert own.meta == {other.meta["filename"]: other.meta["md5"]}
        assert (own.folder, own.archive) == (other.base_folder, other.filename)


def test_fashion_mnist_with_another_hash_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "train-images-idx3-ubyte.gz"
    path.write_bytes(gzip.compress(b"other images"))
    build = ["build-lt", "fashion-mnist", "--out", tmp_path / "o", "--data-root"]
    refused(3, f"{path} is not the published file", *build, tmp_path)
    path.write_bytes(gzip.compress(b"other images")[:-9])
    refused(3, f"{path} is damaged", *build, tmp_path)
    refused(3, "dataset-fashion-mnist", *build, tmp_path / "none")


@pytest.mark.skipif(not DEBIAN_FASHION.is_dir(), reason="Debian's dataset-fashion-mnist is not installed")
def test_real_fashion_mnist_lt_has_the_published_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    numbers = must("build-lt", "fashion-mnist", "--rho", 100, "--json").json
    assert numbers["folder"] == "data/fashion-mnist-lt-rho100"
    assert (numbers["num_train"], numbers["largest"], numbers["smallest"]) == (14886, 6000, 60)
    unpacked = tmp_path / "unpacked"
    unpacked.mkdir()
    for path in DEBIAN_FASHION.glob("*.gz"):
        (unpacked / path.stem).write_bytes(gzip.decompress(path.read_bytes()))
    again = must("build-lt", "fashion-mnist", "--rho", 100, "--data-root", unpacked, "--out", "again", "--json").json
    assert again["fingerprint"] == numbers["fingerprint"]
    assert len(FASHION_NAMES) == 10


class Quiet(http.server.SimpleHTTPRequestHandler):
    """Counts requests instead of printing them."""

    requests = 0

    def log_message(self, format: str, *args: object) -> None:
        type(self).requests += 1


@pytest.fixture
def server(tmp_path: Path) -> Iterator[tuple[str, Path]]:
    """Address and folder of a web server on this machine."""
    folder = tmp_path / "served"
    folder.mkdir()
    Quiet.requests = 0
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=str(folder))) as served:
        thread = threading.Thread(target=served.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{served.server_address[1]}", folder
        served.shutdown()
        thread.join()


def test_download_fetches_missing_and_damaged_files_only(
    server: tuple[str, Path], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    address, folder = server
    (folder / "set.gz").write_bytes(b"content")
    remote = {f"{address}/set.gz": (hashlib.sha256(b"content").hexdigest(), 7)}
    into = tmp_path / "into"
    download("a-set", into, {"a-set": remote})
    assert (into / "set.gz").read_bytes() == b"content"
    assert files(into) == ["set.gz"]
    assert Quiet.requests == 1
    download("a-set", into, {"a-set": remote})
    assert Quiet.requests == 1  # it is there and right
    (into / "set.gz").write_bytes(b"damaged")
    download("a-set", into, {"a-set": remote})
    assert (into / "set.gz").read_bytes() == b"content"
    output = capfd.readouterr()
    assert output.out == ""
    assert output.err == f"fetching {address}/set.gz to {into}\n"


def test_a_download_that_is_not_the_published_file_is_not_kept(server: tuple[str, Path], tmp_path: Path) -> None:
    address, folder = server
    (folder / "set.gz").write_bytes(b"Content")
    remote = {f"{address}/set.gz": (hashlib.sha256(b"content").hexdigest(), 7)}
    with pytest.raises(InputError, match="is not the published file") as caught:
        download("a-set", tmp_path / "into", {"a-set": remote})
    assert "the server sends more" not in caught.value.message
    assert files(tmp_path / "into") == []


class Endless(Quiet):
    """Says that it sends seven bytes compressed, and sends what unpacks without end; or has no length at all."""

    def do_GET(self) -> None:
        self.send_response(200)
        if self.path.startswith("/packed"):
            self.send_header("Content-Encoding", "gzip")
            self.send_header("Content-Length", "7")
        self.end_headers()
        with contextlib.suppress(OSError):
            self.wfile.write(gzip.compress(bytes(2**24)))
            for _ in range(0 if self.path.startswith("/packed") else 1000):
                self.wfile.write(bytes(2**20))


@pytest.mark.parametrize("name", ["set.gz", "packed.gz"])
def test_a_server_that_sends_more_than_was_published_is_cut_off(name: str, tmp_path: Path) -> None:
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Endless) as served:
        threading.Thread(target=served.serve_forever, daemon=True).start()
        remote = {f"http://127.0.0.1:{served.server_address[1]}/{name}": (hashlib.sha256(b"content").hexdigest(), 5000)}
        with pytest.raises((InputError, EnvironmentFault)) as caught:
            download("a-set", tmp_path / "into", {"a-set": remote})
        served.shutdown()
    if name == "set.gz":
        assert "the server sends more than its 5,000 bytes" in caught.value.message
    assert files(tmp_path / "into") == []


def test_download_without_a_network_fails_and_leaves_no_file(tmp_path: Path) -> None:
    nobody = {"a-set": {"http://127.0.0.1:9/set.gz": ("0" * 64, 1)}}
    with pytest.raises(EnvironmentFault, match=r"cannot fetch http://127\.0\.0\.1:9/set\.gz"):
        download("a-set", tmp_path / "into", nobody)
    assert files(tmp_path / "into") == []
