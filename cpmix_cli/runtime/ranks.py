"""Ranks: the processes that train one network together, their communication and their common end.

torchrun or srun starts one rank per GPU. torch.distributed exchanges tensors, and DistributedDataParallel averages the
gradients. Decisions of all ranks go through a separate gloo group (the channel) as integers on the CPU. A rank that
ends can thus inform the others at any point. No pickles are exchanged.
"""

import gc
import hashlib
import json
import os
import re
import socket
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING, Any

from cpmix_cli.runtime import console, memory, processes, signals
from cpmix_cli.runtime.errors import EXIT_BUG, EXIT_INTERRUPTED, CpmixError, EnvironmentFault, UsageError, shortened
from cpmix_cli.runtime.rendezvous import SILENT_SECONDS, TORCHRUN, alone, meet, rendezvous_address, telling, why

if TYPE_CHECKING:
    from torch import Tensor

WAIT = timedelta(hours=1)
"""Longest wait for the slowest rank. It is long because the first rank also writes checkpoints."""
LAST_WORD = timedelta(seconds=5)
"""Longest wait for the other ranks when a rank announces its end."""
SURVEY_SECONDS = 10.0
"""Longest search for the rank that was lost."""
NCCL_ERRORS = "TORCH_NCCL_ASYNC_ERROR_HANDLING"
"""Variable that says what torch does with a process after an error of NCCL."""
ENDED = 1000
"""Smallest number on the channel that means that a rank ends. Smaller numbers are signals and answers."""


class Left(SystemExit):
    """Exit of this rank after another rank has reported the reason. `except Exception` does not catch it."""


