"""Image data sets in Parquet files, laid out as Hugging Face does: shards, splits, columns, class names, labels.

Source: the library `datasets`: split words, metadata of the Arrow schema, `dataset_info` of README.md.
"""

import json
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from cpmix_cli.artifacts.files import digest
from cpmix_cli.data import dataset_card
from cpmix_cli.data.parquet_rows import open_shard, row_name, unreadable
from cpmix_cli.data.splits import Source, Split
from cpmix_cli.runtime import console
from cpmix_cli.runtime.errors import InputError, UsageError, counted, shortened
from cpmix_cli.runtime.text import quoted

if TYPE_CHECKING:
    import pyarrow as pa
    import pyarrow.parquet as pq

_SPLIT_WORDS = {
    **dict.fromkeys(("train", "training"), "train"),
    **dict.fromkeys(("validation", "valid", "dev", "val"), "val"),
    **dict.fromkeys(("test", "testing", "eval", "evaluation"), "test"),
}
_LABEL_NAME = re.compile(r"(.*_)?(labels?|class(es)?|class_?(id|name|label)|category|target)", re.IGNORECASE)
_SHARD = re.compile(r"(?P<set>.*?)-(?P<number>\d{5})-of-(?P<total>\d{5})(?:-[0-9a-f]{16})?")
_UNPACKS = 20
"""Largest number of bytes in memory per byte of the images in a file: images are compressed already."""


@dataclass(frozen=True)
class _Shard:
    path: Path
    file: "pq.ParquetFile"
    features: Mapping[str, Any]
    """Column -> description in Hugging Face's metadata; {} without."""


def read(root: Path, *, image_column: str | None, label_column: str | None) -> Source:
    """Find the images and labels of a folder of Parquet files; the images are read later, see parquet_rows.py.

    Args:
        root: the folder.
        image_column: column of the images; None: the only one of that kind.
        label_column: column of the labels; None: the only one of that kind.

    Raises:
        InputError: a file is missing or damaged, a column is missing or of another kind, training images lack labels.
        UsageError: there is a choice of columns.
    """
    files = _files_by_split(root)
    if "train" not in files:
        raise InputError(
            f"{root} has files of {' and '.join(files)}, and none of training images",
            fix="add the train-*.parquet files",
        )
    shards = {split: [_opened(path) for path in paths] for split, paths in files.items()}
    everything = [shard for part in shards.values() for shard in part]
    first = everything[0]
    image = _image_column(root, first, image_column)
    label = _label_column(root, first, label_column)
    for shard in everything:
        _check_columns(shard, first, image, label)
        _check_size(shard, image)
    names = _class_names(root, everything, label)
    values = {split: [_labels(shard, label) for shard in part] for split, part in shards.items()}
    for split in [split for split in values if split != "train"]:
        if fault := _unlabelled(shards[split], values[split]):
            console.warn(f"the {split} split is left out: {fault}, as in sets whose {split} labels are not published")
            del values[split], shards[split]
    if fault := _unlabelled(shards["train"], values["train"]):
        raise InputError(fault, fix="take the rows without a label out, or name another --label-column")
    if names is None:
        names = sorted({value for part in values.values() for rows in part for value in rows}, key=_in_order)
        numbers = {value: number for number, value in enumerate(names)}
        names = [str(value) for value in names]
        numbered = {split: [[numbers[v] for v in rows] for rows in part] for split, part in values.items()}
    else:
        numbered = values
    splits = {
        split: _split(root, part, numbered[split], image, len(names))
        for split, part in shards.items()
        if split in numbered
    }
    if not len(splits["train"].labels):
        raise InputError(f"{shards['train'][0].path} and the other training files have no rows", fix="fetch them again")
    if len(names) < 2:
        raise InputError(
            f"{root} has one class, {names[0]!r}; a classifier needs two", fix="name another --label-column"
        )
    for name, number in dataset_card.row_counts(root).items():
        split = _SPLIT_WORDS.get(name.lower(), "")
        if split in splits and number != (there := len(splits[split].labels)):
            console.warn(f"{root} has {counted(there, f'{split} image')}; its README.md says {number:,}")
    found = [[str(shard.path.relative_to(root)), _footer_of(shard)] for shard in everything]
    console.note(
        f"{root}: {counted(len(everything), 'file')}, images of the column {image!r}, labels of {label!r}: "
        + ", ".join(f"{split} {len(part.labels):,}" for split, part in splits.items())
    )
    return Source(
        class_names=names,
        pool=splits["train"],
        recipe="image-folder/cpmix",
        profile="ranked",
        test=splits.get("test"),
        val=splits.get("val"),
        test_per_class=None,
        root=root,
        listing=digest([image, label, names, found]),
        name=root.resolve().name,
    )


