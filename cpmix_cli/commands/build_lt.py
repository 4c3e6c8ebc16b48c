"""build-lt: build a long-tailed data set folder from a source."""

import re
from bisect import bisect_left
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cpmix_cli.artifacts import files as artifacts
from cpmix_cli.artifacts import locks, records, tables
from cpmix_cli.artifacts.ownership import refuse_strangers
from cpmix_cli.data import image_folder, shards, storage
from cpmix_cli.data.dataset import Dataset, DatasetRequest, Storage, open_dataset
from cpmix_cli.data.decoding import SHOWN, UnreadableImages, check_pixels, readable, with_several_pictures
from cpmix_cli.data.download import download
from cpmix_cli.data.equal_images import changes_by_class, check_unchanged, warn_of_duplicates
from cpmix_cli.data.longtail import GROUPS, PROFILES, group_of, shuffled_by_class
from cpmix_cli.data.parquet_rows import file_of
from cpmix_cli.data.sources import IMAGE_SIZE, LARGE_IMAGE_SIZE, OFFICIAL_LISTS, SOURCES, check_source, places
from cpmix_cli.data.splits import OWN_SOURCES, Source, Split
from cpmix_cli.evaluation.intervals import too_few_images
from cpmix_cli.flags import BuildOptions
from cpmix_cli.recipe.loading import load, with_settings
from cpmix_cli.recipe.schema import differences
from cpmix_cli.runtime import console
from cpmix_cli.runtime.errors import EnvironmentFault, InputError, UsageError, counted, give_one_of, indented, shortened
from cpmix_cli.runtime.text import on_a_line
from cpmix_cli.training.checks import fitting_settings
from cpmix_cli.training.pretrained import how_to_import


def run(options: BuildOptions) -> None:
    """Select images, store them, and print the class counts.

    Raises:
        UsageError: the source is unknown, a number is out of range, or the source does not support a flag.
        InputError: source files are missing or damaged, or classes have too few images for the request.
        EnvironmentFault: the folder contains another data set or cannot be written, or --download failed.
    """
    _check_flags(options)
    if options.download:
        download(options.source, places(options.source, options.data_root)[0])
    kind: Storage = "tensors"
    size = options.image_size or IMAGE_SIZE
    if options.pack:
        kind, size = "shards", options.pack
    elif options.pack == 0 or options.source in OFFICIAL_LISTS:
        kind, size = "files", options.image_size or LARGE_IMAGE_SIZE
    own: dict[str, dict[str, Any]] = {
        "image-folder": {"layout": options.layout, "skip_unreadable": options.skip_unreadable},
        "parquet": {"image_column": options.image_column, "label_column": options.label_column},
    }
    is_own = options.source in OWN_SOURCES
    source = SOURCES[options.source](options.data_root, options.list_dir, **own.get(options.source, {}))
    rho = options.rho if options.rho is not None else source.default_rho
    if source.val is not None and source.test is None and options.test_per_class is None:
        source = _tested_on_val(source)
    if source.test is not None and options.test_per_class is not None:
        raise UsageError(f"--test-per-class: {options.source} has its own test split", fix="drop the flag")
    if source.val is not None and options.val_per_class:
        raise UsageError(f"--val-per-class: {options.source} has its own val split", fix="drop the flag")

    if options.val_capped and (rho is None or not options.val_per_class):
        raise UsageError(
            "--val-capped keeps the counts of an imbalance factor beside a val split; one of the two is missing",
            fix="give --rho and --val-per-class as well, or drop the flag",
        )

    name = _folder_name(options, source, rho)
    folder = options.out or Path("data") / name
    request = DatasetRequest(
        source=options.source,
        rho=rho,
        profile=None if rho is None else options.profile or source.profile,
        subset_seed=options.subset_seed,
        val_per_class=options.val_per_class,
        test_per_class=options.test_per_class or source.test_per_class,
        image_size=size if source.root else None,
        listing=source.listing,
        storage=kind,
        val_capped=options.val_capped,
        few_inclusive=options.few_inclusive,
    )

    status = "up to date"
    is_there = artifacts.is_there(folder / artifacts.DATASET)
    replaces = options.overwrite or not is_there
    refuse_strangers(folder, storage.OWN_FILES, only=None if replaces else artifacts.DATASET)
    if replaces:
        if options.skip_unreadable:
            source = _readable(source, upright=is_own)
        image_folder.warn_of(source.root or folder, source.left_out)
        chosen = _choose(source, request)
        if options.source == "parquet":  # rows are read in their order
            chosen = {split: np.sort(positions) for split, positions in chosen.items()}
        splits = storage.take(source, chosen)
        if not len(splits["test"].labels):
            if source.test is not None:
                raise InputError(f"{source.root}: no test image can be read", fix="repair them, or give others")
            most = int(np.bincount(source.pool.labels).max())
            raise InputError(
                f"no test image: none of the {len(source.class_names)} classes has enough images to hold one out, "
                f"the largest has {most}",
                fix="give --test-per-class 1, or test images in a folder test beside train"
                if most > 1
                else "add images: a class needs one for the training and one for the test",
            )
        artifacts.check_place(folder, 0)
        with _unreadable_listed_beside(folder, source.root):
            seen = storage.look_for_files(source.root, splits) if source.root and kind != "tensors" else {}
            with locks.hold(folder, wait=True) as lock:
                # Another process may have built it while this one waited.
                if options.overwrite or not artifacts.is_there(folder / artifacts.DATASET):
                    if kind == "files" and options.verify and not options.skip_unreadable and source.root:
                        check_pixels([source.root / p for s in splits.values() for p in s.paths], upright=is_own)
                    with storage.place_for(folder, splits, kind, size) as place:
                        if kind == "tensors" or source.root is None:
                            stored = storage.store_tensors(place, splits, source.root, size)
                        elif kind == "shards":
                            stored = storage.store_shards(place, lock, splits, source.root, seen, size, is_own)
                        else:
                            stored = storage.store_files(place, splits, source.root, size, seen if is_own else {})
                        _write(place, lock, name, request, source, splits, stored, options)
                    status = "built"
    dataset = replace(open_dataset(folder), moved_to=source.root)
    if status == "up to date":
        _check_existing(dataset, request, source)
    else:
        warn_of_duplicates(dataset, is_own=is_own)
        _warn_of_scarce(dataset, held_out=source.test is None)
        if is_own:
            _warn_of_few(source.class_names, splits, options.test_per_class)
        if options.source == "image-folder":
            _warn_of_pages([path for split in dataset.splits for path in dataset.paths(split)])
    if options.verify or (options.skip_unreadable and kind == "files"):
        _verify(dataset, status)
    _show(dataset, status, source)


