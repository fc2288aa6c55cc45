"""What is lost when the training process is killed, and what does the run say afterwards?"""

from __future__ import annotations

from tests.benchmarks.bench import OWN, Bench
from tests.benchmarks.cases.log_call import PEERS
from tests.benchmarks.outcome import Outcome, Table, Target
from tests.support import MlflowServer

CALLS, METRICS, PACE_S = 500, 10, 0.002


def run(bench: Bench) -> Outcome:
    """500 calls of 10 metrics at about 500 Hz, then SIGKILL of the process that logs."""
    outcome = Outcome()
    job = {"metrics": METRICS, "calls_max": CALLS, "pace_s": PACE_S, "kill": True, "warm_up": 0}
    rows: list[list] = []
    with MlflowServer(bench.scratch("server")) as server:
        for name in bench.relays:
            with bench.node(name, server.uri) as node:
                folder = {"logger": OWN, "folder": str(node.folder), "uri": ""}
                bench.script("loggers", {**job, **folder}, environ=node.environ, expected=-9)
                ended = node.wait_until_ended()
            lost = CALLS * METRICS - len(server.all_points(ended["mlflow_run_id"]))
            run_ = server.client().get_run(ended["mlflow_run_id"])
            reason = run_.data.tags.get("relay.end_reason", "")
            rows.append([name, lost, f"{run_.info.status}: {reason}"])
            if name == OWN:
                outcome.targets.append(Target("points lost of 5,000 by SIGKILL", lost, "", most=0))
        rows += [_peer(bench, server, name, job) for name in PEERS if bench.peers is not None]
    if bench.peers is None:
        outcome.skipped.append("peers: no environment with them was given (--peers)")
    columns = ["", "points lost of 5,000", "the run says afterwards"]
    outcome.tables.append(Table("SIGKILL after the 500th call", columns, rows, is_race=True))
    return outcome


def _peer(bench: Bench, server: MlflowServer, name: str, job: dict) -> list:
    assert bench.peers is not None
    before = set(server.run_ids())
    folder = str(bench.scratch("killed"))
    place = {"logger": name, "folder": folder, "uri": server.uri}
    # Helpers of peers outlive the process that is killed, and may still write.
    bench.script("loggers", {**job, **place}, python=bench.peers, expected=-9, linger_s=5.0)
    if name.startswith("MLflow"):
        [run_id] = set(server.run_ids()) - before
        points = len(server.all_points(run_id))
        return [name, CALLS * METRICS - points, server.client().get_run(run_id).info.status]
    found = bench.script("count", place, python=bench.peers)
    return [name, CALLS * METRICS - found["points"], None]
