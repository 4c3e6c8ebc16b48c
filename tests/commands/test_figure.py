"""The paper's figures from run folders: which run goes where, what is drawn, what is refused."""

import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from helpers import cpmix, edit_record, fix_of, must, refused, setting, trained
from PIL import Image

from cpmix_cli.artifacts import records
from cpmix_cli.data.sources import TOY_SIMILAR
from cpmix_cli.recipe.loading import load
from cpmix_cli.report import paper_figures
from cpmix_cli.results.methods import OBJECTIVES, minimised

MIXUP = setting(
    "partner=permutation", "ratio=beta", "alpha=1.0", "mix=linear", "label=lambda", table="stage1.terms.erm"
)


@pytest.fixture(scope="module")
def toys(toy: Path, _toy_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Runs on the toy data: the figure's four methods at rho 20, ERM once more with another seed and once at rho 5."""
    folder = tmp_path_factory.mktemp("toys")
    shutil.copytree(_toy_run, folder / "cpmix")
    for recipe in ("cross-entropy", "mixup", "fixed-pairs"):
        trained(toy, folder / recipe, "--recipe", f"toy/{recipe}")
    trained(toy, folder / "cross-entropy-1", "--recipe", "toy/cross-entropy", "--seed", 1)
    must("build-lt", "toy", "--rho", 5, "--out", folder / "data-rho5")
    trained(folder / "data-rho5", folder / "cross-entropy-rho5", "--recipe", "toy/cross-entropy")
    return folder


TOYS = ("cross-entropy", "cross-entropy-1", "cross-entropy-rho5", "mixup", "fixed-pairs", "cpmix")


@pytest.fixture(scope="module")
def hand(digits: Path, _digits_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Short runs on handwritten digits: four methods at rho 20, ERM without imbalance."""
    folder = tmp_path_factory.mktemp("hand")
    shutil.copytree(_digits_run, folder / "cpmix")
    plain = ("--recipe", "digits/balanced-softmax", "--epochs", 6, "--out", folder / "balanced-softmax")
    must("train-stage2", "--from", folder / "cpmix", *plain)
    must("evaluate", "--from", folder / "balanced-softmax")
    trained(digits, folder / "cross-entropy", "--recipe", "digits/cross-entropy", "--epochs", 2)
    trained(digits, folder / "mixup", "--recipe", "digits/cross-entropy", "--epochs", 2, *MIXUP)
    must("build-lt", "digits", "--rho", 1, "--out", folder / "data-rho1")
    trained(folder / "data-rho1", folder / "balanced", "--recipe", "digits/cross-entropy", "--epochs", 1)
    return folder


def matrix_of(run: Path, phase: str, num_classes: int) -> np.ndarray:
    """Counted anew from the evaluation's predictions."""
    table = pd.read_parquet(run / "evaluation" / phase / "predictions.parquet")
    matrix = np.zeros((num_classes, num_classes), dtype=np.int64)
    np.add.at(matrix, (table["label"], table["predicted"]), 1)
    return matrix


@pytest.mark.parametrize(
    ("recipe", "phase", "method"),
    [
        ("toy/cross-entropy", "stage1", "ERM"),
        ("toy/mixup", "stage1", "Mixup"),
        ("toy/fixed-pairs", "stage1", "similar-pair mixup"),
        ("toy/cpmix", "stage2", "CP-Mix"),
        ("toy/cpmix", "stage1", None),  # the first of its two
        ("cifar100-lt/cpmix", "finetune", "CP-Mix"),
        ("cifar10-lt/mixup", "finetune", "Mixup"),
        ("cifar100-lt/balanced-softmax", "stage2", "Balanced Softmax"),
        ("fashion-mnist-lt/cross-entropy", "stage1", "ERM"),
        ("cifar100-lt/crt", "stage1", "ERM"),
        ("cifar100-lt/crt", "finetune", None),
        ("cifar100-lt/logit-adjusted-posthoc", "stage1", None),
        ("cifar100-lt/cpmix-mixed-finetune", "finetune", None),
        ("cifar100-lt/cpmix-tuned", "stage2", "CP-Mix"),
        ("cifar100-lt/cpmix-random", "stage2", None),
        ("cifar100-lt/cpmix-on-lade", "stage2", None),
        ("cifar100-lt/ablation-6", "stage2", None),
        ("cifar100-lt/class-balanced", "stage1", None),
        ("cifar100-lt/ride", "stage1", None),
        ("cifar100-lt/remix", "stage1", None),
    ],
)
def test_a_method_is_named_by_the_terms_of_its_phase(recipe: str, phase: str, method: str | None) -> None:
    assert minimised(load(recipe), phase) == method


def test_a_term_of_weight_0_does_not_change_the_method() -> None:
    settings = [f"stage2.terms.{name}.weight=0" for name in ("cp", "mix")]
    assert minimised(load("toy/cpmix", settings=settings), "stage2") == "Balanced Softmax"


def test_fixed_pairs_of_the_toy_equal_the_pairs_of_figure_2() -> None:
    pairs = load("toy/fixed-pairs").stage1.terms["pairs"].parameters["pairs"]
    assert sorted(map(sorted, pairs)) == sorted(sorted(pair) for pair in TOY_SIMILAR.items())


def test_every_method_has_a_style() -> None:
    assert paper_figures.METHOD_STYLES.keys() == OBJECTIVES.keys()
    for key in ("color", "marker"):
        assert len({style[key] for style in paper_figures.METHOD_STYLES.values()}) == len(OBJECTIVES)


@pytest.mark.slow
def test_figure_2_is_the_same_for_any_order_of_runs(toys: Path, tmp_path: Path) -> None:
    runs = [toys / name for name in TOYS]
    out, again = tmp_path / "new" / "f.pdf", tmp_path / "again.svg"
    told = must("figure", 2, *runs, "--out", out, "--out", tmp_path / "f.svg", "--json").json
    assert [told[key] for key in ("command", "status", "figure")] == ["figure", "done", 2]
    assert told["files"] == [str(out), str(tmp_path / "f.svg")]
    assert [(r["panel"], r["method"], r["rho"], r["seed"], r["phase"]) for r in told["runs"]] == [
        ("(e)", "ERM", 5, 0, "stage1"),
        ("(b, e)", "ERM", 20, 0, "stage1"),
        ("(e)", "ERM", 20, 1, "stage1"),
        ("(c, e)", "Mixup", 20, 0, "stage1"),
        ("(d, e)", "similar-pair mixup", 20, 0, "stage1"),
        ("(f, e)", "CP-Mix", 20, 0, "stage2"),
    ]
    matrix = matrix_of(toys / "mixup", "stage1", 4)
    assert told["runs"][3]["top1"] == round(100 * matrix.trace() / 4000, 2)

    result = must("figure", 2, *reversed(runs), "--out", again)
    assert again.read_bytes() == (tmp_path / "f.svg").read_bytes()
    assert result.stdout.endswith(f"\ndone: {again}\n")
    result = must("figure", 2, *runs, "--out", again)
    assert result.stdout.endswith(f"\nup to date: {again}\n")

    pdf = out.read_bytes()
    assert pdf.startswith(b"%PDF")
    assert b"/FontFile2" in pdf
    assert b"/Type3" not in pdf
    assert b"CreationDate" not in pdf
    assert len(pdf) < 1_000_000


@pytest.mark.slow
def test_figure_2_counts_grey_as_red_and_yellow_as_purple(toys: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Any] = []
    draw = paper_figures.toy_example
    monkeypatch.setattr(paper_figures, "toy_example", lambda *args: seen.extend(args) or draw(*args))
    monkeypatch.chdir(toys)
    must("figure", 2, *TOYS, "--out", "spied.png")
    matrices = {name: matrix_of(toys / name, "stage2" if name == "cpmix" else "stage1", 4) for name in TOYS}
    confusion = {name: int(m[2, 0] + m[3, 1]) for name, m in matrices.items()}
    *_, regions, shown, results = seen
    assert list(regions) == list(shown) == ["ERM", "Mixup", "similar-pair mixup", "CP-Mix"]
    by_run = ("cross-entropy-rho5", "cross-entropy", "cross-entropy-1", "mixup", "fixed-pairs", "cpmix")
    assert [r.similar_confusion for r in results] == [confusion[name] for name in by_run]
    assert [r.similar_confusion for r in shown.values()] == [confusion[by_run[n]] for n in (1, 3, 4, 5)]
    assert [r.rho for r in results] == [5, 20, 20, 20, 20, 20]
    assert results[2].accuracy == pytest.approx(100 * matrices["cross-entropy-1"].trace() / 4000)
    # The paper's finding: mixing the similar pairs takes confusion away.
    assert confusion["fixed-pairs"] < confusion["cross-entropy"]


def test_figure_2_names_the_missing_run(toys: Path, toy: Path, tmp_path: Path) -> None:
    out = tmp_path / "f.pdf"
    runs = (toys / "cross-entropy", toys / "fixed-pairs", toys / "cpmix")
    result = refused(3, (), "figure", 2, *runs, "--out", out)
    assert result.stdout == ""
    assert result.stderr.endswith(
        "error: figure 2 needs a run of Mixup on toy-LT-20, trained and evaluated\n"
        "  needed by: figure 2\n"
        f"  fix: train one, and give ckpt/mixup as well: "
        f"cpmix train-stage1 --data {toy} --recipe toy/mixup --out ckpt/mixup && cpmix evaluate --from ckpt/mixup\n"
    )
    assert not out.exists()


def test_figure_2_refuses_runs_of_other_data(toys: Path, hand: Path) -> None:
    said = f"error: {hand / 'mixup'} is of digits-lt-rho20, and not of the toy data\n"
    refused(3, said, "figure", 2, toys / "cross-entropy", hand / "mixup")


def test_two_runs_of_one_seed_are_refused(toys: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(toys / "mixup", tmp_path / "copy")
    said = f"{toys / 'mixup' / 'stage1'} and {copy / 'stage1'} are both Mixup on toy-LT-20"
    refused(3, said, "figure", 2, *(toys / name for name in TOYS), copy)


def test_runs_of_different_subsets_are_not_shown_side_by_side(toys: Path, tmp_path: Path) -> None:
    must("build-lt", "toy", "--subset-seed", 1, "--out", tmp_path / "data")
    other = tmp_path / "other"
    must("train-stage1", "--data", tmp_path / "data", "--recipe", "toy/cross-entropy", "--seed", 2, "--out", other)
    said = f" and {other} are of different subsets of toy-LT-20\n"
    refused(3, said, "figure", 2, *(toys / name for name in TOYS), other)


def test_the_error_for_unplaced_runs_lists_the_methods_of_the_figure(toys: Path) -> None:
    run = toys / "cpmix"
    refused(3, f"error: none of {run} is a run of ERM or Mixup\n", "figure", 3, run)


def test_the_error_for_a_run_without_evaluation_gives_the_command(toys: Path, tmp_path: Path) -> None:
    bare = shutil.copytree(toys / "mixup", tmp_path / "bare", ignore=shutil.ignore_patterns("evaluation"))
    result = refused(3, (), "figure", 2, *(toys / name for name in TOYS if name != "mixup"), bare)
    assert result.stderr.endswith(
        f"error: no evaluation {bare / 'evaluation' / 'stage1'}\n"
        "  needed by: figure 2\n"
        f"  fix: cpmix evaluate --from {bare} --phase stage1\n"
    )


@pytest.mark.slow
def test_a_run_of_a_method_outside_the_figure_is_reported_and_unused(toys: Path, toy: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    draw = setting("stage1.terms.erm.draw=class-uniform")
    must("train-stage1", "--data", toy, "--recipe", "toy/cross-entropy", "--out", other, *draw)
    runs = [*(toys / name for name in TOYS), other, toys / "cpmix" / "stage1"]
    result = must("figure", 2, *runs, "--out", tmp_path / "f.svg")
    assert f"warning: {other / 'stage1'} is not used: it is none of ERM, Mixup, " in result.stderr
    assert f"warning: {toys / 'cpmix' / 'stage1'} is not used: it is none of ERM" in result.stderr


def test_figure_1_has_true_classes_along_x(hand: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    drawn = []
    draw = paper_figures.class_distribution
    monkeypatch.setattr(paper_figures, "class_distribution", lambda *a, **k: drawn.append(draw(*a, **k)) or drawn[0])
    told = must("figure", 1, hand / "cross-entropy", "--out", tmp_path / "f.png", "--json").json
    assert [(r["panel"], r["method"], r["dataset"]) for r in told["runs"]] == [("(a, b)", "ERM", "digits-lt-rho20")]
    left, right = drawn[0].axes[:2]
    assert (right.get_xlabel(), right.get_ylabel()) == ("true class", "predicted class")
    matrix = matrix_of(hand / "cross-entropy", "stage1", 10)
    np.testing.assert_array_equal(right.images[0].get_array().filled(0), matrix.T)
    numbers = np.array([t.get_text() or "0" for t in right.texts]).reshape(10, 10).astype(int)
    np.testing.assert_array_equal(numbers, matrix.T)
    assert [bar.get_height() for bar in left.patches] == [124, 88, 63, 45, 32, 23, 16, 12, 8, 6]
    with Image.open(tmp_path / "f.png") as image:
        assert image.size == (2925, 1390)


@pytest.mark.slow
def test_figure_3_recognises_the_balanced_run_by_its_data(hand: Path, tmp_path: Path) -> None:
    runs = [hand / name for name in ("balanced", "mixup", "cross-entropy")]
    told = must("figure", 3, *runs, "--out", tmp_path / "f.pdf", "--json").json
    assert [(r["panel"], r["method"], Path(r["run"]).name) for r in told["runs"]] == [
        ("(a, c)", "ERM", "cross-entropy"),
        ("(b)", "Mixup", "mixup"),
        ("(c)", "ERM", "balanced"),
    ]
    needs = "error: figure 3 needs a run of ERM on balanced digits, trained and evaluated\n"
    build = "to build the data: cpmix build-lt digits --rho 1 --out data/digits-lt-rho1\n"
    refused(3, (needs, build), "figure", 3, *runs[1:])
    said = (
        "is a run of ERM or Mixup on long-tailed data\n",
        "fix: train them as figures/figure3.sh of the recipes does: cpmix recipes",
    )
    refused(3, said, "figure", 3, runs[0], hand / "cpmix")


@pytest.mark.slow
def test_figure_4_needs_all_four_methods(
    hand: Path, digits: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn = []
    draw = paper_figures.class_accuracies
    monkeypatch.setattr(paper_figures, "class_accuracies", lambda *a, **k: drawn.append(draw(*a, **k)) or drawn[0])
    runs = [hand / name for name in ("cpmix", "mixup", "balanced-softmax", "cross-entropy")]
    told = must("figure", 4, *runs, "--out", tmp_path / "f.pdf", "--json").json
    assert [(r["panel"], r["method"]) for r in told["runs"]] == [
        ("(b)", "ERM"),
        ("(b)", "Mixup"),
        ("(b)", "Balanced Softmax"),
        ("(a, b)", "CP-Mix"),
    ]
    legend = [text.get_text() for text in drawn[0].subfigs[1].legends[0].get_texts()]
    assert legend == ["ERM", "Mixup", "Balanced Softmax", "CP-Mix, finetuned"]
    matrix, line = matrix_of(hand / "mixup", "stage1", 10), drawn[0].subfigs[1].axes[0].lines[1]
    np.testing.assert_allclose(line.get_ydata(), 100 * matrix.diagonal() / matrix.sum(1))
    result = refused(3, "needs a run of Balanced Softmax on digits-LT-20, trained", "figure", 4, *runs[:2], runs[3])
    train = "--recipe digits/balanced-softmax --out ckpt/balanced-softmax && cpmix train-stage2 --from"
    assert f"give ckpt/balanced-softmax as well: cpmix train-stage1 --data {digits} {train}" in result.stderr
    assert result.stderr.endswith(" && cpmix evaluate --from ckpt/balanced-softmax\n")
    refused(3, "are both Balanced Softmax on digits-LT-20\n", "figure", 4, *runs, runs[2])


@pytest.mark.slow
@pytest.mark.parametrize("number", [5, 6])
def test_figures_5_and_6_place_each_run_in_its_panel(number: int, hand: Path, tmp_path: Path) -> None:
    runs = [hand / name for name in ("balanced", "cpmix", "cross-entropy")]
    told = must("figure", number, *runs, "--out", tmp_path / "f.pdf", "--json").json
    placed = [(r["panel"], r["method"], r["rho"]) for r in told["runs"]]
    assert placed == [("(a)", "ERM", 20), ("(b)", "CP-Mix", 20), ("(c)", "ERM", 1)]


def test_figure_1_refuses_runs_of_two_data_sets(hand: Path) -> None:
    refused(3, "error: the runs are of 2 data sets: ", "figure", 1, hand / "cross-entropy", hand / "balanced")


def test_a_finetuned_run_is_shown_as_its_method(digits_run: Path, tmp_path: Path) -> None:
    told = must("figure", 6, digits_run, "--out", tmp_path / "f.pdf", "--json").json
    assert [(r["method"], r["phase"]) for r in told["runs"]] == [("CP-Mix", "finetune")]


def test_a_moved_data_set_is_found_by_data(hand: Path, digits: Path, tmp_path: Path) -> None:
    run = shutil.copytree(hand / "cross-entropy", tmp_path / "run")
    path = run / "stage1" / "run.json"
    gone = {"relative": "gone", "absolute": "/gone"}
    edit_record(path, dataset=records.read_fields(path)["dataset"] | gone)
    refused(3, "fix: give its folder with --data FOLDER\n", "figure", 1, run, "--out", tmp_path / "f.svg")
    must("figure", 1, run, "--out", tmp_path / "f.svg", "--data", hand / "data-rho1", "--data", digits)


@pytest.mark.slow
def test_another_file_at_out_is_kept_without_overwrite(hand: Path, tmp_path: Path) -> None:
    out = tmp_path / "thesis.pdf"
    out.write_text("two years of work")
    figure = ("figure", 1, hand / "cross-entropy", "--out")
    assert (
        refused(4, f"error: {out} exists and is not this figure\n", *figure, tmp_path / "f.svg", "--out", out).stdout
        == ""
    )
    assert out.read_text() == "two years of work"
    assert not (tmp_path / "f.svg").exists()
    result = refused(4, f"error: {out} exists and is not this figure\n", *figure, out, "--overwrite")
    assert fix_of(result) == "write elsewhere, or move it away first, because cpmix did not write it"
    assert out.read_text() == "two years of work"
    for kind in ("pdf", "svg", "png"):  # its own figures are replaced
        out = tmp_path / f"own.{kind}"
        must(*figure, out)
        whole = out.read_bytes()
        out.write_bytes(whole + b" ")
        assert fix_of(refused(4, (), *figure, out)) == "write elsewhere, or replace it with --overwrite"
        must(*figure, out, "--overwrite")
        assert out.read_bytes() == whole


def test_default_name_is_used_and_bad_arguments_refused(
    hand: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    result = must("figure", 1, hand / "cross-entropy")
    assert re.search(r"^\(a, b\)  ERM     digits-lt-rho20     0  stage1       2 ", result.stdout, re.MULTILINE)
    assert result.stdout.endswith("\ndone: figure1.pdf\n")
    assert [p.name for p in tmp_path.iterdir()] == ["figure1.pdf"]
    assert cpmix("figure", 1, hand / "cross-entropy", "--out", "f.jpg").code == 2
    assert cpmix("figure", 7, hand / "cross-entropy").code == 2
    assert cpmix("figure", 1).code == 2
    assert cpmix("figure", 1, tmp_path / "nowhere").code == 3


def test_figure_2_refuses_runs_of_a_method_that_differ_in_more_than_the_seed(toys: Path, toy: Path) -> None:
    other = toys / "slow"
    if not other.exists():
        trained(toy, other, "--recipe", "toy/cross-entropy", "--seed", 7, "--set", "optimizer.lr=0.05")
    runs = [toys / name for name in TOYS]
    refused(3, "are both ERM, and differ in optimizer.lr", "figure", 2, *runs, other, "--out", toys / "mixed.pdf")
    assert not (toys / "mixed.pdf").exists()