@dataclass(frozen=True)
class Ranks:
    """Position of this process among the processes that train together. By default there is one process."""

    rank: int = 0
    size: int = 1
    """Number of ranks."""
    local_rank: int = 0
    """Number of this rank on its machine, from 0."""
    local_size: int = 1
    """Number of ranks on this machine."""

    @property
    def first(self) -> bool:
        """True for rank 0, the only rank that writes files and prints."""
        return self.rank == 0

    def max_over_ranks(self, number: int) -> int:
        """Return the largest `number` of all ranks. Each rank waits for all others. Numbers are 0 to ENDED - 1.

        Raises:
            Left: another rank announced its end instead.
        """
        if self.size == 1:
            return number
        told = _tell(number, WAIT)
        if told >= ENDED:
            raise Left((told - ENDED) // self.size)
        return told

    def all_equal(self, sha: str) -> bool:
        """Return whether all ranks have the same hex digest; raises as max_over_ranks()."""
        parts = [int(sha[i : i + 8], 16) % ENDED for i in range(0, 32, 8)]
        largest = [self.max_over_ranks(part) for part in parts]
        smallest = [ENDED - 1 - self.max_over_ranks(ENDED - 1 - part) for part in parts]
        return largest == smallest

    def sum_(self, values: "Tensor") -> "Tensor":
        """Sum values over all ranks, in place and with identical bits on each rank; return them."""
        if self.size > 1:
            import torch.distributed as dist

            dist.all_reduce(values)
        return values

    def all_gather(self, values: "Tensor") -> "Tensor":
        """Concatenate the values of all ranks in order: [n, ...] -> [size * n, ...], with equal n on all ranks."""
        if self.size == 1:
            return values
        import torch
        import torch.distributed as dist

        parts = [torch.empty_like(values) for _ in range(self.size)]
        dist.all_gather(parts, values)
        return torch.cat(parts)


_current = Ranks()
_has_begun = False
"""True from the moment when this process looks for the other ranks."""
_waits_since: float | None = None
"""Time since which this rank waits for the others on the channel; None if it does not."""
_channel: Any = None
_num_joined = 0
_neighbours: dict[int, int] = {}
"""Rank on this machine -> pid."""


def current() -> Ranks:
    """Return this process's position among the ranks; outside together() it is the only rank."""
    return _current


def find(environment: Mapping[str, str]) -> Ranks:
    """Return this process's position from the variables of torchrun or srun; the only rank if neither started it.

    Slurm's variables count only inside a job step, because a batch script has the variables of its allocation.

    Raises:
        EnvironmentFault: the variables are invalid or contradict each other.
    """
    try:
        if environment.keys() >= TORCHRUN:
            rank, size = int(environment["RANK"]), int(environment["WORLD_SIZE"])
            local_rank, local_size = environment.get("LOCAL_RANK", rank), environment.get("LOCAL_WORLD_SIZE", size)
            found = Ranks(rank, size, int(local_rank), int(local_size))
        elif int(environment.get("SLURM_STEP_NUM_TASKS", 1)) > 1 and "SLURM_PROCID" in environment:
            size = int(environment["SLURM_STEP_NUM_TASKS"])
            per_node = _tasks_per_node(environment.get("SLURM_STEP_TASKS_PER_NODE", str(size)))
            local_size = per_node[int(environment.get("SLURM_NODEID", 0))]
            found = Ranks(int(environment["SLURM_PROCID"]), size, int(environment["SLURM_LOCALID"]), local_size)
        else:
            return Ranks()
        if not 0 <= found.rank < found.size or not 0 <= found.local_rank < found.local_size:
            raise ValueError(f"rank {found.rank} of {found.size}, {found.local_rank} of {found.local_size} here")
    except (ValueError, KeyError, IndexError) as fault:
        raise EnvironmentFault(
            f"the variables of torchrun or srun (RANK, WORLD_SIZE, SLURM_PROCID, ...) make no sense: {fault}",
            fix=f"start the ranks with torchrun or srun; to train in one process: {alone()}",
        ) from fault
    return found


def speak_early(fault: CpmixError) -> None:
    """Let a later rank that ends before it joins the others print its error: the first rank may have none."""
    if not _has_begun and is_later(os.environ):
        fault.message = f"rank {find(os.environ).rank}: {fault.message}"
        console.mute(False)


def is_later(environment: Mapping[str, str]) -> bool:
    """Return whether this process is one of several ranks and not the first; False if find() would raise."""
    with suppress(EnvironmentFault):
        return not find(environment).first
    return False


def _tasks_per_node(text: str) -> list[int]:
    """Parse the tasks per node: "4(x2),3" -> [4, 4, 3]."""
    counts = []
    for part in text.split(","):
        match = re.fullmatch(r"(\d+)(?:\(x(\d+)\))?", part)
        if match is None:
            raise ValueError(f"SLURM_STEP_TASKS_PER_NODE = {text}")
        counts += [int(match[1])] * int(match[2] or 1)
    return counts


@contextmanager
def together(flags: Mapping[str, str]) -> Iterator[None]:
    """Connect to the other ranks for the duration of a context. An error at one rank ends all ranks.

    All ranks end with the same exit code, and one of them reports the error.

    Args:
        flags: command and flags of this rank, by name. A rank with others would wait for the rest without end.

    Raises:
        UsageError: the ranks have different flags.
        CpmixError: the error raised inside, at the rank that reports it.
        EnvironmentFault: not all ranks joined, or a rank was lost.
        Left: another rank reports the error.
    """
    global _current, _has_begun
    place = find(os.environ)
    if place.size == 1:
        yield
        return
    _has_begun = True
    signals.twice_seconds = 1.0  # Slurm and torchrun may both forward the same SIGTERM
    store = _join(place)
    _current = place
    console.mute(not place.first)
    done, ended = False, threading.Event()
    threading.Thread(target=_watch, args=(ended,), daemon=True, name="cpmix-waits").start()
    try:
        try:
            with memory.explained():
                _refuse_other_flags(store, place, flags)
                yield
        except OSError as fault:  # may concern the file system of one machine only
            what = f"{os.fsdecode(fault.filename)}: " if isinstance(fault.filename, str | bytes) else ""
            raise EnvironmentFault(
                f"{what}{fault.strerror or fault}",
                fix="check the disk and the permissions of that machine, then run the same command again",
            ) from fault
        done = True
    except (CpmixError, signals.Stopped) as end:
        code = end.exit_code if isinstance(end, CpmixError) else int(str(end.code))
        if not _is_mine_to_say(store, place, code):
            raise Left(code) from end
        if isinstance(end, CpmixError) and not place.first:
            end.message = f"rank {place.rank}: {end.message}"
        console.mute(False)
        raise
    except Exception as fault:
        if not _is_of_a_lost_rank(fault):
            _is_mine_to_say(store, place, EXIT_BUG)  # announce only: Python prints the traceback at each rank
            raise
        _end_without(store, place, fault)
    finally:
        ended.set()
        _current = Ranks()
        _leave(abort=not done)


def nccl_errors(environment: Mapping[str, str]) -> str:
    """Return the value of NCCL_ERRORS: as it is set, else 0, so that torch does not end this process.

    With torch's default, the process is aborted before it can report which rank was lost. torchrun sets 1 if the user
    sets nothing, so its 1 counts as unset.
    """
    value = environment.get(NCCL_ERRORS, "0")
    return "0" if value == "1" and "TORCHELASTIC_RUN_ID" in environment else value


def _join(place: Ranks) -> Any:
    """Connect to the other ranks and return their shared store."""
    import torch
    import torch.distributed as dist

    global _channel, _num_joined
    _num_joined += 1
    # Keys get a prefix per restart of torchrun and per command of this process, so that they cannot collide.
    prefix = f"cpmix-{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}-{_num_joined}"
    host, port = rendezvous_address(os.environ)
    with telling(f"rank {place.rank} of {place.size} waits for rank 0 at {host}:{port}") as silence:
        try:
            store = meet(host, port, place.rank, place.size, prefix, silence)
            os.environ[NCCL_ERRORS] = nccl_errors(os.environ)
            backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
            dist.init_process_group(backend, store=store, rank=place.rank, world_size=place.size, timeout=WAIT)
            _channel = dist.new_group(backend="gloo", timeout=WAIT)
            store.set(f"process-{place.rank}", f"{socket.gethostname()} {os.getpid()}")
            _neighbours.clear()
            first = place.rank - place.local_rank
            for rank in range(max(0, first), min(place.size, first + place.local_size)):
                host_of, process = store.get(f"process-{rank}").decode().split()
                if host_of == socket.gethostname():
                    _neighbours[rank] = int(process)
        except RuntimeError as fault:
            console.mute(False)  # print at each rank: the first rank may be the missing one
            raise EnvironmentFault(
                f"rank {place.rank} of {place.size} does not meet the others at {host}:{port}: {_first_line(fault)} "
                f"({why()})",
                fix=f"to train in one process: {alone()}; else look why another rank did not start, or choose the "
                "place with MASTER_ADDR and MASTER_PORT",
            ) from fault
    return store


def _refuse_other_flags(store: Any, place: Ranks, flags: Mapping[str, str]) -> None:
    """Raise UsageError if the ranks have different flags, with the flags of the first that differs from rank 0."""
    if _current.all_equal(hashlib.sha256(json.dumps(flags, sort_keys=True).encode()).hexdigest()):
        return
    store.set(f"flags-{place.rank}", json.dumps(flags))
    if not place.first:
        _current.max_over_ranks(0)  # the first rank announces its end
    for rank in range(1, place.size):
        theirs = json.loads(store.get(f"flags-{rank}"))
        if names := [name for name in {**flags, **theirs} if flags.get(name) != theirs.get(name)]:
            told = [
                f"{name}: {theirs.get(name, 'not given')} at rank {rank}, {flags.get(name, 'not given')} at rank 0"
                for name in names
            ]
            raise UsageError(
                f"the ranks were started with different flags: {shortened(told, 5, '; ')}",
                fix=f"start all ranks with the same {shortened(names, 5)}",
            )


def _tell(number: int, limit: timedelta) -> int:
    """Return the largest number that a rank sends on the channel."""
    import torch
    import torch.distributed as dist

    global _waits_since
    told = torch.tensor([number])
    _waits_since = time.monotonic()
    try:
        dist.all_reduce(told, dist.ReduceOp.MAX, group=_channel, async_op=True).wait(limit)
    finally:
        _waits_since = None
    return int(told)


def _watch(ended: threading.Event) -> None:
    """Say once per wait on the channel that the first rank waits for longer than SILENT_SECONDS."""
    told = None
    while not ended.wait(SILENT_SECONDS / 10):
        since = _waits_since
        if since not in (None, told) and time.monotonic() - since > SILENT_SECONDS:
            told = since
            console.note(
                f"waits for another rank, which is slow or hangs ({why()}); if it does not come, stop all ranks, and "
                "run the same command again"
            )


def _is_mine_to_say(store: Any, place: Ranks, code: int) -> bool:
    """Announce the end of this rank with its exit code; return whether this rank must report the reason."""
    with suppress(RuntimeError):
        store.set("ended", str(code))  # for ranks that do not wait on the channel now
    # Of ranks that end together with the same code, the lowest sends the largest number and reports.
    word = ENDED + code * place.size + place.size - 1 - place.rank
    with suppress(RuntimeError):  # ranks that do not wait on the channel will notice the lost connection
        return _tell(word, LAST_WORD) == word
    return True


def _is_of_a_lost_rank(fault: Exception) -> bool:
    import torch.distributed as dist

    words = ("gloo", "nccl", "connection", "socket", "timed out")
    is_named = any(word in str(fault).lower() for word in words)
    return isinstance(fault, RuntimeError) and (is_named or isinstance(fault, dist.DistError))


def _end_without(store: Any, place: Ranks, fault: Exception) -> None:
    """End this rank after the loss of another. One rank reports which is lost, unless that rank gave the reason."""
    import torch

    if signals.pending():
        raise Left(EXIT_INTERRUPTED) from fault
    # Objects in the frames of the traceback keep connections open. Closed connections inform the other ranks.
    fault.__traceback__ = None
    gc.collect()
    _leave(abort=True)
    speaker, code = 1, 0
    with suppress(RuntimeError):  # the store fails if the lost rank hosted it
        code = int(store.get("ended")) if store.check(["ended"]) else 0
        speaker = int(store.compare_set("speaker", "", str(place.rank)))
        store.add("heard", 1)
    until = time.monotonic() + SURVEY_SECONDS
    # A killed process closes its connections shortly before it disappears.
    while not (gone := [rank for rank, process in _neighbours.items() if processes.is_alive(process) is False]):
        if code or time.monotonic() > until:
            break
        time.sleep(0.05)
    with suppress(RuntimeError):  # the first rank may host the store, so it waits until the others have read it
        while place.first and store.add("heard", 0) < place.size - len(gone) and time.monotonic() < until:
            time.sleep(0.05)
    if code or place.rank != speaker:
        raise Left(code or EnvironmentFault.exit_code) from fault
    which = f"rank {', '.join(map(str, gone))}" if gone else "a rank"
    console.mute(False)
    lost = EnvironmentFault(
        f"{which} of {place.size} is gone (killed, out of memory, or for the reason given above), and the others "
        f"cannot go on: {_first_line(fault)}",
        fix="run the same command again: it goes on from the last state that was saved",
    )
    if torch.cuda.is_available():  # at exit, NCCL would wait for the lost rank
        console.error(lost)
        os._exit(lost.exit_code)
    raise lost from fault


def _leave(*, abort: bool) -> None:
    """Close the connections. With `abort`, stop NCCL's kernels, which would wait for missing ranks."""
    import torch
    import torch.distributed as dist

    global _channel
    _channel = None
    with suppress(RuntimeError, ValueError):
        if not dist.is_initialized():
            return
        if abort and torch.cuda.is_available():
            dist.distributed_c10d._abort_process_group()
        else:
            dist.destroy_process_group()


def _first_line(fault: Exception) -> str:
    return str(fault).strip().splitlines()[0][:200] if str(fault).strip() else type(fault).__name__
