"""The command to type next."""

from pathlib import Path

from cpmix_cli.recipe.schema import Recipe
from cpmix_cli.runtime import console

COMMANDS = {"stage1": "train-stage1", "stage2": "train-stage2", "finetune": "finetune"}


def remake(run: Path, phase: str, status: str) -> str:
    """The command that makes a phase."""
    if phase == "stage1":
        return console.typed(COMMANDS[phase], "--data", "DATA", "--out", run)
    return console.typed(COMMANDS[phase], "--from", run, *(["--overwrite"] if status == "stale" else []))


def next_command(run: Path, phase: str, recipe: Recipe) -> str:
    """What to type after a phase."""
    command = "evaluate"
    if phase == "stage1" and recipe.stage2 is not None:
        command = "train-stage2"
    elif phase in ("stage1", "stage2") and recipe.finetune is not None:
        command = "finetune"
    return console.typed(command, "--from", run)
