"""cpmix_cli.load(): the Python API classifies as the command predict does."""

import contextlib
import re
import shutil
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from helpers import flip, must, process, write_photos
from PIL import Image

import cpmix_cli
from cpmix_cli.evaluation.trained_model import TrainedModel
from cpmix_cli.runtime import console
from cpmix_cli.runtime.errors import CpmixError, EnvironmentFault, InputError, UsageError

README = Path(__file__).parents[2] / "README.md"


@pytest.fixture(scope="module")
def folder(_digits_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run as ckpt/photos, and images of several sizes in new/."""
    folder = tmp_path_factory.mktemp("api")
    shutil.copytree(_digits_run, folder / "ckpt" / "photos")
    write_photos(folder / "new", {"red": 3, "green": 3})
    return folder


@pytest.fixture(scope="module")
def model(folder: Path) -> TrainedModel:
    return cpmix_cli.load(folder / "ckpt" / "photos", device="cpu")


def pixels_of(path: str | Path) -> np.ndarray:
    with Image.open(path) as image:
        return np.asarray(image)


def test_the_lines_of_the_readme_answer_as_the_command_does(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    block = re.search(r"((?:^    .*\n)+)", README.read_text("utf-8").partition("In Python, ")[2], re.MULTILINE)
    assert block is not None
    lines = [line.strip() for line in block[1].splitlines()]
    with contextlib.chdir(folder):
        must("predict", "new", "--from", "ckpt/photos", "--probabilities", "--out", folder / "p.parquet")
        expected = pd.read_parquet("p.parquet")
        console.command = ""  # as in a process that runs no command
        space: dict[str, Any] = {}
        capsys.readouterr()
        for line in lines[:-1]:
            exec(line, space)
        written = capsys.readouterr()
        assert (written.out, written.err) == ("", "cpmix: takes finetune of ckpt/photos\n")
        pd.testing.assert_frame_equal(space["table"], expected[["path", "class_name", "confidence"]])
        assert space["model"].class_names == [str(digit) for digit in range(10)]
        space["pixels"] = pixels_of(expected["path"][0])
        exec(lines[-1], space)
        shares = [f"probability_{digit}" for digit in range(10)]
        pd.testing.assert_frame_equal(space["table"], expected.loc[:0, ["class_name", "confidence", *shares]])


def test_paths_and_pixels_may_come_in_any_form(folder: Path, model: TrainedModel) -> None:
    paths = [folder / "new" / "red" / "002.png", folder / "new" / "green" / "001.jpg"]
    table = model.predict(paths)
    assert table["path"].tolist() == list(map(str, paths))  # in the order given
    for given in (list(map(str, paths)), tuple(paths), table["path"], (path for path in paths)):
        pd.testing.assert_frame_equal(model.predict(given), table)
    pd.testing.assert_frame_equal(model.predict(str(paths[0])), table[:1])
    arrays = [pixels_of(path) for path in paths]
    assert arrays[0].shape != arrays[1].shape
    plain = table.drop(columns="path")
    opened = [Image.fromarray(pixels) for pixels in arrays]
    for several in (arrays, map(torch.from_numpy, map(np.copy, arrays)), opened):
        pd.testing.assert_frame_equal(model.predict(several), plain)
    for one in (arrays[0], arrays[0][None], arrays[0][:, ::-1].copy()[:, ::-1]):  # the last has negative strides
        pd.testing.assert_frame_equal(model.predict(one), plain[:1])
    same = np.stack([arrays[0]] * 3)
    assert model.predict(same)["confidence"].tolist() == [table["confidence"][0]] * 3
    empty = model.predict([], probabilities=True)
    assert len(empty) == 0
    assert empty.columns[:4].tolist() == ["path", "class_name", "confidence", "probability_0"]


def test_what_is_no_rgb_image_is_refused(folder: Path, model: TrainedModel, tmp_path: Path) -> None:
    for pixels in (np.zeros((8, 8, 3)), np.zeros((8, 8), np.uint8), np.zeros((8, 8, 4), np.uint8), np.uint8([[[]]]), 3):
        with pytest.raises(InputError, match="no RGB image: an array of type"):
            model.predict(pixels)
    with pytest.raises(InputError, match="paths and arrays are given together"):
        model.predict([np.zeros((8, 8, 3), np.uint8), "new"])
    with pytest.raises(InputError, match=r"no such file: nowhere\.png"):
        model.predict("nowhere.png")
    (tmp_path / "text.png").write_text("no image")
    shutil.copy(folder / "new" / "red" / "001.jpg", tmp_path / "cut.jpg")
    (tmp_path / "cut.jpg").write_bytes((tmp_path / "cut.jpg").read_bytes()[:400])
    for name in ("text.png", "cut.jpg"):
        with pytest.raises(InputError, match=f"1 file cannot be read as an image:\n    .*{name}") as found:
            model.predict([folder / "new", tmp_path / name])
        assert found.value.fix == "repair, convert or delete these files, or give the others only"


def test_threads_get_the_answers_that_one_gets(folder: Path, model: TrainedModel) -> None:
    paths = sorted((folder / "new").rglob("*.*"))
    expected = model.predict(paths)["confidence"].tolist()
    with ThreadPoolExecutor(4) as pool:
        found = pool.map(lambda path: model.predict(path)["confidence"][0], paths * 3)
        np.testing.assert_allclose(list(found), expected * 3, rtol=1e-5)


def damaged(run: Path) -> None:
    flip(run / "finetune" / "model.safetensors", -9)


@pytest.mark.parametrize(
    ("change", "settings", "kind", "message", "fix"),
    [
        (shutil.rmtree, {}, InputError, "no run folder", "train its stage 1"),
        (damaged, {}, InputError, "model.safetensors is damaged", "cpmix finetune --from"),
        (None, {"phase": "stage3"}, UsageError, "--phase stage3: cpmix reads only stage1 or stage2", "--phase"),
        (None, {"device": "gpu"}, UsageError, 'device "gpu" is unknown', "give cpu, or one of auto, cuda"),
        pytest.param(
            *(None, {"device": "cuda"}, EnvironmentFault, "device cuda is not there", "auto"),
            marks=pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a CUDA device"),
        ),
    ],
)
def test_errors_of_load_have_a_fix(
    change: Callable[[Path], None] | None,
    settings: dict[str, str],
    kind: type[CpmixError],
    message: str,
    fix: str,
    digits_run: Path,
) -> None:
    console.command = ""
    if change is not None:
        change(digits_run)
    with pytest.raises(kind, match=re.escape(message)) as found:
        cpmix_cli.load(digits_run, **settings)
    assert fix in found.value.fix


def test_importing_the_package_imports_nothing_heavy() -> None:
    code = "import sys, cpmix_cli; cpmix_cli.load; print([m for m in ('torch', 'pandas', 'numpy') if m in sys.modules])"
    assert process(code=code).stdout == "[]\n"
