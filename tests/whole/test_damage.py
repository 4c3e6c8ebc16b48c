"""Files from outside: what rots, what strangers send, what is another's. Always exit 3 and the file's name."""

import gzip
import os
import pickle
import random
import shutil
import sys
import tarfile
import zlib
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from helpers import (
    Canary,
    cpmix,
    edit_record,
    ended,
    exact_contents,
    files,
    fix_of,
    flip,
    follow_fix,
    must,
    process,
    quick_first,
    refused,
    run_commands,
    unchanged,
    write_image,
)
from PIL import Image

from cpmix_cli.artifacts import records, tables
from cpmix_cli.artifacts.files import (
    CONFUSION_PAIRS,
    DATASET,
    MODEL,
    PHASES,
    RECIPE,
    RUN,
    TRAINING_STATE,
    is_there,
    sha256,
)
from cpmix_cli.artifacts.tensors import publish_tensors, read_tensors, sealed_metadata
from cpmix_cli.runtime.errors import InputError

# -- the sweep ---------------------------------------------------------------------------------------------------------

PLACES = 2000


def changed(data: bytes, rng: random.Random, number: int) -> bytes:
    """`data` with a byte changed, cut short, or longer."""
    place = (0, len(data) - 1)[number] if number < 2 else rng.randrange(len(data))
    match rng.randrange(8):
        case 0:
            return data[:place]
        case 1:
            return data[:place] + data[place + 1 :]
        case 2:
            return data + bytes([rng.randrange(256)])
        case 3:
            return data[:place] + bytes(min(16, len(data) - place)) + data[place + 16 :]
        case _:
            return data[:place] + bytes([data[place] ^ (1 << rng.randrange(8))]) + data[place + 1 :]


