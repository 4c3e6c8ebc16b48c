"""The process of --tracker wandb or mlflow: reads rows as JSON lines from stdin, and writes them to the tracker.

trackers.py starts it by its path. It imports nothing of cpmix, and the tracker's package only here: what that package
prints, its handlers of signals and of exit, its threads, its random numbers and its waiting stay out of the run.
It ends by itself soon after stdin is closed, whatever becomes of the run.
"""

import fcntl
import getpass
import json
import math
import netrc
import os
import queue
import shutil
import signal
import socket
import sys
import threading
import time
import urllib.parse
import urllib.request
from collections.abc import Mapping, Sequence
from contextlib import suppress
from importlib import import_module
from pathlib import Path
from typing import Any, Protocol

CONNECT_SECONDS = 3.0
"""Time that a server has to accept a connection, before the tracker's own package is asked, which waits for minutes."""
LAST_SECONDS = 90
"""Time to end after stdin is closed; then the process ends in any case."""
_PER_CALL = 1000  # metrics that MLflow takes in one call
_PARAMETERS_PER_CALL = 100


class _Refused(Exception):
    """The tracker cannot be used; the text says why."""


class _Tracker(Protocol):
    def open(self, known: dict[str, Any]) -> dict[str, Any]:
        """Begin a run, or continue the one of the fields `known`; return the fields by which it is found again."""

    def write(self, rows: Sequence[Mapping[str, Any]]) -> None:
        """Write rows: "values" and "evaluated", name -> value, of "epoch", "seconds_ago" seconds ago.

        Values of an epoch that the run has already are left out.
        """

    def close(self, finished: bool) -> str:
        """End the run; return where it is."""


def main() -> None:
    """Serve one run: a line that describes it, then lines of rows, then a line with "finished"."""
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2):
        signal.signal(number, signal.SIG_IGN)  # a job's signal reaches all of its processes; stdin tells the end
    answers = os.fdopen(os.dup(1), "w")
    nowhere = os.open(os.devnull, os.O_RDWR)
    os.dup2(nowhere, 1)
    os.dup2(nowhere, 2)

    def say(kind: str, text: str = "") -> None:
        with suppress(OSError, ValueError):  # the run is over
            print(json.dumps({kind: text}), file=answers, flush=True)

    try:
        lines = _Lines()
        asked = lines.first()
        try:
            tracker: _Tracker = _Wandb(asked, say) if asked["tracker"] == "wandb" else _Mlflow(asked, say)
        except ImportError as fault:
            why = f"cannot be imported: {fault}"
            if isinstance(fault, ModuleNotFoundError):
                missing = (fault.name or asked["tracker"]).partition(".")[0]
                why = f"{missing} is not installed (pip install 'cpmix[{asked['tracker']}]')"
            raise _Refused(why) from fault
        say("alive")  # each one gives it more time
        _serve(tracker, Path(asked["folder"]) / asked["file"], lines, say)
    except _Refused as fault:
        say("refused", str(fault))
    except Exception as fault:
        first = next(iter(str(fault).strip().splitlines()), "")
        say("refused", f"{type(fault).__name__}: {first}"[:300])
    os._exit(0)  # nothing of the tracker's package may wait at exit


def _serve(tracker: _Tracker, path: Path, lines: "_Lines", say: Any) -> None:
    """Begin or continue a run at the first rows, and write rows as they come, as many at a time as there are."""
    rows = lines.rows()
    if not any("epoch" in row for row in rows):  # the run ended before it saved a state
        return
    with path.open("a+") as file:
        with suppress(OSError):  # the process of an interrupted run may still write its last rows
            fcntl.flock(file, fcntl.LOCK_EX)
        file.seek(0)
        known: dict[str, Any] = {}
        if text := file.read():
            with suppress(ValueError, TypeError):
                known = dict(json.loads(text))
            if known.get("cpmix") != "tracker":
                raise _Refused(f"{path} is a file that cpmix did not write")
        # Begun only now: until its first rows, a run that replaces another one has changed nothing.
        known = tracker.open(known)
        file.truncate(0)
        file.write(json.dumps({"cpmix": "tracker", **known}) + "\n")
        file.flush()
        say("alive")
        finished = False
        while rows:
            finished = "finished" in rows[-1] and bool(rows[-1]["finished"])
            tracker.write([row for row in rows if "epoch" in row])
            say("alive")
            rows = lines.rows()
        say("note", tracker.close(finished))