def _tested_on_val(source: Source) -> Source:
    """Take the folder of val images as the test split, where there is none of test images; says so."""
    assert source.val is not None
    assert source.root is not None
    folder = source.val.paths[0].partition("/")[0]
    of = "the validation split" if file_of(source.root / source.val.paths[0]).suffix == ".parquet" else f"{folder}/"
    console.note(
        f"no folder of test images: the {counted(len(source.val.labels), 'image')} of {of} are the test split; "
        "--val-per-class N holds a val split out of the training images, and --test-per-class N a test split instead"
    )
    return replace(source, test=source.val, val=None)


def _warn_of_few(names: list[str], splits: Mapping[str, Split], test_per_class: int | None) -> None:
    """Name the classes with one training image, and those with fewer test images than wanted, or with none."""
    tests = (1, "no test image")
    if test_per_class is not None:
        tests = (test_per_class, f"fewer than {test_per_class} test images, as one image stays to train on")
    for split, (least, what) in {"train": (2, "only one training image"), "test": tests}.items():
        counts = np.bincount(splits[split].labels, minlength=len(names))
        few = [f"{name} ({number})" for name, number in zip(names, counts, strict=True) if number < least]
        if few:
            console.warn(f"{len(few)} {'class has' if len(few) == 1 else 'classes have'} {what}: {shortened(few, 5)}")


def _warn_of_scarce(dataset: Dataset, *, held_out: bool) -> None:
    """Warn if the test split is too small to say anything of the rare classes.

    Args:
        dataset: the new data set.
        held_out: the test images are held out of the training images.
    """
    groups = [group_of(int(n), few_inclusive=dataset.record.few_inclusive) for n in dataset.class_counts]
    tested = np.bincount(dataset.labels("test"), minlength=dataset.num_classes)
    if few := too_few_images(dataset.class_names, groups, tested):
        more = "add images, or hold out more with --test-per-class" if held_out else "add test images"
        console.warn(f"{few}; {more}")


def _warn_of_pages(paths: list[Path]) -> None:
    """Name the files of which more than the first picture is not used."""
    if several := [str(path) for path in with_several_pictures(paths)]:
        files = counted(len(several), "file")
        console.warn(f"only the first picture is used of {files} with animations or pages:{indented(several, SHOWN)}")


