"""--plugin: a loss of the user's own, from its file to a comparison, and what a run then asks for."""

import re
import shlex
from pathlib import Path

import pytest
from helpers import (
    contents,
    cpmix,
    fix_of,
    follow_fix,
    forget_signals,
    installed_wheel,
    must,
    process,
    refused,
    unchanged,
    write_image,
)

from cpmix_cli import cli, load
from cpmix_cli.runtime.errors import CpmixError

REPOSITORY = Path(cli.__file__).parents[1]
LOSS = (
    "import pathlib\nimport torch.nn.functional as F\n{extra}\n"
    "def mine(logits, labels, weights, class_counts, *, power: float = 0.75):\n"
    "    losses = F.cross_entropy(logits + power * class_counts.to(logits.dtype).log(), labels, reduction='none')\n"
    "    return (weights * losses).mean()\n"
    "LOSSES = {{'mine': mine}}\n"
)


def example() -> tuple[str, list[str]]:
    """The file and the commands of recipes/README.md, under "A loss of your own"."""
    text = (REPOSITORY / "recipes" / "README.md").read_text(encoding="utf-8")
    section = re.search(r"^### A loss of your own\n(.*?)^(?:#|\| key)", text, re.MULTILINE | re.DOTALL)
    assert section
    blocks = re.findall(r"(?:^    .*\n|^\n(?=    |\n))+", section[1], re.MULTILINE)
    code, commands = (re.sub(r"^    ", "", block, flags=re.MULTILINE).strip("\n") for block in blocks if block.strip())
    return f"{code}\n", commands.splitlines()


@pytest.mark.slow
def test_the_readme_s_loss_trains_and_is_compared(tmp_path: Path) -> None:
    """From an installed wheel, which has no file to add a loss to."""
    code, commands = example()
    assert len(code.splitlines()) <= 12
    assert [command.split()[1] for command in commands] == [
        *("build-lt", "train-stage1", "train-stage1", "evaluate", "evaluate", "compare")
    ]
    (tmp_path / "mine.py").write_text(code)
    # In one process, because torch takes seconds to load.
    all_of_them = (
        "import shlex, sys\nfrom cpmix_cli.cli import app\n"
        "for line in sys.argv[1:]: app(shlex.split(line)[1:], standalone_mode=False)"
    )
    env = {"PYTHONPATH": str(installed_wheel(tmp_path))}
    result = process(*commands, "cpmix recipes --copy own", code=all_of_them, cwd=tmp_path, env=env)
    assert result.code == 0, result.stderr
    assert "stage1: plugin mine.py, sha256 " in result.stderr
    rows = [line for line in result.stdout.splitlines() if re.match(r"\d  .*before", line)]
    assert len(rows) == 2
    assert sum("stage1.terms.erm.loss=softened" in row for row in rows) == 1
    assert sum("balanced-softmax" in row or "Balanced Softmax" in row for row in rows) == 1
    assert (tmp_path / "own" / "slurm" / "one-gpu.sbatch").is_file()