@pytest.mark.slow
@pytest.mark.long
def test_a_change_anywhere_is_noticed(toy: Path, toy_run: Path, tmp_path: Path) -> None:
    """Every file of every command, each read by that command again; 2,000 changes in all."""
    data = Path(shutil.copytree(toy, tmp_path / "data"))
    begun = tmp_path / "begun"
    again: dict[Path, tuple[object, ...]] = {
        data: ("build-lt", "toy", "--out", data),
        toy_run / "stage1": ("train-stage1", "--data", toy, "--out", toy_run),
        toy_run / "stage2": ("train-stage2", "--from", toy_run),
        toy_run / "evaluation" / "stage2": ("evaluate", "--from", toy_run),
        toy_run / "confusion" / "stage2": ("confusion-report", "--from", toy_run),
        begun / "stage1": ("status", begun),
    }
    shutil.copytree(toy_run / "stage1", begun / "stage1")
    interrupt(begun / "stage1")
    paths = [(folder / name, command) for folder, command in again.items() for name in files(folder)]
    paths.append((begun / "stage1" / TRAINING_STATE, ("train-stage1", "--data", toy, "--out", begun)))
    each = -(-PLACES // len(paths))
    rng = random.Random(0)
    silent, total = [], 0
    for path, command in paths:
        whole = path.read_bytes()
        for number in range(each):
            damaged = changed(whole, rng, number)
            if damaged == whole:
                continue
            path.write_bytes(damaged)
            total += 1
            result = cpmix(*command)
            said = (str(path), "\n  needed by: ", "\n  fix: ")
            if result.code != 3 or not all(words in result.stderr for words in said) or "Traceback" in result.stderr:
                silent.append(f"{path}: {command[0]} exit {result.code}: {result.stderr}")
        path.write_bytes(whole)
        assert cpmix(*command).code in (0, 75), path  # whole again (status: 75, to be continued)
        if command[0] == "train-stage1" and begun in path.parents:
            break  # that was the last: it is done now
    assert silent == []
    assert total >= PLACES * 0.97  # some changes change nothing


def interrupt(phase: Path) -> None:
    """Make a finished phase one that was interrupted before its last two files, sealed as such."""
    for name in files(phase):
        if name not in (RECIPE, TRAINING_STATE):
            (phase / name).unlink()


SEALED = "seals.check_seal(path, metadata, tensors.tensors_digest(found))"


@pytest.mark.slow
@pytest.mark.parametrize("read", [f"found, metadata = tensors.read_tensors(path); {SEALED}", "seals.read_sealed(path)"])
def test_a_damaged_file_takes_no_more_memory_than_three_times_its_size(tmp_path: Path, read: str) -> None:
    """In a process of its own, by the peak of its resident memory; three times the file at most."""
    path = tmp_path / "big.safetensors"
    size = 64 * 2**20
    tensors = {f"t{i}": torch.zeros(size // 16) for i in range(4)}
    publish_tensors(path, tensors, sealed_metadata(tensors, {}))
    whole = path.read_bytes()
    code = (
        "import resource, sys\n"
        "from pathlib import Path\n"
        "from cpmix_cli.artifacts import seals, tensors\n"
        "from cpmix_cli.runtime.errors import InputError\n"
        "before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        "path = Path(sys.argv[1])\n"
        "try:\n"
        f"    {read}\n"
        "    said = 'whole'\n"
        "except InputError: said = 'refused'\n"
        "print(said, 1024 * (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before))\n"
    )

    header = int.from_bytes(whole[:8], "little")
    places = {"whole": None, "size": 5, "header": 8 + header // 2, "data": 8 + header + size // 2}
    for name, place in places.items():
        path.write_bytes(whole)
        if place is not None:
            flip(path, place, 4)
        said, grown = process(path, code=code).stdout.split()
        assert said == ("whole" if name == "whole" else "refused"), name
        assert int(grown) <= 3 * len(whole), name


# -- other kinds of file in a file's place -----------------------------------------------------------------------------


def put_flipped(path: Path) -> None:
    shutil.copy(path.with_name("aside"), path)
    flip(path)


PLACEHOLDERS: dict[str, Callable[[Path], object]] = {
    "missing": lambda path: None,
    "flipped": put_flipped,
    "folder": Path.mkdir,
    "pipe": os.mkfifo,
    "loop": lambda path: path.symlink_to(path),
    "dangling": lambda path: path.symlink_to(path.with_name("nowhere")),
    "pickle": lambda path: path.write_bytes(pickle.dumps({"model": [1.0]})),
    "empty": lambda path: path.write_bytes(b""),
}


@pytest.mark.parametrize("kind", PLACEHOLDERS)
def test_paths_of_another_kind_in_place_of_files_are_refused(
    kind: str, toy: Path, toy_run: Path, tmp_path: Path
) -> None:
    data = Path(shutil.copytree(toy, tmp_path / "data"))
    evaluation = toy_run / "evaluation" / "stage2"
    stage2 = toy_run / "stage2"
    train = ("train-stage1", "--data", data, "--out", tmp_path / "new")
    again = ("evaluate", "--from", toy_run, "--data", data, "--overwrite")
    commands: list[tuple[Path, tuple[object, ...]]] = [
        (data / DATASET, ("build-lt", "toy", "--out", data)),
        *((data / name, train) for name in (DATASET, "train.safetensors", "class_counts.parquet")),
        *((data / name, again) for name in ("test.safetensors", "test.parquet")),
        (stage2 / RUN, ("train-stage2", "--from", toy_run)),
        (stage2 / MODEL, ("evaluate", "--from", toy_run, "--overwrite")),
        (stage2 / CONFUSION_PAIRS, ("train-stage2", "--from", toy_run)),
        (toy_run / "stage1" / TRAINING_STATE, ("train-stage2", "--from", toy_run, "--overwrite")),
        (evaluation / "predictions.parquet", ("confusion-report", "--from", toy_run, "--overwrite")),
        (evaluation / "metrics.json", ("evaluate", "--from", toy_run)),
    ]
    with unchanged(data, toy_run):
        for path, command in commands:
            if kind == "missing" and (path.name, command[0]) in ((DATASET, "build-lt"), (RUN, "train-stage2")):
                continue  # nothing was made yet
            aside = path.rename(path.with_name("aside"))
            PLACEHOLDERS[kind](path)
            refused(3, (path.name if kind == "missing" else str(path), "\n  fix: "), *command)
            path.rmdir() if kind == "folder" else path.unlink(missing_ok=True)
            aside.rename(path)
    assert not (tmp_path / "new").exists()


# -- the printed fix ---------------------------------------------------------------------------------------------------

RETRAINS = {"stage1": "train-stage1", "stage2": "train-stage2", "finetune": "finetune"}


def put_aside(path: Path, kind: str) -> None:
    path.rename(path.with_name("aside"))
    PLACEHOLDERS[kind](path)


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("class_counts.parquet", "missing"),
        ("class_counts.parquet", "pickle"),
        ("train.safetensors", "flipped"),
        ("train.safetensors", "folder"),
        ("test.parquet", "loop"),
    ],
)
def test_the_printed_fix_repairs_a_data_set(tmp_path: Path, name: str, kind: str) -> None:
    data = tmp_path / "my data"
    build = (
        "build-lt",
        "toy",
        "--rho",
        "12.5",
        "--val-per-class",
        20,
        "--subset-seed",
        3,
        "--few-inclusive",
        "--val-capped",
    )
    must(*build, "--out", data)
    expected = exact_contents(data)
    put_aside(data / name, kind)
    command = ("train-stage1", "--data", data, "--out", tmp_path / "run", "--dry-run")
    if name == "test.parquet":
        command = (*build, "--out", data)
    follow_fix(refused(3, str(data / name), *command))
    must(*command)
    (data / "aside").unlink()
    if kind in ("folder", "loop"):
        moved = data / f"{name}.moved"
        moved.unlink() if moved.is_symlink() else moved.rmdir()
    assert exact_contents(data) == expected


@pytest.mark.parametrize("kind", ["flipped", "empty", "folder", "pipe"])
def test_a_data_set_without_a_whole_record_is_to_be_built_with_its_own_flags(
    toy: Path, tmp_path: Path, kind: str
) -> None:
    """Only its record says what they were."""
    data = Path(shutil.copytree(toy, tmp_path / "data"))
    put_aside(data / DATASET, kind)
    fix = fix_of(refused(3, str(data / DATASET), "build-lt", "toy", "--out", data))
    advice, _, commands = fix.partition(": ")
    assert advice == "give its source, and its flags, in place of SOURCE"
    move = f"mv {data / DATASET} {data / DATASET}.moved && " if kind in ("folder", "pipe") else ""
    assert commands == f"{move}cpmix build-lt SOURCE --out {data} --overwrite"
    run_commands(commands.replace("SOURCE", "toy"))
    must("build-lt", "toy", "--out", data)


def test_the_printed_fix_works_in_a_folder_with_a_colon_in_its_name(toy: Path, tmp_path: Path) -> None:
    data = Path(shutil.copytree(toy, tmp_path / "toy: new"))
    put_aside(data / "train.safetensors", "folder")
    command = ("train-stage1", "--data", data, "--out", tmp_path / "run", "--dry-run")
    follow_fix(refused(3, str(data / "train.safetensors"), *command))
    must(*command)


OF_PHASES = [RUN, MODEL, "metrics.parquet", CONFUSION_PAIRS, "class_counts.parquet", RECIPE]


@pytest.mark.parametrize(
    ("name", "kind"),
    [*((name, "flipped") for name in OF_PHASES), (RUN, "folder"), (MODEL, "folder"), (MODEL, "missing")],
)
@pytest.mark.parametrize("phase", quick_first({phase: phase for phase in PHASES}, pytest.mark.slow))
def test_the_printed_fix_repairs_a_phase_from_its_training_state(
    digits: Path, digits_run: Path, phase: str, name: str, kind: str
) -> None:
    """In seconds, and so that later phases stay what they are."""
    command: tuple[object, ...] = (RETRAINS[phase], "--from", digits_run)
    if phase == "stage1":
        command = ("train-stage1", "--data", digits, "--out", digits_run, "--epochs", 6)
    folder = digits_run / phase
    weights, state = (sha256((folder / file).read_bytes()) for file in (MODEL, TRAINING_STATE))
    # The flags of the recipe are those in run.json, which here has the words of pytest.
    edit_record(folder / RUN, argv=["cpmix", *map(str, command)])
    put_aside(folder / name, kind)
    result = refused(3, str(folder / name), *command)
    assert "--overwrite" not in follow_fix(result)
    must(*command)
    assert [sha256((folder / file).read_bytes()) for file in (MODEL, TRAINING_STATE)] == [weights, state]


@pytest.mark.parametrize("phase", ["stage1", "stage2", "finetune"])
def test_the_printed_fix_trains_a_phase_with_a_damaged_state_again(digits: Path, digits_run: Path, phase: str) -> None:
    command: tuple[object, ...] = (RETRAINS[phase], "--from", digits_run)
    if phase == "stage1":
        command = ("train-stage1", "--data", digits, "--out", digits_run, "--epochs", 6)
    folder = digits_run / phase
    weights = (folder / MODEL).read_bytes()
    flip(folder / TRAINING_STATE)
    assert follow_fix(refused(3, str(folder / TRAINING_STATE), *command)).endswith(" --overwrite")
    must(*command)
    assert (folder / MODEL).read_bytes() == weights
    interrupt(folder)
    flip(folder / TRAINING_STATE)
    result = refused(3, str(folder / TRAINING_STATE), *command)
    if phase == "stage1":  # no other file has its data set
        said = f"train it from the beginning: run the train-stage1 command of {digits_run} again with --overwrite"
        assert fix_of(result) == said
        must(*command, "--overwrite")
    else:
        follow_fix(result)
    must(*command)
    assert (folder / MODEL).read_bytes() == weights


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        *((name, "flipped") for name in (RUN, "metrics.json", "predictions.parquet", "logits.safetensors")),
        *((RUN, kind) for kind in ("folder", "pickle")),
        *(("per_class.parquet", kind) for kind in ("missing", "folder")),
    ],
)
def test_the_printed_fix_repairs_an_evaluation(toy_run: Path, name: str, kind: str) -> None:
    path = toy_run / "evaluation" / "stage2" / name
    put_aside(path, kind)
    command = ("evaluate", "--from", toy_run)
    assert follow_fix(refused(3, str(path), *command)).endswith(
        f"cpmix evaluate --from {toy_run} --phase stage2 --overwrite"
    )
    must(*command)
    must("confusion-report", "--from", toy_run)