def _check_flags(options: BuildOptions) -> None:
    """Check the flags as far as possible without reading a file."""
    name = options.source
    check_source(name)
    if options.rho is not None and not 1 <= options.rho < np.inf:
        raise UsageError(
            f"--rho {options.rho:g} is no imbalance factor", fix="give a number from 1 up, such as --rho 20"
        )
    if options.profile is not None and options.profile not in PROFILES:
        raise UsageError(
            f'--profile "{options.profile}" is no class profile',
            fix=give_one_of(options.profile, PROFILES, "--profile"),
        )
    is_official = name in OFFICIAL_LISTS
    has_files = is_official or name in OWN_SOURCES
    refusals = {
        f"--rho: {name} is as long-tailed as its lists say": is_official and options.rho is not None,
        f"--subset-seed: {name} has the images that its lists say": (
            is_official and options.subset_seed and not options.val_per_class
        ),
        f"--list-dir: {name} does not come as image files": (
            (not has_files or name == "parquet") and options.list_dir is not None
        ),
        f"--image-column: {name} has no columns": name != "parquet" and options.image_column is not None,
        f"--label-column: {name} has no columns": name != "parquet" and options.label_column is not None,
        "--pack 0: images of Parquet files are read in their order, and training needs any": (
            name == "parquet" and options.pack == 0
        ),
        f"--pack: {name} does not come as image files": not has_files and options.pack is not None,
        f"--image-size: the images of {name} have one size": not has_files and options.image_size is not None,
        f"--skip-unreadable: {name} does not come as image files": not has_files and options.skip_unreadable,
        f"--layout: {name} has no class sub-folders": name != "image-folder" and options.layout != "auto",
        "--layout: the lists of --list-dir say the classes": options.list_dir is not None and options.layout != "auto",
        f"--profile: {name} has its own": name not in OWN_SOURCES and options.profile is not None,
        "--image-size: --pack says the size": options.pack and options.image_size is not None,
    }
    for message, is_wrong in refusals.items():
        if is_wrong:
            raise UsageError(message, fix="drop the flag")
    if options.profile is not None and options.rho is None:
        raise UsageError("--profile: without --rho all images are kept", fix="give --rho as well")
    if options.pack and not 8 <= options.pack <= 1024:
        raise UsageError(
            f"--pack {options.pack} is no side of packed images",
            fix="give 8 to 1024 pixels, such as --pack 256; --pack 0 leaves the images in their files",
        )


def _folder_name(options: BuildOptions, source: Source, rho: float | None) -> str:
    """Return a name from source, rho and all values that are not the default, such as cifar100-lt-rho200-seed1."""
    name = options.source
    if source.name:
        name += "-" + re.sub(r"[^\w.-]+", "-", source.name)
    if rho is not None:
        name += f"-lt-rho{rho:g}"
    if options.profile not in (None, source.profile):
        name += f"-{options.profile}"
    if options.pack is not None:
        name += f"-pack{options.pack}" if options.pack else "-files"
    if options.image_size is not None:
        name += f"-{options.image_size}px"
    if options.few_inclusive:
        name += "-few-inclusive"
    numbers = {"seed": options.subset_seed, "val": options.val_per_class, "test": options.test_per_class}
    name += "".join(f"-{word}{number}" for word, number in numbers.items() if number)
    return f"{name}-capped" if options.val_capped else name


