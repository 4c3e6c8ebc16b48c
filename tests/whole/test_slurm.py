"""The job scripts of recipes/slurm, run by a small Slurm: stand-ins for srun, scontrol and sbatch.

By Slurm's manual, the warning goes to the batch shell alone; srun passes USR1 on to its tasks, answers TERM by SIGKILL
to them, and exits with the highest code of them; a requeued job runs from its beginning under its own number.
"""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from helpers import contents, must

from cpmix_cli.runtime import ranks

REPOSITORY = Path(__file__).parents[2]
SCRIPTS = REPOSITORY / "recipes" / "slurm"

NUMBER = 101
"""Of the first job that is submitted."""
EPOCHS = 30
"""Of the toy data: long enough to be preempted."""

FLAGS = """
import json, os, signal, subprocess, sys
arguments = sys.argv[1:]
flags = {}
while arguments[0].startswith("--"):
    name, _, value = arguments.pop(0).partition("=")
    flags[name] = value
"""
"""How the stand-ins for srun and sbatch begin: they read their flags."""

SRUN = (
    FLAGS
    + """nodes = os.environ["SLURM_JOB_NODELIST"].split(",")
per_node = int(flags.get("--ntasks-per-node", os.environ["SLURM_NTASKS_PER_NODE"]))
with open(os.environ["CLUSTER"] + "/srun", "a") as log:
    step = sum(1 for _ in open(log.name))
    print(json.dumps([flags, arguments]), file=log)
tasks = []
signal.signal(signal.SIGUSR1, lambda number, frame: [t.send_signal(number) for t in tasks])
signal.signal(signal.SIGTERM, lambda number, frame: [t.kill() for t in tasks])
environment = {k: v for k, v in os.environ.items() if k not in ("SRUN_CPUS_PER_TASK", "SLURM_CPUS_PER_TASK")}
if "SRUN_CPUS_PER_TASK" in os.environ:
    environment["SLURM_CPUS_PER_TASK"] = os.environ["SRUN_CPUS_PER_TASK"]
for rank in range(per_node * len(nodes)):
    environment |= {
        "SLURM_STEP_ID": str(step), "SLURM_STEP_NUM_TASKS": str(per_node * len(nodes)),
        "SLURM_STEP_NUM_NODES": str(len(nodes)), "SLURM_STEP_NODELIST": ",".join(nodes),
        "SLURM_STEP_TASKS_PER_NODE": f"{per_node}(x{len(nodes)})" if len(nodes) > 1 else str(per_node),
        "SLURM_NTASKS": str(per_node * len(nodes)), "SLURM_LAUNCH_NODE_IPADDR": "127.0.0.1",
        "SLURM_PROCID": str(rank), "SLURM_LOCALID": str(rank % per_node), "SLURM_NODEID": str(rank // per_node),
    }
    tasks.append(subprocess.Popen(arguments, env=environment, start_new_session=True))
codes = [task.wait() for task in tasks]
sys.exit(max(code if code >= 0 else 128 - code for code in codes))
"""
)

SCONTROL = """
import os, sys
if sys.argv[1:3] == ["show", "hostnames"]:
    print(*sys.argv[3].split(","), sep="\\n")
else:
    assert sys.argv[1] == "requeue", sys.argv
    with open(os.environ["CLUSTER"] + "/requeued", "a") as log:
        print(sys.argv[2], file=log)
    sys.exit(int(os.environ.get("NO_REQUEUE", 0)))
"""

SBATCH = (
    FLAGS
    + """with open(os.environ["CLUSTER"] + "/sbatch", "a") as log:
    number = 101 + sum(1 for _ in open(log.name))
    print(json.dumps([number, flags, arguments]), file=log)
print(number if "--parsable" in flags else f"Submitted batch job {number}")
"""
)