def test_the_printed_fix_repairs_a_labelled_evaluation(toy_run: Path) -> None:
    """Its label does not say which --set it was made with: that is in run.json, as it was typed."""
    command = ("evaluate", "--from", toy_run, "--set", "evaluation.tau_norm=1")
    must(*command)
    folder = toy_run / "evaluation" / "stage2-tau-norm-1"
    flip(folder / "metrics.json")
    plain = refused(3, str(folder / "metrics.json"), *command)
    assert fix_of(plain) == f"run the evaluate command that wrote {folder} again, with --overwrite"
    edit_record(folder / RUN, argv=["cpmix", *map(str, command)])
    follow_fix(refused(3, str(folder / "metrics.json"), *command))
    must(*command)


@pytest.mark.parametrize(
    "name",
    quick_first({name: name for name in (RUN, "confused_pairs.parquet", "confusion_matrix.parquet")}, pytest.mark.slow),
)
def test_the_printed_fix_repairs_a_report(toy_run: Path, name: str) -> None:
    path = toy_run / "confusion" / "stage2" / name
    flip(path)
    follow_fix(refused(3, str(path), "confusion-report", "--from", toy_run))
    must("confusion-report", "--from", toy_run)


def test_the_fix_of_weights_that_are_none_names_the_command_that_makes_some(toy: Path, tmp_path: Path) -> None:
    weights = tmp_path / "w.safetensors"
    weights.write_bytes(b"no such thing")
    result = refused(3, str(weights), "train-stage1", "--data", toy, "--init", weights, "--out", tmp_path / "run")
    assert fix_of(result) == "give a safetensors file; cpmix import-weights makes one of a PyTorch checkpoint"


