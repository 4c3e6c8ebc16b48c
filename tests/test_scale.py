"""bench --world-size: the projection by hand, and the command for real on a small network."""

from dataclasses import replace
from pathlib import Path

import pytest
from conftest import cpmix, must

from cpmix_cli.phases.scale import Assumed, Measured, Work, jpeg_files, project

WORK = Work(
    phase="stage2", batch_size=192, steps=600, epochs=60, terms=3, reads=3, reads_in_part=4, trained_bytes=100_000_000
)
MEASURED = Measured(
    network={"stage2": 1000.0},
    augment_shards=50_000.0,
    augment_files=100_000.0,
    decode=100.0,
    read=10_000.0,
    first_read=5_000.0,
    jpeg_bytes=100_000.0,
    packed_bytes=200_000,
    pairs=0.001,
)
ASSUMED = Assumed(cores=4, link=10e9)


def test_one_rank_by_hand() -> None:
    """192 x 3 images at 1,000 a second, 576 augmented at 50,000, 1 ms for pairs: 0.576 + 0.01152 + 0.001 s a step."""
    found = project(WORK, MEASURED, ASSUMED, 1, "shards")
    assert found.images == 576
    assert found.device_seconds == pytest.approx(0.58852)
    assert found.input_seconds == pytest.approx(576 / 40_000)
    assert found.link_bytes == found.link_seconds == 0
    assert (found.first, found.seconds) == ("device", found.device_seconds)
    assert found.disk_bytes == 600 * 576 * 200_000
    assert found.hours == pytest.approx(0.58852 * 600 * 60 / 3600)
    assert found.device_hours == found.hours
    files = project(WORK, MEASURED, ASSUMED, 1, "files")
    assert files.device_seconds == pytest.approx(0.576 + 0.00576 + 0.001)
    assert files.input_seconds == pytest.approx(1.44)
    assert files.first == "input"
    assert files.disk_bytes == 600 * 576 * 100_000


def test_eight_ranks_by_hand() -> None:
    """24 images of the batch each: 72 through the network, 96 read, and 7/8 of twice the gradients sent."""
    found = project(WORK, MEASURED, ASSUMED, 8, "shards")
    assert found.images == 72
    assert found.device_seconds == pytest.approx(0.072 + 96 / 50_000 + 0.001)
    assert found.input_seconds == pytest.approx(96 / 40_000)
    assert found.link_bytes == pytest.approx(175e6)
    assert found.link_seconds == pytest.approx(0.0175)
    assert found.disk_bytes == 600 * 8 * 96 * 200_000
    assert found.device_hours == pytest.approx(8 * found.hours)


def test_what_runs_out_first_and_parts_that_do_not_come_out_even() -> None:
    """64 ranks have 3 images of the batch each; 65 have 3 too, of which some are filled up."""
    found = project(WORK, MEASURED, replace(ASSUMED, link=1e9), 64, "shards")
    assert found.images == 9
    assert found.first == "link"
    assert found.seconds == pytest.approx(2 * 63 / 64 * 0.1)
    assert project(WORK, MEASURED, ASSUMED, 65, "shards").images == 9
    assert project(WORK, MEASURED, ASSUMED, 63, "shards").images == 12


def test_generated_files_are_those_of_photographs(tmp_path: Path) -> None:
    paths = jpeg_files(tmp_path, 2)
    assert len({path.read_bytes() for path in paths}) == 2
    assert all(30_000 < path.stat().st_size < 200_000 for path in paths)


RECIPE = """
[data]
augment = "resized-crop-flip"
crop = 64
normalisation = "imagenet"
[model]
name = "resnet10"
[optimizer]
batch_size = 32
[schedule]
epochs = 4
stage1_epochs = 2
[stage1.terms.erm]
[stage2.terms.erm]
[stage2.terms.cp]
draw = "class-uniform"
partner = "confusion"
ratio = "beta"
alpha = 1.0
mix = "linear"
label = "lambda"
[stage2.terms.mix]
partner = "permutation"
ratio = "beta"
alpha = 1.0
mix = "linear"
label = "lambda"
"""


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    (tmp_path / "places-lt").mkdir()
    path = tmp_path / "places-lt" / "own.toml"
    path.write_text(RECIPE)
    return path


def test_the_command(recipe: Path) -> None:
    found = must("bench", "--recipe", recipe, "--world-size", "8,1", "--cores", 2, "--link", 1, "--json").json
    assert (found["num_images"], found["num_classes"]) == (62_500, 365)
    assert found["assumed"] == {"cores": 2, "link": 1e9}
    work = {each["phase"]: each for each in found["measured"]["work"]}
    assert work["stage1"]["steps"] == -(-62_500 // 32)
    assert [work["stage2"][key] for key in ("terms", "reads", "reads_in_part")] == [3, 3, 4]
    parameters = 4_905_792 + 513 * 365
    assert work["stage1"]["trained_bytes"] == 4 * parameters
    assert found["measured"]["confusion_bytes"] == 8 * 365**2
    rows = [(p["world_size"], p["storage"], p["phase"]) for p in found["projected"]]
    assert rows == [(w, s, p) for w in (1, 8) for s in ("shards", "files") for p in ("stage1", "stage2")]
    for p in found["projected"]:
        assert p["seconds"] == max(p[f"{name}_seconds"] for name in ("device", "input", "link"))
        assert p["seconds"] == p[f"{p['runs_out_first']}_seconds"]
    told = must("bench", "--recipe", recipe, "--world-size", "1").stdout.splitlines()
    assert told[0].startswith(f"measured: {recipe}, 365 classes, ")
    assert any(line.startswith("projected: every rank a device as here, 8 cores that read for each") for line in told)


@pytest.mark.parametrize(
    ("words", "code", "message"),
    [
        (["--world-size", "0"], 2, '--world-size "0": numbers of ranks, such as 1,8,64'),
        (["--world-size", "1,eight"], 2, "numbers of ranks"),
        (["--world-size", "64"], 2, "--world-size 64: a batch has 32 images"),
        (["--world-size", "1", "--recipe", "cifar100-lt/cpmix"], 2, "is known of imagenet-lt, places-lt"),
        (["--world-size", "1", "--set", "data.crop=0", "--set", "data.augment=none"], 2, "sees whole images"),
        (["--world-size", "1", "--data", "nowhere"], 3, "no data set in nowhere"),
    ],
)
def test_what_cannot_be_projected(recipe: Path, words: list[str], code: int, message: str) -> None:
    result = cpmix("bench", *([] if "--recipe" in words else ["--recipe", recipe]), *words)
    assert result.code == code
    assert message in result.stderr
