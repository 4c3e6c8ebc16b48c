"""Images that come from disk ahead of their use: the numbers of resident ones, bounded memory, an end to waiting."""

import json
import os
import shutil
import signal
import threading
import time
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from helpers import contents, fix_of, flip, forget_signals, must, picture, process, refused, run_commands, setting
from numpy.typing import NDArray
from PIL import Image
from simulated_cuda import simulated_cuda
from torchvision import transforms
from torchvision.transforms import functional as tv

from cpmix_cli.bench.measure import Memory
from cpmix_cli.data import augment, stream
from cpmix_cli.data.batches import CropBatches, ImageBatches, open_batches, pictures
from cpmix_cli.data.dataset import open_dataset
from cpmix_cli.data.stream import UPLOADS_IN_USE, FileReader, StreamedBatches, Uploads
from cpmix_cli.recipe.schema import Data
from cpmix_cli.runtime import hardware
from cpmix_cli.runtime.errors import InputError

CPU = torch.device("cpu")
SIZE, CROP = 40, 24
JITTER = Data(augment="resized-crop-flip-jitter", crop=CROP, normalisation="imagenet")
FLAGS = (
    *("--recipe", "digits/cpmix", "--epochs", 3),
    *setting(f"crop={CROP}", "normalisation=imagenet", "augment=resized-crop-flip-jitter", table="data"),
    *setting("optimizer.batch_size=16", "finetune.batch_size=16", "finetune.epochs=1"),
)


@pytest.fixture(scope="session")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """images/ and lists/ of 42 training and 15 test images in 3 classes, and data sets of them: files/ and shards/."""
    folder = tmp_path_factory.mktemp("tree")
    (folder / "lists").mkdir()
    for split, counts in (("train", (24, 12, 6)), ("test", (5, 5, 5))):
        lines = []
        for label, count in enumerate(counts):
            for number in range(count):
                name = f"{split}/{label}/{number}.jpg"
                (folder / "images" / name).parent.mkdir(parents=True, exist_ok=True)
                generator = np.random.default_rng([label, number, split == "test"])
                picture(label, generator, 36).save(folder / "images" / name, quality=90)
                lines.append(f"{name} {label}\n")
        (folder / "lists" / f"{split}.txt").write_text("".join(lines))
    build = ("build-lt", "image-folder", "--list-dir", folder / "lists", "--data-root", folder / "images")
    must(*build, "--pack", 0, "--image-size", SIZE, "--out", folder / "files")
    must(*build, "--pack", SIZE, "--out", folder / "shards")
    return folder


@pytest.fixture
def streamed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(hardware.RESIDENT_SHARE, "cpu", 0.0)