# Says what it was asked and who it is, then does as LEAVE says: an exit code, or what to do at the warning.
RECORD = """
import json, os, signal, sys, time
leave = os.environ.get("LEAVE", "0")
def say(*what):
    with open(os.environ["CLUSTER"] + "/asked", "a") as log:
        print(json.dumps(what), file=log, flush=True)
def warned(number, frame):
    say("warned")
    time.sleep(0.2)
    sys.exit(0 if leave == "finish" else 75)
if leave != "deaf":
    signal.signal(signal.SIGUSR1, warned)
names = ("SLURM_", "MASTER_", "OMP_", "RANK", "WORLD_SIZE", "LOCAL_")
say(sys.argv[1:], {k: v for k, v in os.environ.items() if k.startswith(names)}, os.getpid())
if sys.argv[1] == "status":
    sys.exit(int(os.environ["STATUS"]))
if not leave.isdigit():
    time.sleep(30)
sys.exit(int(leave))
"""


class Cluster:
    """A Slurm of one machine."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.jobs: list[subprocess.Popen[str]] = []
        self.bin = folder / "bin"
        self.bin.mkdir()
        (folder / "recipes").symlink_to(REPOSITORY / "recipes")
        for name, text in (("srun", SRUN), ("scontrol", SCONTROL), ("sbatch", SBATCH)):
            self.install(name, f"#!{sys.executable} -I{text}")
        self.install("python", f'#!/bin/sh\nexec {sys.executable} "$@"\n')
        self.install("cpmix", f'#!/bin/sh\nexec {sys.executable} -m cpmix_cli "$@"\n')
        self.install("torchrun", f'#!/bin/sh\nexec {sys.executable} -m torch.distributed.run "$@"\n')
        kept = {k: v for k, v in os.environ.items() if not k.startswith(("SLURM_", "SRUN_"))}
        path = os.pathsep.join([str(REPOSITORY), os.environ.get("PYTHONPATH", "")])
        self.environment = {**kept, "PYTHONPATH": path, "CLUSTER": str(folder)}
        self.environment["PATH"] = f"{self.bin}{os.pathsep}{os.environ['PATH']}"

    def install(self, name: str, text: str) -> None:
        (self.bin / name).write_text(text)
        (self.bin / name).chmod(0o755)

    def record_instead(self) -> None:
        """From here on cpmix only says what it was asked."""
        package = self.folder / "recorder" / "cpmix_cli"
        package.mkdir(parents=True)
        (package / "__init__.py").touch()
        (package / "__main__.py").write_text(RECORD)
        self.environment["PYTHONPATH"] = str(package.parent)

    def read(self, name: str) -> list[Any]:
        """What a stand-in was told so far."""
        path = self.folder / name
        if not path.exists():
            return []
        return [line if name == "requeued" else json.loads(line) for line in path.read_text().splitlines()]

    def start(
        self, script: str, *arguments: object, number: int = 7, restarts: int = 0, **more: object
    ) -> subprocess.Popen[str]:
        """Run a job's script once, from a copy, as Slurm does."""
        text = (SCRIPTS / script).read_text()
        wanted = dict(re.findall(r"^#SBATCH --([a-z-]+)=?(\S*)", text, re.M))
        assert wanted.items() >= {"requeue": "", "signal": "B:USR1@120", "open-mode": "append"}.items()
        spool = self.folder / "spool" / "slurm_script"
        spool.parent.mkdir(exist_ok=True)
        shutil.copy(SCRIPTS / script, spool)
        nodes, per_node = str(more.pop("nodes", "localhost")), int(str(more.pop("per_node", 1)))
        num_nodes = nodes.count(",") + 1
        environment = {
            "SLURM_JOB_ID": number,
            "SLURM_JOB_NODELIST": nodes,
            "SLURM_JOB_NUM_NODES": num_nodes,
            "SLURM_NTASKS_PER_NODE": per_node,
            "SLURM_NTASKS": per_node * num_nodes,
            "SLURM_CPUS_PER_TASK": wanted["cpus-per-task"],
            "SLURM_GPUS_ON_NODE": wanted.get("gpus-per-node", "1"),
            **({"SLURM_RESTART_COUNT": restarts} if restarts else {}),
            **more,
        }
        own = {**self.environment, **{k: str(v) for k, v in environment.items()}}
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
        self.jobs.append(
            subprocess.Popen(["bash", str(spool), *map(str, arguments)], cwd=self.folder, env=own, **pipes)
        )
        return self.jobs[-1]

    def run(self, script: str, *arguments: object, **more: object) -> tuple[int, str]:
        return ended(self.start(script, *arguments, **more))  # type: ignore[arg-type]

    def wait_for(self, there: Callable[[], object]) -> None:
        until = time.monotonic() + 60
        while not there():
            assert time.monotonic() < until
            time.sleep(0.005)

    def asked(self) -> list[str]:
        return [" ".join(words[0]) for words in self.read("asked") if words != ["warned"]]