def _choose(source: Source, request: DatasetRequest) -> dict[str, NDArray[np.int64]]:
    """Select positions in the source's pool for train, val and, if the source has no test split, test.

    Each class is shuffled. Its first images are train, its last ones test, and val lies before test. So subsets are
    nested over rho, and the splits never overlap. With val_capped, the training set differs from the one without val
    only in classes that val does not leave enough images. Without --test-per-class, a class holds out 20 per cent
    (rounded), at most 10 images. Every class keeps at least one training image. The positions are stacked class by
    class.
    """
    names, rho, num_val = source.class_names, request.rho, request.val_per_class
    order = shuffled_by_class(source.pool.labels, len(names), request.subset_seed)
    available = np.array([len(positions) for positions in order])
    if empty := [names[c] for c in np.flatnonzero(available == 0)]:
        raise InputError(
            f"classes without a training image: {', '.join(empty)}", fix="add images, or take them out of the source"
        )
    held_test = np.zeros_like(available)
    if source.test is None:
        share = np.minimum(10, (available * 0.2 + 0.5).astype(np.int64))
        held_test = np.minimum(share if request.test_per_class is None else request.test_per_class, available - 1)
    left: NDArray[np.int64] = available - held_test - num_val
    if left.min() < 1:
        without = [f"{names[c]} ({available[c]}, {held_test[c]} for the test)" for c in np.flatnonzero(left < 1)]
        most = int((available - held_test).min()) - 1
        raise InputError(
            f"--val-per-class {num_val} leaves no image to train on in {counted(len(without), 'class', 'classes')} "
            f"(images per class): {shortened(without, 5)}",
            fix=f"give --val-per-class {most} or less" if most else "drop --val-per-class, or add images",
        )

    def counts_at(rho: float | None) -> NDArray[np.int64]:
        if rho is None or request.profile is None:
            return left
        return np.minimum(PROFILES[request.profile](left + num_val if request.val_capped else left, rho), left)

    counts = counts_at(rho)
    if counts.min() < 1:
        # Counts shrink as rho grows, and rho 1 leaves every class its images.
        highest = bisect_left(range(1, int(left.max()) + 2), True, key=lambda r: bool(counts_at(r).min() < 1))
        raise InputError(
            f"rho {rho:g} leaves no image in {counted(int((counts < 1).sum()), 'class', 'classes')} "
            f"(images per class: {left.min()} to {left.max()})",
            fix=f"choose --rho {highest} or less" if highest > 1 else "drop --rho, or choose --rho 1",
        )
    train, val, test = [], [], []
    for positions, n, held in zip(order, counts, held_test, strict=True):
        end = len(positions) - held
        train.append(positions[:n])
        val.append(positions[end - num_val : end])
        test.append(positions[end:])
    return {"train": np.concatenate(train), "val": np.concatenate(val), "test": np.concatenate(test)}


def _readable(source: Source, *, upright: bool) -> Source:
    """Leave out the image files that cannot be decoded, and name them in a warning."""
    assert source.root is not None
    left_out = dict(source.left_out.get(image_folder.UNREADABLE, {}))
    kept: dict[str, Any] = {}
    for name, split in (("pool", source.pool), ("val", source.val), ("test", source.test)):
        if split is not None:
            positions, lines = readable([source.root / path for path in split.paths], upright=upright)
            kept[name] = split.take(positions)
            left_out |= dict.fromkeys((line.removeprefix(f"{source.root}/") for line in lines), 1)
    if not left_out:
        return source
    return replace(source, left_out={**source.left_out, image_folder.UNREADABLE: left_out}, **kept)


@contextmanager
def _unreadable_listed_beside(folder: Path, root: Path | None) -> Iterator[None]:
    """If a message cannot show all unreadable image files of `root`, list them in a file next to the output folder."""
    path = folder.with_name(f"{folder.name}-unreadable.txt")
    is_free = not artifacts.is_there(path) or (root is not None and _is_list(path, root))
    try:
        yield
    except UnreadableImages as fault:
        if len(fault.lines) <= SHOWN or not is_free:
            raise
        artifacts.make_folder(path.parent)
        artifacts.publish(
            path, "".join(f"{on_a_line(line)}\n" for line in fault.lines).encode(errors="surrogateescape")
        )
        raise UnreadableImages(fault.lines, shown=SHOWN, listed_in=path, fix=fault.fix) from fault
    if is_free:
        with suppress(OSError):
            path.unlink(missing_ok=True)


def _is_list(path: Path, root: Path) -> bool:
    """Return whether a file is a list of unreadable files of a folder, "PATH: reason" per line."""
    starts = tuple(on_a_line(f"{place}/").encode(errors="surrogateescape") for place in (root, root.resolve()))
    with suppress(InputError):
        lines = artifacts.read_bytes(path).splitlines()
        return bool(lines) and all(line.startswith(starts) and b": " in line for line in lines)
    return False


