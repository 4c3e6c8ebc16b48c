"""Several processes that train one network together: who this one is, and what they say to each other.

torchrun or srun starts them, one for each GPU; torch.distributed carries their words, and DistributedDataParallel the
gradients. What they agree on goes over a channel of its own, whole numbers from host to host, so that a rank that ends
can tell the others in the middle of anything. No pickle goes over either.
"""

import gc
import os
import re
import socket
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING, Any

from cpmix_cli.runtime import console, processes, signals
from cpmix_cli.runtime.errors import EXIT_BUG, EXIT_INTERRUPTED, CpmixError, EnvironmentFault

if TYPE_CHECKING:
    from torch import Tensor

JOIN_SECONDS = 300.0
"""Until all ranks have to be there."""
WAIT = timedelta(hours=1)
"""For the slowest rank: the first one also writes checkpoints."""
LAST_WORD = timedelta(seconds=5)
SURVEY_SECONDS = 10.0
ENDED = 1000
"""Words from here on say that a rank ends; below are signals and answers."""


class Left(SystemExit):
    """Another rank has said why all of them end. Not an Exception: nothing that mends failures is to swallow it."""


@dataclass(frozen=True)
class Ranks:
    """The processes that train together, seen from one of them; by default there is one."""

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    """Counted on this machine alone."""
    local_size: int = 1

    @property
    def first(self) -> bool:
        """This is the one that writes and speaks."""
        return self.rank == 0

    def max_over_ranks(self, number: int) -> int:
        """The largest of the numbers, from 0 to ENDED - 1, that all ranks give; each waits for all.

        Raises:
            Left: a rank ended instead.
        """
        if self.size == 1:
            return number
        told = _tell(number, WAIT)
        if told >= ENDED:
            raise Left((told - ENDED) // self.size)
        return told

    def all_equal(self, sha: str) -> bool:
        """Whether all ranks give this hex digest."""
        parts = [int(sha[i : i + 8], 16) % ENDED for i in range(0, 32, 8)]
        largest = [self.max_over_ranks(part) for part in parts]
        smallest = [ENDED - 1 - self.max_over_ranks(ENDED - 1 - part) for part in parts]
        return largest == smallest

    def sum_(self, values: "Tensor") -> "Tensor":
        """Sum over the ranks, in place, the same bits on each."""
        if self.size > 1:
            import torch.distributed as dist

            dist.all_reduce(values)
        return values

    def all_gather(self, values: "Tensor") -> "Tensor":
        """The values [n, ...] of all ranks one after the other [size n, ...]; n is the same for each."""
        if self.size == 1:
            return values
        import torch
        import torch.distributed as dist

        parts = [torch.empty_like(values) for _ in range(self.size)]
        dist.all_gather(parts, values)
        return torch.cat(parts)


_current = Ranks()
_channel: Any = None
_num_joined = 0
_neighbours: dict[int, int] = {}
"""Process of each rank on this machine."""


def current() -> Ranks:
    """The ranks that this process trains with; itself alone outside together()."""
    return _current


def find(environment: Mapping[str, str]) -> Ranks:
    """Who this process is, as torchrun or srun says; alone where neither started it with others.

    Only a job step of Slurm counts: a batch script has the variables of its whole allocation, too.

    Raises:
        EnvironmentFault: the variables make no sense.
    """
    try:
        if {"RANK", "WORLD_SIZE", "MASTER_ADDR"} <= environment.keys():
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
            fix="start the ranks with torchrun or srun, or unset RANK and WORLD_SIZE",
        ) from fault
    return found


def is_later(environment: Mapping[str, str]) -> bool:
    """This process is one of several ranks, and not the first; false where find() would raise."""
    with suppress(EnvironmentFault):
        return not find(environment).first
    return False


def _tasks_per_node(text: str) -> list[int]:
    """'4(x2),3' -> [4, 4, 3]."""
    counts = []
    for part in text.split(","):
        match = re.fullmatch(r"(\d+)(?:\(x(\d+)\))?", part)
        if match is None:
            raise ValueError(f"SLURM_STEP_TASKS_PER_NODE = {text}")
        counts += [int(match[1])] * int(match[2] or 1)
    return counts


def rendezvous_address(environment: Mapping[str, str]) -> tuple[str, int]:
    """Host and port where the ranks meet: as told, or on the first node of the job step, a port made of its number."""
    job, step = (int(environment.get(name, 0)) for name in ("SLURM_JOB_ID", "SLURM_STEP_ID"))
    nodes = environment.get("SLURM_STEP_NODELIST", environment.get("SLURM_LAUNCH_NODE_IPADDR", "localhost"))
    first = re.split(r",(?![^\[]*\])", nodes)[0]  # at a comma outside brackets
    host = environment.get("MASTER_ADDR") or re.sub(r"\[(\d+)[^\]]*\]", r"\1", first)
    return host, int(environment.get("MASTER_PORT", 20_000 + (7 * job + step) % 10_000))


