"""Several ranks on the CPU: they take the draws of one, end together, and say it once."""

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import closing
from dataclasses import fields
from pathlib import Path

import pandas as pd
import pytest
import torch
from helpers import files, must, setting, write_photos

from cpmix_cli import cli, flags
from cpmix_cli.artifacts import files as artifacts
from cpmix_cli.artifacts import records, tensors
from cpmix_cli.artifacts.files import CONFUSION_PAIRS, METRICS, TRAINING_STATE
from cpmix_cli.runtime import ranks
from cpmix_cli.runtime.errors import EnvironmentFault
from cpmix_cli.runtime.ranks import NCCL_ERRORS, Ranks, find, nccl_errors
from cpmix_cli.runtime.rendezvous import rendezvous_address
from cpmix_cli.training.batch_slices import BatchSlice

TORCHRUN = {"RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "4", "MASTER_ADDR": "a"}
SRUN = {"SLURM_PROCID": "5", "SLURM_STEP_NUM_TASKS": "7", "SLURM_LOCALID": "1", "SLURM_NODEID": "1"}
SRUN["SLURM_STEP_TASKS_PER_NODE"] = "4,3"


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({}, Ranks()),
        (TORCHRUN, Ranks(5, 8, 1, 4)),
        (SRUN, Ranks(5, 7, 1, 3)),
        ({**SRUN, "SLURM_STEP_TASKS_PER_NODE": "3(x2),1"}, Ranks(5, 7, 1, 3)),
        (SRUN | TORCHRUN, Ranks(5, 8, 1, 4)),
        # A batch script: the variables of the allocation, and of no step with several tasks.
        ({"SLURM_PROCID": "0", "SLURM_NTASKS": "8", "SLURM_LOCALID": "0"}, Ranks()),
        ({**SRUN, "SLURM_STEP_NUM_TASKS": "1", "SLURM_PROCID": "0"}, Ranks()),
        # What some clusters set for all jobs.
        ({"WORLD_SIZE": "8", "MASTER_ADDR": "a"}, Ranks()),
    ],
)
def test_environment_gives_the_rank(environment: Mapping[str, str], expected: Ranks) -> None:
    assert find(environment) == expected
    assert ranks.is_later(environment) == (expected.rank > 0)


@pytest.mark.parametrize("changes", [{"RANK": "8"}, {"RANK": "-1"}, {"WORLD_SIZE": "many"}, {"LOCAL_RANK": "4"}])
def test_variables_that_make_no_sense_are_refused(changes: Mapping[str, str]) -> None:
    with pytest.raises(EnvironmentFault, match="make no sense"):
        find(TORCHRUN | changes)
    with pytest.raises(EnvironmentFault, match="SLURM_STEP_TASKS_PER_NODE = 4 nodes"):
        find({**SRUN, "SLURM_STEP_TASKS_PER_NODE": "4 nodes"})


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({"MASTER_ADDR": "node7", "MASTER_PORT": "29500"}, ("node7", 29500)),
        ({"SLURM_JOB_ID": "1234567", "SLURM_STEP_ID": "2", "SLURM_STEP_NODELIST": "gpu[07-09,12]"}, ("gpu07", 21971)),
        ({"SLURM_JOB_ID": "3", "SLURM_STEP_NODELIST": "gpu-a,gpu-b"}, ("gpu-a", 20021)),
        ({"SLURM_JOB_ID": "3", "SLURM_STEP_NODELIST": "r[0-1,4]n[2,5]-ib,a[7]"}, ("r0n2-ib", 20021)),
        ({"SLURM_JOB_ID": "3", "SLURM_LAUNCH_NODE_IPADDR": "10.0.0.7"}, ("10.0.0.7", 20021)),
        ({}, ("localhost", 20000)),
    ],
)
def test_environment_gives_the_rendezvous_address(environment: Mapping[str, str], expected: tuple[str, int]) -> None:
    assert rendezvous_address(environment) == expected


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({}, "0"),
        ({NCCL_ERRORS: "3"}, "3"),
        ({NCCL_ERRORS: "1"}, "1"),
        ({NCCL_ERRORS: "1", "TORCHELASTIC_RUN_ID": "7"}, "0"),  # torchrun's own
        ({NCCL_ERRORS: "2", "TORCHELASTIC_RUN_ID": "7"}, "2"),
    ],
)
def test_torch_leaves_a_process_alone_after_an_error_of_nccl_unless_told(
    environment: Mapping[str, str], expected: str
) -> None:
    """So that cpmix's own message comes first."""
    assert nccl_errors(environment) == expected


