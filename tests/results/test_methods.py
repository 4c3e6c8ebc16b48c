"""Methods as recipes: all of them listed, resolved, fit to train; what they cost and quote from the paper."""

import re
from pathlib import Path

import pytest
from helpers import cpmix, header, must, write_cifar

from cpmix_cli.commands.recipes import image_passes
from cpmix_cli.data.longtail import exponential_counts
from cpmix_cli.recipe.loading import find_recipe, load, recipe_names
from cpmix_cli.results.methods import KINDS, all_methods, read_about
from cpmix_cli.results.paper import PAPER_TABLES
from cpmix_cli.runtime.errors import UsageError

CIFAR = [name for name in recipe_names() if name.startswith("cifar")]
METHODS = [name for name in CIFAR if "ablation" not in name]
OF_TABLE_1 = ["Cross Entropy", "LDAM-DRW", "Balanced Softmax", "MiSLAS", "Remix", "CMO", "UniMix", "OTmix (BS)", "RIDE"]
OF_TABLE_1 += ["SADE", "ACE (from its description)", "CMO + RIDE", "OTmix + RIDE", "CP-Mix + RIDE", "CP-Mix"]
OURS = ["CP-Mix, mixed finetune", "CP-Mix, paper's finetune", "CP-Mix, pretrained", "CP-Mix, strong"]
OURS += ["CP-Mix, strong, one network", "CP-Mix, tuned"]
"""Methods of cpmix itself, without a paper."""
OTHERS = {
    "loss": ["LADE", "Focal", "Logit adjustment (loss)", "Logit adjustment (post hoc)"],
    "reweighting": ["Class-Balanced CE", "Class-Balanced Focal"],
    "mixing": ["Mixup", "CutMix", "RegMixup", "Remix-DRW", "CMO (BS)", "CMO (LDAM-DRW)"],
    "decoupled": ["H2T", "cRT", "LWS", "tau-norm"],
    "ensemble": ["RIDE, 3 experts", "RIDE, distilled", "RIDE, distilled and routed", "RIDE, images turned", "BalPoE"],
    "CP-Mix": ["CP-Mix on LADE", "CP-Mix on LDAM-DRW", "CP-Mix, last block", *OURS],
    "control": ["CP-Mix, class-uniform partner", "CP-Mix, random partner", "Mixup of similar pairs (toy)"],
}


def test_methods_lists_every_method_with_its_numbers_of_the_paper() -> None:
    listed = must("methods", "--json").json
    assert listed.keys() == {"command", "methods"}
    methods = {method["method"]: method for method in listed["methods"]}
    assert len(methods) == len(listed["methods"])
    ablations = [name for name, method in methods.items() if method["kind"] == "ablation"]
    others = {name: kind for kind, names in OTHERS.items() for name in names}
    assert methods.keys() == {*OF_TABLE_1, *others, *ablations}
    assert {name: methods[name]["kind"] for name in others} == others
    for method in methods.values():
        assert method.keys() == {"method", "kind", "paper", "needs", "recipes"}
        assert all(recipe.keys() == {"name", "cells", "copied", "note"} for recipe in method["recipes"])
        own = method["kind"] == "control" or method["method"] in ("Cross Entropy", *OURS)
        assert bool(method["paper"]) != own
    recipes = {recipe["name"]: recipe for method in methods.values() for recipe in method["recipes"]}
    cells: dict[str, dict[str, float]] = {name: {} for name in recipes}
    copied = dict.fromkeys(recipes, False)
    for key in ("table1", "table2", "table3", "table4"):
        for row in PAPER_TABLES[key].rows:
            for column, cell in zip(PAPER_TABLES[key].columns, row.cells, strict=True):
                place = {"table1": column.data.rpartition("-rho")[2], "table2": column.data}.get(key, key)
                for family in {column.family, "cifar100-lt" if key != "table1" else column.family}:
                    if cell is not None:
                        cells[f"{family}/{row.recipe}"][place] = float(cell)
                        copied[f"{family}/{row.recipe}"] |= row.copied
    assert {name: recipe["cells"] for name, recipe in recipes.items()} == cells
    assert {name: recipe["copied"] for name, recipe in recipes.items()} == copied
    assert methods["LADE"]["recipes"][1] == {
        "name": "cifar100-lt/lade",
        "cells": {"places-lt": 39.2, "inaturalist2018": 69.3},
        "copied": True,
        "note": "not the figures of LADE's own paper",
    }
    assert methods[ablations[4]]["recipes"][0]["cells"] == {"table3": 41.28, "table4": 51.8}
    kinds = [KINDS.index(method["kind"]) for method in listed["methods"]]
    assert kinds == sorted(kinds)


def test_the_table_marks_copied_numbers() -> None:
    lines = must("methods").stdout.splitlines()
    rows = {line.split("  ")[0]: line for line in lines[: lines.index("")]}
    assert rows["OTmix (BS)"].split()[3:6] == ["46.80*", "52.30*", "62.30*"]
    assert rows["CP-Mix"].split()[2:6] == ["43.56", "48.20", "52.12", "61.91"]
    assert re.search("  Yoon et al., arXiv 2024  +class counts, confusions$", rows["CP-Mix"])
    assert [line for line in lines if line.startswith("* copied")]
    assert [line for line in lines if line.startswith("CP-Mix  ")][1].split()[1:] == ["53.90", "42.30", "72.30"]
    assert [line for line in lines if line.startswith("LADE  ")][1].split()[1:] == ["39.20*", "69.30*"]
    assert lines[-3:-1] == [
        "all but ablations, balpoe, cpmix-mixed-finetune, cpmix-strong, cpmix-strong-single, cpmix-tuned, h2t, "
        "cpmix-last-block (places-lt) and fixed-pairs (toy) stand for cifar10-lt too",
        "with a number in the second table, for that data set too; ablations for imagenet-lt",
    ]