class _Lines:
    """JSON lines of stdin, which a thread reads: also while the tracker hangs, the end of the run is noticed."""

    def __init__(self) -> None:
        self._lines: queue.SimpleQueue[dict[str, Any] | None] = queue.SimpleQueue()
        threading.Thread(target=self._read, daemon=True).start()

    def first(self) -> dict[str, Any]:
        """Wait for the first line."""
        return self._lines.get() or {}

    def rows(self) -> list[dict[str, Any]]:
        """Wait for lines, and return those that there are; none at the end of stdin."""
        lines = [self._lines.get()]
        while not self._lines.empty():
            lines.append(self._lines.get())
        if None in lines:
            self._lines.put(None)
        return [line for line in lines if line is not None]

    def _read(self) -> None:
        for line in sys.stdin:
            self._lines.put(json.loads(line))
        self._lines.put(None)
        time.sleep(LAST_SECONDS)
        os._exit(1)


def _reach(url: str) -> None:
    """Raise _Refused if the server of a URL, or the proxy before it, accepts no connection."""
    address = urllib.parse.urlsplit(url)
    proxy = urllib.request.getproxies().get(address.scheme)
    if proxy and not urllib.request.proxy_bypass(address.hostname or ""):
        address = urllib.parse.urlsplit(proxy if "//" in proxy else f"//{proxy}")
    port = address.port or (80 if address.scheme == "http" else 443)
    try:
        socket.create_connection((address.hostname or "", port), timeout=CONNECT_SECONDS).close()
    except OSError as fault:
        raise _Refused(f"{url} cannot be reached: {fault.strerror or fault}") from fault


class _Wandb:
    """Weights & Biases. Offline, unless WANDB_MODE or an API key says otherwise; decided before anything is begun."""

    def __init__(self, asked: dict[str, Any], say: Any) -> None:
        for name, value in {"WANDB_ERROR_REPORTING": "false", "WANDB_SILENT": "true"}.items():
            os.environ.setdefault(name, value)
        self._wandb, self._asked, self._say = import_module("wandb"), asked, say
        self._folder = Path(os.environ.get("WANDB_DIR") or asked["folder"])

    def open(self, known: dict[str, Any]) -> dict[str, Any]:
        wandb, asked = self._wandb, self._asked
        url = os.environ.get("WANDB_BASE_URL") or str(wandb.Settings().base_url)
        mode = os.environ.get("WANDB_MODE") or ("online" if _has_key(url) else "offline")
        if mode == "disabled":
            raise _Refused("WANDB_MODE is disabled")
        if mode == "online":
            try:
                _reach(url)
            except _Refused as fault:
                mode = "offline"
                self._say("warning", f"{fault}; it is written offline, for wandb sync")
        name = str(known.get("id") or os.urandom(5).hex())
        if mode == "offline":  # which cannot continue a run: the rows of an earlier process come again
            for old in (self._folder / "wandb").glob(f"offline-run-*-{name}"):
                shutil.rmtree(old, ignore_errors=True)
        settings = {
            **dict.fromkeys(("silent", "disable_git", "disable_code", "x_disable_stats"), True),
            "console": "off",
            "init_timeout": 20.0,
        }
        self._run = wandb.init(
            project=os.environ.get("WANDB_PROJECT") or "cpmix",
            dir=str(self._folder),
            id=name,
            name=asked["name"],
            group=asked["run"],
            job_type=asked["phase"],
            config=asked["config"],
            mode=mode,
            resume="allow" if mode == "online" else None,
            settings=wandb.Settings(**settings),
        )
        self._run.define_metric("*", step_metric="epoch")
        self._offline = mode == "offline"
        return {"id": name}

    def write(self, rows: Sequence[Mapping[str, Any]]) -> None:
        for row in rows:  # those of an epoch that an online run has are left out by wandb, by their step
            self._run.log({**row["values"], "epoch": row["epoch"]}, step=row["epoch"])
            if row["evaluated"]:
                self._run.log({**row["evaluated"], "epoch": row["epoch"]})

    def close(self, finished: bool) -> str:
        place = str(Path(self._run.dir).parent)
        url = None if self._offline else self._run.url
        self._run.finish(exit_code=0 if finished else 1)
        self._wandb.teardown()
        return url or f"written offline; to upload it: wandb sync {place}"