# -- files -------------------------------------------------------------------------------------------------------------


def split_of(path: Path) -> str:
    """Return the split of a Parquet file: a word in its name, else in its folders from the inside; "train" without."""
    for part in reversed(path.with_suffix("").parts):
        for word in re.split(r"[-._ 0-9]+", part.lower()):
            if word in _SPLIT_WORDS:
                return _SPLIT_WORDS[word]
    return "train"


def _files_by_split(root: Path) -> dict[str, list[Path]]:
    """Return the shards of each split, in order: train first."""
    if not root.is_dir():
        raise InputError(f"no folder {root}", fix="give the folder of the Parquet files with --data-root FOLDER")
    found: list[Path] = []
    for place, folders, names in os.walk(root):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        found += [Path(place) / name for name in sorted(names) if name.endswith(".parquet") and name[0] != "."]
    if not found:
        raise InputError(
            f"no .parquet file in {root} or below",
            fix="give the folder of a Hugging Face data set, with files such as data/train-00000-of-00001.parquet",
        )
    places: dict[Path, dict[str, list[Path]]] = {}
    for path in found:
        folder, split = path.parent, split_of(path.relative_to(root))
        if folder != root and folder.name.lower() in _SPLIT_WORDS:
            folder = folder.parent
        places.setdefault(folder, {}).setdefault(split, []).append(path)
    twice = [
        str(folder)
        for folder, splits in places.items()
        if any(splits.keys() & others.keys() for other, others in places.items() if other != folder)
    ]
    if twice:
        raise InputError(
            f"{root} has {len(twice)} sets of the same splits: {shortened(twice, 5)}",
            fix=f"give one of them: {quoted('--data-root', twice[0])}",
        )
    merged = {split: paths for splits in places.values() for split, paths in splits.items()}
    for split, paths in merged.items():
        _check_whole(split, paths)
    return {split: merged[split] for split in ("train", "val", "test") if split in merged}


def _check_whole(split: str, paths: Sequence[Path]) -> None:
    """Raise InputError if numbered shards of a split are missing or of two sets, or one is there twice."""
    sets: dict[tuple[str, str], dict[int, Path]] = {}
    for path in paths:
        name, total, number = "", "", -1
        if found := _SHARD.fullmatch(path.stem):
            name, total, number = found["set"], found["total"], int(found["number"])
        elif re.fullmatch(r"\d{4}", path.stem):
            number = int(path.stem)
        else:
            continue
        if (other := sets.setdefault((name, total), {}).setdefault(number, path)) != path:
            raise InputError(f"{path} and {other.name} are the same shard of {split}", fix="leave one of the two")
    for (name, total), shards in sets.items():
        if len(sets) > 1:
            some = " and ".join(next(iter(numbered.values())).name for numbered in sets.values())
            raise InputError(
                f"{paths[0].parent}: {some} are of different sets of shards of {split}", fix="leave the files of one"
            )
        last = int(total) if total else max(shards) + 1
        gaps = [number for number in range(last) if number not in shards]
        lost = [f"{name}-{number:05}-of-{total}.parquet" if total else f"{number:04}.parquet" for number in gaps]
        if lost:
            raise InputError(
                f"{paths[0].parent} lacks {counted(len(lost), 'shard')} of {split}: {shortened(lost, 5)}",
                fix="copy or fetch the missing files",
            )


def _opened(path: Path) -> _Shard:
    file = open_shard(path)
    try:
        metadata = file.schema_arrow.metadata or {}
        features = json.loads(metadata.get(b"huggingface", b"{}")).get("info", {}).get("features", {})
        if not isinstance(features, dict):
            raise ValueError(f"features are {type(features).__name__}")
    except Exception as fault:
        raise InputError(
            f"{path} has unreadable Hugging Face metadata: {fault}", fix="copy or fetch it again"
        ) from fault
    return _Shard(path, file, features)


def _footer_of(shard: _Shard) -> list[Any]:
    """Return sizes and places of the row groups: they change with the content, and are read without it."""
    footer = shard.file.metadata
    groups = [footer.row_group(i) for i in range(footer.num_row_groups)]
    columns = [group.column(i) for group in groups for i in range(group.num_columns)]
    return [shard.path.stat().st_size, [(c.data_page_offset, c.total_compressed_size, c.num_values) for c in columns]]


