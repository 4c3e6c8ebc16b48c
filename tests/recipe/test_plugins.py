"""--plugin: a file with an error is refused with its line, and what it adds is gone after the command."""

from pathlib import Path

import pytest
from helpers import must, refused

from cpmix_cli.recipe import plugins
from cpmix_cli.recipe.functions import FUNCTION_TABLES, known, needs_of

ARGUMENTS = "logits, labels, weights, class_counts"
MINE = f"def mine({ARGUMENTS}, *, power: float = 0.75):\n    return 0\n"


@pytest.mark.parametrize(
    ("text", "message", "fix"),
    [
        ("def mine(:\n    pass\n", "line 1: invalid syntax", "correct it"),
        (f"\n{MINE}LOSSES = [mine]\n", "line 4: LOSSES is no dictionary, but list", 'write LOSSES = {"mine": mine}'),
        (f"{MINE}LOSSES = {{1: mine}}\n", "line 3: LOSSES has an entry that it must not have, 1", "write LOSSES = "),
        (f"{MINE}NEEDS = {{'mine': 1}}\nLOSSES = {{'mine': mine}}\n", "line 3: NEEDS has an entry", "write NEEDS = "),
        (
            f"def mine({ARGUMENTS}, *, power=1.0): ...\nLOSSES = {{'mine': mine}}\n",
            "line 1: mine(): the parameter power has no type",
            "write its type, such as power: float, or power: float = 1.0",
        ),
        (
            f"def mine({ARGUMENTS}, *, power: Power): ...\nLOSSES = {{'mine': mine}}\n",
            "line 1: mine(): the parameter power: Power cannot be read without importing Power",
            "give the parameter a plain type and default",
        ),
        (
            f"\ndef mine({ARGUMENTS}, *, power: float = 1 / 0): ...\nLOSSES = {{'mine': mine}}\n",
            "line 2: mine(): the parameter power: float = 1 / 0 cannot be read: division by zero",
            "give the parameter a plain type and default",
        ),
        (
            "def mine(logits, y): ...\nLOSSES = {'mine': mine}\n",
            f"line 1: mine() takes logits, y; a function of LOSSES gets {ARGUMENTS}, and its parameters after a *",
            "write def mine(logits, y, weights, class_counts)",
        ),
        (
            "import torch\nLOSSES = {'mse': torch.nn.MSELoss}\n",
            "line 2: LOSSES names torch",
            "name only functions that ",
        ),
        (f"{MINE}LOSSES = {{'sade': mine}}\n", 'line 3: "sade" of LOSSES is a loss of cpmix', 'such as "my-sade"'),
        (
            f"{MINE}LOSSES = {{'mine': mine}}\nENSEMBLE_LOSSES = {{'mine': mine}}\n",
            "LOSSES is in ",
            'such as "my-mine"',
        ),
        (
            f"def mine({ARGUMENTS}, *, weight: float): ...\nLOSSES = {{'mine': mine}}\n",
            'line 2: "mine" has the parameter weight, which is a key of each term',
            "give it another name",
        ),
        (
            "def net(num_classes, shape, recipe, *, width: int): ...\nMODELS = {'net': net}\n",
            'line 2: the network "net" has the parameter width, which no recipe can set',
            "give width a default, or bind it with functools.partial",
        ),
        (
            "def mine(x1, x2, lam, uniforms): ...\nMIXES = {'mine': mine}\n",
            'line 2: the mix "mine" is not in MIX_UNIFORMS',
            'write MIX_UNIFORMS = {"mine": V}, where V is how many random numbers it takes per image',
        ),
        (f"{MINE}LOSS = {{'mine': mine}}\n", "has no table of functions; the tables are ", 'LOSSES = {"mine": mine}'),
    ],
)
def test_a_file_with_an_error_is_refused_with_its_line(text: str, message: str, fix: str, tmp_path: Path) -> None:
    path = tmp_path / "mine.py"
    path.write_text(text)
    result = refused(2, f"error: {path}", "recipes", "digits/cpmix", "--plugin", path)
    said, _, told = result.stderr.partition("  fix: ")
    assert message in said
    assert fix in told


def test_a_file_that_cannot_be_read_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "mine.py"
    result = refused(3, f"{path}", "recipes", "digits/cpmix", "--plugin", path)
    assert "needed by: --plugin" in result.stderr


def test_parameters_are_recipe_keys_and_all_is_gone_after_the_command(tmp_path: Path) -> None:
    path = tmp_path / "mine.py"
    path.write_text(
        "from __future__ import annotations\n"
        "from cpmix_cli.recipe.functions import Needs\nfrom cpmix_cli.models import CifarResNet\n"
        f"{MINE}raise RuntimeError('no code runs where torch is not imported')\n"
        "def box(x1, x2, lam, uniforms): ...\nMIXES = {'my-box': box}\nMIX_UNIFORMS = {'my-box': 3}\n"
        "LOSSES = {'mine': mine}\nNEEDS = {mine: Needs({'model.head': ['cosine']})}\n"
    )
    before = {kind: dict(known(kind)) for kind in FUNCTION_TABLES}
    asked = ("recipes", "digits/cpmix", "--set", "stage2.terms.erm.loss=mine", "--set", "stage2.terms.erm.power=2")
    refused(2, 'loss = "mine" needs model.head = "cosine", not "linear"', *asked, "--plugin", path)
    asked = (*asked, "--set", "model.head=cosine", "--set", "stage2.terms.cp.mix=my-box")
    shown = must(*asked, "--plugin", path).stdout
    assert 'loss = "mine"' in shown
    assert "power = 2.0" in shown
    refused(2, 'stage2.terms.erm.loss = "mine": unknown.', *asked)
    assert {kind: dict(known(kind)) for kind in FUNCTION_TABLES} == before
    with plugins.joined(path):
        assert needs_of("loss", "mine").keys == {"model.head": ["cosine"]}
    assert plugins.current() is None


TABLE = f"{MINE}LOSSES = {{'mine': mine}}\n"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (f"import nowhere\n{TABLE}", "line 1: ModuleNotFoundError: No module named 'nowhere'"),
        (f"import json\njson.loads('{{')\n{TABLE}", "line 2: JSONDecodeError: Expecting property name"),
        (f"{TABLE}raise SystemExit(3)\n", "line 4: SystemExit: 3"),
        (f"{TABLE}if True:\n    LOSSES = {{'yours': mine}}\n", "when it runs, LOSSES has yours; written there is mine"),
    ],
)
def test_code_that_fails_when_it_runs_is_refused_with_its_line(
    text: str, message: str, digits: Path, tmp_path: Path
) -> None:
    path = tmp_path / "mine.py"
    path.write_text(text)
    result = refused(2, message, "train-stage1", "--data", digits, "--out", tmp_path / "run", "--plugin", path)
    assert f"error: {path}" in result.stderr
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_a_function_that_fails_in_a_step_is_refused_with_its_line(digits: Path, tmp_path: Path) -> None:
    path = tmp_path / "mine.py"
    path.write_text(
        f"def mine({ARGUMENTS}, *, power: float = 1.0):\n    return logits @ labels\n\n{TABLE[len(MINE) :]}"
    )
    asked = ("train-stage1", "--data", digits, "--out", tmp_path / "run", "--set", "stage1.terms.erm.loss=mine")
    refused(2, f"error: {path}, line 2: RuntimeError: ", *asked, "--plugin", path, "--dry-run")
