"""Recipes, safetensors headers and Parquet files as chance makes them: a user's error or a valid file, never a bug."""

import contextlib
import json
import tempfile
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tomli_w
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from cpmix_cli.artifacts import seals, tensors
from cpmix_cli.artifacts.tables import CONFUSION_SCHEMA, read_table, table_bytes
from cpmix_cli.recipe import loading as recipes
from cpmix_cli.runtime.errors import InputError, UsageError
from cpmix_cli.training.objective import compile_stage

settings.register_profile("cpmix", deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("cpmix")

SCALARS = st.one_of(
    st.booleans(),
    st.integers(-(2**63), 2**63 - 1),
    st.floats(),
    st.text(max_size=12),
    st.sampled_from(["cross-entropy", "confusion", "natural", "beta", "resnet8", "", "../x"]),
)
VALUES = st.recursive(
    SCALARS,
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.text("abcdefghij_-", min_size=1, max_size=8), inner, max_size=3)
    ),
    max_leaves=6,
)
BUILT_IN = sorted((Path(__file__).parents[2] / "recipes").glob("*/*.toml"))


@contextlib.contextmanager
def file_of(data: bytes, name: str) -> Iterator[Path]:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / name
        path.write_bytes(data)
        yield path


def load(data: bytes) -> None:
    """Load a recipe as a command does, to the compiled terms."""
    with file_of(data, "mine.toml") as path:
        try:
            recipe = recipes.load(str(path))
        except UsageError as fault:
            assert str(path) in fault.message or "recipe" in fault.message, fault
        else:
            for stage in (recipe.stage1, recipe.stage2, recipe.finetune):
                if stage is not None:
                    compile_stage(stage)


@settings(max_examples=300)
@given(st.binary(max_size=200) | st.text(max_size=200).map(lambda text: text.encode("utf-8", "surrogatepass")))
def test_any_bytes_as_a_recipe_load_or_are_refused(data: bytes) -> None:
    load(data)


def spots(tables: dict[str, Any]) -> list[tuple[dict[str, Any], str]]:
    found = []
    for key, value in tables.items():
        found.append((tables, key))
        if isinstance(value, dict):
            found += spots(value)
    return found


@settings(max_examples=400)
@given(st.data())
def test_a_recipe_with_changed_keys_loads_or_is_refused(data: st.DataObject) -> None:
    tables = tomllib.loads(data.draw(st.sampled_from(BUILT_IN)).read_text())
    for _ in range(data.draw(st.integers(1, 3))):
        table, key = data.draw(st.sampled_from(spots(tables)))
        match data.draw(st.sampled_from(["value", "gone", "new"])):
            case "value":
                table[key] = data.draw(VALUES)
            case "gone":
                table.pop(key, None)
            case "new":
                table[data.draw(st.text("abcdefgh_", min_size=1, max_size=6))] = data.draw(VALUES)
        if not tables:
            break
    load(tomli_w.dumps(tables).encode())


JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**70), 2**70) | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=12,
)
ENTRIES = st.fixed_dictionaries(
    {
        "dtype": st.sampled_from(["F32", "F64", "BF16", "I64", "BOOL", "F8_E4M3", "X"]) | JSON,
        "shape": st.lists(st.integers(-2, 2**40), max_size=4) | JSON,
        "data_offsets": st.lists(st.integers(-8, 2**40), min_size=2, max_size=2) | JSON,
    }
)
HEADERS = JSON | st.dictionaries(st.text(max_size=6), ENTRIES | JSON, max_size=4).flatmap(
    lambda entries: st.just(entries) | JSON.map(lambda m: {**entries, "__metadata__": {"cpmix": m}})
)


@pytest.mark.slow
@settings(max_examples=500)
@given(HEADERS, st.binary(max_size=64), st.integers(-9, 9))
def test_any_safetensors_header_is_read_or_refused(header: Any, data: bytes, off: int) -> None:
    text = json.dumps(header).encode()
    size = max(0, len(text) + (off if off % 3 == 0 else 0)).to_bytes(8, "little")
    with file_of(size + text + data, "x.safetensors") as path:
        for read in (tensors.read_tensors, seals.read_header, seals.read_sealed):
            try:
                read(path)
            except InputError as fault:
                assert str(path) in fault.message


@pytest.mark.slow
@settings(max_examples=500)
@given(
    st.lists(st.tuples(st.floats(0, 1, exclude_max=True), st.binary(min_size=1, max_size=9)), min_size=1, max_size=4)
)
def test_any_damaged_parquet_is_read_or_refused(edits: list[tuple[float, bytes]]) -> None:
    columns = {name: np.arange(50) % 7 + 1 for name in CONFUSION_SCHEMA.names}
    data = bytearray(table_bytes(CONFUSION_SCHEMA, columns))
    for place, new in edits:
        at = int(place * len(data))
        data[at : at + len(new)] = new
    with file_of(bytes(data), "x.parquet") as path:
        try:
            read_table(path, CONFUSION_SCHEMA)
        except InputError as fault:
            assert str(path) in fault.message
