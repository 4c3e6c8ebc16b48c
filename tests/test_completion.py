"""What a shell offers at TAB: by the variables with which its script calls cpmix, and by bash itself."""

import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest
from helpers import process

from cpmix_cli.completion import answer
from cpmix_cli.data.sources import SOURCES
from cpmix_cli.models import MODELS
from cpmix_cli.recipe.functions import FUNCTION_TABLES, known
from cpmix_cli.recipe.loading import load, recipe_names
from cpmix_cli.recipe.schema import Optimizer


def by_bash(*words: str) -> list[str]:
    variables = {"COMP_WORDS": "\n".join(("cpmix", *words)), "COMP_CWORD": str(len(words))}
    answered = answer("complete_bash", variables)
    assert answered is not None
    return answered[0].split("\n") if answered[0] else []


SHORT = {name.rpartition("/")[2] for name in recipe_names()}
FORMATS = ["table", "csv", "markdown", "latex", "json"]
TERM = "stage2.terms.cp"
NETWORKS = {*MODELS, "torchvision/", "timm/"}


@pytest.mark.parametrize(
    ("words", "offered"),
    [
        (("train-",), {"train-stage1", "train-stage2"}),
        (("--v",), {"--version"}),
        (("evaluate", "--threshold"), {"--threshold-for"}),
        (("train-stage1", "--recipe", ""), {*recipe_names(), *SHORT}),
        (("recipes", "digits/cpm"), {"digits/cpmix"}),
        (("build-lt", ""), set(SOURCES)),
        (("run", "--rho", "20", "dig"), {"digits"}),
        (("run", "digits", ""), set()),  # files
        (("evaluate", "--phase", ""), {"stage1", "stage2", "finetune"}),
        (("bench", "--device", "cu"), {"cuda"}),
        (("compare", "x", "--format", ""), set(FORMATS)),
        (("compare", "--format", "=", "mark"), {"markdown"}),  # = is a word of its own
        (("train-stage1", "--set", "optimizer.ki"), {f"optimizer.kind={k}" for k in ("", "sgd", "adam", "adamw")}),
        (("train-stage1", "--set", "optimizer.kind", "="), {"sgd", "adam", "adamw"}),
        (("train-stage1", "--set", "optimizer.nesterov", "=", "t"), {"true"}),
        (("train-stage1", "--set", "model.name", "="), NETWORKS),
        (("train-stage1", "--set=model.name=resnext"), {"--set=model.name=resnext50"}),
        (("run", "x", "--set", "model.name", "=", "torchvision/swin_v2"), {f"torchvision/swin_v2_{s}" for s in "bst"}),
        (("train-stage2", "--set", f"{TERM}.lab", "--see"), {"--seed"}),
        (("train-stage2", "--set", "stage2.terms.", ""), set()),
        (("train-stage1", "--epochs", ""), set()),
        (("nothing", ""), set()),
    ],
)
def test_the_words_that_fit_are_offered(words: Sequence[str], offered: set[str]) -> None:
    assert set(by_bash(*words)) == offered


def test_keys_are_those_of_the_schema_and_of_the_recipe_that_is_named(digits_run: Path) -> None:
    assert by_bash("train-stage1", "--set", "optimizer.") == [f"optimizer.{key}=" for key in Optimizer.model_fields]
    terms = load("cifar100-lt/cmo").tables()["stage1"]["terms"]
    offered = by_bash("train-stage1", "--recipe", "cifar100-lt/cmo", "--set", "stage1.terms.")
    assert {key.split(".")[2] for key in offered} == set(terms)
    own = by_bash("train-stage2", "--from", str(digits_run), "--set", f"{TERM}.t")
    assert own == [f"{TERM}.teacher=", f"{TERM}.t="]  # t is a parameter of the recipe's function
    for kind in FUNCTION_TABLES:
        key = "model.name" if kind == "model" else f"{TERM}.{kind}"
        assert set(known(kind)) == set(by_bash("train-stage2", "--set", key, "=")) - {"torchvision/", "timm/"}


def test_zsh_and_fish_get_what_their_scripts_read() -> None:
    line = {"_TYPER_COMPLETE_ARGS": "cpmix evaluate --device c"}
    assert answer("complete_zsh", line) == ('_arguments \'*: :(("cpu"\n"cuda"))\'', 0)
    assert answer("complete_zsh", {"_TYPER_COMPLETE_ARGS": "cpmix evaluate --from "}) == ("_files", 0)
    fish = {"_TYPER_COMPLETE_ARGS": "cpmix stat", "_TYPER_COMPLETE_FISH_ACTION": "get-args"}
    assert answer("complete_fish", fish) == ("status\tShow the state of runs and the next command of each", 0)
    asked = {"_TYPER_COMPLETE_FISH_ACTION": "is-args"}
    assert answer("complete_fish", {**fish, **asked}) == ("", 0)
    assert answer("complete_fish", {**asked, "_TYPER_COMPLETE_ARGS": "cpmix predict "}) == ("", 1)
    assert answer("source_bash", {}) is None  # Typer's


def test_bash_completes_with_the_script_of_show_completion(tmp_path: Path) -> None:
    script = process("--show-completion", "bash", env={"_TYPER_COMPLETE_TEST_DISABLE_SHELL_DETECTION": "1"}).stdout
    (tmp_path / "cpmix").write_text(f'#!/bin/sh\nexec {sys.executable} -m cpmix_cli "$@"\n')
    (tmp_path / "cpmix").chmod(0o755)
    typed = "COMP_WORDS=(cpmix train-stage1 --set optimizer.kind = ad); COMP_CWORD=5; _cpmix_completion cpmix"
    code = f'{script}\n{typed}\nprintf "%s\\n" "${{COMPREPLY[@]}}"'
    path = f"{tmp_path}{os.pathsep}{os.environ['PATH']}"
    found = subprocess.run(["bash", "-c", code], capture_output=True, text=True, env={**os.environ, "PATH": path})
    assert (found.stdout, found.stderr) == ("adam\nadamw\n", "")
