"""The command line itself: help, exit codes, streams, start-up, and an installed wheel."""

import json
import tomllib
from pathlib import Path

import pytest
from helpers import files, installed_wheel, must, process, refused

from cpmix_cli.results.paper import PAPER_TABLES

COMMANDS = ["build-lt", "train-stage1", "train-stage2", "finetune", "evaluate", "confusion-report"]
HELPERS = ["run", "status", "compare", "results", "recipes", "methods"]
HELPERS += ["predict", "export", "misclassified", "figure", "import-weights", "bench"]
REPOSITORY = Path(__file__).parents[1]
RESULTS = f"results {REPOSITORY}/recipes/results.csv"


def test_help_lists_the_six_commands_in_order_then_the_helpers() -> None:
    after = must("--help").stdout.split("Commands:\n")[1]
    pipeline, helpers = (part.split("\n\n")[0] for part in after.split("Helpers:\n"))
    assert [line.split()[0] for line in pipeline.splitlines()] == COMMANDS
    assert [line.split()[0] for line in helpers.splitlines()] == HELPERS


@pytest.mark.parametrize("command", COMMANDS + HELPERS)
def test_every_command_has_help_with_an_example(command: str) -> None:
    result = must(command, "-h")
    assert f"Example: cpmix {command} " in " ".join(result.stdout.split())
    assert "--json" in result.stdout


def test_every_command_has_the_agreed_flags() -> None:
    """Scripts depend on them: one may be added here, none may go."""
    training = (
        "--recipe --set --epochs --seed --device --threads --data --data-root --overwrite --dry-run --eval-every "
    )
    training += "--checkpoint-every --tracker --plugin --json"
    expected = {
        "build-lt": "--rho --out --data-root --list-dir --subset-seed --profile --val-per-class --val-capped "
        "--test-per-class --image-size --pack --few-inclusive --layout --image-column --label-column --skip-unreadable "
        "--download --verify --overwrite --json",
        "train-stage1": f"--out --init --teacher {training}",
        "train-stage2": f"--from --out {training}",
        "finetune": f"--from --out --phase {training}",
        "evaluate": "--from --out --phase --set --label --split --test-data --skip-unreadable --test-distribution "
        "--ratio --threshold-for --few-inclusive --device --threads --tracker --data --data-root --plugin "
        "--overwrite --json",
        "confusion-report": "--from --out --phase --label --compare --no-compare --images --data --data-root "
        "--overwrite --json",
        "run": "--rho --out --data --data-root --list-dir --subset-seed --profile --val-per-class --val-capped "
        "--test-per-class --image-size --pack --few-inclusive --layout --image-column --label-column --skip-unreadable "
        f"--download --verify --seeds --init --teacher {training}",
        "status": "--curves --json",
        "compare": "--split --paper --format --out --overwrite --append --study --json",
        "results": "--update --json",
        "recipes": "--set --epochs --seed --rho --plugin --budget --copy --overwrite --json",
        "methods": "--json",
        "predict": "--from --phase --top --out --probabilities --unsure-below --sort-into --skip-unreadable --device "
        "--threads --plugin --overwrite --json",
        "export": "--from --phase --format --out --data --data-root --plugin --overwrite --json",
        "misclassified": "--from --true --predicted --phase --label --limit --out --data --data-root --overwrite "
        "--json",
        "figure": "--out --data --plugin --overwrite --json",
        "import-weights": "--sha256 --prefix --out --overwrite --json",
        "bench": "--recipe --set --epochs --data --data-root --device --threads --rounds --seconds --ingredients "
        "--world-size --cores --link --plugin --json",
    }
    for command, flags in expected.items():
        text = must(command, "--help").stdout
        found = {w for line in text.splitlines() for w in line.split()[:2] if w.startswith("--")}
        assert found - {"--help"} == set(flags.split()), command


