"""Image files: the formats that are read, whatever their endings say."""

import io
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from helpers import must, refused, write_cifar, write_photos
from PIL import Image

import cpmix_cli
from cpmix_cli.data.decoding import ENDINGS, FORMATS

POSTSCRIPT = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 32 32\n%%EndComments\nshowpage\n%%EOF\n"


@pytest.fixture
def ghostscript(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The file that a program called gs, first on the PATH, leaves behind when it is started."""
    started, program = tmp_path / "started", tmp_path / "bin" / "gs"
    program.parent.mkdir()
    program.write_text(f"#!/bin/sh\ntouch {started}\necho 10.0\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(program.parent), prepend=":")
    return started


def test_postscript_in_a_folder_of_images_is_refused_and_starts_no_program(tmp_path: Path, ghostscript: Path) -> None:
    write_photos(tmp_path / "in", {"red": 4, "blue": 4})
    (tmp_path / "in" / "red" / "x.png").write_bytes(POSTSCRIPT)
    build = ("build-lt", "image-folder", "--data-root", tmp_path / "in", "--out", tmp_path / "out")
    refused(3, ["1 file cannot be read as an image", "red/x.png: not an image"], *build)
    refused(3, "red/x.png: not an image", *build, "--pack", 0)
    assert not ghostscript.exists()


def test_postscript_in_a_parquet_file_is_refused_and_starts_no_program(tmp_path: Path, ghostscript: Path) -> None:
    write_cifar(tmp_path)
    images = [{"bytes": POSTSCRIPT, "path": None}] * 10
    pq.write_table(pa.table({"img": images, "label": list(range(10))}), tmp_path / "test-00000-of-00001.parquet")
    refused(
        3,
        ["image 0 of", "test-00000-of-00001.parquet cannot be decoded: not an image"],
        *("build-lt", "cifar10", "--data-root", tmp_path, "--out", tmp_path / "out"),
    )
    assert not ghostscript.exists()


def test_a_git_lfs_pointer_is_called_one(tmp_path: Path) -> None:
    write_photos(tmp_path / "in", {"red": 4, "blue": 4})
    (tmp_path / "in" / "red" / "x.png").write_bytes(
        b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n"
    )
    build = ("build-lt", "image-folder", "--data-root", tmp_path / "in", "--out", tmp_path / "out")
    refused(3, "red/x.png: a Git LFS pointer, not the image: run git lfs pull", *build)


def test_images_are_opened_in_one_place() -> None:
    package = Path(cpmix_cli.__file__).parent
    opening = [p.relative_to(package).as_posix() for p in package.rglob("*.py") if "Image.open(" in p.read_text()]
    assert opening == ["data/decoding.py"]


@pytest.mark.parametrize("name", sorted(set(FORMATS) - {"QOI", "AVIF"}))
def test_every_format_of_the_list_is_read(tmp_path: Path, name: str) -> None:
    for colour in ("red", "blue"):
        (tmp_path / "in" / colour).mkdir(parents=True)
        for i in range(4):
            buffer = io.BytesIO()
            Image.new("RGB", (20, 20), colour).save(buffer, name)
            (tmp_path / "in" / colour / f"{i}.png").write_bytes(buffer.getvalue())
    must("build-lt", "image-folder", "--data-root", tmp_path / "in", "--out", tmp_path / "out")


def test_each_ending_of_the_list_is_one_that_pillow_knows_for_the_format() -> None:
    Image.init()
    known = Image.registered_extensions()
    assert {known[ending] for ending in ENDINGS - {".mpo"}} == set(FORMATS)  # the plugin of JPEG reads MPO
