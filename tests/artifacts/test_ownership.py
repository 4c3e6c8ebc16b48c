"""Files of a user's that lie in an output folder under a name of cpmix's: they are never replaced or deleted."""

import json
import os
import shutil
import socket
from fnmatch import fnmatch
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from helpers import exact_contents, files, fix_of, must, refused, save, unchanged, write_photos
from safetensors.torch import save_file

from cpmix_cli.artifacts.files import publish, temporary_for
from cpmix_cli.artifacts.locks import LOCK, hold
from cpmix_cli.artifacts.ownership import refuse_strangers
from cpmix_cli.data.storage import OWN_FILES
from cpmix_cli.runtime.errors import EnvironmentFault


def put(path: Path) -> Path:
    """A file as users have it: Hugging Face's columns, weights of another program, a record of another tool, notes."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".parquet":
        pq.write_table(pa.table({"image": [b"png"], "label": [1]}), path)
    elif path.suffix == ".safetensors":
        save_file({"features.weight": torch.ones(2)}, path)
    elif path.suffix == ".json":
        path.write_text(json.dumps({"info": {}, "images": [], "annotations": []}))
    else:
        path.write_text("two years of work")
    return path


DATA = ["train.parquet", "test.safetensors", "class_counts.parquet", "train-00000.shard", "val-hashes.parquet"]
DATA += ["dataset.json", "packing-train-00000.shard.json"]


@pytest.mark.parametrize("flags", [[], ["--overwrite"]])
@pytest.mark.parametrize("name", DATA)
def test_build_lt_refuses_a_file_that_it_did_not_write(tmp_path: Path, name: str, flags: list[str]) -> None:
    out = put(tmp_path / "mine" / name).parent
    with unchanged(tmp_path):
        result = refused(4, (), "build-lt", "toy", "--out", out, *flags)
    assert result.stderr.splitlines()[-2:] == [
        f"error: {out} has 1 file that cpmix did not write and would replace: {name}",
        "  fix: move them to another folder, or write elsewhere with --out FOLDER",
    ]
    put(out / "notes.md")
    (out / name).rename(out / "aside")
    must("build-lt", "toy", "--out", out, *flags)
    assert (out / "notes.md").read_text() == "two years of work"


def test_a_stranger_among_files_of_cpmix_is_refused(toy: Path, tmp_path: Path) -> None:
    """A data set of cpmix may be replaced, but not the val.parquet that a user has put beside it."""
    data = Path(shutil.copytree(toy, tmp_path / "data"))
    build = ("build-lt", "toy", "--out", data, "--val-per-class", 20, "--overwrite")
    for content in (None, b"", b"mine"):
        put(data / "val.parquet") if content is None else (data / "val.parquet").write_bytes(content)
        with unchanged(data):
            refused(4, "1 file that cpmix did not write and would replace: val.parquet", *build)
    (data / "val.parquet").unlink()
    put(data / "train.parquet")  # in place of one of cpmix's
    with unchanged(data):
        refused(4, "would replace: train.parquet", *build)
    (data / "train.parquet").unlink()
    must(*build)


def test_a_data_set_and_a_phase_do_not_share_a_folder(digits: Path, digits_run: Path, tmp_path: Path) -> None:
    """Both have a class_counts.parquet."""
    with unchanged(digits_run):
        said = f"error: {digits_run / 'stage1'} holds an output of another command\n"
        refused(4, said, "build-lt", "toy", "--out", digits_run / "stage1", "--overwrite")
    shutil.copytree(digits, tmp_path / "stage1")
    with unchanged(tmp_path):
        said = f"error: {tmp_path / 'stage1'} holds a data set\n"
        refused(4, said, "train-stage1", "--data", digits, "--out", tmp_path, "--epochs", 6)


def test_a_list_of_unreadable_files_replaces_only_such_a_list(tmp_path: Path) -> None:
    for name in ("red", "green"):
        for number in range(14):
            path = tmp_path / "photos" / name / f"{number}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text("no image")
    build = ("build-lt", "image-folder", "--data-root", tmp_path / "photos", "--out", tmp_path / "data")
    notes = put(tmp_path / "data-unreadable.txt")
    result = refused(3, "28 files cannot be read as an image", *build)
    assert (result.stderr.count("not an image"), "lists all" in result.stderr) == (28, False)
    assert notes.read_text() == "two years of work"
    notes.unlink()
    for _ in range(2):
        refused(3, f"{notes} lists all", *build)
        assert len(notes.read_text().splitlines()) == 28


PHASE = ["model.safetensors", "training_state.safetensors", "metrics.parquet", "recipe.toml", "run.json"]
PHASE += ["class_counts.parquet", "confusion_pairs.parquet"]


@pytest.mark.parametrize("flags", [[], ["--overwrite"], ["--dry-run"]])
@pytest.mark.parametrize("name", PHASE)
def test_training_refuses_a_file_that_it_did_not_write(toy: Path, tmp_path: Path, name: str, flags: list[str]) -> None:
    put(tmp_path / "stage1" / name)
    with unchanged(tmp_path):
        said = f"{tmp_path / 'stage1'} has 1 file that cpmix did not write and would replace: {name}"
        refused(4, said, "train-stage1", "--data", toy, "--out", tmp_path, "--epochs", 2, *flags)


def test_stage_2_and_finetune_refuse_the_weights_of_a_user(digits_run: Path, tmp_path: Path) -> None:
    for command, phase in (("train-stage2", "stage2"), ("finetune", "finetune")):
        put(tmp_path / phase / "model.safetensors")
        with unchanged(tmp_path):
            refused(4, "would replace: model.safetensors", command, "--from", digits_run, "--out", tmp_path)


EVALUATION = ["metrics.json", "per_class.parquet", "predictions.parquet", "logits.safetensors", "samples.parquet"]


@pytest.mark.parametrize("flags", [[], ["--overwrite"]])
def test_evaluate_refuses_files_that_it_did_not_write(toy_run: Path, tmp_path: Path, flags: list[str]) -> None:
    folder = tmp_path / "out" / "evaluation" / "stage2"
    for name in EVALUATION:
        put(folder / name)
    with unchanged(tmp_path):
        said = f"{folder} has 5 files that cpmix did not write and would replace: {', '.join(EVALUATION)}"
        refused(4, said, "evaluate", "--from", toy_run, "--out", tmp_path / "out", *flags)


@pytest.mark.parametrize("flags", [[], ["--overwrite"]])
@pytest.mark.parametrize("name", ["index.html", "stage2/class_accuracy.png", "stage2/confusion_matrix.parquet"])
def test_a_report_refuses_a_file_that_it_did_not_write(
    toy_run: Path, tmp_path: Path, name: str, flags: list[str]
) -> None:
    path = put(tmp_path / "out" / "confusion" / name)
    with unchanged(tmp_path):
        result = refused(4, path.name, "confusion-report", "--from", toy_run, "--out", tmp_path / "out", *flags)
    assert fix_of(result).endswith("or write elsewhere with --out FOLDER")


@pytest.mark.slow
def test_a_page_of_a_user_in_a_run_with_reports_is_refused(toy_run: Path) -> None:
    report = ("confusion-report", "--from", toy_run, "--images", 3)
    page = toy_run / "confusion" / "index.html"
    page.write_text("my page")
    with unchanged(toy_run):
        refused(4, "index.html is a file that cpmix did not write", *report)
    page.unlink()
    must(*report)
    page.write_text(page.read_text() + "damage")  # still a page of cpmix
    must(*report)


@pytest.mark.slow
@pytest.mark.long
def test_an_output_without_its_record_is_cpmix_s_by_its_content(toy: Path, toy_run: Path, tmp_path: Path) -> None:
    """As a process leaves it that was killed before it wrote the record; any of the other files may be missing too."""
    data = Path(shutil.copytree(toy, tmp_path / "data"))
    for folder, record, command in (
        (data, "dataset.json", ("build-lt", "toy", "--out", data)),
        (toy_run / "evaluation" / "stage2", "run.json", ("evaluate", "--from", toy_run)),
        (toy_run / "confusion" / "stage2", "run.json", ("confusion-report", "--from", toy_run)),
    ):
        expected = {name: data for name, data in exact_contents(folder).items() if name != record}
        for name in files(folder)[:4]:
            (folder / record).unlink(missing_ok=True)
            (folder / name).unlink(missing_ok=True)
            must(*command)
            assert {name: (folder / name).read_bytes() for name in expected} == expected


def test_temporary_files_and_locks_follow_no_link(tmp_path: Path) -> None:
    """Links under their names, which another user can foresee, lead to a file that must not be written."""
    precious = put(tmp_path / "precious.txt")
    out = tmp_path / "out.txt"
    for suffix in ("", "-before"):
        temporary = temporary_for(out)
        temporary.with_name(temporary.name + suffix).symlink_to(precious)
    publish(out, b"result")
    folder = tmp_path / "stage1"
    folder.mkdir()
    for serial in range(1000):
        (folder / f"{LOCK}-{socket.gethostname()}-{os.getpid()}-{serial}").symlink_to(precious)
    with hold(folder):
        pass
    assert precious.read_text() == "two years of work"
    assert out.read_bytes() == b"result"
    assert not out.is_symlink()


def test_a_link_in_place_of_a_result_is_replaced_but_not_its_target(toy: Path, tmp_path: Path) -> None:
    data = Path(shutil.copytree(toy, tmp_path / "data"))
    kept = (data / "train.safetensors").rename(tmp_path / "moved.safetensors")
    before = kept.read_bytes()
    (data / "train.safetensors").symlink_to(kept)
    must("build-lt", "toy", "--out", data, "--rho", 5, "--overwrite")
    assert kept.read_bytes() == before
    assert not (data / "train.safetensors").is_symlink()


def test_the_list_of_what_is_left_out_replaces_only_such_a_list(tmp_path: Path) -> None:
    write_photos(tmp_path / "photos", {"red": 8, "green": 8})
    put(tmp_path / "photos" / "red" / "notes.txt")
    build = ("build-lt", "image-folder", "--data-root", tmp_path / "photos", "--image-size", 16, "--out")
    notes = put(tmp_path / "data" / "left_out.txt")
    for flags in ([], ["--overwrite"]):
        with unchanged(tmp_path):
            refused(4, "1 file that cpmix did not write and would replace: left_out.txt", *build, notes.parent, *flags)
    notes.write_text("red/0.png\tblurred\n")  # such a list, but nothing beside it is of cpmix
    (notes.parent / "train-00000.shard").write_text("pixels of a user's own")
    with unchanged(tmp_path):
        refused(4, "2 files that cpmix did not write", *build[:4], "--pack", 16, "--overwrite", "--out", notes.parent)
    shutil.rmtree(notes.parent)
    must(*build, notes.parent)
    assert notes.read_text() == "red/notes.txt\tno image by the name\n"
    must(*build, notes.parent, "--overwrite")
    (tmp_path / "photos" / "red" / "notes.txt").unlink()
    must(*build, notes.parent, "--overwrite")
    assert not notes.exists()


@pytest.mark.parametrize("flags", [[], ["--pack", 16], ["--pack", 0]])
def test_all_files_of_a_data_set_are_among_those_that_are_looked_for(tmp_path: Path, flags: list[object]) -> None:
    write_photos(tmp_path / "photos", {"red": 8, "green": 8})
    put(tmp_path / "photos" / "red" / "notes.txt")
    must(
        *("build-lt", "image-folder", "--data-root", tmp_path / "photos", "--val-per-class", 1, *flags),
        *("--out", tmp_path / "data"),
    )
    names = files(tmp_path / "data")
    assert "left_out.txt" in names
    assert [name for name in names if not any(fnmatch(name, pattern) for pattern in OWN_FILES)] == []


def test_notes_in_the_form_of_a_list_of_unreadable_files_stay(tmp_path: Path) -> None:
    write_photos(tmp_path / "photos", {"red": 8, "green": 8})
    notes = tmp_path / "data-unreadable.txt"
    for text in ("todo: look again\n", ""):
        notes.write_text(text)
        must("build-lt", "image-folder", "--data-root", tmp_path / "photos", "--out", tmp_path / "data", "--overwrite")
        assert notes.read_text() == text
    notes.write_text(f"{tmp_path}/photos/red/000.png: not an image\n")
    must("build-lt", "image-folder", "--data-root", tmp_path / "photos", "--out", tmp_path / "data", "--overwrite")
    assert not notes.exists()


def test_packing_missing_shards_again_deletes_no_file_of_the_user(tmp_path: Path) -> None:
    write_photos(tmp_path / "photos", {"red": 8, "green": 8})
    data = tmp_path / "data"
    build = ("build-lt", "image-folder", "--data-root", tmp_path / "photos", "--pack", 16, "--out", data)
    must(*build)
    (data / "train-00000.shard").unlink()
    put(data / "train-mine1.shard")
    put(data / "train.safetensors")
    with unchanged(data):
        refused(4, "1 file that cpmix did not write and would replace: train.safetensors", *build)
    (data / "train.safetensors").unlink()
    must(*build)
    assert (data / "train-mine1.shard").read_text() == "two years of work"


def test_a_phase_that_ends_before_its_first_state_is_begun_again(toy: Path, tmp_path: Path) -> None:
    """Only recipe.toml is there then; the fix of an error may be another recipe."""
    train = ["train-stage1", "--data", toy, "--out", tmp_path, "--epochs", 2]
    refused(5, "no state was saved before", *train, "--set", "optimizer.lr=1e30")
    assert files(tmp_path) == ["stage1/recipe.toml"]
    must(*train)


def test_a_copy_of_a_recipe_is_the_user_s(toy: Path, toy_run: Path, tmp_path: Path) -> None:
    """Every run's recipe.toml is a valid --recipe, so users copy and edit them."""
    copy = tmp_path / "stage1" / "recipe.toml"
    copy.parent.mkdir()
    copy.write_text((toy_run / "stage1" / "recipe.toml").read_text() + "# my notes\n")
    train = ("train-stage1", "--data", toy, "--out", tmp_path, "--epochs", 2)
    for flags in ([], ["--overwrite"]):
        with unchanged(tmp_path):
            refused(4, "would replace: recipe.toml", *train, *flags)
    copy.rename(tmp_path / "mine.toml")
    must(*train, "--recipe", tmp_path / "mine.toml")
    (copy.parent / "run.json").unlink()
    must(*train, "--recipe", tmp_path / "mine.toml")  # beside a training state it is cpmix's


