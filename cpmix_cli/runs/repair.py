"""Repair commands: the command that writes a damaged file again, from the folder that the file is in."""

import os
import re
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from cpmix_cli.artifacts import files, records
from cpmix_cli.artifacts.files import DATASET, MODEL, PHASES, RECIPE, RUN, TRAINING_STATE
from cpmix_cli.artifacts.seals import read_sealed
from cpmix_cli.data.dataset import DatasetRecord
from cpmix_cli.recipe.loading import load
from cpmix_cli.runs.folders import PhaseFolder, beside
from cpmix_cli.runs.next_command import TRAINING_COMMANDS, training_words
from cpmix_cli.runs.plugin_needs import plugin_words, plugin_words_of
from cpmix_cli.runs.run_json import BegunRecord, PhaseRecord, StateRecord, state_record
from cpmix_cli.runtime import console
from cpmix_cli.runtime.errors import CpmixError, InputError
from cpmix_cli.runtime.text import quoted

_RECIPE_FLAGS = ("--recipe", "--set", "--epochs", "--seed")
_INPUT_FLAGS = ("--init", "--teacher")


def fix_of(fault: InputError) -> str:
    """Return the fix of an error: its own, else the command that repairs its file."""
    return fault.fix or (repair_command(fault.path) if fault.path is not None else "")


def repair_command(path: Path) -> str:
    """Return the command that repairs a damaged file, or a sentence if the folder does not tell all of its flags.

    Args:
        path: file that is missing, damaged, or of another kind.
    """
    folder = beside(path.parent, ".")
    path = folder / path.name
    try:
        if files.is_there(folder / DATASET) or path.name == DATASET:
            command = _build(path)
        elif folder.parent.name == "evaluation" and not files.is_there(folder / TRAINING_STATE):
            phase, _, label = folder.name.partition("-")
            command = _again("evaluate", folder, phase, plain=not label)
        elif folder.parent.name == "confusion" and not files.is_there(folder / TRAINING_STATE):
            phase, _, label = folder.name.partition("-")
            command = _again("confusion-report", folder, phase, plain=not label)
        elif folder.name in PHASES:
            command = _train(PhaseFolder(folder.parent, folder.name), path)
        else:
            return f"restore {path} from a copy, or give another file"
    except (CpmixError, OSError):  # this folder, or one that it refers to, cannot be read
        return f"restore {path} from a copy, or run the command that wrote it again with --overwrite"
    if os.path.lexists(path) and not path.is_file():  # a file replaces no folder; none is read from a pipe or a loop
        move = quoted("mv", path, f"{path}.moved")
        sentence = re.match("give [^:]*: ", command)  # a path may have a colon too
        start = sentence.end() if sentence else 0
        return f"{command[:start]}{move} && {command[start:]}"
    return command


def build_command(folder: Path, *more: str) -> str:
    """Return the build-lt command of a data set folder with more flags, which writes into a folder beside it."""
    command = _build(folder / DATASET)
    beside_it = folder.with_name(f"{folder.name}{''.join(more).replace('--', '-')}")
    return command.replace(" --overwrite", "").replace(quoted("--out", folder), quoted(*more, "--out", beside_it))


def _build(path: Path) -> str:
    """Return the build-lt command of a data set folder. A shard is packed again alone, other files with the whole."""
    folder = path.parent
    try:
        fields = records.read_fields(folder / DATASET)
        record = records.checked(folder / DATASET, DatasetRecord, fields)
    except CpmixError:
        command = f"cpmix build-lt SOURCE --out {quoted(folder)} --overwrite"
        return f"give its source, and its flags, in place of SOURCE: {command}"
    words: list[str] = ["build-lt", record.source]
    if record.rho is not None:
        words += ["--rho", str(record.rho).removesuffix(".0")]
    # The name of a data set has every flag that is not the default.
    if record.profile is not None and f"-{record.profile}" in record.name:
        words += ["--profile", record.profile]
    if record.storage == "shards":
        words += ["--pack", str(record.image_size)]
    elif record.storage == "files" and "-files" in record.name:
        words += ["--pack", "0"]
    if f"-{record.image_size}px" in record.name:
        words += ["--image-size", str(record.image_size)]
    words += ["--few-inclusive"] if record.few_inclusive else []
    words += ["--subset-seed", str(record.subset_seed)] if record.subset_seed else []
    words += ["--val-per-class", str(record.val_per_class)] if record.val_per_class else []
    words += ["--val-capped"] if record.val_capped else []
    words += ["--layout", record.layout] if record.layout != "auto" else []
    words += ["--image-column", record.image_column] if record.image_column is not None else []
    words += ["--label-column", record.label_column] if record.label_column is not None else []
    words += ["--skip-unreadable"] if record.skip_unreadable else []
    if record.test_per_class and f"-test{record.test_per_class}" in record.name:
        words += ["--test-per-class", str(record.test_per_class)]
    lists, root = fields.get("source_files"), record.data_root
    words += ["--data-root", root] if root is not None else []
    command = console.typed(*words, "--out", folder)
    if path.suffix == ".shard":
        command = f"rm -f {quoted(path)} && {command}"
    else:
        command += " --overwrite"
    if lists and root is not None:  # the folder of the lists is not recorded
        return f"give the folder of its lists in place of DIR: {command} --list-dir DIR"
    return f"{command}; if it was built with a --data-root, give that as well" if lists else command


