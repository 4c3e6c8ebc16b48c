"""Every refusal of a command states the value, who needs it and a fix, and the fix repairs it."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from helpers import cpmix, edit_record, must, refused, setting, unchanged, write_image

from cpmix_cli.artifacts.files import sha256

TRAIN = "train-stage1 --data {digits} --out {new}"
REFUSED = {
    "trian-stage1": "give train-stage1",
    "--versoin": "give --version",
    "evaluate": "give --from: ",
    "evaluate --from": "give --from a value: ",
    "evaluate --from {run} more": "cpmix evaluate --help",
    "evaluate --from {run} --ovrwrite": "give --overwrite in place of --ovrwrite; cpmix evaluate --help lists",
    "evaluate --from {run} --overwrite=1": "give --overwrite alone",
    "evaluate --from {run} --ratio 0.5": "give --ratio a number from 1 up",
    "evaluate --from {run} --split tset": "give --split test, or one of train, val",
    "figure 7 {run}": "give N a number from 1 to 6",
    "status": "name the folders of your runs, or begin one: cpmix run digits --out ckpt/digits",
    "compare": "give RUN...: ",
    "train-stage1 --device gpu": "give --device cuda, or one of",
    "build-lt digit": "give digits, or one of cifar10",
    "build-lt digits --rho 0.5": "give a number from 1 up",
    "build-lt digits --pack 8": "drop the flag",
    "build-lt imagenet-lt --pack 7": "--pack 256",
    "build-lt image-folder --profile stepp --rho 2": "give --profile step, or one of",
    "build-lt image-folder --profile step": "give --rho",
    "build-lt image-folder --data-root nowhere": "",
    "train-stage1": "cpmix build-lt digits",
    "train-stage1 --data nowhere": "",
    f"{TRAIN} --epochs 1": "give --epochs 2 or more",
    f"{TRAIN} --epochs no": "give --epochs a number from 1 to 1000000",
    f"{TRAIN} --recipe none.toml": "cpmix recipes",
    f"{TRAIN} --recipe ride": "give cifar10-lt/ride in place of ride, or ",
    f"{TRAIN} --recipe digits/cpmx": "give digits/cpmix in place of digits/cpmx, or ",
    f"{TRAIN} --recipe {'n' * 300}": "cpmix recipes",
    f"{TRAIN} --set optimizer.lr": "--set optimizer.lr=0.05",
    f"{TRAIN} --set optimizer.lrr=1": "correct or drop --set optimizer.lrr=1",
    f"{TRAIN} --set seed={'9' * 5000}": "correct or drop --set seed=999",
    f"{TRAIN} --seed {2**64}": f"correct or drop --seed {2**64}",
    f"{TRAIN} --set model.name=one-hidden-layer": "correct or drop --set model.name=one-hidden-layer",
    f"{TRAIN} --recipe toy/cpmix": "give a recipe for this data set with --recipe",
    f"{TRAIN} --set stage1.terms.erm.teacher=distillation": "--teacher RUN",
    f"{TRAIN} --teacher {{run}}": "--set stage1.terms.erm.teacher=distillation",
    f"{TRAIN} --init none.pth": "convert a checkpoint first: cpmix import-weights CHECKPOINT --sha256 HASH",
    f"{TRAIN} --init {{real}}": "cpmix import-weights {real} --sha256 $(sha256sum < {real} | cut -c1-64)",
    f"{TRAIN} --init {{toy}}": "the folder of a trained run",
    f"{TRAIN} --init none.safetensors": "convert a checkpoint first: cpmix import-weights CHECKPOINT --sha256 HASH",
    f"{TRAIN} --teacher none --set stage1.terms.erm.teacher=distillation": "give the folder of a trained run",
    f"{TRAIN} --tracker wanda": "give --tracker wandb, or one of",
    "train-stage2 --from nowhere": "",
    "train-stage2 --from {run} --set optimizer.lr=7": "drop --set optimizer.lr=7, or train stage1",
    "finetune --from {run} --phase stage3": "",
    "evaluate --from {run} --label a/b": "--label run-2",
    "evaluate --from {run} --split train --test-data {digits}": "drop one of the two flags",
    "evaluate --from {run} --test-data none": "give a folder of FOLDER/CLASS/IMAGE",
    "evaluate --from {run} --ratio 10": "give --test-distribution forward or backward as well, or drop --ratio",
    "evaluate --from {run} --test-distribution forward --ratio inf": "such as --ratio 50",
    "evaluate --from {run} --set optimizer.lr=1": "change only keys of [evaluation]",
    "evaluate --from {run} --set evaluation.tau=1": "correct or drop --set evaluation.tau=1",
    "confusion-report --from {run} --compare {run}": "give each run once",
    "confusion-report --from {run} --compare {toy_run}": "drop --compare {toy_run}",
    "compare {run} --json --format csv": "drop one of the two flags",
    "compare {run} --format yml": "give --format one of csv",
    "recipes digits/cpmx": "give digits/cpmix in place of digits/cpmx, or ",
    "predict {image} --from {toy_run}": "give --from a run that was trained on images",
    "predict nowhere.png --from {run}": "",
    "export --from {run} --out model.bin": "--out model.onnx",
    "export --from {run} --format onxx": "give --format onnx",
    "export --from {run} --phase stage3": "",
    "export --from nowhere": "",
    "misclassified --from {run} --true eleven": "give --true one of 0",
    f"misclassified --from {{run}} --true {'9' * 5000}": "give --true one of 0",
    "misclassified --from {run} --label none": "",
    "figure 3 {run} --out figure.bmp": "--out figure3.pdf",
    "import-weights {weights} --sha256 x": "",
    "import-weights none.pth --sha256 11ad3fa6": "correct the path, or fetch the file",
    "import-weights {weights} --sha256 {sha}": "torch.save(model.state_dict(), FILE)",
    "bench --data {toy}": "give --data a data set of images",
    "bench --data-root {digits}": "give --data FOLDER as well",
    "bench --world-size 1,x": "--world-size 1,8,64",
    "bench --cores 2": "--world-size 1,8,64",
    "bench --data {digits} --set stage1.terms.erm.teacher=distillation": "--recipe cifar100-lt/cpmix",
}
"""Command line -> part of its fix."""


@pytest.mark.parametrize("line", REFUSED)
def test_every_refusal_names_who_needs_the_value_and_a_fix(
    line: str, digits: Path, toy: Path, digits_run: Path, toy_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    torch.save([1], tmp_path / "weights.pth")
    torch.save({"conv1.weight": torch.zeros(1)}, tmp_path / "real.pth")
    places = {
        "digits": digits,
        "toy": toy,
        "run": digits_run,
        "toy_run": toy_run,
        "new": tmp_path / "new",
        "image": write_image(tmp_path / "image.png"),
        "weights": tmp_path / "weights.pth",
        "real": tmp_path / "real.pth",
        "sha": sha256((tmp_path / "weights.pth").read_bytes()),
    }
    with unchanged(tmp_path):
        result = cpmix(*line.format(**places).split())
    assert result.code in (2, 3), result.stderr
    lines = [
        text.partition(": ")[0]
        for text in result.stderr.splitlines()
        if text.startswith(("error", "  needed", "  fix"))
    ]
    root = line.partition(" ")[0] in ("trian-stage1", "--versoin")
    assert lines == (["error", "  fix"] if root else ["error", "  needed by", "  fix"]), result.stderr
    assert REFUSED[line].format(**places) in result.stderr.partition("  fix: ")[2]


@pytest.mark.parametrize(
    ("flags", "changed", "fix"),
    [
        ([], "schedule.epochs: 6 -> 60", "give --epochs 6 --seed 2, as stage1 was trained"),
        (["--seed", "2"], "schedule.epochs: 6 -> 60", "give --epochs 6, as stage1 was trained"),
        (["--epochs", "3", "--seed", "2"], "schedule.epochs: 6 -> 3", "give --epochs 6, as stage1 was trained"),
        (["--epochs", "6"], "seed: 2 -> 0", "give --seed 2, as stage1 was trained"),
    ],
)
def test_a_recipe_file_without_the_epochs_of_stage_1_is_refused_with_the_flags_that_continue_it(
    flags: list[str], changed: str, fix: str, digits: Path, tmp_path: Path
) -> None:
    recipe, run = tmp_path / "mine.toml", tmp_path / "run"
    recipe.write_text('extends = "digits/cpmix"\n')
    must("train-stage1", "--data", digits, "--recipe", recipe, "--epochs", 6, "--seed", 2, "--out", run)
    command = ("train-stage2", "--from", run, "--recipe", recipe, *flags)
    refused(3, (changed, f"  fix: {fix}\n"), *command, "--dry-run")
    given = fix.removeprefix("give ").partition(",")[0].split()
    must(*command, *given, "--dry-run")
    refused(2, "  fix: give --epochs 6\n", "train-stage2", "--from", run, "--epochs", 1)
    again = ("train-stage1", "--data", digits, "--recipe", recipe, "--out", run)
    refused(4, "fix: give --epochs 6 --seed 2, as it was begun; or write elsewhere", *again)


def test_epochs_that_stage_1_did_not_have_are_to_be_dropped(digits: Path, tmp_path: Path) -> None:
    recipe, run = tmp_path / "mine.toml", tmp_path / "run"
    recipe.write_text('extends = "digits/cpmix"\n[schedule]\nepochs = 3\nstage1_epochs = 2\n')
    must("train-stage1", "--data", digits, "--recipe", recipe, "--out", run)
    command = ("train-stage2", "--from", run, "--recipe", recipe, "--dry-run")
    refused(3, "  fix: drop --epochs 2\n", *command, "--epochs", 2)
    must(*command)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "[stage1.terms.erm]\n",
            "200 of schedule.epochs = 300 leave 100 to stage 2, but [stage2] is missing: set both to",
        ),
        (
            'extends = "digits/cpmix"\nschedule.epochs = 2\n',
            "40 of schedule.epochs = 2: lower the first; --epochs N, not",
        ),
        (
            'extends = "digits/cpmix"\nschedule.epochs = 40\n',
            "40 of schedule.epochs = 40 leave none to [stage2]: lower",
        ),
    ],
)
@pytest.mark.parametrize("flags", [(), ("--epochs", 3)])
def test_epochs_of_a_recipe_file_that_fit_no_stages_are_explained(
    text: str, message: str, flags: tuple[object, ...], digits: Path, tmp_path: Path
) -> None:
    (tmp_path / "mine.toml").write_text(text)
    command = ("train-stage1", "--data", digits, "--out", tmp_path / "run", "--recipe", tmp_path / "mine.toml", *flags)
    refused(2, (f"schedule.stage1_epochs = {message}", f"fix: correct {tmp_path / 'mine.toml'}\n"), *command)


SET = {
    "optimizer.lrr=1": "optimizer.lrr: unknown key",
    "optimizer.lr=0,1": "optimizer.lr = '0,1': Input should be a valid number",
    "seed.x=1": "seed: Input should be a valid integer",
    "stage2.terms.cp.t=7": "stage2.terms.cp.t = 7: Input should be less than or equal to 1",
    "stage1.terms.erm.loss=focal": "stage1.terms.erm.gamma: missing (a parameter of loss",
    "data.crop=8": "data.crop = 8 needs data.augment",
    "schedule.stage1_epochs=500": "schedule.stage1_epochs = 500 of schedule.epochs",
    "stage1.terms.erm.partner=permutation": "stage1.terms.erm: a partner needs ratio, alpha, mix, label",
    "model.name=one-hidden-layer": "takes points, the data set has samples of shape",
    'finetune.train=["nothing"]': 'no parameter of the network starts with "nothing"',
}
"""Setting -> what is wrong with it."""


@pytest.mark.parametrize("wrong", SET)
@pytest.mark.parametrize("command", ["train-stage1", "train-stage2"])
def test_an_error_of_set_names_the_flag_that_was_typed(
    wrong: str, command: str, digits: Path, digits_run: Path
) -> None:
    source = ("--data", digits, "--out", digits_run) if command == "train-stage1" else ("--from", digits_run)
    flags = setting("evaluation.batch_size=100", wrong)  # the first is right and never named
    result = refused(2, SET[wrong], command, *source, *flags)
    typed = f"--set '{wrong}'" if '"' in wrong else f"--set {wrong}"
    assert f"error: {typed} gives 1 error in " in result.stderr
    assert result.stderr.endswith(f"fix: correct or drop {typed}\n")


def test_errors_of_the_file_and_of_set_are_told_apart(digits: Path, tmp_path: Path) -> None:
    recipe = tmp_path / "mine.toml"
    recipe.write_text('extends = "digits/cpmix"\noptimizer.nesterov = 1\n')
    command = ("train-stage1", "--data", digits, "--out", tmp_path / "run", "--recipe", recipe)
    result = refused(2, f"error: recipe {recipe} has 1 error:", *command, "--set", "optimizer.lr=0.2")
    assert "--set" not in result.stderr
    said = f"error: recipe {recipe} with --set optimizer.lr=-1 has 2 errors:"
    refused(
        2, (said, f"fix: correct {recipe}; correct or drop --set optimizer.lr=-1"), *command, "--set", "optimizer.lr=-1"
    )


def test_a_run_whose_recipe_has_an_integer_for_a_float_continues(digits: Path, tmp_path: Path) -> None:
    """Runs of earlier versions stored parameters as they were typed."""
    flags = ("--data", digits, "--epochs", 3, *setting("loss=focal", "gamma=1", table="stage1.terms.erm"))
    old, new = tmp_path / "old", tmp_path / "new"
    must("train-stage1", *flags, "--out", new)
    shutil.copytree(new, old)
    path = old / "stage1" / "recipe.toml"
    text = path.read_text()
    assert "gamma = 1.0" in text
    path.write_text(text.replace("gamma = 1.0", "gamma = 1"))
    record = json.loads((old / "stage1" / "run.json").read_text())
    record["made_from"]["recipe"]["stage1"]["terms"]["erm"]["gamma"] = 1
    outputs = {**record["outputs"], "recipe.toml": sha256(path.read_bytes())}
    edit_record(old / "stage1" / "run.json", made_from=record["made_from"], outputs=outputs)
    must("train-stage2", "--from", old)
    assert "up to date" in must("train-stage1", *flags, "--out", old).stdout
    assert "up to date" in must("train-stage2", "--from", old).stdout
    must("evaluate", "--from", old, "--phase", "stage1")
    must("train-stage1", *flags[:-1], "stage1.terms.erm.gamma=1.0", "--seed", 1, "--out", new, "--overwrite")
    must("evaluate", "--from", new)
    assert len(must("compare", old / "stage1", new, "--json").json["rows"]) == 1


def test_a_set_of_few_steps_is_warned_of_and_the_digits_are_not(digits: Path, tmp_path: Path) -> None:
    command = ("train-stage1", "--data", digits, "--out", tmp_path, "--dry-run")
    said = must(*command).stderr
    assert "images, epochs 1 to 40, 7 steps each\nstage1: resnet8, 75,002 parameters; terms: erm; cpu, " in said
    assert "warning" not in said
    few = must(*command, "--set", "optimizer.batch_size=200").stderr
    assert "warning: an epoch has only 3 steps, with batches of 200 images: lower optimizer.batch_size" in few
    assert "417 images, epoch 1, 7 steps\nstage1: resnet8" in must(*command, "--epochs", 2).stderr