@pytest.fixture
def readers(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Seven threads of this test's own."""
    monkeypatch.setattr(hardware, "num_readers", lambda *_: 7)
    threads = stream._Threads()
    monkeypatch.setattr(stream, "_threads", threads)
    yield
    threads._stop()
    assert threads._threads and not any(thread.is_alive() for thread in threads._threads)


class Numbers:
    """Image i is all i (and half its first uniform); a few are damaged. Counts what is read."""

    def __init__(self, side: int = 2, damaged: tuple[int, ...] = (), seconds: float = 0.0) -> None:
        self.shape = [side, side, 3]
        self.seen: list[int] = []
        self._damaged, self._seconds = damaged, seconds

    def read(self, index: int, uniforms: NDArray[np.float64] | None, into: NDArray[np.uint8]) -> None:
        time.sleep(self._seconds)
        self.seen.append(index)
        if index in self._damaged:
            raise InputError(f"image {index} is damaged")
        into[:] = index if uniforms is None else index + 100 * uniforms[0]


def plain_numbers(reader: Numbers) -> StreamedBatches:
    none = torch.empty(0, *reader.shape, dtype=torch.uint8)
    return StreamedBatches(reader, ImageBatches(none, Data(augment="none", normalisation="none"), [], []), CPU)


def values(x: torch.Tensor) -> list[int]:
    return (x[:, 0, 0, 0] * 255).round().long().tolist()


def uniform(*numbers: float) -> torch.Tensor:
    return torch.tensor([[x, 0, 0] for x in numbers], dtype=torch.float64)


def test_files_are_cropped_as_torchvision_crops_them(tree: Path, generator: torch.Generator) -> None:
    dataset = open_dataset(tree / "files")
    paths = dataset.paths("train")
    reader = FileReader(paths, [SIZE, SIZE, 3], JITTER, upright=True)
    found = np.empty((CROP, CROP, 3), dtype=np.uint8)
    for index, path in enumerate(paths):
        image = Image.open(path).convert("RGB")
        uniforms = torch.rand(1, augment.NUM_JITTER, dtype=torch.float64, generator=generator)
        reader.read(index, uniforms[0].numpy(), found)
        box = augment.crop_boxes(uniforms, image.height, image.width)[0].tolist()
        assert (found == np.asarray(tv.resized_crop(image, *box, [CROP, CROP]))).all()
        reader.read(index, None, found)
        expected = transforms.Compose([transforms.Resize(SIZE), transforms.CenterCrop(CROP)])(image)
        assert (found == np.asarray(expected)).all()


def test_test_images_are_the_same_from_files_and_shards_kept_or_streamed(
    tree: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    files, shards = (open_dataset(tree / name) for name in ("files", "shards"))
    order = torch.tensor([3, 14, 0, 3])
    kept, labels = open_batches(shards, "test", JITTER, CPU)
    monkeypatch.setitem(hardware.RESIDENT_SHARE, "cpu", 0.0)
    found = [kept.plain(order)] + [open_batches(d, "test", JITTER, CPU)[0].plain(order) for d in (files, shards)]
    assert found[0].equal(found[1]) and found[0].equal(found[2])
    assert found[0].is_contiguous(memory_format=torch.channels_last)
    assert labels.tolist() == [0] * 5 + [1] * 5 + [2] * 5
    raw = [np.stack(list(pictures(d, "test", np.array([3, 14])))) for d in (files, shards)]
    assert (raw[0] == raw[1]).all() and raw[0].shape == (2, SIZE, SIZE, 3)


LARGE = Data(augment="resized-crop-flip", crop=SIZE, normalisation="inaturalist")
MIDDLE, WHOLE = Data(augment="none", crop=CROP), Data(augment="none")
TURNED = Data(augment="crop-flip-rotate", padding=3)
POLICY = Data(augment="crop-flip-autoaugment", padding=3, cutout=8, flip="alternating")


@pytest.mark.parametrize(
    "recipe", [JITTER, LARGE, MIDDLE, TURNED, POLICY, WHOLE], ids=lambda r: f"{r.augment}-{r.crop}"
)
def test_streamed_shards_give_the_bits_of_resident_ones(
    tree: Path, recipe: Data, streamed: None, readers: None, generator: torch.Generator
) -> None:
    dataset = open_dataset(tree / "shards")
    read, _ = open_batches(dataset, "train", recipe, CPU)
    hardware.RESIDENT_SHARE["cpu"] = 0.25  # put back by the fixture
    kept, _ = open_batches(dataset, "train", recipe, CPU)
    assert (read.resident, kept.resident) == (False, True)
    assert (read.num_uniforms, read.alternating, read.device) == (kept.num_uniforms, kept.alternating, CPU)
    for prefetched in (True, False):
        indices = torch.randint(0, 42, (30,), generator=generator)
        uniforms = torch.rand(30, kept.num_uniforms, dtype=torch.float64, generator=generator)
        if prefetched:
            read.prefetch(indices, uniforms)
            read.prefetch(indices, None)
        assert read.batch(indices, uniforms).equal(kept.batch(indices, uniforms))
        assert read.plain(indices).equal(kept.plain(indices))


def test_crops_of_stored_squares_equal_crops_of_files(generator: torch.Generator, tmp_path: Path) -> None:
    """From files Pillow crops and rounds, from shards the device crops and does not."""
    images = torch.randint(0, 256, (12, SIZE, SIZE, 3), dtype=torch.uint8, generator=generator)
    for i, image in enumerate(images):
        Image.fromarray(image.numpy()).save(tmp_path / f"{i}.png")
    paths = [tmp_path / f"{i}.png" for i in range(12)]
    reader = FileReader(paths, [SIZE, SIZE, 3], JITTER, upright=False)
    recipe = Data(augment="resized-crop-flip", crop=CROP, normalisation="none")
    none = torch.empty(0, CROP, CROP, 3, dtype=torch.uint8)
    from_files = StreamedBatches(reader, CropBatches(none, recipe, [], [], cropped=True), CPU)
    from_squares = CropBatches(images, recipe, [], [])
    uniforms = torch.rand(12, augment.NUM_CROP, dtype=torch.float64, generator=generator)
    at = torch.arange(12)
    difference = (from_files.batch(at, uniforms) - from_squares.batch(at, uniforms)).abs().max()
    assert float(difference) * 255 < 1.6  # Pillow rounds twice: rows, then columns
    assert from_files.plain(at).equal(from_squares.plain(at))


def test_prefetched_images_are_read_ahead_and_only_once() -> None:
    reader = Numbers()
    batches = plain_numbers(reader)
    first, second = torch.tensor([4, 2]), torch.tensor([7, 7])
    batches.prefetch(first, uniform(0, 0.5))
    batches.prefetch(first, uniform(0, 0.5))
    batches.prefetch(second, None)
    until = time.monotonic() + 10
    while len(reader.seen) < 4 and time.monotonic() < until:
        time.sleep(0.01)
    assert sorted(reader.seen) == [2, 4, 7, 7]
    assert values(batches.batch(first, uniform(0, 0.5))) == [4, 52]
    assert values(batches.plain(second)) == [7, 7]
    assert sorted(reader.seen) == [2, 4, 7, 7]


def test_batches_are_right_whether_prefetched_or_not() -> None:
    """Out of order, never asked for, asked for twice or never announced: the images are right all the same."""
    reader = Numbers()
    batches = plain_numbers(reader)
    asked = [torch.tensor([i, i + 1]) for i in range(6)]
    for indices in asked:
        batches.prefetch(indices, None)
    assert values(batches.plain(asked[3])) == [3, 4]
    assert len(batches._ahead) == 2  # what stood before it is forgotten
    assert values(batches.plain(asked[1])) == [1, 2]
    assert values(batches.plain(asked[3])) == [3, 4]
    assert values(batches.plain(torch.tensor([40]))) == [40]
    assert values(batches.batch(asked[5], uniform(0.25, 0))) == [30, 6]  # other uniforms, another batch
    assert values(batches.plain(asked[5])) == [5, 6]
    assert not batches._ahead
    assert batches.plain(torch.empty(0, dtype=torch.int64)).shape == (0, 3, 2, 2)
    assert batches.batch(torch.empty(0, dtype=torch.int64), uniform().view(0, 3)).shape == (0, 3, 2, 2)


def test_the_first_damaged_image_is_reported_with_its_batch(readers: None) -> None:
    batches = plain_numbers(Numbers(damaged=(70, 31, 90)))
    batches.prefetch(torch.arange(50, 100), None)
    batches.prefetch(torch.arange(0, 50), None)
    for _ in range(2):
        with pytest.raises(InputError, match="image 70 is damaged"):
            batches.plain(torch.arange(50, 100))
    assert values(batches.plain(torch.arange(10))) == list(range(10))
    with pytest.raises(InputError, match="image 31 is damaged"):
        batches.plain(torch.arange(0, 50))


def test_prefetching_stays_within_its_memory_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    reader = Numbers(side=8)
    monkeypatch.setattr(stream, "AHEAD_BYTES", 25 * 8 * 8 * 3)
    batches = plain_numbers(reader)
    asked = torch.split(torch.arange(100), 10)
    for indices in asked:
        batches.prefetch(indices, None)
    time.sleep(0.2)
    assert sorted(reader.seen) == list(range(20))
    for number, indices in enumerate(asked):
        assert values(batches.plain(indices)) == indices.tolist()
        assert max(reader.seen) < 10 * (number + 3)
    assert sorted(reader.seen) == list(range(100))


def test_an_epoch_over_a_large_set_keeps_memory_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    """600 MB of images, 32 of them in a batch, with 40 MB to read ahead."""
    monkeypatch.setattr(stream, "AHEAD_BYTES", 40_000_000)
    reader = Numbers(side=256)
    none = torch.empty(0, 256, 256, 3, dtype=torch.uint8)
    recipe = Data(augment="none", crop=16, normalisation="none")
    batches = StreamedBatches(reader, CropBatches(none, recipe, [], []), CPU)
    order = torch.split(torch.arange(3072) % 250, 32)
    memory = Memory(CPU)
    memory.restart()
    for number, indices in enumerate(order):
        for ahead in order[number : number + 12]:
            batches.prefetch(ahead, None)
        assert values(batches.plain(indices)) == indices.tolist()
    peak = memory.peak()
    assert len(reader.seen) == 3072
    assert peak is not None and peak < 200_000_000  # glibc keeps some of what is given back


@pytest.mark.slow
def test_the_end_of_the_program_waits_for_no_reader() -> None:
    """Two announced batches whose images take a minute each."""
    code = """
import time, torch
from cpmix_cli.data.batches import ImageBatches
from cpmix_cli.data.stream import StreamedBatches
from cpmix_cli.recipe.schema import Data

class Slow:
    shape = [2, 2, 3]

    def read(self, *_):
        time.sleep(60)

maths = ImageBatches(torch.empty(0, 2, 2, 3, dtype=torch.uint8), Data(normalisation="none"), [], [])
batches = StreamedBatches(Slow(), maths, torch.device("cpu"))
batches.prefetch(torch.tensor([1, 2]), None)
batches.prefetch(torch.tensor([3]), None)
time.sleep(0.2)
print(time.time())
"""
    found = process(code=code)
    assert found.code == 0
    assert time.time() - float(found.stdout) < 30  # PATIENCE_SECONDS, and the end of Python on a busy machine
    assert not found.stderr


def run_all(data: Path, run: Path, *flags: object) -> None:
    must("train-stage1", "--data", data, "--out", run, *FLAGS, *flags)
    must("train-stage2", "--from", run)
    must("finetune", "--from", run)
    must("evaluate", "--from", run)


@pytest.mark.parametrize("settings", [(), ("confusion.refresh=epoch", "optimizer.micro_batches=2")], ids=["", "ahead"])
def test_streamed_training_equals_resident_training(
    tree: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, settings: tuple[str, ...]
) -> None:
    """Bit for bit through all phases, whether partners are known ahead or not."""
    run_all(tree / "shards", tmp_path / "kept", *setting(*settings))
    monkeypatch.setitem(hardware.RESIDENT_SHARE, "cpu", 0.0)
    run_all(tree / "shards", tmp_path / "read", *setting(*settings))
    assert contents(tmp_path / "kept") == contents(tmp_path / "read")


@pytest.mark.slow
def test_streamed_training_on_a_device_gives_the_numbers_of_the_cpu(
    tree: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for kind in hardware.RESIDENT_SHARE:
        monkeypatch.setitem(hardware.RESIDENT_SHARE, kind, 0.0)
    flags = setting("confusion.refresh=epoch", "optimizer.micro_batches=2", "model.precision=fp32")
    run_all(tree / "shards", tmp_path / "cpu", *flags)
    with simulated_cuda() as device:
        run_all(tree / "shards", tmp_path / "cuda", *flags)
    assert device.crossings["to"] > 100
    losses = [pd.read_parquet(tmp_path / name / "stage2" / "metrics.parquet")["loss"] for name in ("cpu", "cuda")]
    assert losses[1].tolist() == pytest.approx(losses[0].tolist(), rel=0.02)


class Cuda:
    """In place of torch.cuda: streams that keep what they do, in one list in the order of the host's calls."""

    def __init__(self) -> None:
        self.did: list[str] = []
        self.now, self.events = "compute", 0

    def Stream(self, device: torch.device) -> "Lane":
        return Lane(self, "uploads")

    def Event(self) -> "Mark":
        self.events += 1
        return Mark(self, self.events - 1)

    def current_stream(self, device: torch.device) -> "Lane":
        return Lane(self, self.now)

    @contextmanager
    def stream(self, lane: "Lane") -> Iterator[None]:
        before, self.now = self.now, lane.name
        yield
        self.now = before


@dataclass
class Lane:
    """A stream."""

    cuda: Cuda
    name: str

    def wait_stream(self, other: "Lane") -> None:
        self.cuda.did.append(f"{self.name} waits for {other.name}")

    def wait_event(self, event: "Mark") -> None:
        self.cuda.did.append(f"{self.name} waits for use {event.number}")


@dataclass
class Mark:
    """An event."""

    cuda: Cuda
    number: int

    def record(self, lane: Lane) -> None:
        self.cuda.did.append(f"{lane.name} has done use {self.number}")


def test_uploads_have_a_stream_of_their_own_and_overwrite_no_batch_in_use() -> None:
    cuda = Cuda()
    alive: list[weakref.ref[torch.Tensor]] = []
    with simulated_cuda():
        uploads = Uploads(torch.device("cuda"), cuda)
        for number in range(UPLOADS_IN_USE + 2):
            images, uniforms = torch.full((2, 3), number), torch.rand(2)
            cuda.did.append(f"batch {number}, {sum(ref() is not None for ref in alive)} kept")
            with uploads.sent(images, uniforms) as (sent, also):
                assert sent.device.type == also.device.type == "cuda" and sent.tolist() == images.tolist()
                cuda.did.append(f"{cuda.now} uses {number}")
            alive.append(weakref.ref(sent))
            del sent, also
        assert cuda.did[:4] == [
            "batch 0, 0 kept",
            "compute waits for uploads",
            "compute uses 0",
            "compute has done use 0",
        ]
        assert cuda.did[-10:] == [
            f"batch {UPLOADS_IN_USE}, {UPLOADS_IN_USE} kept",
            "uploads waits for use 0",
            "compute waits for uploads",
            f"compute uses {UPLOADS_IN_USE}",
            f"compute has done use {UPLOADS_IN_USE}",
            f"batch {UPLOADS_IN_USE + 1}, {UPLOADS_IN_USE} kept",
            "uploads waits for use 1",
            "compute waits for uploads",
            f"compute uses {UPLOADS_IN_USE + 1}",
            f"compute has done use {UPLOADS_IN_USE + 1}",
        ]
        cuda.did.clear()
        del uploads
        assert cuda.did == [f"uploads waits for use {n}" for n in range(2, UPLOADS_IN_USE + 2)]
        assert not any(ref() is not None for ref in alive)


def test_uploads_to_the_cpu_copy_nothing() -> None:
    images = torch.ones(3)
    with Uploads(CPU).sent(images) as (sent,):
        assert sent is images


@pytest.mark.slow
def test_all_commands_run_on_images_in_their_files(tree: Path, tmp_path: Path) -> None:
    moved = tmp_path / "elsewhere"
    data = shutil.copytree(tree / "files", tmp_path / "data")
    shutil.copytree(tree / "images", moved)
    assert str(tree / "images") in (data / "dataset.json").read_text()
    run = tmp_path / "run"
    train = ("train-stage1", "--data", data, "--out", run, *FLAGS)
    result = must(*train, "--data-root", moved, "--eval-every", 1)
    assert "images are read from disk as they are wanted" in result.stderr
    again = f" --from {run} --data-root {moved}"
    for name, following in (("train-stage2", "finetune"), ("finetune", "evaluate")):
        assert (
            must(name, "--from", run, "--data-root", moved).stderr.splitlines()[-1] == f"next: cpmix {following}{again}"
        )
    evaluated = must("evaluate", "--from", run, "--data-root", moved)
    assert evaluated.stderr.splitlines()[-1] == f"next: cpmix confusion-report{again}"
    assert must("evaluate", "--from", run, "--data-root", moved, "--json").json["num_test"] == 15
    must("confusion-report", "--from", run, "--data-root", moved)
    assert must("misclassified", "--from", run, "--data-root", moved, "--json").json["num_images"] >= 0
    own = must("evaluate", "--from", run, "--json").json
    other = must("evaluate", "--from", run, "--test-data", moved / "test", "--json").json
    assert (own["top1"], own["ece"]) == (other["top1"], other["ece"])
    assert must("predict", moved / "test" / "1", "--from", run, "--json").json["num_images"] == 5


def test_experts_are_weighted_on_images_from_disk(tree: Path, tmp_path: Path, streamed: None) -> None:
    flags = ("--set", "model.experts=2", "--set", 'confusion.refresh="epoch"')
    must("train-stage1", "--data", tree / "shards", "--out", tmp_path / "run", *FLAGS, *flags)
    evaluate = ("evaluate", "--from", tmp_path / "run", "--phase", "stage1")
    weights = must(*evaluate, *setting('evaluation.aggregate="test-time"'), "--json").json["expert_weights"]
    assert sum(weights) == pytest.approx(1, abs=1e-3)


@pytest.mark.parametrize("damage", ["missing", "text", "half"])
def test_a_broken_image_in_the_middle_of_training_is_named(tree: Path, tmp_path: Path, damage: str) -> None:
    images = shutil.copytree(tree / "images", tmp_path / "images")
    broken = images / "train" / "1" / "7.jpg"
    content = broken.read_bytes()
    broken.unlink()
    if damage != "missing":
        broken.write_bytes(b"nothing of the kind" if damage == "text" else content[: len(content) // 2])
    run = tmp_path / "run"
    train = ("train-stage1", "--data", tree / "files", "--data-root", images, "--out", run, *FLAGS)
    refused(3, (f"1 file cannot be read as an image:\n    {broken}: ", "--data-root"), *train)
    broken.write_bytes(content)
    must(*train)


def test_a_damaged_shard_in_the_middle_of_training_is_named(tree: Path, tmp_path: Path, streamed: None) -> None:
    data = shutil.copytree(tree / "shards", tmp_path / "data")
    shard = data / "train-00000.shard"
    flip(shard, 17 * SIZE * SIZE * 3)
    train = ("train-stage1", "--data", data, "--out", tmp_path / "run", *FLAGS)
    result = refused(3, f"{shard}: image 17 of the train split is damaged", *train)
    advice, _, command = fix_of(result).partition(": ")
    assert advice == "give the folder of its lists in place of DIR"
    run_commands(command.replace(" DIR", f" {tree / 'lists'}"))
    must(*train)


def test_a_signal_while_reading_ends_at_once_and_resumes_bit_for_bit(
    tree: Path, tmp_path: Path, handlers: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An image takes 0.1 s here: only the step under way is waited for."""
    must("train-stage1", "--data", tree / "files", "--out", tmp_path / "whole", *FLAGS)
    real = FileReader.read

    def slowly(*arguments: object) -> None:
        time.sleep(0.1)
        real(*arguments)  # type: ignore[arg-type]

    sent: list[float] = []

    def send() -> None:
        sent.append(time.monotonic())
        os.kill(os.getpid(), signal.SIGTERM)

    train = ("train-stage1", "--data", tree / "files", "--out", tmp_path / "run", *FLAGS)
    real_batch = StreamedBatches.batch

    def batch(self: StreamedBatches, *arguments: torch.Tensor) -> torch.Tensor:
        if not sent:
            threading.Timer(0.2, send).start()
        return real_batch(self, *arguments)

    with monkeypatch.context() as patched:
        patched.setattr(FileReader, "read", slowly)
        patched.setattr(StreamedBatches, "batch", batch)
        refused(75, "SIGTERM received; stage1 is saved at epoch 1, step 1", *train)
    assert time.monotonic() - sent[0] < 3
    forget_signals()
    must(*train)
    assert contents(tmp_path / "run") == contents(tmp_path / "whole")


def test_data_root_is_checked(tree: Path, digits: Path, tmp_path: Path) -> None:
    train = ("train-stage1", "--out", tmp_path / "run", *FLAGS, "--data")
    takes_its_place = f"name the folder that takes the place of {tree / 'images'}"
    missing = ("32 of 32 that were looked for are not in it, such as ", takes_its_place)
    refused(3, missing, *train, tree / "files", "--data-root", tmp_path)
    refused(3, f"no folder {tmp_path / 'nothing'}", *train, tree / "files", "--data-root", tmp_path / "nothing")
    refused(2, "has no image files", *train, digits, "--data-root", tree / "images")
    data = shutil.copytree(tree / "files", tmp_path / "data")
    images = shutil.copytree(tree / "images", tmp_path / "images")
    build = ("--list-dir", tree / "lists", "--data-root", images, "--pack", 0, "--image-size", SIZE, "--overwrite")
    must("build-lt", "image-folder", *build, "--out", data)
    shutil.rmtree(images)
    refused(3, "name the folder where they are: --data-root DIR", *train, data)
    assert not (tmp_path / "run").exists()


def test_crops_that_the_data_do_not_allow_are_refused(tree: Path, toy: Path, tmp_path: Path) -> None:
    train = ("train-stage1", "--out", tmp_path / "run", "--data")
    too_large = "data.crop = 41: the images have 40 x 40 pixels"
    refused(2, too_large, *train, tree / "shards", *FLAGS, *setting("data.crop=41"))
    points = "data.crop = 8: for images, the data set has points"
    refused(2, points, *train, toy, *setting("data.crop=8", 'data.augment="none"'))


def test_augmentations_that_the_data_do_not_allow_are_refused(digits: Path, toy: Path, tmp_path: Path) -> None:
    train = ("train-stage1", "--out", tmp_path / "run", "--data")
    too_large = "data.cutout = 9: the images have 8 x 8 pixels"
    refused(2, too_large, *train, digits, *setting("data.augment=crop", "data.cutout=9"))
    for key, value in (("augment", "crop-flip-autoaugment"), ("cutout", 4), ("flip", "alternating")):
        points = f"data.{key} = {json.dumps(value)}: for images, the data set has points"
        refused(2, points, *train, toy, *setting("data.augment=crop-flip", f"data.{key}={value}"))


@pytest.mark.slow
def test_bench_measures_disk_input_and_the_reference_loop(tree: Path) -> None:
    flags = (*FLAGS, "--device", "cpu", "--rounds", 1, "--seconds", 0, "--json", "--set", "model.precision=fp32")
    measured = must("bench", "--data", tree / "files", *flags).json
    assert measured["input_images_per_second"] == measured["images_per_second_by_round"]["input"][0] > 0
    assert measured["reference_images_per_second"] > 0