@pytest.mark.parametrize("changes", [{"MASTER_PORT": "many"}, {"MASTER_PORT": "65536"}, {"SLURM_JOB_ID": "x"}])
def test_a_place_that_makes_no_sense_is_refused(changes: Mapping[str, str]) -> None:
    with pytest.raises(EnvironmentFault, match="make no sense"):
        rendezvous_address(changes)


@pytest.mark.parametrize(("size", "count"), [(12, 3), (10, 4), (5, 4), (3, 4), (1, 4), (7, 1)])
def test_batch_slices_count_each_image_once_and_keep_the_mean(size: int, count: int) -> None:
    """Each image counts once, and the mean over the parts is that over the batch."""
    values = torch.arange(1.0, size + 1).double() ** 2
    means, seen = [], []
    for number in range(count):
        part = BatchSlice(number, count, size)
        own, weights = part.select(values), part.image_weights(torch.device("cpu"))
        assert len(own) == part.length == -(-size // count)
        assert (weights is None) == (size % count == 0)
        weights = torch.ones(part.length).double() if weights is None else weights
        means.append((own * weights).mean())
        seen += own[weights > 0].tolist()
    assert seen == values.tolist()
    torch.testing.assert_close(torch.stack(means).mean(), values.mean(), rtol=1e-14, atol=0)


def test_slices_are_padded_with_images_from_the_start_of_the_batch() -> None:
    """Ten images for four ranks: 0 1 2, 3 4 5, 6 7 8, and 9 with 0 and 1 again, which count nothing."""
    parts = [BatchSlice(number, 4, 10) for number in range(4)]
    found = [part.select(torch.arange(10)).tolist() for part in parts]
    assert found == [[0, 1, 2], [3, 4, 5], [6, 7, 8], [9, 0, 1]]
    weights = parts[3].image_weights(torch.device("cpu"))
    assert weights is not None
    assert weights.tolist() == [1.2, 0.0, 0.0]


RUN = """
import sys
from cpmix_cli.runtime import signals
signals.install()
from cpmix_cli import cli
from cpmix_cli.runtime import console, ranks, rendezvous
import os
console.set_up()
if "SLOW_STATE" in os.environ:  # a state that takes a second to write
    import time
    from cpmix_cli.artifacts import files
    publish = files.publish
    def slowly(path, data):
        time.sleep(1.0 if path.name == "training_state.safetensors" else 0.0)
        return publish(path, data)
    files.publish = slowly
rendezvous.JOIN_SECONDS = float(os.environ.get("JOIN_SECONDS", 60))
ranks.SILENT_SECONDS = float(os.environ.get("SILENT_SECONDS", 10))
for number, line in enumerate(sys.argv[1:]):
    console.mute(ranks.is_later(os.environ))
    if "TORCHELASTIC_RUN_ID" not in os.environ:  # the server of the command before may still stand there
        os.environ["MASTER_PORT"] = str(int(os.environ["MASTER_PORT"]) + min(number, 1))
    try:
        code = cli.app(line.split("|"), prog_name="cpmix", standalone_mode=False)
    except cli.typer.Exit as leaves:
        code = leaves.exit_code
    except signals.Stopped as stop:
        code = stop.code
    if code:
        sys.exit(code)
"""


class Launched:
    """As many processes as ranks, as torchrun or srun starts them; each runs the commands one after the other."""

    def __init__(
        self,
        size: int,
        *commands: Sequence[object],
        folders: Sequence[Path] | None = None,
        srun: bool = False,
        extra: Mapping[str, str] | None = None,
        without: Sequence[int] = (),
        only: Mapping[int, Sequence[object]] | None = None,
    ) -> None:
        """`only` has more words for the first command of single ranks."""
        with closing(socket.socket()) as free:
            free.bind(("127.0.0.1", 0))
            self.port = str(free.getsockname()[1])
        self.processes = []
        for rank in range(size):
            own = {"RANK": rank, "WORLD_SIZE": size, "LOCAL_RANK": rank, "LOCAL_WORLD_SIZE": size}
            if srun:
                own = {"SLURM_PROCID": rank, "SLURM_STEP_NUM_TASKS": size, "SLURM_LOCALID": rank}
            own |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": self.port, "OMP_NUM_THREADS": 1}
            environment = os.environ | {name: str(value) for name, value in own.items()} | dict(extra or {})
            lines = ["|".join(map(str, command)) for command in commands]
            lines[0] = "|".join(map(str, (*commands[0], *(only or {}).get(rank, ()))))
            if rank not in without:
                options = {"cwd": folders[rank] if folders else None, "env": environment, "text": True}
                pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
                self.processes.append(subprocess.Popen([sys.executable, "-c", RUN, *lines], **options, **pipes))

    def wait_for(self, text: str) -> str:
        """Read what the first rank says on stderr up to a line with this text; returns it."""
        stream, read = self.processes[0].stderr, ""
        assert stream is not None
        for line in stream:
            read += line
            if text in line:
                return read
        raise AssertionError(read)

    def end(self) -> tuple[list[int], list[str], list[str]]:
        try:
            ended = [process.communicate(timeout=120) for process in self.processes]
        finally:
            for process in self.processes:
                process.kill()
        return [process.returncode for process in self.processes], [e[0] for e in ended], [e[1] for e in ended]


def must_run(size: int, *commands: Sequence[object], srun: bool = False) -> str:
    """Ranks that have to succeed, the first alone with something to say: its stderr."""
    codes, outs, errs = Launched(size, *commands, srun=srun).end()
    assert set(codes) == {0}, errs
    assert outs[0]
    assert not any(outs[1:])
    assert not any(errs[1:])
    return errs[0]


def metrics(phase: Path) -> pd.DataFrame:
    return pd.read_parquet(phase / METRICS).drop(columns=["seconds", "images_per_second"])


WHOLE_NUMBERS = ["epoch", "train_accuracy", "num_confusions", "num_fallbacks"]


def pipeline(data: Path, run: Path, *changes: str) -> list[Sequence[object]]:
    settings = [word for change in ("model.precision=fp32", *changes) for word in ("--set", change)]
    return [("train-stage1", "--data", data, "--out", run, "--epochs", 5, *settings), ("train-stage2", "--from", run)]


@pytest.mark.slow
@pytest.mark.parametrize("refresh", ["step", "epoch"])
@pytest.mark.long
def test_ranks_and_micro_batches_give_the_results_of_one_rank(refresh: str, toy: Path, tmp_path: Path) -> None:
    """No batch norm; the last batch has 52 of 64 points. Draws and counts are the same, sums differ by rounding."""
    changes = ["optimizer.batch_size=64", f"confusion.refresh={refresh}", "stage2.terms.cp.per_sample=true"]
    for command in pipeline(toy, tmp_path / "alone", *changes):
        must(*command)
    for command in pipeline(toy, tmp_path / "pieces", *changes, "optimizer.micro_batches=5"):
        must(*command)
    must_run(2, *pipeline(toy, tmp_path / "two", *changes), srun=refresh == "step")
    must_run(3, *pipeline(toy, tmp_path / "three", *changes, "optimizer.micro_batches=2"))
    for phase in ("stage1", "stage2"):
        alone = tmp_path / "alone" / phase
        expected = metrics(alone)
        assert expected["num_confusions"].min() > 0
        for name in ("pieces", "two", "three"):
            found = metrics(tmp_path / name / phase)
            assert found[WHOLE_NUMBERS].equals(expected[WHOLE_NUMBERS])
            pd.testing.assert_frame_equal(found, expected, rtol=1e-4)
            own = tmp_path / name / phase / CONFUSION_PAIRS
            assert own.read_bytes() == (alone / CONFUSION_PAIRS).read_bytes()
    record = records.read_fields(tmp_path / "three" / "stage2" / artifacts.RUN)
    assert record["ranks"] == 3


@pytest.mark.slow
def test_ranks_mix_the_features_of_one_rank(toy: Path, tmp_path: Path) -> None:
    recipe = tmp_path / "h2t.toml"
    recipe.write_text(
        'extends = "toy/cpmix"\n[finetune]\nepochs = 3\nbatch_size = 64\n[finetune.terms.h2t]\ndraw = "class-uniform"\n'
        'partner = "frequency-power"\npower = 1.0\nmix = "channels"\np = 0.25\nlabel = "first"\n'
    )
    stage1, stage2 = pipeline(toy, tmp_path / "run")
    must(*stage1, "--recipe", recipe)
    must(*stage2)
    command = ("finetune", "--from", tmp_path / "run")
    must(*command, "--out", tmp_path / "alone")
    must_run(2, (*command, "--out", tmp_path / "two"))
    expected = metrics(tmp_path / "alone" / "finetune")
    pd.testing.assert_frame_equal(metrics(tmp_path / "two" / "finetune"), expected, rtol=1e-4)


@pytest.mark.slow
def test_ranks_shift_statistics_of_mixed_features(digits_run: Path, tmp_path: Path) -> None:
    """Each rank its own, and the first rank's are published; a rank that went another way would end with an error."""
    keys = ("partner=frequency-power", "power=1", "mix=channels", "p=0.25", "label=first")
    flags = [*setting("finetune.batchnorm=shift"), *setting(*keys, table="finetune.terms.erm")]
    must_run(2, ("finetune", "--from", digits_run, "--out", tmp_path / "two", *flags))
    before, after = (
        tensors.read_tensors(run / phase / "model.safetensors")[0]
        for run, phase in ((digits_run, "stage2"), (tmp_path / "two", "finetune"))
    )
    assert not before["bn1.running_mean"].equal(after["bn1.running_mean"])
    assert before["conv1.weight"].equal(after["conv1.weight"])
    steps = after["bn1.num_batches_tracked"] - before["bn1.num_batches_tracked"]
    assert steps > 0 and steps % 2 == 0


@pytest.mark.slow
@pytest.mark.long
def test_ranks_average_the_weights_of_one_rank(toy: Path, digits: Path, tmp_path: Path) -> None:
    changes = ["optimizer.batch_size=64", "optimizer.ema_epochs=10"]
    for command in pipeline(toy, tmp_path / "alone", *changes):
        must(*command)
    must_run(2, *pipeline(toy, tmp_path / "two", *changes))
    alone, two = (tensors.read_tensors(tmp_path / n / "stage2" / artifacts.MODEL)[0] for n in ("alone", "two"))
    for name, values in alone.items():
        torch.testing.assert_close(two[name], values, rtol=1e-3, atol=1e-4)
    said = must_run(2, *pipeline(digits, tmp_path / "digits", *changes))  # with batch norm
    assert said.count("one pass over the training images, for the batch norm of the averaged weights") == 2


@pytest.mark.slow
@pytest.mark.long
def test_all_commands_run_under_torchrun(tmp_path: Path) -> None:
    """What does not train is the first rank's alone."""
    run, data = tmp_path / "run", tmp_path / "digits"
    commands = [
        ("build-lt", "digits", "--out", data),
        ("train-stage1", "--data", data, "--out", run, "--epochs", 6),
        ("train-stage2", "--from", run),
        ("finetune", "--from", run),
        ("evaluate", "--from", run),
        ("confusion-report", "--from", run),
    ]
    script = tmp_path / "run.py"
    script.write_text(RUN)
    found = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", script]
        + ["|".join(map(str, command)) for command in commands],
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert found.returncode == 0, found.stderr
    assert found.stdout.count("done: ") == 5
    said = "stage1: batches of 64 over 2 ranks, 32 images a forward pass and term; the learning rate is the recipe's"
    assert found.stderr.count(said) == 1
    assert must("status", run).stdout.count("done") >= 3
    assert (run / "confusion" / "index.html").is_file()
    # Again, and on another number of ranks: up to date.
    for command in commands[1:4]:
        assert "up to date" in must(*command).stdout


@pytest.mark.slow
@pytest.mark.parametrize("refresh", ["step", "epoch"])
@pytest.mark.long
def test_a_signal_to_one_rank_stops_all_and_saves_once(refresh: str, toy: Path, tmp_path: Path) -> None:
    """... and the run goes on with another number of ranks, as if nothing had been."""
    run = tmp_path / "run"
    stage1, stage2 = pipeline(toy, run, f"confusion.refresh={refresh}", "optimizer.batch_size=8")
    must(*stage1)
    launched = Launched(4, stage2)
    launched.wait_for("projected")
    launched.processes[2].send_signal(signal.SIGTERM)
    codes, _, errs = launched.end()
    assert codes == [75] * 4, errs
    assert errs[0].startswith("interrupted: SIGTERM received; stage2 is saved at epoch ")
    assert not any(errs[1:])
    assert files(run / "stage2") == ["recipe.toml", "training_state.safetensors"]
    state, _ = tensors.read_tensors(run / "stage2" / TRAINING_STATE)
    assert ("epoch_confusion" in state) == (refresh == "epoch")
    found = must(*stage2)
    assert "begun with 4 ranks, going on with 1: the draws stay the same" in found.stderr
    whole = tmp_path / "whole"
    must("train-stage2", "--from", run, "--out", whole)
    assert metrics(run / "stage2")[WHOLE_NUMBERS].equals(metrics(whole / "stage2")[WHOLE_NUMBERS])


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGUSR1, signal.SIGTERM])
def test_a_signal_to_all_ranks_saves_though_it_comes_to_one_after_the_other(
    number: signal.Signals, toy: Path, tmp_path: Path
) -> None:
    """The first rank's own comes while it writes what the second rank's asked for."""
    words = ("train-stage1", "--data", toy, "--out", tmp_path / "run", "--epochs", 900, "--checkpoint-every", 1000)
    launched = Launched(2, words, extra={"SLOW_STATE": "1"})
    launched.wait_for("projected")
    for process in reversed(launched.processes):
        process.send_signal(number)
        time.sleep(0.3)
    codes, _, errs = launched.end()
    assert codes == [75, 75], errs
    assert f"interrupted: {number.name} received; stage1 is saved at epoch" in errs[0]
    assert files(tmp_path / "run" / "stage1") == ["recipe.toml", "training_state.safetensors"]


