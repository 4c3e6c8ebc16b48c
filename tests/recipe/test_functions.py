"""The outline that recipes are checked against is that of the functions themselves."""

import inspect
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
from helpers import refused

from cpmix_cli import losses, mixing, models
from cpmix_cli.recipe import functions
from cpmix_cli.recipe.functions import FUNCTION_TABLES, Needs, bind, known, needs_of
from cpmix_cli.runtime.errors import UsageError
from cpmix_cli.training.objective import functions as all_functions

FUNCTIONS = all_functions()


@pytest.mark.parametrize("kind", FUNCTION_TABLES)
def test_the_outline_has_the_functions_and_parameters_of_the_modules(kind: str) -> None:
    outlined = known(kind)
    assert list(outlined) == list(FUNCTIONS[kind])
    for name, function in FUNCTIONS[kind].items():
        keywords = [p for p in inspect.signature(function).parameters.values() if p.kind is p.KEYWORD_ONLY]
        assert repr(list(inspect.signature(outlined[name]).parameters.values())) == repr(keywords)


def test_a_table_that_the_outline_cannot_read_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "losses.py").write_text("import torch\nSCALE = torch.ones(1)\nLOSSES = {'mse': torch.nn.MSELoss}\n")
    monkeypatch.setattr(functions, "__file__", str(tmp_path / "recipe" / "functions.py"))
    functions.outline.cache_clear()
    try:
        with pytest.raises(UsageError, match=r"losses\.py, line 3: LOSSES names torch") as caught:
            functions.outline("losses")
        assert caught.value.fix == f"name only functions that are defined in {tmp_path / 'losses.py'}"
    finally:
        functions.outline.cache_clear()


@pytest.mark.parametrize(("parameter", "package"), [("kind: torch.dtype", "torch"), ("scale: float = np.pi", "np")])
def test_a_parameter_that_cannot_be_read_is_an_error(
    parameter: str, package: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = f"import numpy as np\nimport torch\ndef mse(logits, *, inputs: int, {parameter}): ...\n"
    (tmp_path / "losses.py").write_text(text)
    monkeypatch.setattr(functions, "__file__", str(tmp_path / "recipe" / "functions.py"))
    functions.outline.cache_clear()
    try:
        functions.outline("losses")  # a helper that no table names may have any parameter
        (tmp_path / "losses.py").write_text(f"{text}LOSSES = {{'mse': mse}}\n")
        functions.outline.cache_clear()
        with pytest.raises(UsageError) as caught:
            functions.outline("losses")
    finally:
        functions.outline.cache_clear()
    message = (
        f"{tmp_path}/losses.py, line 3: mse(): the parameter {parameter} cannot be read without importing {package}"
    )
    assert caught.value.message == message
    assert "give the parameter a plain type and default" in caught.value.fix


ARGUMENTS = "logits, labels, weights, class_counts"


@pytest.mark.parametrize(
    ("parameters", "message", "fix"),
    [
        (f"{ARGUMENTS}, *, eps", "mine(): the parameter eps has no type", "such as eps: float, or eps: float = 1.0"),
        (
            f"{ARGUMENTS}, *, eps=2.0",
            "mine(): the parameter eps has no type",
            "such as eps: float, or eps: float = 1.0",
        ),
        (f"{ARGUMENTS}, eps: float", f"mine() takes {ARGUMENTS}, eps; a ", f"def mine({ARGUMENTS}, *, eps: float)"),
        (f"{ARGUMENTS}, eps=2.0", f"mine() takes {ARGUMENTS}, eps; a ", f"def mine({ARGUMENTS}, *, eps: float = 2.0)"),
        ("logits, y", f"a function of LOSSES gets {ARGUMENTS}", "def mine(logits, y, weights, class_counts)"),
    ],
)
def test_a_function_that_no_recipe_can_call_is_refused(
    parameters: str, message: str, fix: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    own = tmp_path / "losses.py"
    text = (
        (Path(losses.__file__)).read_text().replace("LOSSES: dict", f"def mine({parameters}): ...\n\n\nLOSSES: dict", 1)
    )
    line = text[: text.index("def mine")].count("\n") + 1
    own.write_text(
        text.replace('    "cross-entropy": cross_entropy,', '    "cross-entropy": cross_entropy,\n    "mine": mine,')
    )
    (tmp_path / "mixing.py").write_text(Path(mixing.__file__).read_text())
    (tmp_path / "models.py").write_text(Path(models.__file__).read_text())
    monkeypatch.setattr(functions, "__file__", str(tmp_path / "recipe" / "functions.py"))
    functions.outline.cache_clear()
    try:
        result = refused(
            2, f"error: {own}, line {line}: ", "recipes", "digits/cpmix", "--set", "stage1.terms.erm.loss=mine"
        )
    finally:
        functions.outline.cache_clear()
    said, _, told = result.stderr.partition("  fix: ")
    assert message in said
    assert fix in told


def test_outline_needs_equal_those_of_the_modules() -> None:
    """The outline has those of the modules; each is of a function that recipes can name."""
    found = {}
    for kind in FUNCTION_TABLES:
        for name, function in FUNCTIONS[kind].items():
            module = import_module(function.__module__) if inspect.isfunction(function) else None
            own = getattr(module, "NEEDS", {}).get(function, Needs())
            assert needs_of(kind, name) == own
            if own != Needs():
                found[name] = own
    assert len(found) == len(losses.NEEDS) + len(mixing.NEEDS)
    assert found["sade"].keys == {"model.experts": [3]}
    assert needs_of("loss", "no such loss") == Needs()


def scaled(x: float, *, factor: float, power: int = 1) -> float:
    return (factor * x) ** power


@pytest.mark.parametrize(
    ("names", "given", "expected"),
    [
        ({"mix": "scaled"}, {"factor": 2.0}, []),
        ({"mix": "scaled"}, {"factor": 2.0, "power": 3}, []),
        ({"mix": "scaled"}, {}, ['factor: missing (a parameter of mix = "scaled")']),
        ({"mix": "scaled"}, {"factor": "2"}, ["factor = '2': Input should be a valid number"]),
        (
            {"mix": "scaled"},
            {"factor": 2.0, "powr": 3},
            ['powr: unknown key. Did you mean "power"? Known: factor, loss, power.'],
        ),
        # The key may belong to the function that was meant.
        ({"mix": "scald"}, {"factor": 2.0}, ['mix = "scald": unknown. Did you mean "scaled"? Known: scaled.']),
    ],
)
def test_bind_returns_functions_or_errors(names: dict[str, str], given: dict[str, Any], expected: list[str]) -> None:
    bound, faults = bind(names, given, {"mix": {"scaled": scaled}}, ["loss"])
    assert faults == expected
    if not faults:
        assert bound["mix"](3.0) == 6.0 ** given.get("power", 1)