def ended(job: subprocess.Popen[str]) -> tuple[int, str]:
    log, _ = job.communicate(timeout=120)
    return job.returncode, log


@pytest.fixture
def cluster(tmp_path: Path) -> Iterator[Cluster]:
    """A Slurm whose jobs run the real cpmix."""
    cluster = Cluster(tmp_path)
    yield cluster
    for job in cluster.jobs:  # of a test that failed
        if job.poll() is None:
            job.kill()
            job.communicate()


@pytest.fixture
def recorder(cluster: Cluster) -> Cluster:
    """A Slurm whose jobs run a program that says what it was asked."""
    cluster.record_instead()
    return cluster


# -- real runs ---------------------------------------------------------------------------------------------------------


def preempt(job: subprocess.Popen[str], stage1: Path, cluster: Cluster) -> str:
    """Warn a job when it has saved an epoch; returns its log."""
    cluster.wait_for((stage1 / "training_state.safetensors").exists)
    job.send_signal(signal.SIGUSR1)
    code, log = ended(job)
    assert code == 0, log
    assert "interrupted: SIGUSR1 received" in log
    assert cluster.read("requeued") == [str(NUMBER)]
    assert (stage1 / "training_state.safetensors").exists()
    return log


@pytest.mark.slow
@pytest.mark.long
def test_a_chain_of_jobs_survives_a_preemption_and_ends_in_the_same_files(cluster: Cluster, toy: Path) -> None:
    command = ["bash", "recipes/slurm/pipeline.sh", str(toy), "run", "--epochs", str(EPOCHS)]
    options = {"cwd": cluster.folder, "env": {**cluster.environment, "PHASES": "train-stage2"}, "text": True}
    submitted = subprocess.run(command, capture_output=True, check=True, **options)
    names = ["train-stage1", "train-stage2", "evaluate", "confusion-report"]
    assert submitted.stdout == "".join(f"{NUMBER + i} {name}\n" for i, name in enumerate(names))
    jobs = cluster.read("sbatch")
    for (number, flags, arguments), name in zip(jobs, names, strict=True):
        assert arguments[:2] == ["recipes/slurm/one-gpu.sbatch", name]
        after = {"--dependency": f"afterok:{number - 1}", "--kill-on-invalid-dep": "yes"} if number > NUMBER else {}
        assert flags == {"--parsable": "", "--job-name": f"cpmix-{name}", **after}

    number, _, (_, *arguments) = jobs[0]
    preempt(cluster.start("one-gpu.sbatch", *arguments, number=number), cluster.folder / "run" / "stage1", cluster)
    for number, _, (_, *arguments) in jobs[:-1]:  # the report takes as long as all the rest
        code, log = cluster.run("one-gpu.sbatch", *arguments, number=number, restarts=int(number == NUMBER))
        assert code == 0, log
    assert cluster.read("requeued") == [str(NUMBER)]

    undisturbed = cluster.folder / "undisturbed"
    must("train-stage1", "--data", toy, "--out", undisturbed, "--epochs", EPOCHS)
    must("train-stage2", "--from", undisturbed)
    must("evaluate", "--from", undisturbed)
    assert contents(cluster.folder / "run") == contents(undisturbed)


@pytest.mark.slow
@pytest.mark.parametrize("script", ["one-node.sbatch", "torchrun.sbatch"])
@pytest.mark.long
def test_two_preempted_ranks_save_and_one_rank_resumes(cluster: Cluster, toy: Path, script: str) -> None:
    command = ("train-stage1", "--data", toy, "--out", "run", "--epochs", EPOCHS)
    ranks_here = {"RUN": "run", "RANKS_PER_NODE": 2} if script == "torchrun.sbatch" else {"per_node": 2}
    log = preempt(cluster.start(script, *command, number=NUMBER, **ranks_here), cluster.folder / "run/stage1", cluster)
    assert log.count("over 2 ranks") == 1
    again = must("train-stage1", "--data", toy, "--out", cluster.folder / "run", "--epochs", EPOCHS)
    assert "goes on after epoch" in again.stderr
    assert "begun with 2 ranks, going on with 1" in again.stderr
    assert (cluster.folder / "run" / "stage1" / "model.safetensors").is_file()


