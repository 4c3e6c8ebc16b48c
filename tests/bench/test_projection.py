"""bench --world-size: the projection by hand, and the command for real on a small network."""

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import cpmix, files, must
from PIL import Image

from cpmix_cli.bench.projection import Assumptions, Measurements, StorageSpeed, project
from cpmix_cli.recipe.loading import load
from cpmix_cli.training.plan import PhaseContext, Plan, make_plan


def plan_of(phase: str, **changes: Any) -> Plan:
    """A phase of CP-Mix on Places-LT."""
    anything: Any = None
    context = PhaseContext(load("places-lt/cpmix"), anything, torch.device("cpu"), "fp32", {})
    return replace(make_plan(context, phase), batch_size=192, first_epoch=1, last_epoch=60, **changes)


NUM_IMAGES = 115_846
STAGE2 = plan_of("stage2")
"""Three terms; one has partners from the batch, and one confused classes."""
MEASURED = Measurements(
    kept={
        "resident": StorageSpeed(None, 0.0, {192: 50_000.0}),
        "shards": StorageSpeed(10_000.0, 200_000.0, {192: 50_000.0}),
        "files": StorageSpeed(100.0, 100_000.0, {192: 100_000.0}),
    },
    network={"stage2": {192: 1000.0, 3: 100.0}},
    gradient_bytes={"stage2": 100_000_000},
    buffer_bytes=200_000,
    count_seconds=0.0004,
    draw_seconds=0.0006,
)
ASSUMED = Assumptions(cores=4, link=10.0)


def projected(measured: Measurements, assumed: Assumptions, plan: Plan, kept: str, world_size: int) -> dict[str, Any]:
    return project(measured, assumed, [plan], NUM_IMAGES, kept, world_size)


def test_projection_of_one_rank_equals_the_numbers_by_hand() -> None:
    """576 images at 1,000 a second, augmented at 50,000, 1 ms for pairs; the last of 604 steps has 70 images."""
    found = projected(MEASURED, ASSUMED, STAGE2, "shards", 1)
    step = found["phases"]["stage2"]
    assert [step[f"{what}_per_rank_and_step"] for what in ("images", "passes", "read")] == [192, 576, 576]
    assert (step["steps_per_epoch"], step["epochs"], step["limit"]) == (604, 60, "device")
    assert step["device_seconds"] == step["step_seconds"] == pytest.approx(0.58852)
    assert step["input_seconds"] == pytest.approx(576 / 40_000)
    assert step["network_bytes_per_rank_and_step"] == step["link_seconds"] == 0
    assert step["pairs_share"] == pytest.approx(0.001 / 0.58852)
    assert step["cores_wanted"] == 1
    assert step["disk_bytes_per_epoch"] == 3 * 115_846 * 200_000
    assert step["disk_bytes_per_second_and_machine"] == pytest.approx(576 * 200_000 / 0.58852)
    # 70 is nearer to 3 than to 192: the speed that was measured there
    last = 210 / 100 + 210 / 50_000 + 0.001
    assert step["seconds"] == found["seconds"] == pytest.approx(60 * (603 * 0.58852 + last))
    assert found["rank_hours"] == pytest.approx(found["seconds"] / 3600)


def test_reading_image_files_is_the_limit_on_one_rank() -> None:
    """576 images at 4 x 100 a second; 0.58276 s of the device want 576 / 58.276 = 9.9 cores."""
    step = projected(MEASURED, ASSUMED, STAGE2, "files", 1)["phases"]["stage2"]
    assert step["step_seconds"] == step["input_seconds"] == pytest.approx(1.44)
    assert step["device_seconds"] == pytest.approx(0.576 + 0.00576 + 0.001)
    assert (step["limit"], step["cores_wanted"]) == ("input", 10)
    assert step["disk_bytes_per_second_and_machine"] == pytest.approx(576 * 100_000 / 1.44)
    enough = projected(MEASURED, replace(ASSUMED, cores=10), STAGE2, "files", 1)["phases"]["stage2"]
    assert enough["limit"] == "device"


def test_projection_of_eight_ranks_equals_the_numbers_by_hand() -> None:
    """7/4 of 100 MB and of 3 + 3 numbers go out, the running statistics, and 24 errors to each of 7 others."""
    fast = replace(MEASURED, network={"stage2": {24: 1000.0}})
    found = projected(fast, ASSUMED, STAGE2, "shards", 8)
    step = found["phases"]["stage2"]
    assert [step[f"{what}_per_rank_and_step"] for what in ("images", "passes", "read")] == [24, 72, 96]
    assert step["device_seconds"] == pytest.approx(0.072 + 96 / 50_000 + 0.001)
    assert step["input_seconds"] == pytest.approx(96 / 40_000)
    sent = 1.75 * (100_000_000 + 8 * 6) + 200_000 + 7 * 8 * 24
    assert step["network_bytes_per_rank_and_step"] == sent
    assert step["link_seconds"] == pytest.approx(sent / 10e9)
    # the last step has 70 images: 9 a rank, of which two are filled up
    assert step["disk_bytes_per_epoch"] == 4 * 8 * (603 * 24 + 9) * 200_000
    assert step["disk_bytes_per_second_and_machine"] == pytest.approx(8 * 96 * 200_000 / step["step_seconds"])
    assert found["rank_hours"] == pytest.approx(8 * found["seconds"] / 3600)


