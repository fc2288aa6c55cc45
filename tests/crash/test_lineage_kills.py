"""SIGKILL of the daemon between any two steps of creation and linking, step by step.

The steps are its requests to the server. At the n-th one it is killed, either before the server
gets the request, or after the server has done it and before the daemon hears of it.
"""

from __future__ import annotations

import itertools
import json
import threading
import time
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import pytest

from mlflow_relay.launch import relay_run_id
from tests.support import MlflowServer, TcpProxy
from tests.support.lineage import (
    expected_lineage,
    fresh_key,
    is_linked,
    lineage_of,
    make_one,
    only,
    show,
    values,
    wait_until_all_ended,
    when,
)
from tests.support.proxy import Action, Exchange
from tests.support.relay import POLL_S, Node

if TYPE_CHECKING:
    from mlflow.entities import Run as MlflowRun

STEPS_MAX = 40
WRITES = (b"runs/create", b"runs/log-batch", b"runs/update", b"runs/delete")


class KillPoint:
    """The n-th request from now on: `reached` is set, and the daemon never gets an answer.

    Args: is_done: the server does what it asks for. Only for writes: a question whose answer is
        lost is one that was never asked.
    """

    def __init__(self, proxy: TcpProxy, number: int, *, is_done: bool) -> None:
        self.reached, self.over = threading.Event(), threading.Event()
        self.request = ""
        self._number, self._is_done = number, is_done
        self._count = itertools.count(1)
        proxy.fail(self._act(), on=self._is_it)

    def _is_it(self, head: bytes) -> bool:
        if self._is_done and not any(name in head for name in WRITES):
            return False
        if next(self._count) != self._number:
            return False
        self.request = head.split(b" HTTP")[0].rpartition(b"/mlflow/")[2].decode()
        return True

    def _act(self) -> Action:
        def act(exchange: Exchange) -> bool:
            if self._is_done:
                exchange.forward()
            self.reached.set()
            self.over.wait(60.0)
            return False

        return act


class Ranks:
    """One process that makes run after run, as it is told: starting one costs a second."""

    _SCRIPT = """
    import json, sys
    import mlflow_relay

    for line in sys.stdin:
        run = mlflow_relay.start_run(**json.loads(line))
        print(run.run_id, flush=True)
        for step in range(5):
            run.log_metrics({"loss": step}, step=step)
        run.end()
    """

    def __init__(self, node: Node) -> None:
        self._process = node.rank(self._SCRIPT)

    def make(self, **start: Any) -> str:
        """Start a run, which ends by itself; return its relay run id."""
        stdin, stdout = self._process.stdin, self._process.stdout
        assert stdin is not None
        assert stdout is not None
        stdin.write(json.dumps({"experiment_name": "kills", **start}) + "\n")
        stdin.flush()
        for line in stdout:
            if len(line.strip()) == 32:
                return line.strip()
        raise AssertionError("the rank has ended")


@pytest.fixture
def node(tmp_path, mlflow_proxy) -> Iterator[Node]:
    with Node(tmp_path / "node", mlflow_proxy.uri) as node:
        node.start()
        yield node


@pytest.fixture
def relatives(node, mlflow_server) -> tuple[MlflowRun, MlflowRun]:
    """A run to resume and one to fork, delivered."""
    ids = [make_one(node, run_key=fresh_key(name), run_name=name) for name in ("parent", "weights")]
    wait_until_all_ended(node, ids)
    parent, weights = (only(mlflow_server, run_id) for run_id in ids)
    return parent, weights


def live_through(node: Node, proxy: TcpProxy, point: KillPoint, run_ids: list[str]) -> bool:
    """Return whether the point was reached; the daemon was killed there, and all is delivered."""
    t0 = time.monotonic()
    dumped = False
    while not point.reached.wait(POLL_S):
        if time.monotonic() - t0 > 10 and not dumped:
            dumped = True
            for r in node.status()["runs"]:
                if r["run_id"] in run_ids:
                    print(
                        "SLOW",
                        {
                            k: r[k]
                            for k in (
                                "state",
                                "status",
                                "ranks_alive",
                                "accepted_records",
                                "delivered_records",
                                "waiting_records",
                                "journal_records",
                                "last_error",
                                "waits_for",
                                "mlflow_run_id",
                            )
                        },
                    )
            print(
                "SLOW journals",
                list((node.runtime / "journals").glob("*")),
                node.status()["daemon"]["sessions_open"],
            )
            for h in proxy.heads()[-25:]:
                print("SLOW", h.split(b" HTTP")[0])
        runs = {run["run_id"]: run for run in node.status()["runs"]}
        mine = [runs[run_id] for run_id in run_ids if run_id in runs]
        done = [run for run in mine if run["state"] == "ended" and not run["waits_for"]]
        if len(done) == len(run_ids):
            proxy.heal()
            return False
    node.kill()
    proxy.heal()
    point.over.set()
    node.start()
    wait_until_all_ended(node, run_ids)
    return True