# -- content that is wrong under the right hash ------------------------------------------------------------------------


def republish(folder: Path, name: str, sha: str) -> None:
    """Make run.json vouch for a file."""
    edit_record(folder / RUN, outputs={**records.read_fields(folder / RUN)["outputs"], name: sha})


def edit_state(path: Path, change: Callable[[dict[str, torch.Tensor]], object] = len, **metadata: object) -> str:
    """Change tensors and metadata of a training state and seal it again; returns its hash."""
    tensors, before = read_tensors(path)
    change(tensors)
    before.pop("digest")
    return publish_tensors(path, tensors, sealed_metadata(tensors, {**before, **metadata}))


def put(name: str, value: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[dict[str, torch.Tensor]], None]:
    def change(tensors: dict[str, torch.Tensor]) -> None:
        tensors[name] = value(tensors[name])

    return change


HEAD = "model.head.weight"
STATE_EDITS: dict[str, tuple[Callable[[dict[str, torch.Tensor]], object], str]] = {
    "extra": (lambda t: t.update(more=torch.zeros(1)), "more: not in the network"),
    "missing": (lambda t: t.pop(HEAD), f"{HEAD}: missing"),
    "shape": (put(HEAD, lambda t: t[:3].clone()), f"{HEAD}: has shape (3, 100), expected (4, 100)"),
    "type": (put(HEAD, torch.Tensor.double), f"{HEAD}: has type float64, expected float32"),
    "nan": (put(HEAD, lambda t: t.clone().fill_(torch.nan)), f"{HEAD}: contains NaN or infinite values"),
    "inf": (put("confusion", lambda t: t.clone().fill_(torch.inf)), "confusion: contains NaN or infinite values"),
    "below 0": (put("confusion", lambda t: t - 1), "has confusion counts below 0"),
    "diagonal": (put("confusion", lambda t: t + torch.eye(4, dtype=t.dtype)), "of a class with itself"),
    "classes": (put("confusion", lambda t: t[:3, :3].clone()), "confusion: has shape (3, 3), expected (4, 4)"),
    "no momentum": (lambda t: t.pop("optimizer.head.bias.momentum_buffer"), "momentum_buffer: missing"),
}