def test_a_phase_that_fails_ends_its_job(cluster: Cluster) -> None:
    code, log = cluster.run("one-gpu.sbatch", "train-stage1", "--data", "nowhere", "--out", "run")
    assert code == 3, log
    assert "nowhere" in log
    assert cluster.read("requeued") == []


# -- what a job does with exit codes and signals -----------------------------------------------------------------------

RUN = {"DATA": "data/c100", "RUN": "ckpt/c100", "RECIPE": "cifar100-lt/cpmix"}
COMMANDS = [
    "train-stage1 --data data/c100 --out ckpt/c100 --recipe cifar100-lt/cpmix --epochs 5 --seed 1",
    "train-stage2 --from ckpt/c100",
    "finetune --from ckpt/c100",
    "evaluate --from ckpt/c100",
    "confusion-report --from ckpt/c100",
]


def test_one_job_runs_all_phases(recorder: Cluster) -> None:
    assert recorder.run("pipeline.sbatch", **RUN, FLAGS="--epochs 5 --seed 1") == (0, "")
    assert recorder.asked() == COMMANDS
    assert {flags["--kill-on-bad-exit"] for flags, _ in recorder.read("srun")} == {"0"}


@pytest.mark.parametrize("code", [1, 2, 3, 4, 5, 130, 137])
def test_an_exit_code_but_75_ends_the_job(recorder: Cluster, code: int) -> None:
    assert recorder.run("pipeline.sbatch", **RUN, LEAVE=code) == (code, "")
    assert len(recorder.asked()) == 1
    assert recorder.read("requeued") == []


def test_code_75_without_a_warning_queues_the_job_again(recorder: Cluster) -> None:
    """Slurm preempted by a TERM to the step, which this shell does not see."""
    assert recorder.run("pipeline.sbatch", **RUN, LEAVE=75) == (0, "")
    assert len(recorder.asked()) == 1
    assert recorder.read("requeued") == ["7"]


def test_a_job_is_not_queued_again_for_ever(recorder: Cluster) -> None:
    for restarts, limit, again in ((99, {}, 1), (100, {}, 1), (2, {"REQUEUES": 3}, 2), (3, {"REQUEUES": 3}, 2)):
        code, log = recorder.run("pipeline.sbatch", **RUN, **limit, LEAVE=75, restarts=restarts)
        assert len(recorder.read("requeued")) == again
        refused = f"job 7 was queued again {restarts} times, which is enough; submit it again to go on\n"
        assert (code, log) in ((0, ""), (75, refused))
    assert code == 75


def test_a_job_that_cannot_be_queued_again_fails(recorder: Cluster) -> None:
    """With 0 the jobs that wait for it would begin."""
    code, log = recorder.run("pipeline.sbatch", **RUN, LEAVE=75, NO_REQUEUE=1)
    assert code == 75
    assert log == "job 7 cannot be queued again (scontrol, see above); submit it again to go on\n"


@pytest.mark.parametrize("leave", ["wait", "deaf"])
def test_the_warning_is_forwarded_once(recorder: Cluster, leave: str) -> None:
    """A rank that is still starting is killed by it: exit code 138."""
    job = recorder.start("pipeline.sbatch", **RUN, LEAVE=leave)
    recorder.wait_for(recorder.asked)
    for _ in range(3):
        job.send_signal(signal.SIGUSR1)
        time.sleep(0.05)
    assert ended(job) == (0, "")
    assert recorder.read("asked").count(["warned"]) == (leave == "wait")
    assert recorder.read("requeued") == ["7"]


def test_no_step_starts_after_the_warning(recorder: Cluster) -> None:
    job = recorder.start("pipeline.sbatch", **RUN, LEAVE="finish")
    recorder.wait_for(recorder.asked)
    job.send_signal(signal.SIGUSR1)
    assert ended(job) == (0, "")
    assert len(recorder.asked()) == 1
    assert recorder.read("requeued") == ["7"]


