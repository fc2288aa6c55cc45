"""What do the two doors cost code that already speaks MLflow?"""

from __future__ import annotations

import statistics

from tests.benchmarks.bench import Bench, percentiles, ratio
from tests.benchmarks.outcome import Outcome, Table, Target
from tests.support import MlflowServer, TcpProxy
from tests.support.servers import free_port

RELAY = {"MLFLOW_TRACKING_URI": "relay://", "MLFLOW_DISABLE_TELEMETRY": "true"}


def run(bench: Bench) -> Outcome:
    outcome = Outcome()
    _fluent(bench, outcome)
    _log_batch(bench, outcome)
    return outcome


def _fluent(bench: Bench, outcome: Outcome) -> None:
    """log_metrics and log_metric on relay://, beside MLflow's own layers with nothing below."""
    job = {"turns": bench.pick(10, 20), "calls": 200, "metrics": 10}
    with bench.node() as node:
        found = bench.script("fluent", job, environ={**node.environ, **RELAY})
    rows: list[list] = []
    for name, turns in found.items():
        ours, nothing = zip(*turns, strict=True)
        cost = ratio(ours, nothing)
        rows.append([name, statistics.median(ours), statistics.median(nothing), cost])
        what = f"relay:// to a store that does nothing, fluent {name}, p50"
        outcome.targets.append(Target(what, cost, "×", most=1.3, is_ratio=True))
    columns = ["p50 µs", "relay://", "nothing", "ratio"]
    outcome.tables.append(Table("MLflow's fluent calls", columns, rows))


def _log_batch(bench: Bench, outcome: Outcome) -> None:
    """log-batch of 1000 metrics to the endpoint and to the server; then with the server away."""
    job = {"requests": bench.pick(20, 40), "metrics": 1000, "pause_s": 0.3}
    with MlflowServer(bench.scratch("server")) as server, TcpProxy(server.uri) as proxy:
        port = free_port()
        uris = {"endpoint": f"http://127.0.0.1:{port}", "server": server.uri}
        with bench.node(uri=proxy.uri, http_port=port):
            runs = [[uri, _new_run(uri), name] for name, uri in uris.items()]
            up = bench.script("log_batch", {**job, "runs": runs})
            proxy.refuse()
            away = bench.script("log_batch", {**job, "runs": runs[:1]})["endpoint"]
    cases = {"server": up["server"], "endpoint": up["endpoint"], "endpoint, server away": away}
    rows = [[name, *percentiles(ms).values()] for name, ms in cases.items()]
    columns = ["", "p50 ms", "p99 ms", "p99.9 ms", "max ms"]
    outcome.tables.append(Table("log-batch of 1000 metrics over HTTP", columns, rows))
    outcome.targets += [
        Target("endpoint to the stock server, log-batch of 1000, p50",
               ratio(up["endpoint"], up["server"]), "×", most=2, is_ratio=True),
        Target("endpoint, log-batch of 1000, server away, p50",
               statistics.median(away), "ms", most=20),
    ]  # fmt: skip


def _new_run(uri: str) -> str:
    from mlflow.tracking import MlflowClient

    run_id: str = MlflowClient(uri).create_run("0").info.run_id
    return run_id