@pytest.mark.parametrize("edit", STATE_EDITS)
def test_a_training_state_that_does_not_fit_is_refused(edit: str, toy: Path, tmp_path: Path) -> None:
    """Another stage 1's state under the right hash: refused before anything of stage 2 is written."""
    must("train-stage1", "--data", toy, "--out", tmp_path, "--epochs", 4, "--set", "optimizer.kind=sgd")
    change, message = STATE_EDITS[edit]
    path = tmp_path / "stage1" / TRAINING_STATE
    republish(path.parent, path.name, edit_state(path, change))
    refused(3, (str(path), message), "train-stage2", "--from", tmp_path)
    assert not (tmp_path / "stage2").exists()


def test_weights_that_do_not_fit_are_refused(digits_run: Path, toy_run: Path) -> None:
    path, toys = digits_run / "finetune" / MODEL, toy_run / "stage2" / MODEL
    tensors, _ = read_tensors(toys)
    republish(path.parent, path.name, publish_tensors(path, tensors))
    refused(3, "does not fit the network", "evaluate", "--from", digits_run)
    tensors["head.bias"][1] = torch.nan
    republish(toys.parent, toys.name, publish_tensors(toys, tensors))
    message = f"{toys} does not fit the network, 1 tensor:\n    head.bias: contains NaN or infinite values"
    refused(3, message, "evaluate", "--from", toy_run, "--overwrite")


def test_pairs_out_of_range_are_refused(toy_run: Path) -> None:
    path = toy_run / "stage2" / CONFUSION_PAIRS
    columns = {"true_class": [9], "predicted_class": [1], "count": [3]}
    republish(path.parent, path.name, tables.publish_table(path, tables.CONFUSION_SCHEMA, columns))
    refused(3, (str(path), "classes are 0 to 3"), "train-stage2", "--from", toy_run)


@pytest.mark.parametrize("key", ["outputs", "made_from", "dataset", "epochs", "source"])
@pytest.mark.parametrize("value", [None, 7, {"x": {}}, "gone"])
def test_a_record_made_by_hand_is_refused(toy_run: Path, key: str, value: object) -> None:
    """Its digest holds, its fields are others."""
    path = toy_run / "stage2" / RUN
    record = records.read_fields(path)
    record[key] = value
    if value == "gone":
        del record[key]
    if (key, value) == ("epochs", 7):
        return  # as good as any
    records.publish_record(path, record)
    for command in (("evaluate", "--from", toy_run), ("status", toy_run), ("train-stage2", "--from", toy_run)):
        if key == "source" and value is None:
            continue  # a phase that started from nothing
        refused(3, str(path), *command)


def test_a_file_name_that_leads_out_of_the_folder_is_refused(toy_run: Path) -> None:
    republish(toy_run / "stage2", "../../etc/passwd", "0" * 64)
    refused(3, "outputs.../../etc/passwd", "train-stage2", "--from", toy_run)


@pytest.mark.parametrize("name", ["stage1/run.json", "stage1/training_state.safetensors", "dataset.json"])
def test_a_newer_format_is_refused(toy: Path, toy_run: Path, tmp_path: Path, name: str) -> None:
    if name == "dataset.json":
        path = Path(shutil.copytree(toy, tmp_path / "data")) / name
        edit_record(path, format=2)
        command = ("train-stage1", "--data", path.parent, "--out", tmp_path / "o")
    elif name == "stage1/run.json":
        path = toy_run / name
        edit_record(path, format=2)
        command = ("train-stage2", "--from", toy_run)
    else:
        interrupt(toy_run / "stage1")
        path = toy_run / name
        edit_state(path, format=2)
        command = ("train-stage1", "--data", toy, "--out", toy_run)
    refused(3, f"{path} has format 2, this cpmix reads format 1", *command)


OF_STATES = [{"step": -1}, {"step": 10**9}, {"step": 3}, {"epoch": 0}, {"epoch": 99}, {"precision": "fp64"}]
OF_STATES += [{"phase": "stage3"}, {"columns": ["epoch"]}]
OF_STATES += [{"source": {"phase": "nope", "sha256": "0", "run": "."}}]
OF_STATES += [{"source": {"phase": "stage1", "sha256": "0", "run": "a\x00b"}}]


