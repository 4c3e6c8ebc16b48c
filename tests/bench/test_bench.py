"""bench: its figures agree with each other, and it leaves nothing behind."""

from pathlib import Path
from statistics import median

import pytest
from helpers import files, must, refused

from cpmix_cli.bench.ingredients import INGREDIENTS

PHASES = ["stage1", "stage2", "finetune"]


def test_bench_json_reports_medians_only(digits: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    before = files(digits)
    flags = ("--data", digits, "--rounds", 3, "--seconds", 0, "--epochs", 30, "--device", "cpu", "--json")
    measured = must("bench", "--recipe", "digits/cpmix", "--set", "model.precision=fp32", *flags).json
    assert files(tmp_path) == [] and files(digits) == before

    rounds = measured["images_per_second_by_round"]
    assert set(rounds) >= {"reference", *PHASES, *(f"network_{phase}_fp32" for phase in PHASES)}
    assert all(len(speeds) == 3 and min(speeds) > 0 for speeds in rounds.values())
    assert measured["reference_images_per_second"] == median(rounds["reference"])
    assert measured["network_fp32_images_per_second"] == median(rounds["network_stage1_fp32"])
    assert measured["network_best_images_per_second"] in [median(s) for n, s in rounds.items() if "network_stage1" in n]
    for phase in PHASES:
        own, alone = rounds[phase], rounds[f"network_{phase}_fp32"]
        assert measured[f"{phase}_images_per_second"] == median(own)
        for other, key in ((rounds["reference"], "ratio_to_reference"), (alone, "ratio_to_network")):
            assert measured[key][phase] == median(a / b for a, b in zip(own, other, strict=True))

    # --epochs halves the recipe: 20 of one term, 10 of three; the finetune keeps its share, 5.
    passes = {"stage1": 20, "stage2": 10 * 3, "finetune": 5}
    expected = {p: n * measured["num_images"] / measured[f"{p}_images_per_second"] for p, n in passes.items()}
    assert measured["projected_seconds"] == pytest.approx(expected | {"total": sum(expected.values())})
    assert measured["gpu_hours"] == 0
    assert measured["start_up_seconds"] > 0
    assert [cost["num_classes"] for cost in measured["pairs"]] == [100, 1000, 8142]
    assert all(cost["count_seconds"] > 0 and cost["draw_seconds"] > 0 for cost in measured["pairs"])
    assert set(measured["peak_memory_bytes"]) == set(rounds)


def test_bench_table_omits_stage2_if_the_recipe_has_none(digits: Path) -> None:
    flags = ("--data", digits, "--rounds", 1, "--seconds", 0, "--device", "cpu")
    result = must("bench", "--recipe", "cross-entropy", *flags)  # of the data set
    titles = [line.split("  ")[0] for line in result.stdout.splitlines()]
    assert titles[0] == "loop"
    assert titles[2].startswith("reference loop: PIL, ")
    assert [t.split(",")[0] for t in titles if t.startswith("cpmix ")] == ["cpmix stage1", "cpmix finetune"]
    assert "projected for digits/cross-entropy: stage1 " in result.stdout
    assert "stage2" not in result.stdout
    assert "1 round, " in result.stderr


@pytest.mark.slow
def test_bench_compares_experts_with_the_plain_network(digits: Path) -> None:
    flags = ("--data", digits, "--rounds", 2, "--seconds", 0, "--device", "cpu", "--set", "model.precision=fp32")
    idle = ("draw=natural", "loss=cross-entropy", "teacher=distillation", "weight=0")  # it does not count
    settings = ("model.experts=2", "model.expert_width=0.75", *(f"stage1.terms.idle.{key}" for key in idle))
    command = ("bench", "--recipe", "digits/cross-entropy", *(f for s in settings for f in ("--set", s)), *flags)
    measured = must(*command, "--json").json
    rounds = measured["images_per_second_by_round"]
    ratio = median(a / b for a, b in zip(rounds["network_stage1_fp32"], rounds["plain"], strict=True))
    assert measured["ratio_to_plain_network"] == {"loop": ratio}
    table = must(*command).stdout
    assert "network only, plain, fp32 " in table
    assert "experts to the plain network of full width, each alone, images/s: loop " in table
    plain = must("bench", "--recipe", "digits/cross-entropy", *flags, "--json").json
    assert plain["ratio_to_plain_network"] == {}


def test_bench_needs_images(toy: Path) -> None:
    refused(3, f"{toy} holds points", "bench", "--data", toy)


def test_bench_reports_a_recipe_error_before_it_measures(digits: Path) -> None:
    said = 'stage2.terms.cp.partner = "confusing": unknown'
    command = ("bench", "--data", digits, "--set", "stage2.terms.cp.partner=confusing")
    assert refused(2, said, *command).stdout == ""


def test_bench_ingredients_compares_steps_with_and_without(digits: Path) -> None:
    """Each round has a ratio; an ingredient that the recipe or the data do not allow is left out with the reason."""
    flags = ("--data", digits, "--rounds", 2, "--seconds", 0, "--device", "cpu", "--set", "model.precision=fp32")
    command = ("bench", "--ingredients", "--recipe", "digits/cpmix", *flags)
    measured = must(*command, "--set", "data.augment=crop-flip", "--json").json
    rows = measured["ingredients"]
    assert list(rows) == [title for title in INGREDIENTS if title != "Cutout"]
    assert measured["left_out"] == {"Cutout": "data.cutout = 16: the images have 8 x 8 pixels"}
    for title, row in rows.items():
        assert row["phase"] == ("finetune" if title == "H2T" else "stage1")
        assert row["settings"] == list(INGREDIENTS[title].on)
        assert len(row["ratio_by_round"]) == 2 and row["ratio"] == median(row["ratio_by_round"])
        assert min(row["seconds_with"], row["seconds_without"], *row["ratio_by_round"]) > 0
    assert rows["three balanced experts"]["ratio"] > 1.3
    same = {row["seconds_without"] for title, row in rows.items() if title not in ("three balanced experts", "H2T")}
    assert len(same) == 1  # loops of equal recipes are one loop
    lines = must(*command).stdout.splitlines()
    assert " ".join(lines[0].split()) == "ingredient phase s/step without with ratio lowest .. highest settings"
    shown = ["AutoAugment", "averaged weights", "three balanced experts", "H2T"]
    assert [line.split("  ")[0] for line in lines[2:-3]] == shown
    flip = 'left out: alternating flips: data.flip = "alternating" needs data.augment = "resized-crop-flip" or "resiz'
    assert lines[-1].startswith(flip)


def test_bench_makes_one_report_at_a_time() -> None:
    refused(2, "--ingredients and --world-size are two different", "bench", "--ingredients", "--world-size", "1,8")
