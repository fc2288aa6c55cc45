"""EIO, ENOSPC, EDQUOT and short writes at every system call by which a daemon changes its spool."""

from __future__ import annotations

import os
import random
import signal
import sys
import threading
from pathlib import Path

from mlflow_relay_daemon.control_client import ControlClient, NoDaemon
from tests.crash.cases.disk import EDQUOT, EIO, ENOSPC, SHORT, Plan
from tests.crash.cases.disk import BadDisk as BadSpool
from tests.crash.child import Child
from tests.crash.outcome import Job, Outcome
from tests.crash.scripted_rank import ScriptedRank, check_all
from tests.crash.side_by_side import try_all
from tests.crash.tracer import Call, Ended, run_traced, why_not
from tests.support import MlflowServer
from tests.support.relay import PATIENCE_S, Node, wait_until

#: What is done, and to how many calls in a row: after each a lane waits for 5 s.
FAULTS = ((EIO, 1), (ENOSPC, 1), (EDQUOT, 1), (SHORT, 1), (EIO, 3))


class TracedDaemon(threading.Thread):
    """A node's daemon whose system calls are met. It ends as a daemon does, by SIGTERM."""

    def __init__(self, node: Node, disk: BadSpool) -> None:
        super().__init__(name="tracer", daemon=True)
        self._node, self._disk = node, disk
        self.ended: Ended | None = None

    def run(self) -> None:
        ended = run_traced(self._become_the_daemon, self._disk)
        if ended.status == -signal.SIGKILL:
            self._node.start(wait=False)  # as systemd does
        self.ended = ended

    def _become_the_daemon(self) -> None:
        environ = {**self._node._daemon_environ, "PYTHONDONTWRITEBYTECODE": "1"}
        os.execve(sys.executable, [sys.executable, "-m", "mlflow_relay_daemon", "daemon"], environ)

    def answers(self) -> bool:
        try:
            with ControlClient(self._node.socket) as control:
                self._pid = int(control.ping()["pid"])
        except NoDaemon:
            return False
        return True

    def stop(self) -> Ended:
        """SIGTERM, if it lives."""
        if self.ended is None and self.answers():
            os.kill(self._pid, signal.SIGTERM)
        self.join(PATIENCE_S)
        assert self.ended is not None, "the daemon does not end"
        return self.ended


def run(job: Job) -> Outcome:
    outcome = Outcome(
        "A real daemon serves a rank with a script, or finds in the spool what a killed daemon has "
        "taken of one, delivers it to MLflow and drains; each of the system calls by which it changes its spool fails in turn, once or a few times on end, with "
        "EIO, ENOSPC, EDQUOT or as a short write. A start may fail, in one line, and is followed by "
        "another; after that the daemon lives, says no traceback and goes on by itself. All that the "
        "rank logged is in MLflow once, the run is FINISHED, and nothing is lost or left behind",
        0,
        "faults",
    )
    outcome.skipped = why_not()
    if outcome.skipped:
        return outcome
    with MlflowServer(job.folder / "mlflow") as server:
        plans = all_plans(job, server)
        outcome.goal = len(plans)
        random.Random(job.seed).shuffle(plans)  # a short run tries some of each kind
        kinds = try_all(job, server, plans, outcome)
    outcome.figures = {f"failed {name}": f"{count:,}" for name, count in sorted(kinds.items())}
    return outcome


def all_plans(job: Job, server: MlflowServer) -> list[Plan]:
    """Return every fault of a daemon that serves a rank, and of one that delivers what another has
    left; both live once without any."""
    return [
        Plan("", number, fault, count, killed_at=int(is_heir))
        for is_heir in (False, True)
        for number, call in enumerate(calls_of_a_life(job, server, is_heir=is_heir), 1)
        for fault, count in FAULTS
        if fault != SHORT or call.can_be_short
    ]


def calls_of_a_life(job: Job, server: MlflowServer, *, is_heir: bool) -> list[Call]:
    with Node(job.folder / f"life-{is_heir}", server.uri) as node:
        disk = BadSpool(node.spool)
        deliver_a_rank(node, disk, server, Outcome("", 0, ""), is_heir=is_heir)
        return disk.calls


def try_plan(folder: Path, server: MlflowServer, plan: Plan, outcome: Outcome) -> list[str]:
    """Return the names of the calls that failed."""
    with Node(folder, server.uri) as node:
        disk = BadSpool(node.spool)
        disk.plan(plan.first, plan.fault, plan.calls)
        what = Outcome("", 0, "")
        try:
            deliver_a_rank(node, disk, server, what, is_heir=bool(plan.killed_at))
        except AssertionError as error:
            what.found(str(error))
        for each in what.findings:
            outcome.found(f"{plan} {_names(disk.failed)}: {each}")
    outcome.count += 1
    return [f"{each.name} ({plan.fault.name})" for each in disk.failed]


def deliver_a_rank(
    node: Node, disk: BadSpool, server: MlflowServer, outcome: Outcome, *, is_heir: bool = False
) -> None:
    """Let a daemon serve a rank, and look at what MLflow has of it then.

    Args:   is_heir: the rank is gone, and its records are in the spool that a killed one has left.
    Raises: AssertionError: the daemon did not do well.
    """
    rank = ScriptedRank(node, f"daemon-{node.folder.name}")
    if is_heir:
        node._daemon_environ["MLFLOW_RELAY_OFFLINE"] = "1"
        node.start()
        _live(rank)
        node.kill()
        node.daemon = None
        del node._daemon_environ["MLFLOW_RELAY_OFFLINE"]
    daemon = TracedDaemon(node, disk)
    daemon.start()
    try:
        wait_until(lambda: daemon.ended or daemon.answers(), "the daemon answers, or ends")
        if daemon.ended is not None and node.daemon is None:  # who starts it starts it again
            node.start()
        if not is_heir:
            _live(rank)
        check_all(node, server, {"the rank": rank}, outcome)
    finally:
        ended = daemon.stop()
        if node.daemon is not None:
            node.stop()
    assert "Traceback" not in ended.said, ended.said[-3000:]
    if ended.status == -signal.SIGKILL:
        return
    has_started = node.daemon is None
    assert ended.status == 0 or not has_started, f"status {ended.status}: {ended.said[-1000:]}"
    is_one_line = len(ended.said.strip().splitlines()) == 1
    assert has_started or is_one_line, f"a start says in one line why: {ended.said[-1000:]}"


def _live(rank: ScriptedRank) -> None:
    with Child(rank.live) as child:
        child.go()
        assert child.wait() == 0, child.said
    assert rank.has_ended, child.said


def _names(calls: list[Call]) -> list[str]:
    return [f"{each.name} {Path(each.path).name}" for each in calls[:2]]