@pytest.mark.parametrize("edit", OF_STATES)
def test_a_state_sealed_by_hand_is_refused(digits_run: Path, edit: dict[str, object]) -> None:
    """Interrupted after its last epoch, and then made to say that it stands elsewhere."""
    interrupt(digits_run / "stage2")
    path = digits_run / "stage2" / TRAINING_STATE
    edit_state(path, **edit)
    refused(3, str(path), "train-stage2", "--from", digits_run)


OF_DATA = [{"mean": [0.1, 0.2]}, {"std": []}, {"shape": [8, 8]}, {"shape": [2]}, {"shape": [0, 8, 1]}]
OF_DATA += [{"relative": "a\x00b"}, {"absolute": "/a" * 3000}]


@pytest.mark.parametrize("edit", OF_DATA)
def test_a_runs_record_of_its_data_set_is_checked(digits_run: Path, tmp_path: Path, edit: dict[str, object]) -> None:
    """`predict` goes by it alone."""
    path = digits_run / "finetune" / RUN
    edit_record(path, dataset={**records.read_fields(path)["dataset"], **edit})
    write_image(tmp_path / "x.png")
    for command in (("predict", "--from", digits_run, tmp_path / "x.png"), ("evaluate", "--from", digits_run)):
        refused(3, f"{path} has an invalid value", *command)


def test_a_data_set_whose_recipe_is_missing_is_refused(toy: Path, tmp_path: Path) -> None:
    """It is not the command line that is wrong."""
    path = Path(shutil.copytree(toy, tmp_path / "data")) / DATASET
    edit_record(path, recipe="toy/cpmx")
    command = ("train-stage1", "--data", path.parent, "--out", tmp_path / "run", "--dry-run")
    refused(3, f'{path}: no recipe "toy/cpmx"', *command)
    must(*command, "--recipe", "toy/cpmix")


OF_DATA_SETS = [
    {"mean": [0.1, 0.2]},
    {"std": [-1.0]},
    {"mean": [float("nan")]},
    {"shape": [8, -8, 1]},
    {"shape": [8, 8]},
]
OF_DATA_SETS += [{"groups": {}}, {"recipe": "r" * 400}, {"files": {"../../etc/passwd": "0" * 64}}]


@pytest.mark.parametrize("edit", OF_DATA_SETS)
def test_a_data_set_sealed_by_hand_is_refused(digits: Path, tmp_path: Path, edit: dict[str, object]) -> None:
    path = Path(shutil.copytree(digits, tmp_path / "data")) / DATASET
    edit_record(path, **edit)
    refused(3, f"{path} has an invalid value", "train-stage1", "--data", path.parent, "--out", tmp_path / "run")


# -- of another data set, subset or recipe -----------------------------------------------------------------------------


def test_files_of_other_runs_are_refused(toy: Path, toy_run: Path, digits_run: Path, tmp_path: Path) -> None:
    """Each taken from a run that is sound in itself."""
    must("build-lt", "toy", "--rho", 10, "--out", tmp_path / "rho10")
    must("train-stage1", "--data", tmp_path / "rho10", "--out", tmp_path / "other")
    must("train-stage2", "--from", tmp_path / "other")
    for name in ("training_state.safetensors", "confusion_pairs.parquet", "recipe.toml", "class_counts.parquet"):
        path = toy_run / "stage1" / name
        own = path.read_bytes()
        foreign = digits_run if name == "recipe.toml" else tmp_path / "other"  # the toy's recipe is the same
        shutil.copy(foreign / "stage1" / name, path)
        assert path.read_bytes() != own
        refused(3, f"{path} is damaged", "train-stage1", "--data", toy, "--out", toy_run)
        path.write_bytes(own)
    for flags in (["--data", tmp_path / "rho10"], ["--data", digits_run]):
        refused(3, str(flags[1]), "train-stage2", "--from", toy_run, *flags, "--overwrite")
    # A whole phase of another run beside this one's: its own record says what it was made from.
    shutil.rmtree(toy_run / "stage2")
    shutil.copytree(tmp_path / "other" / "stage2", toy_run / "stage2")
    refused(3, "stage2 is stale (stage1 was trained again since)", "evaluate", "--from", toy_run, "--phase", "stage2")


