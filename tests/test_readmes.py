"""READMEs are true: commands can be typed, what is cited is there, and every key of the code has its line."""

import ast
import re
import shlex
from collections.abc import Iterator
from itertools import zip_longest
from pathlib import Path
from typing import Any

import pytest
import typer

from cpmix_cli import cli
from cpmix_cli.recipe import functions, schema
from cpmix_cli.recipe.loading import load, recipe_names
from cpmix_cli.training.metrics import metrics_schema

PACKAGE = Path(cli.__file__).parent
ROOT = PACKAGE.parent
READMES = sorted(
    path
    for name in ("README.md", "*/**/README.md", "recipes/RESULTS.md")
    for path in ROOT.glob(name)
    if path.relative_to(ROOT).parts[0] in ("README.md", "cpmix_cli", "recipes", "tests")
)
COMMANDS: dict[str, Any] = typer.main.get_command(cli.app).commands  # type: ignore[attr-defined]


def name_of(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def text_of(name: str) -> str:
    return (ROOT / name).read_text(encoding="utf-8")


def typed_in(text: str) -> Iterator[list[str]]:
    """The words after `cpmix` of every command line of a text, in blocks and within sentences."""
    lines = [line[4:] for line in text.replace("\\\n", " ").splitlines() if line.startswith("    ")]
    for line in lines + re.findall(r"`([^`\n]+)`", text):
        if found := re.match(r"(?:\$ )?(?:[A-Z_]+=\S+ )*(?:(?:torchrun|srun) .*-m cpmix_cli|cpmix) (.*)", line):
            words = shlex.split(re.split(r" \||;| && ", found[1])[0], comments=True)
            if words and not words[0].endswith((",", "...")):  # rows of a table, commands left open
                yield words


LINES = [
    pytest.param(words, id=f"{name_of(path)}: {' '.join(words)}")
    for path in READMES
    for words in typed_in(path.read_text("utf-8"))
]


@pytest.mark.parametrize("words", LINES)
def test_command_lines_can_be_typed(words: list[str]) -> None:
    name, *rest = words
    if name.startswith("-"):
        assert name in ("--help", "--version", "-h", "--install-completion")
        return
    assert name in COMMANDS
    flags = {flag: param for param in COMMANDS[name].params for flag in param.opts}
    for flag, value in zip_longest(rest, rest[1:], fillvalue=""):
        if flag.startswith("-"):
            assert flag in {*flags, "--help"}, flag
        if flag == "--recipe" and "/" in value and not value.endswith(".toml"):
            assert value in recipe_names()
        if flag == "--set" and "=" in value:
            assert value.partition("=")[0].split(".")[0] in schema.Recipe.model_fields, value


@pytest.mark.parametrize("path", READMES, ids=name_of)
def test_every_link_of_a_readme_exists(path: Path) -> None:
    for target, anchor in re.findall(r"\]\((?!https?:)([^)#\s]*)(?:#([\w-]+))?\)", path.read_text("utf-8")):
        found = (path.parent / target).resolve() if target else path
        assert found.exists(), target
        if anchor:
            headings = re.findall(r"^#+ (.*)$", found.read_text("utf-8"), re.MULTILINE)
            assert anchor in [re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings]
    for script in re.findall(
        r"\b(?:recipes|tests|cpmix_cli)/[\w/-]+\.(?:sh|sbatch|py|toml|md)\b", path.read_text("utf-8")
    ):
        assert (ROOT / script).exists(), script


def test_nothing_cites_a_file_that_is_not_here() -> None:
    texts = [
        *PACKAGE.rglob("*.py"),
        *PACKAGE.rglob("*.js"),
        *(ROOT / "recipes").rglob("*.*"),
        *(ROOT / "tests").rglob("*.py"),
        *READMES,
    ]
    for path in texts:
        if path != Path(__file__):
            assert not re.search(r"(?<![\w/])reference/\w|DESIGN\.md|\w+_\w+_design\.md", path.read_text("utf-8")), path


def test_messages_name_only_files_that_an_installed_package_has() -> None:
    """A user of a wheel has no tests, no Makefile, and the recipes after `cpmix recipes --copy`."""
    named = r"(?<!\w)(?:recipes|tests)/\w|Makefile|\b(?:losses|mixing|models|schema)\.py"
    for path in PACKAGE.rglob("*.py"):
        if not re.search(named, text := path.read_text("utf-8")):
            continue
        nodes = list(ast.walk(ast.parse(text)))
        docs = {id(node.value) for node in nodes if isinstance(node, ast.Expr)}
        for node in nodes:
            if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in docs:
                assert not re.search(named, node.value), f"{path}:{node.lineno}"
    for command in COMMANDS.values():
        assert not re.search(named, f"{command.help} {command.epilog}"), command.name


def test_every_flag_has_its_line() -> None:
    text = text_of("cpmix_cli/commands/README.md")
    for name, command in COMMANDS.items():
        section = re.search(rf"^### `{name}`\n(.*?)(?=^##)", text, re.MULTILINE | re.DOTALL)
        assert section, name
        rows = re.findall(r"^\| `([^`]+)` \| (.*) \|$", section[1], re.MULTILINE)
        expected = []
        for param in command.params:
            shown = param.opts[0] if param.opts[0].startswith("-") else param.metavar
            if shown not in ("--json", "--help"):
                expected.append((shown.replace("|", r"\|"), param.help.replace("|", r"\|")))
        assert rows == expected, f"{name}:\n" + "\n".join(f"| `{flag}` | {help} |" for flag, help in expected)


def keys_of(table: type[Any]) -> Iterator[str]:
    """The keys of a table of the recipe, and of the tables within it."""
    for name, field in table.model_fields.items():
        yield name
        for part in ast.walk(ast.parse(str(field.annotation).replace("<class '", "").replace("'>", ""), mode="eval")):
            inner = getattr(schema, getattr(part, "attr", ""), None)
            if isinstance(inner, type) and issubclass(inner, schema.Table):
                yield from keys_of(inner)


def test_every_recipe_key_has_its_line() -> None:
    lines = set(re.findall(r"^\| `(\w+)`", text_of("recipes/README.md"), re.MULTILINE))
    keys = set(keys_of(schema.Recipe))
    for kind in functions.TERM_KINDS:
        for name in functions.known(kind):
            keys |= set(functions.keywords(kind, name))
    assert {"t", "alpha", "milestones", "prefix", "tau_norm"} <= keys
    assert not keys - lines


def test_every_column_of_the_metrics_has_its_line() -> None:
    text = text_of("cpmix_cli/commands/README.md")
    assert all(f"\n| `{column}` | " in text for column in metrics_schema(["<term>"]).names)


def test_every_environment_variable_has_its_line() -> None:
    found = set()
    for path in PACKAGE.rglob("*.py"):
        source = path.read_text("utf-8")
        if "environ" in source or "envvar" in source:
            found |= {
                node.value
                for node in ast.walk(ast.parse(source))
                if isinstance(node, ast.Constant) and re.fullmatch(r"(?!GIT_)(?:[A-Z]+_)+[A-Z_]+|RANK", str(node.value))
            }  # those of git are set for it
    assert {"CPMIX_DATA_DIR", "RANK", "WORLD_SIZE", "SLURM_JOB_ID"} <= found
    text = text_of("cpmix_cli/commands/README.md")
    assert not {name for name in found if f"`{name}`" not in text}
    for script in (ROOT / "recipes" / "slurm").glob("*.s*"):
        for name in re.findall(r"\$\{([A-Z]+)[:-]", script.read_text("utf-8")):
            assert f"`{name}`" in text_of("recipes/slurm/README.md") or f"`{name}=" in text_of(
                "recipes/slurm/README.md"
            ), name


def test_recipes_load_that_readmes_name() -> None:
    named = set(
        re.findall(
            r"`((?:cifar100-lt|cifar10-lt|digits|toy|image-folder|imagenet-lt|places-lt|inaturalist2018)/[a-z0-9-]+)`",
            text_of("recipes/README.md"),
        )
    )
    assert named
    for name in named:
        load(name)