def test_a_cancelled_job_saves_and_stays_cancelled(recorder: Cluster) -> None:
    """TERM goes to the shell and to the step; handed on, it would make srun kill the step in the middle of saving."""
    job = recorder.start("pipeline.sbatch", **RUN, LEAVE="wait")
    recorder.wait_for(recorder.asked)
    job.send_signal(signal.SIGTERM)
    time.sleep(0.1)
    os.kill(recorder.read("asked")[0][2], signal.SIGUSR1)
    assert ended(job) == (75, "job 7 was ended; submit it again to go on\n")
    assert recorder.read("requeued") == []


def test_each_task_of_an_array_has_its_rho_and_seed(recorder: Cluster) -> None:
    (size,) = re.findall(r"^#SBATCH --array=0-(\d+)%", (SCRIPTS / "array.sbatch").read_text(), re.M)
    pairs = [(rho, seed) for rho in (200, 100, 50) for seed in range(3)]
    assert int(size) + 1 == len(pairs)
    for task in (0, 2, 3, 8):
        rho, seed = pairs[task]
        array = {"SLURM_ARRAY_JOB_ID": 40, "SLURM_ARRAY_TASK_ID": task}
        before = len(recorder.asked())
        assert recorder.run("array.sbatch", number=40 + task, **array, FLAGS="--epochs 5") == (0, "")
        data, run = f"data/cifar100-lt-rho{rho}", f"ckpt/rho{rho}-seed{seed}"
        assert recorder.asked()[before:] == [
            f"build-lt cifar100 --rho {rho} --out {data}",
            f"train-stage1 --data {data} --recipe cifar100-lt/cpmix --seed {seed} --out {run} --epochs 5",
            *(f"{command} --from {run}" for command in ("train-stage2", "finetune", "evaluate", "confusion-report")),
        ]
    code, log = recorder.run("array.sbatch", SLURM_ARRAY_JOB_ID=40, SLURM_ARRAY_TASK_ID=9)
    assert (code, log) == (2, "task 9: there are 3 imbalances times 3 seeds\n")


@pytest.mark.slow
def test_the_tasks_of_an_array_build_their_data_set_once(recorder: Cluster) -> None:
    real = f'PYTHONPATH="{REPOSITORY}" exec {sys.executable} -m cpmix_cli "$@"'
    recorded = f'exec {sys.executable} -m cpmix_cli "$@"'
    recorder.install("cpmix", f'#!/bin/sh\nif [ "$1" = build-lt ]; then {real}; fi\n{recorded}\n')
    lists = {"SOURCE": "toy", "RHOS": "20", "SEEDS": "0 1", "RECIPE": "toy/cpmix", "PHASES": ""}
    lists["SLURM_ARRAY_JOB_ID"] = "40"
    jobs = [recorder.start("array.sbatch", number=40 + i, SLURM_ARRAY_TASK_ID=i, **lists) for i in range(2)]
    (first, one), (second, other) = map(ended, jobs)
    assert first == second == 0, one + other
    assert (one + other).count("up to date") == 1
    train = "train-stage1 --data data/toy-lt-rho20 --recipe toy/cpmix --seed"
    assert {f"{train} {i} --out ckpt/rho20-seed{i}" for i in range(2)} <= set(recorder.asked())
    assert not any("train-stage2" in line for line in recorder.asked())


def test_only_the_preempted_task_of_an_array_is_queued_again(recorder: Cluster) -> None:
    """Its number may be the whole array's."""
    array = {"SLURM_ARRAY_JOB_ID": 40, "SLURM_ARRAY_TASK_ID": 8}
    assert recorder.run("array.sbatch", number=40, **array, LEAVE=75) == (0, "")
    assert recorder.read("requeued") == ["40_8"]


def ranks_of(recorder: Cluster) -> tuple[list[ranks.Ranks], set[tuple[str, int]]]:
    """Who each recorded process is to cpmix, in their order, and where they all meet."""
    environments = [words[1] for words in recorder.read("asked") if words != ["warned"] and words[0] == TRAIN]
    found = sorted((ranks.find(environment) for environment in environments), key=lambda r: r.rank)
    return found, {ranks.rendezvous_address(environment) for environment in environments}