@contextmanager
def together() -> Iterator[None]:
    """Join the other ranks, and leave with all of them: whatever ends one ends all, with one exit code, said once.

    Raises:
        CpmixError: what was raised inside, at the one rank that is to say it.
        EnvironmentFault: other ranks never came, or one was lost.
        Left: another rank says why.
    """
    global _current
    place = find(os.environ)
    if place.size == 1:
        yield
        return
    signals.twice_seconds = 1.0  # Slurm and torchrun may each hand SIGTERM on
    store = _join(place)
    _current = place
    console.mute(not place.first)
    done = False
    try:
        try:
            yield
        except OSError as fault:  # of one machine's file system, maybe
            what = f"{os.fsdecode(fault.filename)}: " if isinstance(fault.filename, str | bytes) else ""
            raise EnvironmentFault(f"{what}{fault.strerror or fault}") from fault
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
            _is_mine_to_say(store, place, EXIT_BUG)  # Python says it at each
            raise
        _end_without(store, place, fault)
    finally:
        _current = Ranks()
        _leave(abort=not done)


def _join(place: Ranks) -> Any:
    """Meet the others; returns the store that they share."""
    import torch
    import torch.distributed as dist

    global _channel, _num_joined
    host, port = rendezvous_address(os.environ)
    try:
        # As torch's own env:// does it: torchrun keeps the store itself. Each of its attempts has names of its own, and
        # each command of a process that runs several.
        kept = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
        limit = timedelta(seconds=JOIN_SECONDS)
        shared = dist.TCPStore(  # type: ignore[attr-defined]
            host, port, place.size, place.first and not kept, limit, multi_tenant=True
        )
        _num_joined += 1
        names = f"cpmix-{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}-{_num_joined}"
        store = dist.PrefixStore(names, shared)  # type: ignore[attr-defined]
        store.set_timeout(limit)
        backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
        dist.init_process_group(backend, store=store, rank=place.rank, world_size=place.size, timeout=WAIT)
        _channel = dist.new_group(backend="gloo", timeout=WAIT)
        store.set(f"process-{place.rank}", f"{socket.gethostname()} {os.getpid()}")
        _neighbours.clear()
        first = place.rank - place.local_rank
        for rank in range(max(0, first), min(place.size, first + place.local_size)):
            host, process = store.get(f"process-{rank}").decode().split()
            if host == socket.gethostname():
                _neighbours[rank] = int(process)
    except RuntimeError as fault:
        console.mute(False)  # the first may be the one that did not come
        raise EnvironmentFault(
            f"rank {place.rank} of {place.size} does not meet the others at {host}:{port}: {_first_line(fault)}",
            fix="look why another rank did not start; or choose the place with MASTER_ADDR and MASTER_PORT",
        ) from fault
    return store


def _tell(number: int, limit: timedelta) -> int:
    """The largest number that a rank tells over the channel."""
    import torch
    import torch.distributed as dist

    told = torch.tensor([number])
    work = dist.all_reduce(told, dist.ReduceOp.MAX, group=_channel, async_op=True)
    work.wait(limit)
    return int(told)


def _is_mine_to_say(store: Any, place: Ranks, code: int) -> bool:
    """Tell the others that this rank ends, and with what; of several that end at once the lowest speaks."""
    with suppress(RuntimeError):
        store.set("ended", str(code))  # for those who are in the middle of something else
    word = ENDED + code * place.size + place.size - 1 - place.rank
    with suppress(RuntimeError):  # they will miss this rank where they are
        return _tell(word, LAST_WORD) == word
    return True


def _is_of_a_lost_rank(fault: Exception) -> bool:
    import torch.distributed as dist

    words = ("gloo", "nccl", "connection", "socket", "timed out")
    is_named = any(word in str(fault).lower() for word in words)
    return isinstance(fault, RuntimeError) and (is_named or isinstance(fault, dist.DistError))


def _end_without(store: Any, place: Ranks, fault: Exception) -> None:
    """A rank is gone: say which, once, and end, at the others by Left; nothing where it said why itself."""
    import torch

    if signals.pending():
        raise Left(EXIT_INTERRUPTED) from fault
    # What stands in the frames holds the connections open. Closed, they tell the others, while the store is there.
    fault.__traceback__ = None
    gc.collect()
    _leave(abort=True)
    speaker, code = 1, 0
    with suppress(RuntimeError):  # the first rank kept the store, and is gone
        code = int(store.get("ended")) if store.check(["ended"]) else 0
        speaker = int(store.compare_set("speaker", "", str(place.rank)))
        store.add("heard", 1)
    until = time.monotonic() + SURVEY_SECONDS
    # A process that is killed closes its connections a moment before it is gone.
    while not (gone := [rank for rank, process in _neighbours.items() if not processes.start_of(process)]):
        if code or time.monotonic() > until:
            break
        time.sleep(0.05)
    with suppress(RuntimeError):  # who keeps the store stays until the others have asked it
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
    if torch.cuda.is_available():  # NCCL would wait for the lost rank before it lets the program end
        console.error(lost)
        os._exit(lost.exit_code)
    raise lost from fault


def _leave(*, abort: bool) -> None:
    """Close what the ranks share; if ranks may be missing, end NCCL's kernels, which would wait for them."""
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