@pytest.mark.parametrize(
    ("line", "code"),
    [
        ("--help", 0),
        ("train-stage2 --help", 0),
        ("run digits --recipe toy/cpmux", 2),
        ("run digits --set optimizer.lrr=1", 2),
        ("run {data} --epochs 1", 2),
        ("bench --help", 0),
        ("--version", 0),
        ("evaluate", 2),
        ("train-stage1 --device gpu", 2),
        ("recipes", 0),
        ("recipes toy/cpmix", 0),
        ("recipes toy/cpmix digits/cpmix --seed 3", 0),
        ("recipes --budget", 0),
        ("methods", 0),
        ("compare {run} --format yaml", 2),
        ("compare {run} --paper table5", 2),
        ("train-stage1 --data {data} --recipe toy/cpmux", 2),
        ("train-stage1 --data {data} --recipe toy/cpmix --set optimizer.lrr=1", 2),
        ("train-stage1 --data {data} --set optimizer.lr=fast", 2),
        ("train-stage1 --data {data} --epochs 1", 2),
        ("train-stage1 --data {data} --set stage2.terms.cp.partner=confusing", 2),
        ("train-stage1 --data {data} --set stage2.terms.cp.alpha=-1", 2),
        ("train-stage1 --data {data} --set model.name=resnet33", 2),
        ("train-stage2 --from {run} --set optimizer.lrr=1", 2),
        ("train-stage2 --from {run}/stage1 --set stage2.terms.cp.tt=1", 2),
        ("finetune --from {run} --set finetune.terms.erm.loss=x", 2),
        ("finetune --from {run} --phase stage1 --recipe toy/cpmix --set optimizer.lr=-1", 2),
    ],
)
def test_help_and_recipe_errors_import_nothing_heavy(line: str, code: int, digits: Path, digits_run: Path) -> None:
    found = imported_by(line.format(data=digits, run=digits_run).split())
    assert found == (code, [])


def test_the_quick_check_skips_what_only_the_phase_can_know(digits_run: Path, digits: Path, tmp_path: Path) -> None:
    """What a recipe says for a rho that is not known yet, and a damaged data set."""
    recipe = tmp_path / "mine.toml"
    recipe.write_text('extends = "digits/cpmix"\n[by_rho.20.finetune.terms.erm]\nloss = "logit-adjusted"\ntau = 2.0\n')
    flags = ("--recipe", recipe, "--epochs", 6, "--set", "finetune.terms.erm.tau=1.5", "--out", tmp_path / "out")
    must("finetune", "--from", digits_run, *flags)
    for damage in ({"rho": "20"}, {"rho": [1]}, {"recipe": "digits/nothing"}):
        folder = tmp_path / "damaged"
        folder.mkdir(exist_ok=True)
        record = json.loads((digits / "dataset.json").read_text())
        (folder / "dataset.json").write_text(json.dumps(record | damage))
        flags = ("--data", folder, "--set", "optimizer.lr=0.1", "--out", tmp_path / "run")
        refused(3, "dataset.json", "train-stage1", *flags)


def test_completion_imports_nothing_heavy() -> None:
    for words in ("cpmix train-", "cpmix run --set model.name=", "cpmix recipes "):
        environment = {"COMP_WORDS": words, "COMP_CWORD": str(words.count(" "))}
        assert imported_by([], _CPMIX_COMPLETE="complete_bash", **environment) == (0, []), words


def test_commands_that_read_results_do_without_torch(digits_run: Path) -> None:
    for command in ("status", "compare", "misclassified --from"):
        status, names = imported_by([*command.split(), str(digits_run)])
        assert status == 0
        assert not {"torch", "torchvision", "matplotlib", "sklearn"} & set(names), command
    for command in (RESULTS, "recipes", "recipes digits/cpmix", "methods", "train-stage1 --help"):
        assert imported_by(command.split()) == (0, []), command