TRAIN = ["train-stage1", "--data", "data/places", "--out", "ckpt/places"]


def test_one_node_runs_one_rank_per_gpu(recorder: Cluster) -> None:
    assert recorder.run("one-node.sbatch", *TRAIN, per_node=8, number=1234) == (0, "")
    found, places = ranks_of(recorder)
    assert found == [ranks.Ranks(i, 8, i, 8) for i in range(8)]
    assert places == {("localhost", 20_000 + 7 * 1234)}
    assert {words[1]["SLURM_CPUS_PER_TASK"] for words in recorder.read("asked")} == {"8"}


def test_many_nodes_run_one_rank_per_gpu(recorder: Cluster) -> None:
    assert recorder.run("many-nodes.sbatch", *TRAIN, nodes="n1,n2,n3", per_node=2) == (0, "")
    found, places = ranks_of(recorder)
    assert found == [ranks.Ranks(i, 6, i % 2, 2) for i in range(6)]
    assert places == {("n1", 20_049)}


def test_a_signal_reaches_all_ranks(recorder: Cluster) -> None:
    job = recorder.start("one-node.sbatch", *TRAIN, per_node=2, LEAVE="wait")
    recorder.wait_for(lambda: len(recorder.asked()) == 2)
    job.send_signal(signal.SIGUSR1)
    assert ended(job) == (0, "")
    assert recorder.read("asked").count(["warned"]) == 2
    assert recorder.read("requeued") == ["7"]


def test_a_data_set_is_copied_to_the_nodes_own_disk(recorder: Cluster) -> None:
    (recorder.folder / "data" / "my places").mkdir(parents=True)
    (recorder.folder / "data" / "my places" / "dataset.json").write_text("{}")
    scratch = recorder.folder / "scratch"
    scratch.mkdir()
    more = {"COPY": "data/my places", "TMPDIR": scratch, "per_node": 2}
    job = recorder.start("one-node.sbatch", "train-stage2", "--from", "ckpt", LEAVE="wait", **more)
    recorder.wait_for(lambda: len(recorder.asked()) == 2)
    copy = scratch / "cpmix-7" / "my places"
    assert (copy / "dataset.json").read_text() == "{}"
    assert set(recorder.asked()) == {f"train-stage2 --from ckpt --data {copy}"}
    job.send_signal(signal.SIGUSR1)
    assert ended(job) == (0, "")
    assert list(scratch.iterdir()) == []
    copying, training, cleaning = [flags for flags, _ in recorder.read("srun")]
    assert copying["--ntasks"] == cleaning["--ntasks"] == "1"
    assert copying["--ntasks-per-node"] == cleaning["--ntasks-per-node"] == "1"
    assert "--ntasks-per-node" not in training


def test_torchrun_hands_the_warning_on_and_a_run_that_is_done_is_not_queued_again(recorder: Cluster) -> None:
    more = {"RUN": "ckpt/places", "RANKS_PER_NODE": 2, "STATUS": 0, "LEAVE": "wait"}
    job = recorder.start("torchrun.sbatch", *TRAIN, **more)
    recorder.wait_for(lambda: len(recorder.asked()) == 2)
    found, _ = ranks_of(recorder)
    assert found == [ranks.Ranks(i, 2, i, 2) for i in range(2)]
    assert {words[1]["OMP_NUM_THREADS"] for words in recorder.read("asked")} == {"32"}
    job.send_signal(signal.SIGUSR1)
    assert ended(job)[0] == 1
    assert recorder.read("asked").count(["warned"]) == 2
    assert recorder.asked()[2:] == ["status ckpt/places"]
    assert recorder.read("requeued") == []


def test_torchrun_that_fails_without_a_warning_ends_the_job(recorder: Cluster) -> None:
    code, log = recorder.run("torchrun.sbatch", *TRAIN, RUN="ckpt/places", RANKS_PER_NODE=2, LEAVE=3)
    assert code == 1, log
    assert set(recorder.asked()) == {" ".join(TRAIN)}
    assert recorder.read("requeued") == []
