"""Ownership: files that an output replaces or deletes must be cpmix's own, by their folder's record or their content.

A process may be killed between any two files, so the record of a folder is not enough: tables, tensors and records are
known by their columns, names and keys as well. Weights, figures and shards have no such marks, users edit copies of
recipes, and damage removes marks: these files count as cpmix's if another file of the folder is known.
"""

import json
from collections.abc import Iterable, Iterator
from pathlib import Path

import pyarrow.parquet as pq

from cpmix_cli.artifacts import files, tables
from cpmix_cli.artifacts.records import read_fields
from cpmix_cli.artifacts.seals import read_header
from cpmix_cli.runtime.errors import CpmixError, EnvironmentFault, UnreadableError, counted, shortened
from cpmix_cli.runtime.memory import raise_if_exhausted

_SPLIT = [tables.split_schema(by_path).names for by_path in (True, False)]
_FORMS: dict[str, list[list[str]]] = {
    **{f"{split}.parquet": _SPLIT for split in ("train", "val", "test", "samples")},
    **{f"{split}-{files.HASHES}": [tables.HASHES_SCHEMA.names] for split in ("train", "val", "test")},
    **{f"{split}-{files.SEEN}": [tables.SEEN_SCHEMA.names] for split in ("train", "val", "test")},
    files.CLASS_COUNTS: [tables.CLASS_COUNTS_SCHEMA.names],
    files.CONFUSION_PAIRS: [tables.CONFUSION_SCHEMA.names],
    files.CONFUSION_MATRIX: [tables.CONFUSION_SCHEMA.names],
    files.CONFUSED_PAIRS: [tables.CONFUSED_PAIRS_SCHEMA.names],
    files.PER_CLASS: [tables.PER_CLASS_SCHEMA.names, tables.OLDER_PER_CLASS_SCHEMA.names],
    files.THRESHOLDS: [tables.THRESHOLDS_SCHEMA.names],
    files.PREDICTIONS: [tables.PREDICTIONS_SCHEMA.names],
    **{f"{split}.safetensors": [["images", "labels"], ["labels", "points"]] for split in ("train", "val", "test")},
    files.LOGITS: [["labels", "logits"], ["expert_logits", "labels", "logits"]],
}
"""File -> all of its columns, or tensors in the order of their names, in each of its forms."""
_KEYS: dict[str, set[str]] = {
    files.RUN: {"format", "phase", "made_from", "outputs", "argv", "versions", "digest"},
    files.DATASET: {"format", "name", "source", "classes", "files", "fingerprint", "digest"},
    files.EVALUATION: {"phase", "top1", "balanced_accuracy", "num_test", "ece", "checkpoint_sha256"},
    files.TRAINING_STATE: {"format", "phase", "made_from", "epoch", "step", "columns", "tensors_digest", "digest"},
    files.METRICS: {"epoch", "learning_rate", "loss", "gradient_norm", "images_per_second", "seconds"},
    "packing-": {"format", "images", "hashes", "values", "digest"},
}
"""File -> keys, columns or metadata that it has among others."""


def refuse_strangers(folder: Path, names: Iterable[str], *, only: str | None = None, is_known: bool = False) -> None:
    """Check that cpmix wrote all files of an output folder that a command may replace or delete.

    Args:
        folder: output folder; it need not exist.
        names: names of the files, or patterns such as "train-*.shard".
        only: the only file that may be refused; the others just help to know it.
        is_known: True if another file shows that cpmix wrote into the folder.

    Raises:
        EnvironmentFault: lists the files that cpmix did not write. Or the folder has a data set and the output is none,
            or the other way round.
        UnreadableError: a file cannot be read now.
    """
    other = files.RUN if files.DATASET in (names := list(names)) else files.DATASET
    if _tells(folder / other):
        what = "a data set" if other == files.DATASET else "an output of another command"
        raise EnvironmentFault(f"{folder} holds {what}", fix="write elsewhere with --out FOLDER")
    found = list(_existing(folder, names))
    recorded = _recorded(found)
    told = {path: _tells(path) for path in found}
    is_known = is_known or recorded is not None or True in told.values()

    def is_own(path: Path) -> bool:
        if recorded is not None and path.name in recorded:  # perhaps damaged, which its reader reports
            return told[path] is not False or _has_hash(path, recorded[path.name])
        if told[path] is None and (recorded is None or _expected(path) is None):
            return is_known
        return told[path] is True

    if strangers := [path.name for path in found if only in (None, path.name) and not is_own(path)]:
        raise EnvironmentFault(
            f"{folder} has {counted(len(strangers), 'file')} that cpmix did not write and would replace: "
            + shortened(strangers, 5),
            fix="move them to another folder, or write elsewhere with --out FOLDER",
        )