def test_class_weights_are_normed_over_the_batch_of_all_ranks(toy: Path, tmp_path: Path) -> None:
    changes = ["stage1.terms.erm.reweight=effective-number", "stage1.terms.erm.beta=0.999"]
    changes += ["stage1.terms.erm.loss=cross-entropy", "optimizer.batch_size=64"]
    stage1, _ = pipeline(toy, tmp_path / "alone", *changes)
    must(*stage1)
    pieces, _ = pipeline(toy, tmp_path / "pieces", *changes, "optimizer.micro_batches=3")
    must(*pieces)
    found, expected = (metrics(tmp_path / name / "stage1") for name in ("pieces", "alone"))
    pd.testing.assert_frame_equal(found, expected, rtol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("killed", [0, 1, 2])
@pytest.mark.long
def test_a_killed_rank_ends_all_ranks(killed: int, digits: Path, tmp_path: Path) -> None:
    launched = Launched(3, ("train-stage1", "--data", digits, "--out", tmp_path / "run", "--epochs", 900))
    launched.wait_for("epoch=2/")
    launched.processes[killed].kill()
    codes, _, errs = launched.end()
    assert codes == [-9 if rank == killed else 4 for rank in range(3)], errs
    (said,) = [err for err in errs if "error: " in err]
    assert f"error: rank {killed} of 3 is gone" in said
    assert "fix: run the same command again" in said
    assert sum("Traceback" in err for err in errs) == 0
    assert not list((tmp_path / "run" / "stage1").glob(".lock*")) or killed == 0


@pytest.mark.slow
def test_an_error_of_all_ranks_is_printed_once(tmp_path: Path) -> None:
    codes, outs, errs = Launched(3, ("train-stage1", "--data", tmp_path / "none", "--json")).end()
    assert codes == [3] * 3
    loading, error, *_ = errs[0].splitlines()
    assert loading == "train-stage1: loading torch"
    assert error.startswith(f"error: no data set in {tmp_path / 'none'}")
    assert outs[0].startswith('{"error": ')
    assert not any(errs[1:] + outs[1:])


@pytest.mark.slow
def test_an_error_of_one_ends_all(digits: Path, tmp_path: Path) -> None:
    """One machine does not see the data set."""
    folders = [tmp_path / "a", tmp_path / "b"]
    for folder in folders:
        folder.mkdir()
    (folders[0] / "data").symlink_to(digits)
    codes, _, errs = Launched(2, ("train-stage1", "--data", "data", "--out", "run"), folders=folders).end()
    assert codes == [3, 3]
    assert errs[0] == "train-stage1: loading torch\n"
    assert errs[1].startswith("error: rank 1: no data set in data")


@pytest.mark.slow
def test_ranks_that_read_different_files_end(digits: Path, toy: Path, tmp_path: Path) -> None:
    folders = [tmp_path / "a", tmp_path / "b"]
    for folder, data in zip(folders, (digits, toy), strict=True):
        folder.mkdir()
        (folder / "data").symlink_to(data)
    words = ("train-stage1", "--data", "data", "--out", tmp_path / "run", "--recipe", "digits/cross-entropy")
    codes, _, errs = Launched(2, words, folders=folders).end()
    assert codes[0] != 0
    assert codes[0] == codes[1]
    assert sum("error: " in err for err in errs) == 1


@pytest.mark.slow
@pytest.mark.long
def test_ranks_read_the_same_plugin(digits: Path, tmp_path: Path) -> None:
    """Each machine may have its copy at its own place."""
    folders = [tmp_path / "a", tmp_path / "b"]
    text = (
        "import torch\ndef mine(logits, labels, weights, class_counts):\n"
        "    return (weights * torch.nn.functional.cross_entropy(logits, labels, reduction='none')).mean()\n"
        "LOSSES = {'mine': mine}\n"
    )
    for folder in folders:
        folder.mkdir()
        (folder / "mine.py").write_text(text)
    words = ("train-stage1", "--data", digits, "--out", tmp_path / "run", "--epochs", 2, "--plugin", "mine.py")
    words = (*words, "--set", "stage1.terms.erm.loss=mine")
    codes, _, errs = Launched(2, words, folders=folders).end()
    assert codes == [0, 0], errs
    (folders[1] / "mine.py").write_text(f"{text}\n")
    codes, _, errs = Launched(2, words, folders=folders).end()
    assert codes == [2, 2], errs
    assert "error: the ranks were started with different flags: --plugin: " in errs[0]


@pytest.mark.slow
@pytest.mark.parametrize("missing", [0, 1])
def test_a_missing_rank_is_reported_by_the_others(missing: int, digits: Path, tmp_path: Path) -> None:
    words = ("train-stage1", "--data", digits, "--out", tmp_path / "run")
    launched = Launched(2, words, without=[missing], extra={"JOIN_SECONDS": "2"})
    codes, _, errs = launched.end()
    assert codes == [4]
    assert f"error: rank {1 - missing} of 2 does not meet the others at 127.0.0.1:" in errs[0]
    assert not (tmp_path / "run").exists()


def test_ranks_compare_every_flag_of_training_but_paths_that_are_compared_by_content() -> None:
    kinds = (flags.TrainStage1Options, flags.TrainStage2Options, flags.FinetuneOptions)
    for name, kind in zip(cli.TRAINING, kinds, strict=True):
        needed: dict[str, object] = {} if kind is flags.TrainStage1Options else {"from_folder": Path("run")}
        plain = cli._common_flags(name, kind(**needed))
        for field in fields(kind):
            other: object = Path("other") if "folder" in field.name or field.name == "out" else "other"
            changed = cli._common_flags(name, kind(**{**needed, field.name: other}))
            assert (changed != plain) == (field.name not in ("data", "data_root", "init", "teacher")), field.name


# Each changes which files a rank reads or writes, or how often the ranks wait for each other.
UNLIKE = ["--checkpoint-every 2", "--eval-every 1", "--dry-run", "--overwrite", "--tracker tensorboard", "--seed 3"]


@pytest.mark.slow
@pytest.mark.parametrize("flag", UNLIKE)
def test_ranks_with_different_flags_are_refused_by_the_flag(flag: str, digits: Path, tmp_path: Path) -> None:
    words = ("train-stage1", "--data", digits, "--out", tmp_path / "run", "--epochs", 2)
    codes, _, errs = Launched(2, words, only={1: flag.split()}).end()
    name, value = (*flag.split(), "given")[:2]
    assert codes == [2, 2], errs
    assert errs[0].splitlines()[1:] == [
        f"error: the ranks were started with different flags: {name}: {value} at rank 1, not given at rank 0",
        "  needed by: train-stage1",
        f"  fix: start all ranks with the same {name}",
    ]
    assert errs[1] == ""
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_a_rank_whose_command_is_refused_before_it_joins_says_so(digits: Path, tmp_path: Path) -> None:
    words = ("train-stage1", "--data", digits, "--out", tmp_path / "run")
    codes, _, errs = Launched(2, words, only={1: ["--epochs", "x"]}, extra={"JOIN_SECONDS": "2"}).end()
    assert codes == [4, 2]
    assert "rank 0 of 2 waits for rank 1 in vain, for 2 s (WORLD_SIZE is 2)" in errs[0]
    assert errs[1].startswith("error: rank 1: --epochs x is not a valid integer\n")


@pytest.mark.slow
def test_ranks_that_know_other_numbers_of_ranks_are_refused(digits: Path, tmp_path: Path) -> None:
    words = ("train-stage1", "--data", digits, "--out", tmp_path / "run")
    launched = Launched(1, words, extra={"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"})
    again = {"RANK": "1", "LOCAL_RANK": "1", "WORLD_SIZE": "3", "LOCAL_WORLD_SIZE": "3"}
    other = Launched(1, words, extra=again | {"MASTER_PORT": launched.port})
    codes, _, errs = launched.end()
    *_, of_other = other.end()
    assert codes == [4]
    assert "there are 2 ranks by its variables, 3 by those of rank 1 (WORLD_SIZE is 2)" in errs[0], of_other


ALONE = {
    "a shell of srun --pty": {
        "SLURM_JOB_ID": "5",
        "SLURM_STEP_NUM_TASKS": "4",
        "SLURM_PROCID": "0",
        "SLURM_LOCALID": "0",
    },
    "left variables of torchrun": {"RANK": "0", "WORLD_SIZE": "4", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29731"},
    "a later rank": {"RANK": "3", "WORLD_SIZE": "4", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29732"},
}


@pytest.mark.slow
@pytest.mark.parametrize("case", ALONE)
@pytest.mark.long
def test_a_rank_that_waits_in_vain_says_so_with_the_way_out(case: str, toy: Path, tmp_path: Path) -> None:
    """After 10 seconds, not 300; and the command works as it is printed."""
    environment = {**os.environ, **ALONE[case]}
    words = ["train-stage1", "--data", str(toy), "--out", str(tmp_path / "a run"), "--epochs", "2"]
    command = [sys.executable, "-m", "cpmix_cli", *words]
    began = time.monotonic()
    with subprocess.Popen(
        command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, env=environment
    ) as run:
        assert run.stderr is not None
        waits = next(line for line in run.stderr if "waits" in line)
        fix = run.stderr.readline()
        assert time.monotonic() - began < 60
        run.send_signal(signal.SIGTERM)
        assert run.wait(timeout=20) == 75  # while it waits, a signal is answered
    variable = "SLURM_STEP_NUM_TASKS" if "srun" in case else "WORLD_SIZE"
    assert waits.endswith(f", for at most 300 s: {variable} is 4\n")
    who = (
        "rank 3 of 4 waits for rank 0 at 127.0.0.1:29732"
        if case == "a later rank"
        else "rank 0 of 4 waits for ranks 1, "
    )
    assert waits.startswith(who)
    printed = fix.removeprefix("  fix: if there are no others, such as in a shell of srun --pty: ").strip()
    assert printed.startswith(f"env -u {variable} cpmix train-stage1 --data ")
    script = tmp_path / "cpmix"
    script.write_text(f'#!/bin/sh\nexec {sys.executable} -m cpmix_cli "$@"\n')
    script.chmod(0o755)
    subprocess.run(["sh", "-c", printed], check=True, env={**environment, "PATH": f"{tmp_path}:{os.environ['PATH']}"})
    assert (tmp_path / "a run" / "stage1" / artifacts.RUN).is_file()


@pytest.mark.slow
@pytest.mark.long
def test_a_rank_that_hangs_is_told_by_the_first(digits: Path, tmp_path: Path) -> None:
    words = ("train-stage1", "--data", digits, "--out", tmp_path / "run", "--epochs", 900)
    launched = Launched(2, words, extra={"SILENT_SECONDS": "1"})
    launched.wait_for("epoch=2/")
    launched.processes[1].send_signal(signal.SIGSTOP)
    assert "waits for another rank, which is slow or hangs (WORLD_SIZE is 2)" in launched.wait_for("waits for")
    launched.processes[1].send_signal(signal.SIGCONT)
    launched.processes[1].send_signal(signal.SIGTERM)
    assert launched.end()[0] == [75, 75]


@pytest.mark.slow
def test_bad_training_images_are_all_named_also_by_several_ranks(tmp_path: Path) -> None:
    photos, data = tmp_path / "photos", tmp_path / "data"
    write_photos(photos, {"red": 30, "green": 20})
    must("build-lt", "image-folder", "--data-root", photos, "--pack", 0, "--image-size", 32, "--out", data)
    words = [
        "train-stage1",
        "--data",
        data,
        "--out",
        tmp_path / "run",
        "--recipe",
        "digits/cross-entropy",
        "--epochs",
        1,
    ]
    words += setting("data.normalisation=imagenet", "data.augment=crop", "optimizer.batch_size=8")
    bad = sorted(path for path in photos.rglob("*") if path.is_file())[:40]
    for path in bad:
        path.write_bytes(b"no image")
    codes, _, errs = Launched(2, words).end()
    assert codes == [3, 3], errs
    (said,) = [err for err in errs if "error: " in err]
    assert "files cannot be read as an image:" in said
    assert sum(str(path) in said for path in bad) == 20
    assert "more" in said


@pytest.mark.slow
def test_a_diverging_run_is_reported_once(digits: Path, tmp_path: Path) -> None:
    words = ("train-stage1", "--data", digits, "--out", tmp_path / "run", "--set", "optimizer.lr=1e20")
    codes, _, errs = Launched(2, words).end()
    assert codes == [5, 5]
    assert "is not finite at step" in errs[0]
    assert errs[1] == ""


@pytest.mark.slow
def test_batch_norm_across_ranks_needs_gpus(digits: Path, tmp_path: Path) -> None:
    words = ("train-stage1", "--data", digits, "--out", tmp_path / "run", "--set", "model.sync_batchnorm=true")
    codes, _, errs = Launched(2, words).end()
    assert codes == [2, 2]
    assert errs[0].splitlines()[-3:] == [
        "error: model.sync_batchnorm: torch has it on GPUs alone",
        "  needed by: train-stage1",
        "  fix: give --set model.sync_batchnorm=false",
    ]
    must(*words, "--epochs", 6)  # alone it has nothing to do


@pytest.mark.slow
def test_a_dry_run_of_ranks_writes_nothing(digits: Path, tmp_path: Path) -> None:
    words = ("train-stage1", "--data", digits, "--out", tmp_path / "run", "--dry-run")
    assert "over 2 ranks" in must_run(2, words)
    assert not (tmp_path / "run").exists()
