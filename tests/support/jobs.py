"""Jobs of real ranks that log known points, and what MLflow must hold of them afterwards."""

from __future__ import annotations

import json
import subprocess
import textwrap
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from mlflow_relay.launch import relay_run_id
from tests.support.proxy import IO_TIMEOUT_S, Action, Exchange
from tests.support.relay import PATIENCE_S, Node, wait_until
from tests.support.servers import MlflowServer, Point

if TYPE_CHECKING:
    from mlflow.entities import Run as MlflowRun

#: What the daemon adds to every run's params (DESIGN, 7); the MLflow run id is their value.
LINEAGE_PARAMS = ("training.run_id", "metadata.run_id")

#: key, step, value
Logged = tuple[str, int, float]

#: What the scripts of all ranks here begin with. The values are exact in binary.
PREAMBLE = """
import json, os, signal, sys, threading, time
import mlflow_relay

def now_ms():
    return time.time_ns() // 1_000_000

def metrics(rank, step, count=10):
    return {f"m{j}": rank * 1e6 + step + j / 16 for j in range(count)}

def say(word):
    print(word, flush=True)

def hear():
    assert sys.stdin.readline(), "the test has gone"

def report(**fields):
    print(json.dumps(fields), flush=True)
"""


def start_rank(
    node: Node, script: str, *arguments: object, environ: dict[str, str] | None = None
) -> subprocess.Popen[str]:
    """Start a rank whose script may use what PREAMBLE defines."""
    return node.rank(PREAMBLE + textwrap.dedent(script), *arguments, environ=environ)


def tell(process: subprocess.Popen[str], word: str = "on") -> None:
    """Let a rank that waits in `hear` go on."""
    assert process.stdin is not None
    process.stdin.write(word + "\n")
    process.stdin.flush()


def hear(process: subprocess.Popen[str], word: str) -> str:
    """Return the line that begins with this word, as soon as the rank has said it."""
    assert process.stdout is not None
    before = []
    for line in process.stdout:
        if line.startswith(word):
            return line.rstrip("\n")
        before.append(line)
    raise AssertionError(f"the rank ended and never said {word!r}:\n{''.join(before)}")


def last_words(process: subprocess.Popen[str]) -> str:
    """Wait until a rank has ended, however; return what it said and nobody has heard yet."""
    assert process.stdout is not None
    output = process.stdout.read()
    process.wait()
    return output


def reports(processes: Iterable[subprocess.Popen[str]]) -> list[dict[str, Any]]:
    """Wait for ranks that must end well; return what each reported."""
    found = []
    for process in processes:
        output = last_words(process)
        assert process.returncode == 0, output
        lines = [line for line in output.splitlines() if line.startswith("{")]
        assert lines, f"no report:\n{output}"
        found.append(json.loads(lines[-1]))
    return found


def now_ms() -> int:
    """Return what the clock of all ranks of this node shows."""
    return time.time_ns() // 1_000_000


def show(figure: str) -> None:
    """Print a measured figure, for whoever runs pytest with -s."""
    print(figure)


# ── what was logged ──


def logged(rank: int, steps: Iterable[int], count: int = 10, prefix: str = "") -> list[Logged]:
    """Return what `metrics` of the preamble gives for these steps, as points."""
    return [
        (f"{prefix}m{j}", step, rank * 1e6 + step + j / 16) for step in steps for j in range(count)
    ]


def assert_exactly(points: Iterable[Point], expected: Iterable[Logged]) -> None:
    """Every expected point is there with its value, none twice, and there is no other."""
    there = Counter((key, step, value) for key, value, _, step in points)
    wanted = Counter(expected)
    missing, extra = wanted - there, there - wanted
    assert there == wanted, (
        f"{wanted.total()} points were logged and {there.total()} are there; "
        f"missing {missing.total()}, such as {sorted(missing)[:3]}; "
        f"too many {extra.total()}, such as {sorted(extra)[:3]}"
    )


# ── what MLflow shows ──


