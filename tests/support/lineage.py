"""Ranks that start runs with parents and forks, and what MLflow shows of these afterwards."""

from __future__ import annotations

import json
import re
import subprocess
import tempfile
import uuid
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mlflow_relay.launch import relay_run_id
from tests.support.relay import PATIENCE_S, Node, finish, wait_until
from tests.support.servers import MlflowServer

if TYPE_CHECKING:
    from mlflow.entities import Run as MlflowRun

RUN_PARAMS = ("training.run_id", "metadata.run_id")
FORK_PARAM = "config.training.fork_run_id"
#: How soon a link that waits is looked at again without any news: links.LOOK_AGAIN_S, and a while.
LOOKED_AGAIN_S = 40.0

#: Makes one run after the other; a value is its step, counted on from run to run.
_MAKING = """
import json, sys
import mlflow_relay

for plan in json.loads(sys.stdin.readline()):
    run = mlflow_relay.start_run(**plan["start"])
    for step in range(*plan["steps"]):
        run.log_metrics({"loss": step}, step=step)
    run.end(plan["status"])
    print(run.run_id)
"""

#: Does what it hears, line by line: "log 0 20", "tag key value", "end FAILED".
_OBEYING = """
import json, sys
import mlflow_relay

run = mlflow_relay.start_run(**json.loads(sys.argv[1]))
print(run.run_id, flush=True)
for line in sys.stdin:
    word, *rest = line.split()
    if word == "log":
        for step in range(*map(int, rest)):
            run.log_metrics({"loss": step}, step=step)
    elif word == "tag":
        run.set_tag(*rest)
    elif word == "end":
        run.end(*rest)
    print(word, flush=True)
"""


def fresh_key(what: str = "job") -> str:
    """Return a run key that no other test uses."""
    return f"{what}-{uuid.uuid4().hex[:12]}"


def first_id(run_key: str) -> str:
    """Return the relay run id of the first start_run of a process with this key."""
    return relay_run_id(run_key, 1)


# ── ranks ──


def plan(steps: tuple[int, int] = (0, 5), status: str = "FINISHED", **start: Any) -> dict[str, Any]:
    """Return what a rank is to do: start a run so, log these steps, end it so."""
    return {"start": start, "steps": steps, "status": status}


def start_making(node: Node, plans: Sequence[dict[str, Any]]) -> subprocess.Popen[str]:
    """Start a process that makes these runs, one after the other."""
    process = node.rank(_MAKING)
    assert process.stdin is not None
    process.stdin.write(json.dumps(plans) + "\n")
    process.stdin.flush()
    return process


def make(node: Node, *plans: dict[str, Any]) -> list[str]:
    """Make these runs in one process; return their relay run ids."""
    return made(finish([start_making(node, plans)])[0])


def made(output: str) -> list[str]:
    """Return the relay run ids that a process printed, among warnings perhaps."""
    return re.findall(r"^[0-9a-f]{32}$", output, re.MULTILINE)


def make_one(node: Node, steps: tuple[int, int] = (0, 5), **start: Any) -> str:
    """Make one run in a process of its own; return its relay run id."""
    (run_id,) = make(node, plan(steps, **start))
    return run_id


def offline_node(folder: Path, tracking_uri: str) -> Node:
    """Return a node whose daemon only keeps, until `deliver_and_leave`. Its spool is in memory:
    nothing that uses this is about disks, and hundreds of runs are made here."""
    runtime = Path(tempfile.mkdtemp(prefix="relay-", dir="/dev/shm"))
    node = Node(
        folder, tracking_uri, settings={"offline": True}, runtime=runtime, spool=runtime / "spool"
    )
    node._own_runtime = True
    return node


class Rank:
    """A rank that does what it is told, when it is told; ends by itself when the test has gone."""

    def __init__(self, node: Node, environ: dict[str, str] | None = None, **start: Any) -> None:
        self.process = node.rank(_OBEYING, json.dumps(start), environ=environ)
        self.run_id = self._hear()

    def do(self, *words: object) -> None:
        """Return when it has done it."""
        assert self.process.stdin is not None
        self.process.stdin.write(" ".join(map(str, words)) + "\n")
        self.process.stdin.flush()
        heard = self._hear()
        assert heard == words[0], heard

    def log(self, begin: int, end: int) -> None:
        self.do("log", begin, end)

    def leave(self, status: str = "FINISHED") -> None:
        """End the run, and the process."""
        self.do("end", status)
        finish([self.process])

    def kill(self) -> None:
        """SIGKILL."""
        self.process.kill()
        self.process.communicate()

    def _hear(self) -> str:
        assert self.process.stdout is not None
        while line := self.process.stdout.readline():
            if not line.startswith("no daemon has acknowledged"):
                return line.strip()
        raise AssertionError(f"the rank has ended: {self.process.wait()}")


# ── what MLflow shows ──


def seen(
    server: MlflowServer, run_id: str, tag: str = "relay.run_id", value: str | None = None
) -> list[MlflowRun]:
    """Return all active MLflow runs of a relay run, in whatever experiment."""
    client = server.client()
    experiments = [each.experiment_id for each in client.search_experiments()]
    return list(client.search_runs(experiments, f"tags.`{tag}` = '{value or run_id}'"))


