"""How fast do an offline node's data reach a server by `mlflow-relay sync`?"""

from __future__ import annotations

import time

from tests.benchmarks.bench import Bench
from tests.benchmarks.load import Load, send_to
from tests.benchmarks.outcome import Outcome, Table
from tests.support import MlflowServer


def run(bench: Bench) -> Outcome:
    outcome = Outcome()
    rows: list[list] = []
    with MlflowServer(bench.scratch("server")) as server:
        for name in bench.relays:
            with bench.node(name, offline=True) as node:
                load = Load(1, frames=bench.pick(10, 50), records=100, distinct=True)
                send_to(node, load)
                node.stop()
                if node.command("sync", "--help").returncode != 0:
                    outcome.skipped.append(f"{name} has no `sync`")
                    continue
                begin_s = time.monotonic()
                done = node.command(
                    "sync", str(node.spool), "--tracking-uri", server.uri, timeout_s=300
                )
                took_s = time.monotonic() - begin_s
                assert done.returncode == 0, done.stderr
                rows.append([f"{name}: spool", load.points, took_s, load.points / took_s])
        rows += _bare(bench, server)
        rows += _export_import(bench, server, outcome)
    columns = ["", "points", "s", "points/s"]
    note = "Start of the command included."
    outcome.tables.append(Table("Sync to a server", columns, rows, note))
    outcome.skipped.append(
        "`anemoi-training mlflow sync`: needs anemoi-training with its torch and a server of its "
        "own; PEERS.md has what it did to 50,000 points"
    )
    return outcome


def _bare(bench: Bench, server: MlflowServer) -> list[list]:
    job = {"uri": server.uri, "threads": 1, "batches": bench.pick(10, 50)}
    begin_s = time.monotonic()
    found = bench.script("bare_log_batch", job)
    took_s = time.monotonic() - begin_s
    return [
        [
            "bare log_batch loop, start included",
            job["batches"] * 1000,
            took_s,
            job["batches"] * 1000 / took_s,
        ],
        ["bare log_batch loop", job["batches"] * 1000, None, found["points_per_s"]],
    ]


def _export_import(bench: Bench, server: MlflowServer, outcome: Outcome) -> list[list]:
    """mlflow-export-import: one run out and in again, where its environment has it."""
    if bench.peers is None:
        outcome.skipped.append("mlflow-export-import: no environment with it was given (--peers)")
        return []
    points = bench.pick(5_000, 50_000)
    job = {"uri": server.uri, "batches": points // 1000, "folder": str(bench.scratch("export"))}
    try:
        found = bench.script("export_import", job, python=bench.peers, timeout_s=300)
    except RuntimeError as error:
        outcome.skipped.append(f"mlflow-export-import: {str(error).strip().splitlines()[-1]}")
        return []
    took_s = found["export_s"] + found["import_s"]
    return [["mlflow-export-import", points, took_s, points / took_s]]