def _write(
    folder: Path,
    lock: locks.Lock,
    name: str,
    request: DatasetRequest,
    source: Source,
    splits: Mapping[str, Split],
    stored: storage.Stored,
    options: BuildOptions,
) -> None:
    """Publish the lists, the class counts, and dataset.json last."""
    files = dict(stored.files)
    digests: dict[str, Any] = {}
    for split, part in splits.items():
        columns: dict[str, Any] = {"sample_id": np.arange(len(part.labels)), "label": part.labels}
        columns |= {"path": part.paths} if source.root else {"source_index": part.positions}
        listed = f"{split}.parquet"
        files[listed] = tables.publish_table(folder / listed, tables.split_schema(source.root is not None), columns)
        # A digest of the content, because another pyarrow may write other Parquet bytes.
        pairs = np.stack([part.labels, part.positions]).astype("<i8").tobytes()
        digests[split] = {"list": artifacts.sha256(pairs), **stored.digests[split]}

    counts, num_test = (
        np.bincount(splits[name].labels, minlength=len(source.class_names)) for name in ("train", "test")
    )
    groups = [group_of(int(n), few_inclusive=request.few_inclusive) for n in counts]
    files[artifacts.CLASS_COUNTS] = tables.publish_table(
        folder / artifacts.CLASS_COUNTS,
        tables.CLASS_COUNTS_SCHEMA,
        {
            "class_id": np.arange(len(counts)),
            "class_name": source.class_names,
            "num_train": counts,
            "num_test": num_test,
            "group": groups,
        },
    )
    if source.left_out:
        lines = [f"{on_a_line(path)}\t{reason}\n" for reason, paths in source.left_out.items() for path in paths]
        text = "".join(lines).encode(errors="surrogateescape")
        files[artifacts.LEFT_OUT] = artifacts.publish(folder / artifacts.LEFT_OUT, text)
    scanned = {
        "times": source.times,
        "layout": None if options.layout == "auto" else options.layout,
        "image_column": options.image_column,
        "label_column": options.label_column,
        "left_out": {reason: sum(paths.values()) for reason, paths in source.left_out.items()},
        "skip_unreadable": image_folder.UNREADABLE in source.left_out,
    }
    record = {
        "format": records.FORMAT,
        "name": name,
        **request.model_dump(exclude_defaults=True),
        "classes": source.class_names,
        "num_train": int(counts.sum()),
        "num_test": int(num_test.sum()),
        "shape": stored.shape,
        "mean": stored.mean,
        "std": stored.std,
        "groups": {g: groups.count(g) for g in GROUPS},
        "recipe": source.recipe,
        "files": files,
        **stored.keys,
        "data_root": str(source.root.resolve()) if source.root else None,
        **{key: value for key, value in scanned.items() if value},
        "source_files": {p.name: artifacts.sha256(artifacts.read_bytes(p)) for p in source.files},
        "fingerprint": artifacts.digest({"classes": source.class_names, "splits": digests}),
    }
    lock.check()
    records.publish_record(folder / artifacts.DATASET, record)


# -- a finished data set -----------------------------------------------------------------------------------------------


def _check_existing(dataset: Dataset, request: DatasetRequest, source: Source) -> None:
    """Check that an existing data set is the requested one, of the same images, undamaged; pack missing shards."""
    recorded = dataset.record.model_dump(include=set(DatasetRequest.model_fields))
    if changed := differences(recorded, request.model_dump()):
        if recorded["source"] == request.source and recorded["listing"] != request.listing:
            listed = changes_by_class(dataset, source) or ["other lists, or files of other sizes"]
            changed = [*(line for line in changed if not line.startswith("listing: ")), *listed]
        raise EnvironmentFault(
            f"{dataset.folder} holds another data set:{indented(changed, SHOWN)}",
            fix="write elsewhere with --out FOLDER, or replace it with --overwrite",
        )
    artifacts.verify(dataset.folder, dataset.record.files)
    if dataset.storage == "shards":
        _repair(dataset)
    if dataset.record.times is not None and dataset.record.times != source.times:
        check_unchanged(dataset)
    locks.tidy(dataset.folder)


def _repair(dataset: Dataset) -> None:
    """Pack missing or truncated shards again, and check them against the recorded hashes."""
    assert dataset.data_root is not None
    if any(dataset.recorded_shards(split).missing() for split in dataset.splits):
        refuse_strangers(dataset.folder, storage.OWN_FILES)
    for split in dataset.splits:
        recorded = dataset.recorded_shards(split)
        if not recorded.missing():
            continue
        paths = dataset.samples(split)["path"].tolist()
        with (
            _unreadable_listed_beside(dataset.folder, dataset.data_root),
            locks.hold(dataset.folder, wait=True) as lock,
        ):
            missing = recorded.missing()  # another process may have packed some while this one waited
            console.note(f"packing {counted(len(missing), 'missing shard')} of {split} again")
            seen = np.zeros((len(paths), 2), dtype=np.int64)
            packing = shards.Packing(
                *(dataset.folder, split, dataset.data_root, paths, seen),
                *(dataset.shape[0], dataset.upright, dataset.record.shard_images),
            )
            packing.pack(missing, lock, expected=recorded.hashes)
            storage.clear(dataset.folder, dataset)


