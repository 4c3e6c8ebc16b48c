"""Files: what must be equal between two equal runs, and files that tests write, change and damage."""

import hashlib
import io
import resource
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from PIL import Image

from cpmix_cli.artifacts import records
from cpmix_cli.artifacts.tensors import read_tensors
from cpmix_cli.recipe.loading import find_recipe

CLOCK = ["seconds", "images_per_second"]
COLOURS = {"red": (220, 40, 30), "green": (30, 200, 60), "blue": (20, 60, 210)}


def files(folder: Path) -> list[str]:
    """All files below a folder, as sorted relative names; hidden ones too."""
    return sorted(p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file())


def header(name: str) -> str:
    """The comment at a recipe's head, in one line."""
    lines = find_recipe(name).read_text().splitlines()
    return " ".join(line.removeprefix("#").strip() for line in lines if line.startswith("#"))


def exact_contents(folder: Path) -> dict[str, bytes]:
    return {name: (folder / name).read_bytes() for name in files(folder)}


def contents(folder: Path) -> dict[str, bytes]:
    """Every file below a folder: all but the times, hosts and paths in records, and the clock in metrics and states."""
    found = {}
    for name in files(folder):
        path = folder / name
        if path.name == "metrics.parquet":
            found[name] = pd.read_parquet(path).drop(columns=CLOCK).to_csv().encode()
        elif path.name == "training_state.safetensors":
            tensors, _ = read_tensors(path)
            kept = {n: t for n, t in tensors.items() if n not in ("history", "sums")}
            found[name] = b"".join(t.numpy().tobytes() for _, t in sorted(kept.items()))
        elif path.name != "run.json":
            found[name] = path.read_bytes()
    return found


@contextmanager
def unchanged(*folders: Path) -> Iterator[None]:
    """Check that all files of these folders have the same bytes before and after."""
    before = [exact_contents(folder) for folder in folders]
    yield
    assert [exact_contents(folder) for folder in folders] == before


def flip(path: Path, place: int = -1, bit: int = 1) -> bytes:
    """Flip bits of one byte of a file; returns the bytes that it had before."""
    whole = path.read_bytes()
    damaged = bytearray(whole)
    damaged[place] ^= bit
    path.write_bytes(damaged)
    return whole


def edit_record(path: Path, **changes: object) -> None:
    """Change fields of a record and seal it again, as a stranger would who knows how."""
    records.publish_record(path, {**records.read_fields(path), **changes})


def write_image(path: Path, pixels: Any = (0, 0, 0), size: tuple[int, int] = (20, 20)) -> Path:
    """Write an image: of one colour, or an array of pixels [height, width, 3] uint8; folders are made."""
    path.parent.mkdir(parents=True, exist_ok=True)
    (Image.new("RGB", size, pixels) if isinstance(pixels, str | tuple) else Image.fromarray(pixels)).save(path)
    return path


def write_photos(folder: Path, counts: dict[str, int], seed: int = 0, noise: float = 25) -> None:
    """Noisy images of a colour each, of different sizes and formats."""
    generator = np.random.Generator(np.random.PCG64(seed))
    for name, count in counts.items():
        (folder / name).mkdir(parents=True)
        for i in range(count):
            size = (20 + 3 * (i % 4), 24 + 2 * (i % 3), 3)
            pixels = np.clip(np.array(COLOURS[name]) + generator.normal(0, noise, size), 0, 255).astype(np.uint8)
            Image.fromarray(pixels).save(folder / name / f"{i:03d}.{('png', 'jpg')[i % 2]}")


@contextmanager
def file_limit(size: int) -> Iterator[None]:
    """Let this process write no file beyond `size` bytes."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


class Canary:
    """Leaves a file behind when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def __reduce__(self) -> tuple[object, ...]:
        return Path.touch, (self._path,)


def png(image: torch.Tensor) -> bytes:
    """[H, W, 3] uint8 as PNG."""
    buffer = io.BytesIO()
    Image.fromarray(image.numpy()).save(buffer, "PNG")
    return buffer.getvalue()


def write_cifar(folder: Path, num_train: int = 12, classes: int = 10) -> None:
    """A small CIFAR-10 in the Hugging Face layout: PNG bytes, label."""
    generator = torch.Generator().manual_seed(1)
    for split, size in (("train", num_train * classes), ("test", 2 * classes)):
        images = torch.randint(0, 256, (size, 32, 32, 3), dtype=torch.uint8, generator=generator)
        encoded = [{"bytes": png(i), "path": None} for i in images]
        labels = [i % classes for i in range(size)]
        table = pa.table({"img": encoded, "label": labels})
        pq.write_table(table, folder / f"{split}-00000-of-00001.parquet")


def save(content: object, path: Path) -> str:
    """torch.save; the file's sha256."""
    torch.save(content, path)
    return hashlib.sha256(path.read_bytes()).hexdigest()