def test_the_link_is_the_limit_on_64_ranks() -> None:
    """3 images each, at the speed measured with 3: 9 / 100 s. With 1 GB/s the gradients take twice as long."""
    step = projected(MEASURED, replace(ASSUMED, link=1.0), STAGE2, "shards", 64)["phases"]["stage2"]
    assert step["device_seconds"] == pytest.approx(0.09 + 12 / 50_000 + 0.001)
    sent = 2 * 63 / 64 * (100_000_000 + 48) + 200_000 + 63 * 8 * 3
    assert step["network_bytes_per_rank_and_step"] == round(sent)
    assert (step["limit"], step["step_seconds"]) == ("link", pytest.approx(sent / 1e9))
    of_8_ranks = 8 * 12 * 200_000 / step["step_seconds"]
    assert step["disk_bytes_per_second_and_machine"] == pytest.approx(of_8_ranks)


def test_images_per_rank_round_up_for_uneven_batches_and_micro_batches() -> None:
    def images(world_size: int, plan: Plan = STAGE2) -> tuple[int, int]:
        found = projected(MEASURED, ASSUMED, plan, "shards", world_size)["phases"]["stage2"]
        return found["images_per_rank_and_step"], found["read_per_rank_and_step"]

    assert images(65) == (3, 12)  # 195 in all, three of them filled up
    assert images(63) == (4, 16)
    two = replace(STAGE2, micro_batches=2)
    assert images(1, two) == (192, 768)  # one rank, two parts: the partner may be in the other one
    assert images(7, two) == (28, 112)  # 14 parts of 14 images


def test_resident_images_need_no_reading() -> None:
    step = projected(MEASURED, ASSUMED, STAGE2, "resident", 8)["phases"]["stage2"]
    assert step["read_per_rank_and_step"] == step["input_seconds"] == step["cores_wanted"] == 0
    assert step["disk_bytes_per_epoch"] == step["disk_bytes_per_second_and_machine"] == 0


def test_projected_seconds_are_summed_over_phases() -> None:
    """A phase that counts and draws nothing tells no errors and has no pairs to pay for."""
    plain = plan_of("stage1", collect_confusion=False)
    measured = replace(
        MEASURED,
        network={"stage1": {192: 1000.0}, **MEASURED.network},
        gradient_bytes={"stage1": 1000, **MEASURED.gradient_bytes},
    )
    found = project(measured, ASSUMED, [plain, STAGE2], NUM_IMAGES, "shards", 2)
    step = found["phases"]["stage1"]
    assert (step["pairs_share"], step["device_seconds"]) == (0, pytest.approx(0.096 + 96 / 50_000))
    assert step["network_bytes_per_rank_and_step"] == 1000 + 8 * 4 + 200_000
    assert found["seconds"] == step["seconds"] + found["phases"]["stage2"]["seconds"]


RECIPE = """
extends = "digits/cpmix"
data = { augment = "resized-crop-flip", crop = 64, normalisation = "imagenet" }
optimizer.batch_size = 32
schedule = { epochs = 4, stage1_epochs = 2 }
finetune = { epochs = 1, batch_size = 16 }
"""
PHASES = ["stage1", "stage2", "finetune"]
QUICK = ("--rounds", 1, "--seconds", 0, "--device", "cpu")


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    (tmp_path / "places-lt").mkdir()
    path = tmp_path / "places-lt" / "own.toml"
    path.write_text(RECIPE)
    return path


