"""Packed images: their pixels, what stops and damages them, and how they are mended."""

import json
import os
import signal
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import Result, cpmix, ended, exact_contents, files, flip, hooked, must, on_event, write_image
from PIL import Image
from torchvision.transforms import v2

from cpmix_cli.data import shards
from cpmix_cli.data.dataset import open_dataset
from cpmix_cli.data.decoding import in_threads, read_square
from cpmix_cli.runtime.errors import InputError

SIZE = 16
FILES = ["class_counts.parquet", "dataset.json"] + [
    f"{split}{end}" for split in ("test", "train") for end in ("-00000.shard", "-hashes.parquet", ".parquet")
]


def write_images(root: Path, num_train: int = 5, num_test: int = 2) -> None:
    """Noise of two classes, in sizes from 17 to 60 pixels."""
    generator = np.random.default_rng(0)
    for split, count in (("train", num_train), ("test", num_test)):
        for name in ("a", "b"):
            for i in range(count):
                pixels = generator.integers(0, 256, (*generator.integers(17, 60, 2), 3), dtype=np.uint8)
                write_image(root / split / name / f"{i:03d}.jpg", pixels)


@pytest.fixture
def photos(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of 10 and 4 images, and shards that take 4."""
    monkeypatch.setattr(shards, "SHARD_IMAGES", 4)
    write_images(tmp_path / "photos")
    return tmp_path / "photos"


def pack(photos: Path, out: Path, *flags: object) -> Result:
    return cpmix(*packing(photos, out), *flags)


def packing(photos: Path, out: Path) -> tuple[object, ...]:
    return ("build-lt", "image-folder", "--data-root", photos, "--pack", SIZE, "--out", out)


def stored(folder: Path, split: str = "train") -> np.ndarray:
    return open_dataset(folder).shards(split).load_all()


def test_a_square_equals_resize_and_centre_crop_of_torchvision(tmp_path: Path) -> None:
    """Byte for byte, whatever the sides; and the middle of a larger square is the middle of the image."""
    generator = np.random.default_rng(1)
    for width, height in [(300, 256), (256, 300), (341, 256), (500, 375), (375, 501), (100, 333), (17, 16), (256, 256)]:
        image = Image.fromarray(generator.integers(0, 256, (height, width, 3), dtype=np.uint8))
        image.save(tmp_path / "a.png")
        for size in (256, 33):
            expected = v2.Compose([v2.Resize(size), v2.CenterCrop(size)])(image)
            found = read_square(tmp_path / "a.png", size, upright=False)
            assert found.size == (size, size)
            assert found.tobytes() == expected.tobytes(), (width, height, size)
        middle = v2.CenterCrop(224)(read_square(tmp_path / "a.png", 256, upright=False))
        whole = v2.Compose([v2.Resize(256), v2.CenterCrop(224)])(image)
        assert middle.tobytes() == whole.tobytes()


def test_packing_writes_shards_with_the_resized_images(photos: Path, tmp_path: Path) -> None:
    result = pack(photos, tmp_path / "d")
    assert result.code == 0
    notes = result.stderr.splitlines()
    assert [note.split(" in ")[0] for note in notes[:2]] == ["packed 10 train images", "packed 4 test images"]
    assert [note.split()[0] for note in notes[2:]] == ["warning:", "next:"]
    extra = ["train-00001.shard", "train-00002.shard"]
    assert files(tmp_path / "d") == sorted([*FILES, *extra])
    sizes = [(tmp_path / "d" / f"train-0000{i}.shard").stat().st_size for i in range(3)]
    assert sizes == [n * SIZE * SIZE * 3 for n in (4, 4, 2)]
    dataset = open_dataset(tmp_path / "d")
    assert (dataset.storage, dataset.shape, dataset.record.shard_images) == ("shards", [SIZE, SIZE, 3], 4)
    images = stored(tmp_path / "d")
    for path, image in zip(dataset.paths("train"), images, strict=True):
        assert (image == np.asarray(read_square(path, SIZE, upright=True))).all()
    pixels = images.reshape(-1, 3) / 255
    np.testing.assert_allclose(dataset.record.mean, pixels.mean(0), rtol=1e-12)
    np.testing.assert_allclose(dataset.record.std, pixels.std(0), rtol=1e-12)
    assert pack(photos, tmp_path / "d", "--json").json["status"] == "up to date"
    assert pack(photos, tmp_path / "e", "--json").json["fingerprint"] == dataset.fingerprint
    assert dataset.name == "image-folder-photos-pack16"


def test_shards_can_be_read_from_many_threads(photos: Path, tmp_path: Path) -> None:
    assert pack(photos, tmp_path / "d").code == 0
    expected = stored(tmp_path / "d")
    packed = open_dataset(tmp_path / "d").shards("train")
    assert (len(packed), packed.shape, packed.num_bytes) == (10, [SIZE, SIZE, 3], expected.nbytes)
    order = np.random.default_rng(0).integers(0, 10, 2000)

    def same(index: int) -> bool:
        into = np.empty((SIZE, SIZE, 3), dtype=np.uint8)
        packed.read(int(order[index]), None, into)
        return bool((into == expected[order[index]]).all())

    with ThreadPoolExecutor(8) as pool:
        assert all(pool.map(same, range(len(order))))


def test_own_images_are_rotated_by_exif_and_benchmarks_are_not(photos: Path, tmp_path: Path) -> None:
    pixels = np.zeros((20, 20, 3), dtype=np.uint8)
    pixels[:10] = 255
    exif = Image.Exif()
    exif[0x0112] = 3  # to be turned by 180 degrees
    path = photos / "train" / "a" / "000.jpg"
    Image.fromarray(pixels).save(path, exif=exif, quality=100)
    assert read_square(path, SIZE, upright=False).getpixel((8, 0)) == (255, 255, 255)
    assert read_square(path, SIZE, upright=True).getpixel((8, 0)) == (0, 0, 0)
    assert pack(photos, tmp_path / "d").code == 0
    dataset = open_dataset(tmp_path / "d")
    assert dataset.upright
    assert stored(tmp_path / "d")[dataset.paths("train").index(path)][0, 8].tolist() == [0, 0, 0]


def test_a_test_image_in_the_training_set_causes_a_warning(photos: Path, tmp_path: Path) -> None:
    (photos / "test" / "b" / "000.jpg").write_bytes((photos / "train" / "a" / "002.jpg").read_bytes())
    assert "warning: 1 of 4 test images is identical to a training image" in pack(photos, tmp_path / "d").stderr


def test_a_changed_byte_is_found_at_first_touch(photos: Path, tmp_path: Path) -> None:
    assert pack(photos, tmp_path / "d").code == 0
    path = tmp_path / "d" / "train-00001.shard"
    flip(path, 2 * SIZE * SIZE * 3 + 5)
    packed = open_dataset(tmp_path / "d").shards("train")
    into = np.empty((SIZE, SIZE, 3), dtype=np.uint8)
    for index in (0, 5, 7, 9):
        packed.read(index, None, into)
    first = tmp_path / "d" / "train-00000.shard"
    for _ in range(2):  # there and back
        flip(first, 0)
        packed.read(0, None, into)  # no second hash
    for _ in range(2):
        with pytest.raises(InputError) as caught:
            packed.read(6, None, into)
        assert caught.value.message == f"{path}: image 6 of the train split is damaged: its sha256 differs"
        assert caught.value.path == path
    with pytest.raises(InputError, match="image 6 of the train split is damaged"):
        packed.load_all()
    assert pack(photos, tmp_path / "d").code == 0  # which looks at sizes, not at 86 GB
    result = pack(photos, tmp_path / "d", "--verify", "--json")
    assert ended(result, 3, f"{path}: 1 damaged, the first is image 6").json["exit_code"] == 3
    assert (
        f"fix: delete them, then run the same command again, which packs missing shards: rm -f {path}" in result.stderr
    )
    path.unlink()
    packed_again = ("packing 1 missing shard of train again", "6 of 10 train images are packed already")
    ended(pack(photos, tmp_path / "d", "--verify"), 0, packed_again)
    assert pack(photos, tmp_path / "d", "--verify").stderr.startswith("next: ")
    assert files(tmp_path / "d") == sorted([*FILES, "train-00001.shard", "train-00002.shard"])


def test_a_missing_or_short_shard_is_refused(photos: Path, tmp_path: Path) -> None:
    assert pack(photos, tmp_path / "d").code == 0
    expected = stored(tmp_path / "d")
    dataset = open_dataset(tmp_path / "d")
    packed = dataset.shards("train")
    os.truncate(tmp_path / "d" / "train-00002.shard", SIZE * SIZE * 3 + 1)
    packed.read(8, None, np.empty((SIZE, SIZE, 3), dtype=np.uint8))
    with pytest.raises(InputError, match=r"train-00002.shard: image 9 of the train split is cut short"):
        packed.read(9, None, np.empty((SIZE, SIZE, 3), dtype=np.uint8))
    with pytest.raises(InputError, match=r"train-00002.shard: missing, or of another size"):
        dataset.shards("train")
    (tmp_path / "d" / "train-00000.shard").unlink()
    with pytest.raises(InputError, match=r"train-00000.shard and 1 more: missing, or of another size"):
        dataset.shards("train")
    with pytest.raises(InputError, match=r"cannot read .*train-00000.shard: No such file"):
        dataset.recorded_shards("train").read(0, None, np.empty((SIZE, SIZE, 3), dtype=np.uint8))
    assert pack(photos, tmp_path / "d").code == 0
    assert (stored(tmp_path / "d") == expected).all()


def test_a_shard_is_not_repaired_with_other_images(photos: Path, tmp_path: Path) -> None:
    assert pack(photos, tmp_path / "d").code == 0
    path = open_dataset(tmp_path / "d").paths("train")[9]
    with Image.open(path) as image:
        upside_down = image.rotate(180)
    size = path.stat().st_size
    upside_down.save(path, quality=30)
    path.write_bytes(path.read_bytes().ljust(size, b"\0"))  # as long as before
    (tmp_path / "d" / "train-00002.shard").unlink()
    changed = f"{path} is not what was packed: 1 images of {tmp_path / 'd' / 'train-00002.shard'} have changed"
    ended(pack(photos, tmp_path / "d"), 3, changed)
    assert not (tmp_path / "d" / "train-00002.shard").exists()
    assert pack(photos, tmp_path / "d", "--overwrite").code == 0


def test_a_changed_list_of_hashes_is_refused(photos: Path, tmp_path: Path) -> None:
    assert pack(photos, tmp_path / "d").code == 0
    flip(tmp_path / "d" / "test-hashes.parquet", 60)
    ended(pack(photos, tmp_path / "d"), 3, "test-hashes.parquet is damaged")


@pytest.mark.slow
def test_packing_beyond_the_file_size_limit_fails_and_writes_nothing(photos: Path, tmp_path: Path) -> None:
    """Of a file, as ulimit -f has it."""
    hook = FOUR_A_SHARD + "import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (3000, 3000))"
    result = hooked(hook, *packing(photos, tmp_path / "d"))
    ended(result, 4, "a file may have 3,000 here (ulimit -f)")
    assert files(tmp_path / "d") == []


def test_overwriting_with_another_storage_replaces_all_files(photos: Path, tmp_path: Path) -> None:
    command = ["build-lt", "image-folder", "--data-root", photos, "--image-size", SIZE, "--out", tmp_path / "d"]
    must(*command)
    ended(pack(photos, tmp_path / "d"), 4, "storage: 'tensors' -> 'shards'")
    assert pack(photos, tmp_path / "d", "--overwrite").code == 0
    assert files(tmp_path / "d") == sorted([*FILES, "train-00001.shard", "train-00002.shard"])
    must(*command, "--overwrite")
    tensors = ["test.parquet", "test.safetensors", "train.parquet", "train.safetensors"]
    assert files(tmp_path / "d") == ["class_counts.parquet", "dataset.json", *tensors]


FOUR_A_SHARD = "from cpmix_cli.data import shards\nshards.SHARD_IMAGES = 4\n"


def stopped(photos: Path, out: Path, event: str, name: str, number: signal.Signals) -> Result:
    """pack() in a process that gets a signal when it opens or renames a file of that name."""
    hook = FOUR_A_SHARD + on_event(event, f"any(str(a).endswith({name!r}) for a in args)", number, 0.5)
    return hooked(hook, *packing(photos, out))


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT])
@pytest.mark.long
def test_stopped_packing_resumes_with_finished_shards(photos: Path, tmp_path: Path, number: signal.Signals) -> None:
    """Just when an image of the fifth of five shards is opened; what was whole before is taken over."""
    (photos / "test" / "b" / "last.jpg").write_bytes((photos / "train" / "b" / "000.jpg").read_bytes())
    assert pack(photos, tmp_path / "whole").code == 0
    out = tmp_path / "d"
    for _ in range(2):  # the second finds the same four, and has nothing of its own to go on with
        result = stopped(photos, out, "open", "last.jpg", number)
        assert (result.code, result.stdout) == (75 if number != signal.SIGKILL else -9, "")
    if number != signal.SIGKILL:
        assert "fix: run the same command again to go on" in result.stderr
        assert not list(out.glob(".cpmix-*"))
    assert not (out / "dataset.json").exists()
    kept = {path.name: path.stat().st_mtime_ns for path in out.glob("*.shard")}
    assert len(kept) == 4
    again = pack(photos, out)
    assert again.code == 0
    assert again.stderr.splitlines()[0] == "4 of 5 test images are packed already"
    assert kept == {name: (out / name).stat().st_mtime_ns for name in kept}
    assert exact_contents(out) == exact_contents(tmp_path / "whole")
    assert pack(photos, out, "--verify").code == 0


def test_only_shards_of_the_same_images_are_reused(photos: Path, tmp_path: Path) -> None:
    (photos / "train" / "b" / "004.jpg").write_text("no image")
    ended(pack(photos, tmp_path / "d"), 3, "1 file cannot be read as an image")
    finished = {path.name for path in (tmp_path / "d").glob("*.shard")}
    assert len(finished) == 3  # of 4, with those of test
    for name in ("train/a/000.jpg", "train/b/004.jpg"):
        write_image(photos / name, "red")
    record = json.loads((tmp_path / "d" / "packing-test-00000.shard.json").read_text())
    assert sorted(record) == ["digest", "format", "hashes", "images", "values"]
    assert pack(photos, tmp_path / "d").code == 0
    whole = pack(photos, tmp_path / "whole", "--json")
    assert open_dataset(tmp_path / "d").fingerprint == whole.json["fingerprint"]


def test_a_shard_with_an_image_replaced_by_one_of_equal_size_is_not_reused(photos: Path, tmp_path: Path) -> None:
    replaced, broken = write_image(photos / "train" / "a" / "000.bmp", "red"), photos / "train" / "b" / "004.jpg"
    broken.write_text("no image")
    ended(pack(photos, tmp_path / "d"), 3, "1 file cannot be read as an image")
    write_image(replaced, "blue")
    write_image(broken, "red")
    assert pack(photos, tmp_path / "d").code == 0
    place = open_dataset(tmp_path / "d").paths("train").index(replaced)
    assert stored(tmp_path / "d")[place][0, 0].tolist() == [0, 0, 255]


@pytest.mark.slow
def test_a_shard_of_other_images_does_not_match_its_record(photos: Path, tmp_path: Path) -> None:
    """Stopped; begun with another image, and killed between shard and record; gone on with as it was first."""
    whole, out, path = tmp_path / "whole", tmp_path / "d", photos / "train" / "a" / "000.jpg"
    assert pack(photos, whole).code == 0
    assert stopped(photos, out, "open", "test/a/000.jpg", signal.SIGTERM).code == 75
    first = path.read_bytes()
    write_image(path, "red")
    place = open_dataset(whole).paths("train").index(path)
    record = f"packing-train-{place // 4:05d}.shard.json"
    assert stopped(photos, out, "os.rename", record, signal.SIGKILL).code == -9
    path.write_bytes(first)
    assert pack(photos, out).code == 0
    assert (stored(out) == stored(whole)).all()


def test_threads_stop_when_their_consumer_fails() -> None:
    started: list[int] = []

    def work(i: int) -> int:
        started.append(i)
        time.sleep(0.01)
        return i

    with pytest.raises(KeyError):
        for i in in_threads(work, 1000, threads=2):
            if i == 3:
                raise KeyError
    assert len(started) < 20
    assert list(in_threads(lambda i: i, 10_000)) == list(range(10_000))
    assert torch.get_num_threads() > 0