@pytest.mark.parametrize("done", [True, False])
def test_a_phase_under_the_name_of_another_is_refused(digits_run: Path, done: bool) -> None:
    shutil.rmtree(digits_run / "finetune")
    shutil.copytree(digits_run / "stage2", digits_run / "finetune")
    if not done:
        interrupt(digits_run / "finetune")
    name = RUN if done else TRAINING_STATE
    commands = (("status", digits_run), ("evaluate", "--from", digits_run))
    for command in commands if done else commands[:1]:
        refused(3, f"{digits_run / 'finetune' / name} is the record of stage2, not of finetune", *command)


def test_a_path_that_cannot_be_checked_is_not_reported_as_missing(tmp_path: Path) -> None:
    """As for a user who may not look into a folder: here a name that no file system takes."""
    assert not is_there(tmp_path / "nowhere" / "x")
    (tmp_path / "file").write_text("")
    assert not is_there(tmp_path / "file" / "x")
    with pytest.raises(InputError, match="File name too long"):
        is_there(tmp_path / ("n" * 300))


def test_a_damaged_evaluation_beside_a_sound_one_is_left_out(digits_run: Path) -> None:
    must("evaluate", "--from", digits_run, "--phase", "stage1")
    path = digits_run / "evaluation" / "stage1" / "metrics.json"
    path.write_bytes(path.read_bytes()[:-9])
    result = must("evaluate", "--from", digits_run)
    assert f"warning: left out: {path} is damaged" in result.stderr
    assert f"; to repair it: cpmix evaluate --from {digits_run} --phase stage1 --overwrite\n" in result.stderr
    table = result.stdout.partition("\n\n")[0].splitlines()[3:]
    assert [line.split()[0] for line in table] == ["finetune", "95"]  # and its 95 % interval
    must("confusion-report", "--from", digits_run)
    refused(3, str(path), "evaluate", "--from", digits_run, "--phase", "stage1")


# -- nothing is unpickled, nothing unpacked beyond its bounds ----------------------------------------------------------


def test_pickle_payloads_are_never_executed(tmp_path: Path, toy: Path) -> None:
    """In a CIFAR archive and its unpacked folder, a .pth, and files that claim to be safetensors or Parquet."""
    canary = tmp_path / "sang"
    payload = pickle.dumps({"data": Canary(canary), b"data": Canary(canary), "fine_labels": [0]})
    source = tmp_path / "cifar-100-python"
    source.mkdir()
    for name in ("train", "test", "meta"):
        (source / name).write_bytes(payload)
    archive = tmp_path / "packed"
    archive.mkdir()
    with tarfile.open(archive / "cifar-100-python.tar.gz", "w:gz") as packed:
        packed.add(source, "cifar-100-python")
    weights = tmp_path / "weights.pth"
    torch.save({"w": Canary(canary)}, weights)
    renamed = tmp_path / "weights.safetensors"
    renamed.write_bytes(payload)
    sha = sha256(weights.read_bytes())
    parquet = tmp_path / "parquet"
    parquet.mkdir()
    (parquet / "train-00000-of-00001.parquet").write_bytes(payload)
    (parquet / "test-00000-of-00001.parquet").write_bytes(payload)
    out = ("--out", tmp_path / "out")
    commands: list[tuple[Path, tuple[object, ...]]] = [
        (source, ("build-lt", "cifar100", "--data-root", tmp_path, *out)),
        (archive, ("build-lt", "cifar100", "--data-root", archive, *out)),
        (parquet, ("build-lt", "cifar100", "--data-root", parquet, *out)),
        (weights, ("import-weights", weights, "--sha256", sha)),
        (renamed, ("train-stage1", "--data", toy, "--init", renamed, *out)),
        (weights, ("train-stage1", "--data", toy, "--init", weights, *out)),
    ]
    for path, command in commands:
        refused(3, str(path), *command)
        assert not canary.exists()
    assert not (tmp_path / "out").exists()
    pickle.loads(payload)  # it would have
    assert canary.exists()


def test_an_unpublished_archive_is_refused_without_unpacking(tmp_path: Path) -> None:
    """Members that point out of the archive are not even looked at: the hash of the whole is wrong."""
    (tmp_path / "evil").write_text("x")
    with tarfile.open(tmp_path / "cifar-100-python.tar.gz", "w:gz") as packed:
        for name in ("../outside", "/tmp/cpmix-outside", "cifar-100-python/train"):
            packed.add(tmp_path / "evil", name)
    before = files(tmp_path)
    refused(3, "is not the published file", "build-lt", "cifar100", "--data-root", tmp_path, "--out", tmp_path / "out")
    assert files(tmp_path) == before
    assert not Path("/tmp/cpmix-outside").exists()


