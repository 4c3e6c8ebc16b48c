"""Where ranks meet: the variables of torchrun and srun, the shared store, and what a rank says that waits."""

import os
import re
import socket
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

from cpmix_cli.runtime import console
from cpmix_cli.runtime.errors import EnvironmentFault
from cpmix_cli.runtime.text import quoted

JOIN_SECONDS = 300.0
"""Longest wait until all ranks have joined."""
SILENT_SECONDS = 10.0
"""Time after which a rank that waits for others says so."""
TORCHRUN = {"RANK", "WORLD_SIZE", "MASTER_ADDR"}
_SIZES = ("WORLD_SIZE", "SLURM_STEP_NUM_TASKS")
"""Variables of torchrun and of srun without which this process is the only rank."""


def rendezvous_address(environment: Mapping[str, str]) -> tuple[str, int]:
    """Return host and port at which the ranks connect.

    They are MASTER_ADDR and MASTER_PORT. By default, the host is the first node of the Slurm job step, and the port is
    computed from the ids of job and step.

    Raises:
        EnvironmentFault: a variable is not a number, or not that of a port.
    """
    try:
        job, step = (int(environment.get(name, 0)) for name in ("SLURM_JOB_ID", "SLURM_STEP_ID"))
        port = int(environment.get("MASTER_PORT", 20_000 + (7 * job + step) % 10_000))
        if not 0 < port < 65_536:
            raise ValueError(f"port {port}")
    except ValueError as fault:
        raise EnvironmentFault(
            f"MASTER_PORT or the ids of the Slurm job and step (SLURM_JOB_ID, SLURM_STEP_ID) make no sense: {fault}",
            fix="set MASTER_PORT to a number from 1024 to 65535, the same at all ranks",
        ) from fault
    nodes = environment.get("SLURM_STEP_NODELIST", environment.get("SLURM_LAUNCH_NODE_IPADDR", "localhost"))
    first = re.split(r",(?![^\[]*\])", nodes)[0]  # at a comma outside brackets
    host = environment.get("MASTER_ADDR") or re.sub(r"\[(\d+)[^\]]*\]", r"\1", first)
    return host, port


def why() -> str:
    """Return the variable that makes this process one of several ranks, with its value."""
    name = _SIZES[0] if os.environ.keys() >= TORCHRUN else _SIZES[1]
    return f"{name} is {os.environ.get(name)}"


def alone() -> str:
    """Return the command that does in this process alone what it was asked to do with others."""
    unset = [word for name in _SIZES if name in os.environ for word in ("-u", name)]
    return f"{quoted('env', *unset)} {console.typed(*sys.argv[1:])}"


def meet(host: str, port: int, rank: int, size: int, prefix: str, silence: "Silence") -> Any:
    """Wait until all ranks have connected, and return their shared store.

    Args:
        host, port: see rendezvous_address().
        rank: number of this rank.
        size: number of ranks.
        prefix: start of all keys in the store, the same at all ranks.
        silence: changes in place, to what this rank waits for.

    Raises:
        RuntimeError: a rank does not come in JOIN_SECONDS, comes twice, or knows another number of ranks.
    """
    import torch.distributed as dist

    until = time.monotonic() + JOIN_SECONDS
    shared = _connect(host, port, rank, size, until)
    store = dist.PrefixStore(prefix, shared)  # type: ignore[attr-defined]
    store.set_timeout(timedelta(seconds=JOIN_SECONDS))
    if store.add(f"rank-{rank}", 1) > 1:
        raise RuntimeError(f"another process is rank {rank} as well")
    store.set(f"size-{rank}", str(size))
    while missing := [other for other in range(size) if not store.check([f"size-{other}"])]:
        listed = ", ".join(map(str, missing[:20])) + (", ..." if missing[20:] else "")
        silence.text = f"rank {rank} of {size} waits for rank{'s' if missing[1:] else ''} {listed}"
        silence.is_mine = all(other in missing for other in range(rank))
        if time.monotonic() > until:
            raise RuntimeError(f"{silence.text} in vain, for {JOIN_SECONDS:g} s")
        time.sleep(0.1)
    for other in [0] if rank else range(size):
        if (theirs := int(store.get(f"size-{other}"))) != size:
            raise RuntimeError(f"there are {size} ranks by its variables, {theirs} by those of rank {other}")
    return store


def _connect(host: str, port: int, rank: int, size: int, until: float) -> Any:
    """Return the store of all ranks at the first one; under torchrun its agent hosts it, like torch's env://."""
    import torch.distributed as dist

    hosts = rank == 0 and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"
    while not hosts:  # torch would answer no signal while it tries, and print a trace of its stack
        try:
            socket.create_connection((host, port), timeout=1).close()
            break
        except OSError as fault:
            if time.monotonic() > until:
                raise RuntimeError(
                    f"nothing answers there for {JOIN_SECONDS:g} s ({fault.strerror or fault})"
                ) from fault
            time.sleep(0.2)
    limit = timedelta(seconds=max(1.0, until - time.monotonic()))
    return dist.TCPStore(  # type: ignore[attr-defined]
        host, port, size, hosts, limit, wait_for_workers=False, multi_tenant=True
    )


@dataclass
class Silence:
    """Sentence about what this rank waits for."""

    text: str
    is_mine: bool = True
    """False if another rank that waits says it."""


@contextmanager
def telling(text: str) -> Iterator[Silence]:
    """If the context lasts longer than SILENT_SECONDS, print what this rank waits for, and how to do without."""
    silence, done = Silence(text), threading.Event()

    def tell() -> None:
        while not done.wait(SILENT_SECONDS):
            if silence.is_mine:
                console.insist(f"{silence.text}, for at most {JOIN_SECONDS:g} s: {why()}")
                console.insist(f"  fix: if there are no others, such as in a shell of srun --pty: {alone()}")
                return

    threading.Thread(target=tell, daemon=True, name="cpmix-silence").start()
    try:
        yield silence
    finally:
        done.set()
