"""A data set that is moved or built anew while a phase trains: told at the next epoch, and nothing trained is lost."""

import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from helpers import contents, must, refused, setting, write_photos

from cpmix_cli.runtime import hardware
from cpmix_cli.training.step import Step

sys.path.append(str(Path(__file__).parents[1] / "runtime"))
from test_ranks import Launched

FLAGS = (
    *("--recipe", "digits/cpmix", "--epochs", 5),
    *setting("crop=12", "normalisation=imagenet", "augment=resized-crop-flip", table="data"),
    *setting("optimizer.batch_size=8"),
)


def build(folder: Path, storage: str, seed: int, out: Path) -> None:
    if storage == "tensors":
        must("build-lt", "toy", "--subset-seed", seed, "--out", out)
        return
    pack = ("--pack", 16) if storage == "shards" else ("--pack", 0, "--image-size", 16)
    must("build-lt", "image-folder", "--data-root", folder / "photos", *pack, "--subset-seed", seed, "--out", out)


def at_step(monkeypatch: pytest.MonkeyPatch, epoch: int, number: int, do: Callable[[], object]) -> None:
    """Do something after one step of an epoch."""
    real = Step.__call__

    def call(step: Step, current: int) -> None:
        real(step, current)
        if (step._state.epoch, current) == (epoch, number):
            do()

    monkeypatch.setattr(Step, "__call__", call)


@pytest.mark.parametrize("change", ["moved", "rebuilt"])
@pytest.mark.parametrize(
    "storage", ["tensors", *(pytest.param(name, marks=pytest.mark.slow) for name in ("shards", "files"))]
)
def test_a_data_set_that_changes_is_told_at_the_next_epoch(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, storage: str, change: str
) -> None:
    write_photos(tmp_path / "photos", {"red": 12, "green": 8, "blue": 5})
    build(tmp_path, storage, 0, tmp_path / "data")
    build(tmp_path, storage, 1, tmp_path / "other")
    monkeypatch.setitem(hardware.RESIDENT_SHARE, "cpu", 0.0)
    flags = ("--epochs", 5) if storage == "tensors" else FLAGS
    command = ("train-stage1", "--data", tmp_path / "data", "--checkpoint-every", 4, *flags)
    must(*command, "--out", tmp_path / "whole")

    def take_away() -> None:
        (tmp_path / "data").rename(tmp_path / "aside")
        if change == "rebuilt":
            (tmp_path / "other").rename(tmp_path / "data")

    with monkeypatch.context() as patched:
        at_step(patched, 2, 0, take_away)
        said = (
            "was moved or deleted while" if change == "moved" else "was built anew, from other images or flags, while"
        )
        result = refused(
            3, f"the data set {tmp_path / 'data'} {said} it was in use", *command, "--out", tmp_path / "run"
        )
    assert "stage1 is saved at epoch 2, step " in result.stderr
    assert "give its new folder with --data" in result.stderr or "give its folder with --data" in result.stderr
    if change == "rebuilt":
        (tmp_path / "data").rename(tmp_path / "other")
    (tmp_path / "aside").rename(tmp_path / "data")
    assert "stage1: goes on after epoch 2, step " in must(*command, "--out", tmp_path / "run").stderr
    assert contents(tmp_path / "run") == contents(tmp_path / "whole")


def test_images_that_are_moved_within_an_epoch_cost_only_a_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_photos(tmp_path / "photos", {"red": 40, "green": 30, "blue": 20})
    build(tmp_path, "files", 0, tmp_path / "data")
    command = ("train-stage1", "--data", tmp_path / "data", *FLAGS)
    must(*command, "--out", tmp_path / "whole")
    with monkeypatch.context() as patched:
        at_step(patched, 2, 2, lambda: (tmp_path / "photos").rename(tmp_path / "aside"))
        said = f"the folder {tmp_path / 'photos'} of the images of {tmp_path / 'data'} was moved or deleted"
        result = refused(3, said, *command, "--out", tmp_path / "run")
    assert "stage1 is saved at epoch 2, step " in result.stderr
    assert result.stderr.endswith("or give its new place with --data-root FOLDER: then the same command goes on\n")
    (tmp_path / "aside").rename(tmp_path / "photos")
    assert "stage1: goes on after epoch 2, step " in must(*command, "--out", tmp_path / "run").stderr
    assert contents(tmp_path / "run") == contents(tmp_path / "whole")


def test_a_data_set_that_was_built_again_as_it_was_is_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    build(tmp_path, "tensors", 0, tmp_path / "data")
    build(tmp_path, "tensors", 0, tmp_path / "again")

    def swap() -> None:
        (tmp_path / "data").rename(tmp_path / "aside")
        (tmp_path / "again").rename(tmp_path / "data")

    at_step(monkeypatch, 2, 0, swap)
    must("train-stage1", "--data", tmp_path / "data", "--out", tmp_path / "run", "--epochs", 5)


@pytest.mark.slow
@pytest.mark.long
def test_all_ranks_stop_with_the_state_saved(tmp_path: Path) -> None:
    build(tmp_path, "tensors", 0, tmp_path / "data")
    command = ("train-stage1", "--data", tmp_path / "data", "--out", tmp_path / "run", "--epochs", 2000)
    both = Launched(2, command)
    both.wait_for("epoch=2/")
    (tmp_path / "data").rename(tmp_path / "aside")
    codes, _, errs = both.end()
    assert codes == [3, 3], errs
    assert sum("was moved or deleted while it was in use" in err for err in errs) == 1
    (tmp_path / "aside").rename(tmp_path / "data")
    again = Launched(2, command)
    assert "goes on after epoch" in again.wait_for("epoch=")
    for process in again.processes:
        process.terminate()
    assert again.end()[0] == [75, 75]


@pytest.mark.slow
@pytest.mark.long
def test_all_ranks_stop_where_one_sees_that_the_data_set_is_gone(tmp_path: Path) -> None:
    """Each rank has a copy, as on machines with disks of their own; the second rank's is moved."""
    folders = [tmp_path / "a", tmp_path / "b"]
    for folder in folders:
        build(tmp_path, "tensors", 0, folder / "data")
    both = Launched(2, ("train-stage1", "--data", "data", "--out", tmp_path / "run", "--epochs", 2000), folders=folders)
    both.wait_for("epoch=2/")
    (folders[1] / "data").rename(tmp_path / "aside")
    codes, _, errs = both.end()
    assert codes == [3, 3], errs
    assert "the data set was moved or built anew while it was in use, as another rank sees it" in errs[0]