def run_id_of(run_key: str) -> str:
    """Return the relay run id of a key as its tag shows it: "key", or "key#2" of a second run."""
    key, _, ordinal = run_key.partition("#")
    return relay_run_id(key, int(ordinal or 1))


def runs_with_key(server: MlflowServer, run_key: str) -> list[MlflowRun]:
    """Return all MLflow runs of this job; deleted ones, too."""
    from mlflow.entities import ViewType

    client = server.client()
    experiments = client.search_experiments(view_type=ViewType.ALL)
    return list(
        client.search_runs(
            [experiment.experiment_id for experiment in experiments],
            f"tags.`relay.run_id` = '{run_id_of(run_key)}'",
            ViewType.ALL,
        )
    )


def only_run(server: MlflowServer, run_key: str) -> MlflowRun:
    """Return the one MLflow run of this job; fails if there is another, even a deleted one."""
    runs = runs_with_key(server, run_key)
    assert len(runs) == 1, f"{len(runs)} MLflow runs for one job"
    assert runs[0].info.lifecycle_stage == "active"
    return runs[0]


def status_when(
    node: Node,
    run_key: str,
    condition: Callable[[dict[str, Any]], object],
    what: str,
    timeout_s: float = PATIENCE_S,
) -> dict[str, Any]:
    """Return what the daemon says of this job as soon as it knows it and the condition is true.

    A daemon whose disk is busy (that of other tests, too) may be slow to answer: it is asked again.
    """
    from mlflow_relay_daemon.control_client import NoDaemon

    run_id = run_id_of(run_key)

    def found() -> dict[str, Any] | None:
        try:
            status = node.status()
        except NoDaemon:
            return None
        runs = [run for run in status["runs"] if run["run_id"] == run_id]
        return runs[0] if runs and condition(runs[0]) else None

    return wait_until(found, f"{run_key}: {what}", timeout_s)


def ended_status(node: Node, run_key: str, timeout_s: float = PATIENCE_S) -> dict[str, Any]:
    """Return what the daemon says of this job once it has ended and MLflow has all of it."""
    return status_when(node, run_key, lambda run: run["state"] == "ended", "it ended", timeout_s)


def ended_run(node: Node, server: MlflowServer, run_key: str) -> MlflowRun:
    """Return the one MLflow run of this job once the daemon says that it has ended."""
    ended_status(node, run_key)
    return only_run(server, run_key)


def own_params(run: MlflowRun) -> dict[str, str]:
    """Return the params of a run that its ranks have logged."""
    return {key: value for key, value in run.data.params.items() if key not in LINEAGE_PARAMS}


def wait_for_points(server: MlflowServer, mlflow_run_id: str, count: int) -> list[Point]:
    """Return the points of a run as soon as there are so many."""
    return wait_until(
        lambda: found if len(found := server.all_points(mlflow_run_id)) >= count else None,
        f"{count} points in MLflow",
    )


def assert_lifetime(
    run: MlflowRun, words: Sequence[Mapping[str, int]], points: Iterable[Point]
) -> None:
    """Start, end and every point of the run have times of its ranks' own clocks.

    Args:
        words: of each rank: when it was "before_start", "after_start", "before_end", "after_end".
    """
    starts = [word["before_start"] for word in words] + [word["after_start"] for word in words]
    assert min(starts) <= run.info.start_time <= max(starts)
    begun, ended = (max(word[name] for word in words) for name in ("before_end", "after_end"))
    assert begun <= run.info.end_time <= ended
    times = [timestamp_ms for _, _, timestamp_ms, _ in points]
    assert min(starts) <= min(times) <= max(times) <= ended


# ── one more fault for the proxy ──


def keep_response(done: threading.Event, until: threading.Event) -> Action:
    """Let the server do it, set `done`, and never pass on its response; hang up `until`."""

    def act(exchange: Exchange) -> bool:
        exchange.forward()
        done.set()
        until.wait(IO_TIMEOUT_S)
        return False

    return act