def test_every_recipe_of_cifar_has_an_about_table() -> None:
    for name in CIFAR:
        about = read_about(find_recipe(name))
        assert about is not None, name
        data, stem = name.split("/")
        if data == "cifar100-lt":
            assert about.kind is not None, name
        else:
            same = read_about(find_recipe(f"cifar100-lt/{stem}"))
            assert same is not None
            assert about.method == same.method
    recipes = [name for method in all_methods() for name in method.recipes]
    assert sorted(recipes) == recipe_names()


def test_the_error_for_a_bad_about_table_names_its_file(tmp_path: Path) -> None:
    path = tmp_path / "mine.toml"
    path.write_text('[about]\nkind = "magic"\ncells = { 200 = 1.0 }\nauthor = "me"\n')
    with pytest.raises(UsageError) as caught:
        read_about(path)
    text = str(caught.value)
    assert str(path) in text
    assert all(f"about.{key}" in text for key in ("method", "kind", "cells", "author"))
    path.write_text("seed = 1\n")
    assert read_about(path) is None


@pytest.mark.parametrize(
    ("name", "flags", "passes", "ratio"),
    [
        ("cifar100-lt/cpmix", [], 200 + 100 * 3 + 30, 1),
        ("cifar100-lt/balanced-softmax", [], 200 + 100 + 30, 330 / 530),
        ("cifar100-lt/regmixup", [], 350 * 2 + 30, 730 / 530),
        ("cifar100-lt/ablation-5", [], 200 + 100 * 2 + 30, 430 / 530),
        ("cifar100-lt/otmix", [], 240 + (237 * 238 - 4 * 5) / 2 / 240 + 30, (270 + 28193 / 240) / 530),
        ("cifar100-lt/cpmix", ["--epochs", 30], 20 + 10 * 3 + 3, 1),
        ("cifar100-lt/h2t", [], 200 + 10 * 2, 220 / 530),
        ("toy/cpmix", [], 7 + 3 * 3, 1),
    ],
)
def test_budget_counts_image_passes_and_ratio(name: str, flags: list[object], passes: float, ratio: float) -> None:
    result = must("recipes", name, "--budget", *flags, "--json").json
    assert result.keys() == {"command", "budgets"}
    (entry,) = result["budgets"]
    assert entry["name"] == name
    assert entry["image_passes"] == pytest.approx(passes, abs=1e-4)
    assert entry["to_cpmix"] == pytest.approx(ratio, abs=1e-4)


def test_budget_accepts_all_recipes_or_one_file(tmp_path: Path) -> None:
    listed = must("recipes", "--budget", "--json").json["budgets"]
    assert [entry["name"] for entry in listed] == recipe_names()
    entry = listed[recipe_names().index("cifar100-lt/cpmix")]
    assert entry.pop("name") == "cifar100-lt/cpmix"
    epochs = {"stage1_epochs": 200, "stage2_epochs": 100, "finetune_epochs": 30}
    assert entry == {**epochs, "image_passes": 530.0, "to_cpmix": 1.0}
    text = must("recipes", "--budget").stdout
    assert re.search(r"cifar100-lt/cpmix +200 \+ 100 \+ 30 +530\.0 +1\.00\n", text)
    path = tmp_path / "mine.toml"
    path.write_text('extends = "toy/cpmix"\n')
    (entry,) = must("recipes", path, "--budget", "--json").json["budgets"]
    assert (entry["image_passes"], entry["to_cpmix"]) == (16.0, None)
    assert cpmix("recipes", "cifar100-lt/nothing", "--budget").code == 2


def test_the_cost_in_each_header_equals_the_budget() -> None:
    """At rho 200 those of CIFAR."""
    totals = [int(exponential_counts(num_max, classes, 200).sum()) for num_max, classes in ((5000, 10), (500, 100))]
    assert totals == [11203, 9502]
    sizes = {"cifar10-lt": 11203, "cifar100-lt": 9502}
    sizes |= {"imagenet-lt": 115_846, "places-lt": 62_500, "inaturalist2018": 437_513}
    for name in recipe_names():
        if (data := name.partition("/")[0]) in sizes:
            at = " at rho 200" if data.startswith("cifar") else ""
            (cost,) = re.findall(rf"Cost{at}: [^=]*= ([\d.]+) million image passes", header(name))
            assert cost == f"{image_passes(load(name)) * sizes[data] / 1e6:.1f}", name


@pytest.fixture(scope="session")
def small_cifar(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("cifar")
    write_cifar(folder)
    must("build-lt", "cifar10", "--rho", 4, "--data-root", folder, "--out", folder / "lt")
    return folder / "lt"


@pytest.mark.slow
@pytest.mark.parametrize("name", CIFAR)
def test_every_recipe_of_cifar_is_fit_to_train(name: str, small_cifar: Path, tmp_path: Path) -> None:
    flags = ["--data", small_cifar, "--recipe", name, "--out", tmp_path / "run"]
    if any(term.teacher for term in load(name).stage1.terms.values()):
        plain = ("--recipe", "cifar10-lt/cross-entropy", "--set", "model.name=resnet8", "--epochs", 1)
        must("train-stage1", "--data", small_cifar, *plain, "--out", tmp_path / "teacher")
        flags += ["--teacher", tmp_path / "teacher"]
    assert must("train-stage1", *flags, "--dry-run", "--json").json["status"] == "dry run"
    assert not (tmp_path / "run").exists()