def _check_size(shard: _Shard, image: str) -> None:
    """Raise InputError if the images would unpack to many times their size, as in a file made to fill the memory."""
    footer = shard.file.metadata
    for i in range(footer.num_row_groups):
        for column in (footer.row_group(i).column(j) for j in range(footer.num_columns)):
            if column.path_in_schema in (image, f"{image}.bytes"):
                packed, whole = column.total_compressed_size, column.total_uncompressed_size
                if whole > _UNPACKS * packed + 2**20:
                    raise InputError(
                        f"{shard.path} would unpack from {packed:,} to {whole:,} bytes in row group {i}",
                        fix="copy or fetch it again",
                    )


# -- columns -----------------------------------------------------------------------------------------------------------


def _kind(kind: "pa.DataType") -> "pa.DataType":
    import pyarrow as pa

    return kind.value_type if pa.types.is_dictionary(kind) else kind


def _holds_images(kind: "pa.DataType") -> bool:
    """Return whether a column is struct<bytes, ...> or binary."""
    import pyarrow as pa

    kind = _kind(kind)
    if pa.types.is_struct(kind):
        return bool(kind.get_field_index("bytes") >= 0) and _holds_images(kind.field("bytes").type)
    return kind in (pa.binary(), pa.large_binary(), pa.binary_view())


def _is_text(kind: "pa.DataType") -> bool:
    import pyarrow as pa

    return _kind(kind) in (pa.string(), pa.large_string(), pa.string_view())


def _holds_labels(kind: "pa.DataType") -> bool:
    import pyarrow as pa

    return bool(_is_text(kind) or pa.types.is_integer(_kind(kind)) or pa.types.is_boolean(kind))


def _holds_several_labels(kind: "pa.DataType") -> bool:
    import pyarrow as pa

    return bool(pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind))


def _columns(schema: "pa.Schema") -> str:
    return shortened([f"{field.name} {field.type}" for field in schema], 20)


def _image_column(root: Path, shard: _Shard, given: str | None) -> str:
    schema = shard.file.schema_arrow
    possible = [field.name for field in schema if _holds_images(field.type) and "/" not in field.name]
    name = _chosen(root, shard, "image", given, possible)
    if not _holds_images(schema.field(name).type):
        names = "names of files, which are not in it" if _is_text(schema.field(name).type) else "no encoded images"
        raise InputError(
            f"{shard.path} has the column {name} as {schema.field(name).type}: {names}; expected struct<bytes: binary, "
            "path: string> or binary",
            fix="embed the images (datasets: embed_external_files), or use image-folder for files"
            if _is_text(schema.field(name).type)
            else "name another column with --image-column",
        )
    return name


def _label_column(root: Path, shard: _Shard, given: str | None) -> str:
    schema = shard.file.schema_arrow
    described = [
        name
        for name, feature in shard.features.items()
        if isinstance(feature, dict) and feature.get("_type") == "ClassLabel" and schema.names.count(name) == 1
    ]
    several = [f.name for f in schema if _LABEL_NAME.fullmatch(f.name) and _holds_several_labels(f.type)]
    named = [f.name for f in schema if _LABEL_NAME.fullmatch(f.name) and _holds_labels(f.type)]
    possible = [name for name in schema.names if name in described or name in named]
    name = _chosen(root, shard, "label", given, possible or several)
    if _holds_several_labels(kind := schema.field(name).type):
        raise InputError(
            f"{shard.path} has the column {name} as {kind}: several labels per image",
            fix="give a column of one label with --label-column",
        )
    if not _holds_labels(kind):
        raise InputError(
            f"{shard.path} has the column {name} as {kind}; expected class numbers or names",
            fix="name another column with --label-column",
        )
    return name


def _chosen(root: Path, shard: _Shard, what: str, given: str | None, possible: Sequence[str]) -> str:
    """Return the column of the images or labels: the one of the flag, or the only one that there is."""
    schema = shard.file.schema_arrow
    if given is not None:
        if schema.names.count(given) != 1:
            raise UsageError(
                f"--{what}-column {given}: {shard.path} has columns {_columns(schema)}", fix="name one of these columns"
            )
        return given
    if len(possible) > 1:
        raise UsageError(
            f"{root} has {len(possible)} columns of {what}s: {', '.join(possible)}",
            fix=" or ".join(f"give {quoted(f'--{what}-column', name)}" for name in possible[:5]),
        )
    if not possible:
        kinds = {
            "image": "encoded images (struct<bytes: binary, path: string> or binary)",
            "label": "labels by its name",
        }
        raise InputError(
            f"{shard.path} has no column of {kinds[what]}; its columns are {_columns(schema)}",
            fix=f"name it with --{what}-column",
        )
    return possible[0]