@pytest.mark.timeout(240)
@pytest.mark.parametrize("is_done", [False, True], ids=["not done", "done and not answered"])
def test_a_resumed_fork_survives_a_kill_at_any_step(
    is_done, node, relatives, mlflow_server, mlflow_proxy
):
    parent, weights = relatives
    begin_s = time.monotonic()
    ranks = Ranks(node)
    killed_at = []
    for number in range(1, STEPS_MAX):
        point = KillPoint(mlflow_proxy, number, is_done=is_done)
        run_id = ranks.make(
            run_key=fresh_key("victim"),
            resume=parent.data.tags["relay.run_id"],
            fork=weights.data.tags["relay.run_id"],
        )
        was_killed = live_through(node, mlflow_proxy, point, [run_id])
        run = when(mlflow_server, run_id, is_linked, f"linked, killed at {point.request}")
        check_child(mlflow_server, run, parent.info.run_id, weights.info.run_id)
        if not was_killed:
            break
        killed_at.append(point.request.partition("?")[0])
    show(f"killed at {len(killed_at)} steps, {time.monotonic() - begin_s:.1f} s: {killed_at}")
    assert killed_at.count("runs/create") == 1
    assert len(killed_at) >= (5 if is_done else 9)


@pytest.mark.timeout(240)
@pytest.mark.parametrize("is_done", [False, True], ids=["not done", "done and not answered"])
def test_a_link_that_waited_survives_a_kill_at_any_step(is_done, node, mlflow_server, mlflow_proxy):
    """The child is there first; then its parent comes, and both are told."""
    begin_s = time.monotonic()
    ranks = Ranks(node)
    killed_at = []
    for number in range(1, STEPS_MAX):
        parent_key = fresh_key("parent")
        # The n-th run of a process is key#n, and the child comes first.
        parent_id = relay_run_id(parent_key, 2 * number)
        child_id = ranks.make(
            run_key=fresh_key("child"), resume=parent_id, fork=parent_id,
            params={"base": parent_id}, tags={"base": parent_id},
        )  # fmt: skip
        wait_until_all_ended(node, [child_id])
        point = KillPoint(mlflow_proxy, number, is_done=is_done)
        assert ranks.make(run_key=parent_key, run_name="parent") == parent_id
        was_killed = live_through(node, mlflow_proxy, point, [parent_id, child_id])
        words = f"linked, its texts are there, killed at {point.request}"
        run = when(mlflow_server, child_id, is_complete, words)
        mlflow_id = only(mlflow_server, parent_id).info.run_id
        check_child(mlflow_server, run, mlflow_id, mlflow_id)
        assert run.data.params["base"] == run.data.tags["base"] == mlflow_id
        assert run.data.tags["relay.original.base"] == parent_id
        if not was_killed:
            break
        killed_at.append(point.request.partition("?")[0])
    show(f"killed at {len(killed_at)} steps, {time.monotonic() - begin_s:.1f} s: {killed_at}")
    assert len(killed_at) >= 9


def is_complete(run: MlflowRun) -> bool:
    """Return whether a child that waited has all that it waited for."""
    texts = run.data.params.keys() & {"base"} | run.data.tags.keys() & {"forkedRunId"}
    originals = run.data.tags.keys() & {"base", "relay.original.base"}
    return is_linked(run) and len(texts) == 2 and len(originals) == 2


def check_child(server: MlflowServer, run: MlflowRun, parent: str, weights: str) -> None:
    assert lineage_of(run) == expected_lineage(
        name="parent", origin=parent, parent=parent, fork=weights
    )
    assert values(server, run.info.run_id) == [0, 1, 2, 3, 4]
    assert run.info.status == "FINISHED"
    assert run.data.tags["relay.owner"]
