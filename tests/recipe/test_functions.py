"""The outline that recipes are checked against is that of the functions themselves."""

import inspect
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest

from cpmix_cli import losses, mixing
from cpmix_cli.recipe import functions
from cpmix_cli.recipe.functions import FUNCTION_TABLES, Needs, bind, known, needs_of
from cpmix_cli.training.objective import FUNCTIONS


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
        with pytest.raises(NameError, match=r"losses\.py: LOSSES may only name functions of this file"):
            functions.outline("losses")
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
        with pytest.raises(NameError) as caught:
            functions.outline("losses")
    finally:
        functions.outline.cache_clear()
    message = f"{tmp_path}/losses.py: mse(): the parameter {parameter} cannot be read without importing {package}. "
    assert str(caught.value).startswith(message)
    assert "give the parameter a plain type and default" in str(caught.value)


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