def _check_columns(shard: _Shard, first: _Shard, *columns: str) -> None:
    """Raise InputError if a shard lacks a column, or has it as another kind than the first shard."""
    mine, theirs = shard.file.schema_arrow, first.file.schema_arrow
    for check, name in zip((_holds_images, _holds_labels), columns, strict=True):
        if mine.names.count(name) != 1 or not check(mine.field(name).type):
            raise InputError(
                f"{shard.path} has columns {_columns(mine)}; {first.path.name} has {name} as {theirs.field(name).type}",
                fix="copy or fetch it again, or take it out",
            )
        if name == columns[1] and _is_text(mine.field(name).type) != _is_text(theirs.field(name).type):
            raise InputError(
                f"{shard.path} has {name} as {mine.field(name).type}, {first.path.name} as {theirs.field(name).type}",
                fix="copy or fetch it again, or take it out",
            )


# -- labels ------------------------------------------------------------------------------------------------------------


def _labels(shard: _Shard, column: str) -> list[Any]:
    """Return the label of each row: number, name, or None."""
    import pyarrow as pa

    found: list[Any] = []
    try:
        for i in range(shard.file.metadata.num_row_groups):
            for batch in shard.file.iter_batches(65_536, [i], [column], use_threads=False):
                values = batch.column(0)
                values = values.dictionary_decode() if pa.types.is_dictionary(values.type) else values
                found += values.to_pylist()
    except Exception as fault:
        raise unreadable(shard.path, fault) from fault
    if len(found) != shard.file.metadata.num_rows:
        raise InputError(
            f"{shard.path} has {counted(len(found), 'label')} in {counted(shard.file.metadata.num_rows, 'row')}",
            fix="fetch it again",
        )
    return found


def _unlabelled(shards: Sequence[_Shard], values: Sequence[Sequence[Any]]) -> str:
    """Return which rows of a split have no label, null or -1, for a message; "" if all have one."""
    lost = [
        (shard, row, value)
        for shard, rows in zip(shards, values, strict=True)
        for row, value in enumerate(rows)
        if value is None or value == -1
    ]
    if not lost:
        return ""
    shard, row, value = lost[0]
    total = sum(map(len, values))
    said = "null" if value is None else value
    return f"{len(lost):,} of {total:,} rows have no label, the first is row {row} of {shard.path} ({said})"


def _in_order(value: Any) -> tuple[bool, Any]:
    return isinstance(value, str), value


def _split(
    root: Path, shards: Sequence[_Shard], labels: Sequence[Sequence[int]], image: str, num_classes: int
) -> Split:
    """Return the samples of a split, in the order of the rows; raise InputError if a label is no class."""
    paths: list[str] = []
    for shard, rows in zip(shards, labels, strict=True):
        outside = [row for row, value in enumerate(rows) if not 0 <= value < num_classes]
        if outside:
            raise InputError(
                f"{shard.path} has the label {rows[outside[0]]} in row {outside[0]}; {num_classes} classes are named, "
                f"0 to {num_classes - 1}",
                fix="copy or fetch it again",
            )
        name = shard.path.relative_to(root).as_posix()
        paths += [row_name(name, image, row) for row in range(len(rows))]
    numbers: NDArray[np.int64] = np.array([value for rows in labels for value in rows], dtype=np.int64)
    return Split(numbers, paths=paths)


def _class_names(root: Path, shards: Sequence[_Shard], label: str) -> list[str] | None:
    """Return the class names by number: of the files' metadata, else of README.md; None: labels are their names."""
    import pyarrow as pa

    if not pa.types.is_integer(_kind(shards[0].file.schema_arrow.field(label).type)):
        return None
    names: list[str] | None = None
    for shard in shards:
        feature = shard.features.get(label)
        if isinstance(feature, dict) and (own := feature.get("names")):
            if not isinstance(own, list) or len({str(name).encode() for name in own}) < len(own):
                raise InputError(f"{shard.path} names a class of {label} twice", fix="copy or fetch it again")
            if names is not None and names != [str(name) for name in own]:
                raise InputError(
                    f"{shard.path} names other classes than the shards before it, or in another order",
                    fix="take out the files of another version of the set",
                )
            names = [str(name) for name in own]
    return names or dataset_card.class_names(root).get(label)