@pytest.mark.parametrize(
    ("form", "text"),
    [
        ("table", "accuracy in per cent\nmine\n"),
        ("markdown", "**my accuracies, per cent**\n\n- 90\n"),
        ("latex", "% \\usepackage{booktabs}\n\\begin{table}\n  \\caption{mine}\n"),
        ("csv", "method,recipe,mine\n"),
        ("json", '{"runs": ["command: compare"]}\n'),
    ],
)
def test_compare_knows_its_own_tables_from_a_user_s(toy_run: Path, tmp_path: Path, form: str, text: str) -> None:
    compare = ("compare", toy_run, "--format", form, "--overwrite", "--out")
    (tmp_path / "mine").write_text(text)
    with unchanged(tmp_path):
        refused(4, f"{tmp_path / 'mine'} exists", *compare, tmp_path / "mine")
    for _ in range(2):
        must(*compare, tmp_path / "own")
    for _ in range(2):
        must("compare", toy_run, "--paper", "table1", "--format", form, "--overwrite", "--out", tmp_path / "own")


def test_import_weights_does_not_replace_a_training_state(digits_run: Path, tmp_path: Path) -> None:
    checkpoint = tmp_path / "weights.pth"
    sha = save({"fc.weight": torch.ones(2, 2)}, checkpoint)
    state = digits_run / "stage1" / "training_state.safetensors"
    convert = ("import-weights", checkpoint, "--sha256", sha, "--overwrite", "--out")
    with unchanged(digits_run):
        refused(4, f"{state} holds something else", *convert, state)
    for _ in range(2):
        must(*convert, tmp_path / "own.safetensors")