def _train(folder: PhaseFolder, path: Path) -> str:
    """Return the training command of a phase.

    A file that the training state implies is written again from it, in seconds; else the phase is trained again.
    """
    name = TRAINING_COMMANDS[folder.phase]
    begun, state = _records(folder)
    if begun is None:
        if folder.phase != "stage1":
            return console.typed(name, "--from", folder.run, "--overwrite")
        return f"train it from the beginning: run the {name} command of {folder.run} again with --overwrite"
    source = begun.source
    origin = PhaseFolder(beside(folder.run, source.run), source.phase) if source else None
    words = training_words(folder, state or begun, origin, has_stage2=True) + plugin_words(begun)
    words += [] if state else _typed_flags(folder, begun, _INPUT_FLAGS) or []
    recipe = _recipe_words(folder, begun, state, origin)
    resumes = state is not None and path.name != TRAINING_STATE and recipe is not None
    words += recipe or []
    if not resumes:
        words += ["--overwrite"]
    command = console.typed(*words)
    if resumes and (folder.path / RUN).is_file():
        command = f"rm {quoted(folder.path / RUN)} && {command}"
    if recipe is None:
        return f"give its recipe again in place of RECIPE, and the flags that changed it: {command} --recipe RECIPE"
    return command


def _records(folder: PhaseFolder) -> tuple[BegunRecord | None, StateRecord | None]:
    """Return the record of a phase from whichever file is whole, and that of its training state if that is whole."""
    begun: BegunRecord | None = None
    state: StateRecord | None = None
    with suppress(CpmixError):
        path = folder.path / TRAINING_STATE
        found = state_record(path, read_sealed(path)[0])
        if found.phase == folder.phase:
            begun = state = found
    with suppress(CpmixError):
        begun = folder.record()
    return begun, state


def _recipe_words(
    folder: PhaseFolder, begun: BegunRecord, state: StateRecord | None, origin: PhaseFolder | None
) -> list[str] | None:
    """Return the flags that give a phase its recipe again; None if they are unknown."""
    recorded = begun.outputs.get(RECIPE) if isinstance(begun, PhaseRecord) else state.recipe_sha256 if state else None
    beside_it = [PhaseFolder(folder.run, phase) for phase in PHASES]  # phases of a run mostly have one recipe
    equal = []
    for place in ([origin] if origin is not None else []) + [folder, *beside_it]:
        path = place.path / RECIPE
        with suppress(CpmixError):
            data = files.read_bytes(path)
            load(str(path), as_record=True)
            if files.sha256(data) == recorded or (recorded is None and place == folder):
                equal.append(place)
    if not equal:
        return _typed_flags(folder, begun, _RECIPE_FLAGS)
    # The command takes the recipe of the phase that it starts from.
    return [] if equal[0] == origin else ["--recipe", str(equal[0].path / RECIPE)]


def _typed_flags(folder: PhaseFolder, begun: BegunRecord, names: Sequence[str]) -> list[str] | None:
    """Return the flags with these names, and their values, of the command that trained a phase; None if unknown."""
    argv = begun.argv if isinstance(begun, PhaseRecord) else []
    if argv[1:2] != [TRAINING_COMMANDS[folder.phase]]:
        return None
    found: list[str] = []
    for number, word in enumerate(argv):
        name, equals, _ = word.partition("=")
        if name in names:
            found += [word] if equals else list(argv[number : number + 2])
    return found


def _again(name: str, folder: Path, phase: str, *, plain: bool = True) -> str:
    """Return the command that writes an evaluation or a report again: as it was typed, else with the plain flags.

    Args:
        name: "evaluate" or "confusion-report".
        folder: RUN/evaluation/NAME or RUN/confusion/PHASE.
        phase: phase that it is of.
        plain: False if flags that are not recorded decide what it contains.
    """
    run = folder.parent.parent
    argv: Any = []
    with suppress(CpmixError):
        argv = records.read_fields(folder / RUN).get("argv")
    typed = isinstance(argv, list) and argv[1:2] == [name]
    if typed and not plain:
        return console.typed(*argv[1:], *([] if "--overwrite" in argv else ["--overwrite"]))
    plugin = plugin_words_of(PhaseFolder(run, phase)) if name == "evaluate" else []
    command = console.typed(name, "--from", run, "--phase", phase, *plugin, "--overwrite")
    if plain and files.is_there(run / phase / MODEL):
        return command
    return f"run the {name} command that wrote {folder} again, with --overwrite"
