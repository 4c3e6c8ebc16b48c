"""recipes --copy: all that stands beside the recipes, to edit, and what a user edited is never replaced."""

import re
import subprocess
from pathlib import Path

import pytest
from helpers import edit_record, exact_contents, files, must, refused, unchanged

from cpmix_cli import cli
from cpmix_cli.artifacts.files import sha256

RECIPES = Path(cli.__file__).parents[1] / "recipes"
RECORD = ".cpmix-recipes.json"


def test_copies_are_whole_and_scripts_name_each_other_by_their_place(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    result = must("recipes", "--copy", "my own")
    assert result.stdout.splitlines() == [
        "edit a recipe, then give its file: --recipe 'my own/cifar100-lt/cpmix.toml'",
        f"done: my own ({len(files(RECIPES))} files of {len(files(RECIPES))} written)",
    ]
    assert result.stderr == "next: cpmix run digits --recipe 'my own/digits/cpmix.toml'\n"
    copied = exact_contents(Path("my own"))
    assert copied.keys() - {RECORD} == exact_contents(RECIPES).keys()
    for name, data in copied.items():
        if Path(name).suffix not in (".sh", ".sbatch"):
            assert name == RECORD or data == (RECIPES / name).read_bytes()
            continue
        for place in re.findall(r"'my own'/([\w/.-]+)", data.decode()):
            assert Path("my own", place).exists(), (name, place)
        assert subprocess.run(["bash", "-n", f"my own/{name}"], check=False).returncode == 0
        assert not re.search(r"(?<![$\w/])recipes/\w", data.decode())
    with unchanged(Path("my own")):
        assert must("recipes", "--copy", "my own").stdout.endswith(
            f"up to date: my own (0 files of {len(files(RECIPES))} written)\n"
        )
    Path("my own/digits/cpmix.toml").unlink()
    assert must("recipes", "--copy", "my own", "--json").json["written"] == ["digits/cpmix.toml"]
    shown = must("recipes", "my own/digits/cpmix.toml", "--set", "optimizer.lr=0.5").stdout
    assert "lr = 0.5" in shown


@pytest.mark.slow
def test_what_a_user_wrote_or_edited_is_never_replaced(tmp_path: Path) -> None:
    own = tmp_path / "own"
    stranger = own / "digits" / "cpmix.toml"
    stranger.parent.mkdir(parents=True)
    stranger.write_text("mine")
    for more in ((), ("--overwrite",)):
        with unchanged(own):
            refused(4, "has 1 file that cpmix did not write, or that you edited: digits/cpmix.toml", *asked(own), *more)
    stranger.unlink()
    must(*asked(own))
    stranger.write_text(stranger.read_text() + "\n")
    refused(4, "digits/cpmix.toml", *asked(own), "--overwrite")
    # Another version of cpmix made this copy, and nobody edited it.
    record = {name: sha256(data) for name, data in exact_contents(own).items() if name != RECORD}
    edit_record(own / RECORD, files=record)
    refused(4, "has 1 copy of another version of cpmix: digits/cpmix.toml", *asked(own))
    assert must(*asked(own), "--overwrite", "--json").json["written"] == ["digits/cpmix.toml"]
    assert stranger.read_bytes() == (RECIPES / "digits" / "cpmix.toml").read_bytes()
    stranger.unlink()
    stranger.symlink_to(RECIPES / "toy" / "cpmix.toml")
    refused(4, "digits/cpmix.toml", *asked(own), "--overwrite")


def asked(folder: Path) -> tuple[object, ...]:
    return ("recipes", "--copy", folder)


def test_flags_that_do_not_go_with_copies_are_refused(tmp_path: Path) -> None:
    refused(2, "--copy copies all recipes as they are, without name", "recipes", "digits/cpmix", *asked(tmp_path)[1:])
    refused(2, "--overwrite has no effect without --copy", "recipes", "digits/cpmix", "--overwrite")
    refused(2, "lies in the recipes of cpmix", *asked(RECIPES / "mine"))
    with unchanged(RECIPES):
        assert must(*asked(RECIPES), "--json").json["status"] == "up to date"