@pytest.mark.slow
@pytest.mark.long
def test_a_gzip_bomb_is_refused_within_bounded_memory(tmp_path: Path) -> None:
    """4 GB of zeros under a published name: no more is unpacked than there should be."""
    compress = zlib.compressobj(9, zlib.DEFLATED, 31)
    with (tmp_path / "train-images-idx3-ubyte.gz").open("wb") as file:
        for _ in range(4096):
            file.write(compress.compress(bytes(2**20)))
        file.write(compress.flush())
    for name in ("train-labels-idx1-ubyte", "t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte"):
        (tmp_path / f"{name}.gz").write_bytes(gzip.compress(b"x"))
    command = ["build-lt", "fashion-mnist", "--data-root", str(tmp_path), "--out", str(tmp_path / "out")]
    # The peak of a process starts at that of the one that forked it, pytest with all it has loaded: hence one between.
    peak = "import resource, subprocess, sys\ncode = subprocess.run(sys.argv[1:]).returncode\n"
    peak += "print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss)\nsys.exit(code)"
    result = process(sys.executable, "-m", "cpmix_cli", *command, code=peak)
    ended(result, 3, "train-images-idx3-ubyte.gz is not the published file")
    assert int(result.stdout) < 1_500_000  # kilobytes


def hugging_face(folder: Path, **changes: object) -> None:
    """Two small files of the Parquet layout, whose images are one white PNG."""
    folder.mkdir(exist_ok=True)
    Image.new("RGB", (32, 32), "white").save(folder / "white.png")
    image = {"bytes": (folder / "white.png").read_bytes(), "path": None}
    table = {"img": [image] * 200, "fine_label": list(range(100)) * 2, **changes}
    for split in ("train", "test"):
        pq.write_table(pa.table(table), folder / f"{split}-00000-of-00001.parquet")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"fine_label": ["cat"] * 200}, "has the column fine_label as string; expected int64"),
        ({"fine_label": [None, *range(199)]}, "lacks 1 label"),
        ({"fine_label": [100] * 200}, "has labels 100 to 100; expected 0 to 99"),
        ({"fine_label": [-1, *range(1, 100)] * 2}, "has labels -1 to 99"),
        ({"img": ["x"] * 200}, "has the column img as string; expected img, as struct<bytes: binary, path: string>"),
        ({"img": [{"bytes": b"GIF89a", "path": None}] * 200}, "cannot be decoded"),
        ({"img": [{"bytes": None, "path": "x"}] * 200}, "has the column img as struct<bytes: null, path: string>"),
        ({"img": [{"bytes": bytes([i]) * 100_000, "path": None} for i in range(200)]}, "would unpack from"),
    ],
)
def test_a_damaged_hugging_face_layout_is_refused(tmp_path: Path, changes: dict[str, object], message: str) -> None:
    hugging_face(tmp_path / "hf", **changes)
    command = ("build-lt", "cifar100", "--rho", 1, "--data-root", tmp_path / "hf", "--out", tmp_path / "out")
    refused(3, (message, str(tmp_path / "hf")), *command)
    assert not (tmp_path / "out").exists()


def test_weights_changed_since_their_import_are_refused(tmp_path: Path, toy: Path) -> None:
    weights = tmp_path / "w.pth"
    torch.save({"hidden.weight": torch.zeros(10, 2), "hidden.bias": torch.zeros(10)}, weights)
    must("import-weights", weights, "--sha256", sha256(weights.read_bytes()))
    path = tmp_path / "w.safetensors"
    flip(path, -2, 64)
    refused(3, f"{path} is damaged", "train-stage1", "--data", toy, "--init", path, "--out", tmp_path / "o")


# -- images ------------------------------------------------------------------------------------------------------------


def test_image_names_that_no_table_can_hold_are_named(tmp_path: Path) -> None:
    root = tmp_path / "mine"
    for name in (b"ant", b"b\xe9e"):
        write_image(root / os.fsdecode(name) / "x.png")
    command = ("build-lt", "image-folder", "--data-root", root, "--out", tmp_path / "out")
    refused(3, r"names that are no UTF-8, which no table can hold: 'b\xe9e/x.png'", *command)


def test_json_of_an_error_names_the_file(toy_run: Path) -> None:
    (toy_run / "stage2" / MODEL).write_bytes(b"")
    found = cpmix("evaluate", "--from", toy_run, "--overwrite", "--json").json
    assert found["exit_code"] == 3
    assert str(toy_run / "stage2" / MODEL) in found["error"]