@pytest.mark.slow
def test_bench_projects_a_published_set_as_json(recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    flags = ("--world-size", "8,1", "--cores", 2, "--link", 1, "--json")
    found = must("bench", "--recipe", recipe, *QUICK, *flags).json
    assert files(tmp_path) == ["places-lt/own.toml"]
    assert (found["num_images"], found["num_classes"], found["counts_from"]) == (62_500, 365, "published")
    measured, assumed = found["measured"], found["assumed"]
    assert [assumed[key] for key in ("cores", "link", "ranks_per_machine")] == [2, 1.0, 8]
    assert set(measured["network"]) == set(PHASES)
    assert measured["kept"]["shards"]["image_bytes"] == 256 * 256 * 3
    assert 60_000 < measured["kept"]["files"]["image_bytes"] < 160_000
    assert measured["image_files"] == "16 generated JPEGs, 500 x 375"
    assert measured["confusion_bytes"] == 8 * 365**2
    assert measured["gradient_bytes"]["stage1"] == measured["gradient_bytes"]["stage2"]
    assert measured["gradient_bytes"]["finetune"] == 4 * (64 + 1) * 365
    assert [entry["world_size"] for entry in found["projected"]] == [1, 8]
    for entry in found["projected"]:
        assert {"shards", "files"} <= set(entry["images"]) <= {"resident", "shards", "files"}
        for kept in entry["images"].values():
            assert list(kept["phases"]) == PHASES
            assert [kept["phases"][p]["epochs"] for p in PHASES] == [2, 2, 1]
            assert [kept["phases"][p]["steps_per_epoch"] for p in PHASES] == [1954, 1954, 3907]
            for p, terms in zip(PHASES, (1, 3, 1), strict=True):
                step = kept["phases"][p]
                assert step["passes_per_rank_and_step"] == terms * step["images_per_rank_and_step"]
                assert step["step_seconds"] == max(step[f"{what}_seconds"] for what in ("device", "input", "link"))
                assert step["step_seconds"] == step[f"{step['limit']}_seconds"]
        made = entry["images"]["shards"]["phases"]["stage2"]
        alone = entry["world_size"] == 1
        assert made["read_per_rank_and_step"] == (3 * 32 if alone else 4 * 4)  # others make the partner anew
    assert set(found["runs_out_first"]) == set(found["projected"][0]["images"])


@pytest.mark.slow
def test_tables_keep_measured_assumed_and_projected_apart(recipe: Path) -> None:
    flags = ("--world-size", "1,8", "--epochs", 2, "--set", "model.sync_batchnorm=true")
    told = must("bench", "--recipe", recipe, *QUICK, *flags).stdout.replace(str(recipe), "own").splitlines()
    starts = [i for i, line in enumerate(told) if re.match("measured here: |assumed: |projected, not measured: ", line)]
    assert [told[i].split(":")[0] for i in starts] == ["measured here", "assumed", "projected, not measured"]
    assert "8 cores of each rank" in told[starts[1]] and "12.5 GB/s" in told[starts[1]]
    assert max(map(len, told)) <= 130
    rows = {tuple(line.split()[:3]) for line in told[starts[2] :]}
    assert {(w, kept, p) for w in ("1", "8") for kept in ("shards", "files") for p in PHASES} <= rows
    assert told[-1] == "not projected: SyncBatchNorm's own messages, evaluations, checkpoints, start-up"
    assert "projected, not measured: own on 62,500 images in 365 classes (published)" in told


@pytest.mark.slow
def test_bench_projects_from_the_files_of_a_data_set(recipe: Path, tmp_path: Path) -> None:
    photos = tmp_path / "photos"
    for name in ("lynx", "cat"):
        (photos / name).mkdir(parents=True)
        for i in range(12):
            Image.new("RGB", (96, 80), (20 * i, 9, len(name))).save(photos / name / f"{i}.jpg")
    data = tmp_path / "data"
    must("build-lt", "image-folder", "--data-root", photos, "--out", data, "--pack", 0, "--image-size", 64)
    found = must("bench", "--recipe", recipe, "--data", data, *QUICK, "--world-size", 2, "--json").json
    assert (found["counts_from"], found["num_classes"]) == ("--data", 2)
    assert found["measured"]["image_files"] == f"{found['num_images']} of its files"
    assert found["measured"]["kept"]["files"]["image_bytes"] < 5000
    assert found["measured"]["kept"]["shards"]["image_bytes"] == 64 * 64 * 3
    # Packed sets are read from their own shards.
    must("build-lt", "image-folder", "--data-root", photos, "--out", tmp_path / "packed", "--pack", 72)
    found = must("bench", "--recipe", recipe, "--data", tmp_path / "packed", *QUICK, "--world-size", 2, "--json").json
    assert found["measured"]["kept"]["shards"]["image_bytes"] == 72 * 72 * 3
    assert found["measured"]["image_files"] == "16 generated JPEGs, 500 x 375"


def test_data_sets_in_memory_are_projected_as_resident_only(digits: Path) -> None:
    found = must("bench", "--data", digits, *QUICK, "--world-size", "1,4", "--json").json
    assert found["recipe"] == "digits/cpmix"
    assert [list(entry["images"]) for entry in found["projected"]] == [["resident"], ["resident"]]
    assert "image_files" not in found["measured"]


@pytest.mark.parametrize(
    ("words", "code", "message"),
    [
        (["--world-size", "0"], 2, '--world-size "0" is no list of numbers of ranks'),
        (["--world-size", "1,eight"], 2, "give numbers from 1 up"),
        (["--world-size", "1,,8"], 2, "give numbers from 1 up"),
        (["--world-size", "9" * 5000], 2, "give numbers from 1 up"),
        (["--world-size", "17"], 2, "--world-size 17: a batch of "),  # the finetune's
        (["--cores", "2"], 2, "--cores and --link are a projection's"),
        (["--link", "2"], 2, "--world-size 1,8,64"),
        (["--world-size", "1", "--data", "nowhere"], 3, "no data set in nowhere"),
        (["--world-size", "1", "--data-root", "nowhere"], 2, "--data-root nowhere has no data set"),
    ],
)
def test_requests_that_cannot_be_projected_are_refused(recipe: Path, words: list[str], code: int, message: str) -> None:
    result = cpmix("bench", "--recipe", recipe, *words)
    assert result.code == code
    assert message in result.stderr