def test_a_link_in_a_circle_is_refused(tmp_path: Path) -> None:
    (tmp_path / "out").symlink_to("out")
    write_photos(tmp_path / "photos", {"red": 3, "green": 3})
    build = ("build-lt", "image-folder", "--data-root", tmp_path / "photos", "--out", tmp_path / "out")
    result = refused(3, f"cannot read {tmp_path / 'out' / 'dataset.json'}: Too many levels of symbolic links", *build)
    assert fix_of(result)
    convert = ("import-weights", tmp_path / "weights.pth", "--sha256", "0" * 64, "--out", tmp_path / "out")
    result = refused(4, f"a link leads back to itself: '{tmp_path / 'out'}'", *convert)
    assert fix_of(result) == "delete the link, or give another path"
    for path in (tmp_path / "out", tmp_path / "photos" / "red" / "000.png"):
        result = refused(3, f"{path} is not a folder", "status", path)
        assert fix_of(result) == "give the folder of a run, or of a phase in it"


def test_names_that_are_not_to_be_written_are_of_no_account(tmp_path: Path) -> None:
    put(tmp_path / "train.parquet")
    refuse_strangers(tmp_path, ["test.parquet", "train-*.shard"])
    refuse_strangers(tmp_path / "none", ["train.parquet"])
    (tmp_path / "test.parquet").symlink_to("nowhere")
    with pytest.raises(EnvironmentFault, match=r"2 files .* replace: test.parquet, train.parquet"):
        refuse_strangers(tmp_path, ["test.parquet", "train.parquet"])