def test_the_status_of_an_interrupted_phase_needs_no_torch(digits_run: Path) -> None:
    (digits_run / "stage2" / "run.json").unlink()
    status, names = imported_by(["status", str(digits_run)])
    assert status == 75
    assert "torch" not in names
    assert "torch" not in imported_by(["status", str(digits_run), "--curves"])[1]


def test_the_first_line_of_a_training_command_states_what_it_loads(digits: Path, tmp_path: Path) -> None:
    flags = ("--data", digits, "--out", tmp_path / "run", "--epochs", 3, "--dry-run")
    assert process("train-stage1", *flags).stderr.splitlines()[0] == "train-stage1: loading torch"
    assert "loading" not in must("train-stage1", *flags).stderr  # it is loaded already


def imported_by(arguments: list[str], **environment: str) -> tuple[int, list[str]]:
    """Exit code of a command line, and the heavy packages that it imported."""
    code = (
        "import sys\n"
        "from cpmix_cli.__main__ import main\n"
        "try: main()\n"
        "except SystemExit as leaving: code = leaving.code\n"
        "heavy = {'torch', 'torchvision', 'timm', 'pandas', 'pyarrow', 'numpy', 'matplotlib', 'sklearn'}\n"
        "sys.__stdout__.write(f'\\n{code or 0} ' + ','.join(heavy & set(sys.modules)))"
    )
    found = process(*arguments, code=code, env=environment)
    status, _, names = found.stdout.splitlines()[-1].partition(" ")
    return int(status), sorted(filter(None, names.split(",")))


def test_version_equals_that_of_the_package() -> None:
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]
    assert must("--version").stdout == f"cpmix {project['version']}\n"


def test_json_does_not_outlast_its_command(tmp_path: Path) -> None:
    told = refused(3, (), "evaluate", "--from", tmp_path, "--json").json
    assert (told["exit_code"], told["error"].partition(" ")[0]) == (3, "error:")
    assert refused(3, (), "evaluate", "--from", tmp_path).stdout == ""
    assert must("--version").stdout.startswith("cpmix ")


TRAIN = "train-stage1 --data {data} --out run"
TABLES = f"fix: give --paper table9, or one of {', '.join(sorted(set(PAPER_TABLES) - {'table9'}))}"