def _verify(dataset: Dataset, status: str) -> None:
    """Check every packed image, or decode every image file that was not decoded when the set was built just now."""
    if dataset.storage == "shards":
        for split in dataset.splits:
            dataset.shards(split).verify()
    elif dataset.storage == "files" and status == "up to date":
        fix = "restore or repair these files, or leave them out: --overwrite --skip-unreadable"
        with _unreadable_listed_beside(dataset.folder, dataset.data_root):
            paths = [path for split in dataset.splits for path in dataset.paths(split)]
            check_pixels(paths, upright=dataset.upright, fix=fix)


def _files_of(dataset: Dataset, source: Source, status: str) -> tuple[dict[str, Any], list[list[str]]]:
    """Return how many files of the folder were found, used and left out: as JSON fields, and as rows of a table."""
    left_out = {reason: sum(paths.values()) for reason, paths in source.left_out.items()}
    rows = image_folder.rows_of(source.left_out)
    in_splits = sum(len(split.labels) for split in (source.pool, source.val, source.test) if split is not None)
    if status == "up to date" and (skipped := dataset.record.left_out.get(image_folder.UNREADABLE, 0)):
        in_splits -= skipped - left_out.pop(image_folder.UNREADABLE, 0)
        left_out[image_folder.UNREADABLE] = skipped
        rows = [row for row in rows if image_folder.UNREADABLE not in row[0]]
        rows.append([f"left out: {image_folder.UNREADABLE}", f"{skipped:,}", str(dataset.folder / artifacts.LEFT_OUT)])
    used = {split: len(dataset.labels(split)) for split in dataset.splits}
    not_chosen = in_splits - sum(used.values())
    found = in_splits + sum(left_out.values())
    fields = {"found": found, "used": used, "not_chosen": not_chosen, "left_out": left_out}
    chosen = [[split, f"{number:,}", ""] for split, number in used.items()]
    chosen += [["not in the long-tailed subset", f"{not_chosen:,}", ""]] if not_chosen else []
    return fields, [*chosen, *rows, ["found", f"{found:,}", str(source.root)]]


def _show(dataset: Dataset, status: str, source: Source) -> None:
    record, counts = dataset.record, dataset.class_counts
    groups = record.groups
    medium, few = ("21..100", "<=20") if record.few_inclusive else ("20..100", "<20")
    num_val = len(dataset.labels("val")) if "val" in dataset.splits else 0
    fields = {
        "status": status,
        "folder": str(dataset.folder),
        "num_classes": len(counts),
        "num_train": record.num_train,
        "num_val": num_val,
        "num_test": record.num_test,
        "largest": int(counts.max()),
        "smallest": int(counts.min()),
        "groups": groups,
        "fingerprint": record.fingerprint,
    }
    table: list[str] = []
    if source.times is not None and not source.files:  # a folder was scanned
        fields["files"], rows = _files_of(dataset, source, status)
        table = [*console.table_lines(("files", ">number", "such as"), rows), ""]
    shown = f"many (>100) {groups['many']}, medium ({medium}) {groups['medium']}, few ({few}) {groups['few']}"
    said = (
        f"{record.name}: {record.num_train:,} training{f', {num_val:,} val' if num_val else ''} and "
        f"{counted(record.num_test, 'test image')}, "
        f"{counted(len(counts), 'class', 'classes')}, largest {counts.max()}, smallest {counts.min()} "
        f"(ratio {counts.max() / counts.min():.4g})"
    )
    lines = [
        *console.histogram(counts.tolist(), record.classes),
        "",
        *table,
        *console.prose([said, f"groups: {shown} classes"]),
        f"{status}: {dataset.folder}",
    ]
    console.result(fields, lines=lines)
    _follow(dataset)


def _follow(dataset: Dataset) -> None:
    """Print the command that trains on a data set, with what its default recipe needs besides."""
    record = dataset.record
    recipe = load(dataset.recipe(), rho=record.rho)
    settings = fitting_settings(recipe, dataset.num_classes, dataset.shape, has_statistics=dataset.has_statistics)
    flags = [word for setting in settings for word in ("--set", setting)]
    words = ["train-stage1", "--data", dataset.folder, "--out", f"ckpt/{record.name}", *flags]
    if weights := with_settings(recipe, settings).model.init:
        how, made = how_to_import(weights)
        console.follow(f"{how} && {console.typed(*words, '--init', made)}")
    else:
        console.follow(console.typed(*words))