def _existing(folder: Path, names: Iterable[str]) -> Iterator[Path]:
    for name in names:
        if "*" in name or "[" in name:
            yield from folder.glob(name)
        elif files.is_there(folder / name):
            yield folder / name


def _recorded(found: Iterable[Path]) -> dict[str, str] | None:
    """Return the files that an undamaged record of the folder lists, itself included: name -> sha256."""
    for path in found:
        key = {files.RUN: "outputs", files.DATASET: "files"}.get(path.name)
        try:
            if key is not None:
                return {**read_fields(path)[key], path.name: ""}
        except UnreadableError:
            raise
        except (CpmixError, KeyError, TypeError):
            pass
    return None


def _expected(path: Path) -> list[list[str]] | set[str] | None:
    """Return the names that files of this name have; None for files that have none."""
    return _FORMS.get(path.name) or _KEYS.get("packing-" if path.name.startswith("packing-") else path.name)


def _tells(path: Path) -> bool | None:
    """Return whether the content of a file shows that cpmix wrote it; None if it shows neither."""
    expected = _expected(path)
    if path.name == files.LEFT_OUT:  # the lists of the splits are written first
        return None if _has_tabs(path) else False
    if path.suffix == ".shard":  # its record is written first
        return _tells(path.with_name(f"packing-{path.name}.json")) or None
    try:
        found = _names_in(path) if expected is not None else []
    except UnreadableError:
        raise
    except Exception as fault:  # damaged files make the readers raise any exception
        if isinstance(fault, OSError) and fault.errno:  # pyarrow's own have no number
            raise files.read_fault(path, fault) from fault
        raise_if_exhausted(fault)
        return None
    match expected:
        case None:
            return None
        case set():
            return len(expected - set(found)) <= 1  # one is allowed to be damaged
        case _:
            differing = min(_num_differing(found, form) for form in expected)
            return (True, None)[differing] if differing <= 1 else False


def _num_differing(found: list[str], form: list[str]) -> int:
    return sum(a != b for a, b in zip(found, form, strict=True)) if len(found) == len(form) else len(form)


def _names_in(path: Path) -> list[str]:
    """Return the columns of a table, the tensors (of a training state: the metadata), or the keys of a JSON file.

    Reads no more than needed; raises any exception.
    """
    with files.open_file(path) as file:  # refuses pipes, which would block
        if path.suffix == ".parquet":
            return list(pq.read_schema(file).names)
    if path.suffix == ".safetensors":
        tensors, metadata = read_header(path)
        return list(metadata) if path.name == files.TRAINING_STATE else sorted(tensors)
    return list(dict(json.loads(files.read_bytes(path, limit=files.MAX_RECORD))))


def _has_tabs(path: Path) -> bool:
    """Return whether a file can be the list of what is left out, "PATH<tab>reason" per line; the last may be cut."""
    try:
        first, *others = files.read_bytes(path).splitlines()
    except UnreadableError:
        raise
    except (CpmixError, ValueError):
        return False
    return all(b"\t" in line for line in (first, *others[:-1]))


def _has_hash(path: Path, sha: str) -> bool:
    try:
        return files.sha256(files.read_bytes(path)) == sha
    except UnreadableError:
        raise
    except CpmixError:
        return False