def only(server: MlflowServer, run_id: str) -> MlflowRun:
    """Return the one active MLflow run of a relay run."""
    runs = seen(server, run_id)
    assert len(runs) == 1, f"{len(runs)} MLflow runs for relay run {run_id}"
    return runs[0]


def when(
    server: MlflowServer,
    run_id: str,
    condition: Callable[[MlflowRun], object],
    what: str,
    timeout_s: float = PATIENCE_S,
) -> MlflowRun:
    """Return the one MLflow run of a relay run as soon as it is as it should be."""
    last: list[MlflowRun] = []

    def found() -> MlflowRun | None:
        last[:] = seen(server, run_id)
        return last[0] if len(last) == 1 and condition(last[0]) else None

    try:
        return wait_until(found, what, timeout_s)
    except AssertionError as error:
        state = [(run.info.status, run.data.tags, run.data.params) for run in last]
        raise AssertionError(f"{error}; MLflow has {state}") from None


def all_runs(server: MlflowServer, experiment_name: str) -> list[MlflowRun]:
    """Return all active runs of an experiment."""
    client = server.client()
    experiment = client.get_experiment_by_name(experiment_name)
    if experiment is None:
        return []
    return list(client.search_runs([experiment.experiment_id], max_results=5000))


def waits(run: MlflowRun) -> bool:
    """Return whether a run's parent is not known yet."""
    return bool(run.data.tags.get("relay.waits_for"))


def is_linked(run: MlflowRun) -> bool:
    """Return whether a run that resumes another hangs under it."""
    return bool(run.data.tags.get("mlflow.parentRunId")) and not waits(run)


def values(server: MlflowServer, mlflow_run_id: str, key: str = "loss") -> list[float]:
    """Return all stored values of a metric, each as often as it is there, sorted."""
    return sorted(point[1] for point in server.all_points(mlflow_run_id) if point[0] == key)


def lineage_of(run: MlflowRun) -> dict[str, str | None]:
    """Return what section 7's table says of a run: tags, params and name."""
    tags, params = run.data.tags, run.data.params
    named = {
        "resumedRun": tags.get("resumedRun"),
        "parent": tags.get("mlflow.parentRunId"),
        "forkedRun": tags.get("forkedRun"),
        "forkedRunId": tags.get("forkedRunId"),
        "waits_for": tags.get("relay.waits_for") or None,
        "name": run.info.run_name,
    }
    wanted = (*RUN_PARAMS, FORK_PARAM)
    return {**named, **{name: params.get(name) for name in wanted}}


def expected_lineage(
    *, name: str, origin: str, parent: str | None = None, fork: str | None = None
) -> dict[str, str | None]:
    """Return what `lineage_of` must give.

    Args: origin: the MLflow run that its params name: itself, or the run that it resumes.
    """
    return {
        "resumedRun": "True" if parent else None,
        "parent": parent,
        "forkedRun": "True" if fork else None,
        "forkedRunId": fork,
        "waits_for": None,
        "name": name,
        **dict.fromkeys(RUN_PARAMS, origin),
        FORK_PARAM: fork,
    }


def statuses(node: Node, run_ids: Iterable[str]) -> dict[str, str]:
    """Return the state of these runs as the daemon has it."""
    wanted = set(run_ids)
    runs = node.status()["runs"]
    return {run["run_id"]: run["state"] for run in runs if run["run_id"] in wanted}


def wait_until_all_ended(node: Node, run_ids: Iterable[str], timeout_s: float = PATIENCE_S) -> None:
    """Return once all of these have ended, and MLflow has all of them."""
    wanted = set(run_ids)

    def ended() -> bool:
        states = statuses(node, wanted)
        return len(states) == len(wanted) and set(states.values()) == {"ended"}

    try:
        wait_until(ended, f"all {len(wanted)} runs ended", timeout_s)
    except AssertionError as error:
        runs = [run for run in node.status()["runs"] if run["run_id"] in wanted]
        log = node.log.read_text(errors="replace")[-3000:]
        raise AssertionError(f"{error}\n{runs}\n{log}") from None


def collect_and_leave(node: Node, runs: int) -> None:
    """Stop a daemon that is offline, once it has all that its ranks have left."""

    def has_all() -> bool:
        found = node.status()["runs"]
        left = [run for run in found if run["ranks_alive"] or run["journal_records"]]
        return len(found) == runs and not left

    wait_until(has_all, f"{runs} runs are in the spool")
    assert node.stop() == 0


def deliver_and_leave(node: Node, timeout_s: float = PATIENCE_S) -> None:
    """Start the daemon of a spool, which delivers what it can and leaves, as a sync would."""
    node._daemon_environ.pop("MLFLOW_RELAY_OFFLINE", None)
    node._daemon_environ["MLFLOW_RELAY_EXIT_WHEN_IDLE_S"] = "0.2"
    node.start(wait=False)
    assert node.daemon is not None
    assert node.daemon.wait(timeout_s) == 0, node.log.read_text()[-3000:]


def show(figure: str) -> None:
    """Print a measured figure, for whoever runs pytest with -s."""
    print(figure)