@pytest.mark.slow
@pytest.mark.long
def test_a_run_made_with_a_plugin_goes_on_only_with_the_same_file(
    digits: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("mine.py").write_text(LOSS.format(extra="pathlib.Path('ran').touch()"))
    sha = "sha256 [0-9a-f]{64}"
    asked = ("train-stage1", "--data", digits, "--out", "run", "--epochs", 2, "--set", "stage1.terms.erm.loss=mine")
    needs = "error: run/stage1 needs the plugin mine.py, sha256 "
    result = must(*asked, "--plugin", "mine.py")
    assert re.search("stage1: plugin mine.py, sha256 [0-9a-f]{12}, is recorded in the run\n", result.stderr)
    assert result.stderr.endswith("next: cpmix train-stage2 --from run --plugin mine.py\n")
    Path("ran").unlink()

    # Readers do not need it, and do not run it.
    with unchanged(Path("run")):
        assert "next: cpmix train-stage2 --from run --plugin mine.py" in cpmix("status", "run").stdout
        assert 'loss = "mine"' in must("recipes", "run/stage1/recipe.toml").stdout
        for command in (asked, ("train-stage2", "--from", "run"), ("finetune", "--from", "run", "--phase", "stage1")):
            assert re.search(f"{needs[:-7]}{sha}\n", refused(3, needs, *command).stderr)
        refused(3, needs, "evaluate", "--from", "run", "--phase", "stage1")
        write_image(Path("photo.png"))
        refused(3, needs, "predict", "photo.png", "--from", "run", "--phase", "stage1")
        refused(3, needs, "run", digits, "--out", "run", "--epochs", 2, "--set", "stage1.terms.erm.loss=mine")
    assert not Path("ran").exists()

    fix = follow_fix(cpmix("train-stage2", "--from", "run"))
    assert fix == "cpmix train-stage2 --from run --plugin mine.py"
    assert follow_fix(cpmix("evaluate", "--from", "run", "--phase", "stage2")).endswith(" --plugin mine.py")
    assert follow_fix(cpmix("predict", "photo.png", "--from", "run", "--phase", "stage2")).endswith("--plugin mine.py")
    assert "mine" in must("compare", "run").stdout
    fix = follow_fix(cpmix("confusion-report", "--from", "run", "--phase", "stage1"))
    assert fix == "cpmix evaluate --from run --phase stage1 --plugin mine.py"
    must("confusion-report", "--from", "run", "--phase", "stage2")
    assert "up to date" in must(*asked, "--plugin", "mine.py").stdout

    # A changed file is another input.
    old = Path("mine.py").read_text()
    Path("mine.py").write_text(f"{old}# changed\n")
    fix = fix_of(refused(3, needs, "train-stage2", "--from", "run"))
    assert fix == "restore mine.py, which has changed, then: cpmix train-stage2 --from run --plugin mine.py"
    with unchanged(Path("run")):
        refused(4, "run/stage1 was made from something else:\n    plugin: ", *asked, "--plugin", "mine.py")
        for command in (("train-stage2",), ("finetune", "--phase", "stage1"), ("evaluate", "--phase", "stage1")):
            result = refused(
                3, "run/stage1 was made with another plugin: mine.py", *command, "--from", "run", "--plugin", "mine.py"
            )
            assert len(re.findall(r"[0-9a-f]{64}", result.stderr)) == 2
    must(*asked, "--plugin", "mine.py", "--overwrite")
    assert "stale" in cpmix("status", "run").stdout
    Path("mine.py").unlink()
    fix = fix_of(refused(3, needs, "train-stage2", "--from", "run"))
    assert fix == (
        "mine.py is not there; give the file in place of FILE.py: cpmix train-stage2 --from run --plugin FILE.py"
    )


@pytest.mark.slow
def test_a_phase_that_does_not_depend_on_the_plugin_takes_a_changed_one(
    digits: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Many versions of a stage 2 start from one stage 1."""
    monkeypatch.chdir(tmp_path)
    Path("mine.py").write_text(LOSS.format(extra=""))
    asked = ("--data", digits, "--epochs", 2, "--set", "stage2.terms.erm.loss=mine", "--plugin", "mine.py")
    must("train-stage1", *asked, "--out", "run")
    refused(3, "run/stage1 needs the plugin mine.py", "train-stage2", "--from", "run")
    Path("mine.py").write_text(LOSS.format(extra="").replace("power", "strength"))
    assert "up to date" in must("train-stage1", *asked, "--out", "run").stdout
    must("train-stage2", "--from", "run", "--plugin", "mine.py")
    refused(
        2,
        "stage2.terms.erm.power: unknown key",
        *("train-stage2", "--from", "run", "--out", "other", "--plugin", "mine.py"),
        "--set",
        "stage2.terms.erm.power=1",
    )
    must("evaluate", "--from", "run", "--phase", "stage1", "--plugin", "mine.py")
    # Of a file that the recipe names nothing of, nothing is recorded.
    result = must("train-stage1", "--data", digits, "--epochs", 2, "--out", "plain", "--plugin", "mine.py")
    assert "is not used: the recipe names none of it" in result.stderr
    assert result.stderr.endswith("next: cpmix train-stage2 --from plain\n")
    must("evaluate", "--from", "plain", "--phase", "stage1")


@pytest.mark.slow
def test_an_interrupted_phase_goes_on_with_the_plugin_alone(handlers: object, digits: Path, tmp_path: Path) -> None:
    mine, stop = tmp_path / "mine.py", tmp_path / "stop"
    signals = f"import signal\n    if pathlib.Path('{stop}').exists():\n        signal.raise_signal(signal.SIGTERM)"
    mine.write_text(LOSS.format(extra="").replace("    losses =", f"    {signals}\n    losses ="))
    asked = ("train-stage1", "--data", digits, "--epochs", 2, "--set", "stage1.terms.erm.loss=mine")
    must(*asked, "--out", tmp_path / "whole", "--plugin", mine)
    stop.touch()
    assert cpmix(*asked, "--out", tmp_path / "run", "--plugin", mine).code == 75
    forget_signals()
    stop.unlink()
    needs = f"error: {tmp_path}/run/stage1 needs the plugin mine.py, sha256 "
    refused(3, needs, *asked, "--out", tmp_path / "run")
    shown = cpmix("status", tmp_path / "run").stdout
    must(*shlex.split(shown.partition("next: cpmix ")[2]))
    assert contents(tmp_path / "run") == contents(tmp_path / "whole")


@pytest.mark.slow
@pytest.mark.long
def test_run_gives_its_plugin_to_every_step(digits: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With a network, a mix and a label rule of the user's own too."""
    monkeypatch.chdir(tmp_path)
    Path("mine.py").write_text(
        "from __future__ import annotations\n"
        + LOSS.format(extra="from cpmix_cli.models import CifarResNet")
        + "def half(x1, x2, lam, uniforms):\n    return 0.5 * (x1 + x2), lam\n"
        "def rarer(lam, n1, n2, *, sharpness: float):\n"
        "    return n2 ** sharpness / (n1 ** sharpness + n2 ** sharpness)\n"
        "def tiny(num_classes, shape, recipe):\n"
        "    return CifarResNet(num_classes, num_channels=shape[-1], blocks=1, width=4)\n"
        "MIXES = {'half': half}\nMIX_UNIFORMS = {'half': 0}\nLABELS = {'rarer': rarer}\nMODELS = {'tiny': tiny}\n"
    )
    terms = ["stage1.terms.erm.loss=mine", "stage2.terms.cp.mix=half", "stage2.terms.cp.label=rarer"]
    settings = [*terms, "stage2.terms.cp.sharpness=0.5", "model.name=tiny"]
    asked = ("run", digits, "--out", "run", "--epochs", 2, *(word for s in settings for word in ("--set", s)))
    must(*asked, "--plugin", "mine.py")
    assert "next:" not in must("status", "run").stdout
    result = refused(3, "needs the plugin mine.py", *asked)
    assert fix_of(result).startswith("cpmix run ")
    assert fix_of(result).endswith(" --plugin mine.py")
    assert "up to date: run" in must(*shlex.split(fix_of(result))[1:]).stdout
    write_image(Path("photo.png"))
    must("predict", "photo.png", "--from", "run", "--plugin", "mine.py")
    refused(3, "needs the plugin mine.py", "export", "--from", "run", "--format", "pt2")
    model = load("run", device="cpu", plugin="mine.py")
    assert len(model.predict("photo.png")) == 1
    with pytest.raises(CpmixError, match=r"needs the plugin mine\.py, sha256 ") as caught:
        load("run", device="cpu")
    assert caught.value.fix == f'give its file: cpmix_cli.load(..., plugin="{Path("mine.py").resolve()}")'