@pytest.mark.parametrize(
    ("line", "code", "message"),
    [
        ("train", 2, "cpmix has no command train"),
        ("train-stage1", 2, "--data is missing"),
        ("train-stage1 --data nowhere", 3, "no data set in nowhere"),
        ("train-stage2", 2, "--from is missing"),
        ("train-stage2 --from nowhere", 3, "no run folder nowhere"),
        ("finetune --from .", 3, "holds no finished stage1 or stage2"),
        (
            "evaluate --from .",
            3,
            "fix: train its stage 1: train-stage1 takes a data set folder as --data, and . as --out",
        ),
        ("evaluate --from . --phase stage3", 2, "--phase stage3: evaluate reads only stage1 or stage2 or finetune"),
        ("evaluate --from . --label a/b", 2, '--label "a/b"'),
        ("confusion-report --from .", 3, "holds no finished"),
        ("evaluate --from . --device gpu", 2, '--device "gpu"'),
        (f"{TRAIN} --epochs 0", 2, "--epochs 0 is not greater than or equal to 1"),
        (f"{TRAIN} --epochs two", 2, "--epochs two is not a valid integer"),
        (f"{TRAIN} --seed -1", 2, "--seed -1 is not greater than or equal to 0"),
        (
            f"{TRAIN} --epochs 1",
            2,
            "has 2 stages of at least one epoch needed by: train-stage1 fix: give --epochs 2 or more",
        ),
        (f"{TRAIN} --set optimizer.lr", 2, "is not table.key=value"),
        (f"{TRAIN} --set optimizer.lr=nan", 2, "optimizer.lr"),
        (f"{TRAIN} --set nothing.at=all", 2, "nothing: unknown key"),
        (f"{TRAIN} --bad-flag", 2, "cpmix train-stage1 has no flag --bad-flag"),
        (f"{TRAIN} --recipe digits/cpmx", 2, "fix: give digits/cpmix in place of digits/cpmx"),
        (f"{TRAIN} --recipe none.toml", 2, "recipe file none.toml does not exist"),
        ("compare nowhere --paper table5", 2, TABLES),
        ("compare nowhere --format yaml", 2, '--format "yaml" is unknown'),
    ],
)
def test_bad_commands_end_with_their_exit_code_and_write_nothing(
    line: str, code: int, message: str, digits: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    result = refused(code, (), *line.format(data=digits).split())
    assert message in " ".join(result.stderr.split())
    assert result.stdout == ""
    assert files(tmp_path) == []


@pytest.mark.parametrize(
    "line",
    [
        "trian",
        "--versoin",
        "evaluate",
        "evaluate --from",
        "evaluate --from x --bad",
        "predict x --top two",
        "methods x",
    ],
)
def test_usage_errors_are_json_wherever_the_flag_stands(line: str) -> None:
    words = line.split()
    plain = refused(2, "error: ", *words)
    for place in {1, len(words)}:
        result = refused(2, (), *words[:place], "--json", *words[place:])
        assert (result.json, result.stderr) == ({"error": plain.stderr.rstrip("\n"), "exit_code": 2}, plain.stderr)
    assert plain.stdout == ""


def test_json_works_at_any_place_in_the_command_line() -> None:
    result = refused(2, (), "evaluate", "--from", "x", "--device", "gpu", "--json")
    said = 'error: --device "gpu" is unknown\n  needed by: evaluate\n  fix: give --device cuda, or one of auto, cpu'
    assert result.json == {"error": said, "exit_code": 2}
    refused(2, "--json and --format csv are two output formats", "compare", "nowhere", "--format", "csv", "--json")


def test_divergence_ends_with_5_and_keeps_no_result(digits: Path, tmp_path: Path) -> None:
    flags = ("--data", digits, "--out", tmp_path, "--epochs", 6)
    said = "the loss is not finite at step 2 of epoch 1, learning rate 1e+30; loss terms: erm nan;"
    refused(5, (said, "no state was saved before"), "train-stage1", *flags, "--set", "optimizer.lr=1e30")
    assert not (tmp_path / "stage1" / "run.json").exists()


@pytest.mark.slow
def test_logs_are_plain_lines(digits: Path, tmp_path: Path) -> None:
    """In an sbatch log: no control character even where FORCE_COLOR is set, one line an epoch, JSON alone on stdout."""
    flags = ["--data", str(digits), "--out", str(tmp_path), "--epochs", "6", "--json"]
    result = process("train-stage1", *flags, env={"FORCE_COLOR": "1", "COLUMNS": "40"})
    assert result.code == 0
    assert result.stdout.count("\n") == 1
    assert result.stdout.startswith("{")
    assert not any(c in result.stdout + result.stderr for c in "\r\x1b")
    lines = result.stderr.splitlines()
    epochs = [line for line in lines if line.startswith("stage1 epoch=")]
    assert [line.split()[1] for line in epochs] == [f"epoch={e}/4" for e in range(1, 5)]
    assert any(line.startswith("stage1: projected ") for line in lines)
    assert lines[-1] == f"next: cpmix train-stage2 --from {tmp_path}"


@pytest.mark.slow
def test_an_installed_wheel_finds_its_recipes(digits: Path, tmp_path: Path) -> None:
    installed = installed_wheel(tmp_path)
    held = files(installed / "cpmix_cli" / "recipes")
    assert held == files(REPOSITORY / "recipes")
    command = ("train-stage1", "--data", digits, "--out", "run", "--dry-run", "--recipe", "digits/balanced-softmax")
    result = process(*command, cwd=tmp_path, env={"PYTHONPATH": str(installed)})
    assert result.code == 0, result.stderr
    assert "dry run" in result.stdout