def _has_key(url: str) -> bool:
    """Return whether there is an API key for a server: in WANDB_API_KEY, or from wandb login."""
    if os.environ.get("WANDB_API_KEY"):
        return True
    with suppress(OSError, RuntimeError, netrc.NetrcParseError):
        logins = netrc.netrc(os.environ.get("NETRC") or str(Path("~/.netrc").expanduser()))
        return logins.authenticators(urllib.parse.urlsplit(url).hostname or "") is not None
    return False


class _Mlflow:
    """MLflow: the server or database of MLFLOW_TRACKING_URI; without it mlflow.db in the working directory."""

    def __init__(self, asked: dict[str, Any], say: Any) -> None:
        defaults = {
            "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1",  # mlflow's own: 7 times 120 seconds
            "MLFLOW_HTTP_REQUEST_TIMEOUT": "5",
            "MLFLOW_DISABLE_TELEMETRY": "true",
        }
        for name, value in defaults.items():
            os.environ.setdefault(name, value)
        if (uri := os.environ.get("MLFLOW_TRACKING_URI", "")).startswith("http"):
            _reach(uri)
        mlflow, entities = import_module("mlflow"), import_module("mlflow.entities")
        say("alive")
        self._client, self._metric, self._param = mlflow.MlflowClient(), entities.Metric, entities.Param
        self._uri, self._asked = mlflow.get_tracking_uri(), asked

    def open(self, known: dict[str, Any]) -> dict[str, Any]:
        self._known: dict[int, set[str]] = {}
        if known.get("uri") == self._uri and self._continues(str(known.get("run"))):
            return known
        asked, client = self._asked, self._client
        name = os.environ.get("MLFLOW_EXPERIMENT_NAME") or "cpmix"
        with suppress(Exception):  # it is there already
            client.create_experiment(name)
        tags = {"mlflow.user": getpass.getuser(), "mlflow.source.name": "cpmix", "cpmix.phase": asked["phase"]}
        experiment = client.get_experiment_by_name(name)
        if experiment is None:
            raise _Refused(f"{self._uri} has no experiment {name}, and none can be made")
        run = client.create_run(experiment.experiment_id, run_name=asked["name"], tags=tags)
        self._run = run.info.run_id
        parameters = [self._param(key, value[:6000]) for key, value in asked["parameters"].items()]
        for start in range(0, len(parameters), _PARAMETERS_PER_CALL):
            client.log_batch(self._run, params=parameters[start : start + _PARAMETERS_PER_CALL])
        return {"uri": self._uri, "run": self._run}

    def _continues(self, run: str) -> bool:
        """Take up a run again, if it is there; note what it has of each epoch."""
        try:
            self._client.update_run(run, status="RUNNING")
            for name in self._client.get_run(run).data.metrics:
                for metric in self._client.get_metric_history(run, name):
                    self._known.setdefault(metric.step, set()).add(name)
        except Exception:  # deleted, or in another database of this name
            return False
        self._run = run
        return True

    def write(self, rows: Sequence[Mapping[str, Any]]) -> None:
        now = time.time()
        metrics = [
            self._metric(name, value, int(1000 * (now - row["seconds_ago"])), row["epoch"])
            for row in rows
            for name, value in {**row["evaluated"], **row["values"], "epoch": row["epoch"]}.items()
            if math.isfinite(value) and name not in self._known.get(row["epoch"], ())
        ]
        for start in range(0, len(metrics), _PER_CALL):
            self._client.log_batch(self._run, metrics=metrics[start : start + _PER_CALL])

    def close(self, finished: bool) -> str:
        self._client.set_terminated(self._run, "FINISHED" if finished else "KILLED")
        return f"run {self._run} in {self._uri}"


if __name__ == "__main__":
    main()
