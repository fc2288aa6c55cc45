"""How fast does it reach MLflow, against a bare loop of MLflow's own client?"""

from __future__ import annotations

import statistics
import time

from tests.benchmarks.bench import OWN, Bench, BenchNode, ratio
from tests.benchmarks.databases import SERVERS, NoDatabase
from tests.benchmarks.load import Load, send_to
from tests.benchmarks.outcome import Outcome, Table, Target
from tests.support import MlflowServer

BATCH = 1000  # metrics in a request, for both
THREADS = (1, 2, 4)
#: What is sent before the clock starts: the run's creation is not what is measured.
BEGUN_BATCHES = 2
#: A status costs the daemon about a millisecond, which counts as its CPU.
LOOK_EVERY_S = 1.0


def run(bench: Bench) -> Outcome:
    outcome = Outcome()
    databases = ("SQLite",) if bench.size == "quick" else tuple(SERVERS)
    for database in databases:
        try:
            with SERVERS[database](bench) as server:
                _compare(bench, outcome, database, server)
        except NoDatabase as why:
            outcome.skipped.append(str(why))
    return outcome


def _compare(bench: Bench, outcome: Outcome, database: str, server: MlflowServer) -> None:
    batches = bench.pick(12, 40)
    rates: dict[str, list[float]] = {}
    cpu_us: dict[str, list[float]] = {}

    def note(name: str, points_per_s: float, cpu: float) -> None:
        rates.setdefault(name, []).append(points_per_s)
        cpu_us.setdefault(name, []).append(cpu)

    bench.script("bare_log_batch", {"uri": server.uri, "threads": 1, "batches": 3})  # warm up
    for _ in range(bench.rounds):
        for threads in THREADS:
            for name in bench.relays if threads == 1 else ():
                note(f"{name}, 1 run", *_relay(bench, name, server, runs=1, batches=batches))
            job = {"uri": server.uri, "threads": threads, "batches": max(5, batches // threads)}
            found = bench.script("bare_log_batch", job)
            note(f"log_batch loop, {threads} threads", found["points_per_s"], found["cpu_us"])
        for name in bench.relays:
            note(
                f"{name}, 8 runs",
                *_relay(bench, name, server, runs=8, batches=max(5, batches // 4)),
            )
    rows: list[list] = [
        [name, statistics.median(each), statistics.median(cpu_us[name])]
        for name, each in rates.items()
    ]
    columns = ["", "points/s", "CPU µs/point"]
    note_ = "CPU is that of the daemon, or of the process with the loop; the server's is its own."
    outcome.tables.append(Table(f"Delivery, {database} behind the server", columns, rows, note_))
    one = rates["log_batch loop, 1 threads"]
    best = [
        max(rates[f"log_batch loop, {threads} threads"][index] for threads in THREADS)
        for index in range(len(one))
    ]
    outcome.targets += [
        Target(
            f"{database}: 1 run to the bare loop",
            ratio(rates[f"{OWN}, 1 run"], one),
            "",
            least=1.0,
            is_ratio=True,
        ),
        Target(
            f"{database}: 8 runs to the best of 1, 2, 4 threads",
            ratio(rates[f"{OWN}, 8 runs"], best),
            "",
            least=0.95,
            is_ratio=True,
        ),
        Target(
            f"{database}: daemon CPU per delivered point",
            statistics.median(cpu_us[f"{OWN}, 1 run"]),
            "µs",
            most=3,
            beside=f"the bare loop {statistics.median(cpu_us['log_batch loop, 1 threads']):.3g} µs, "
            "19 where the target is from",
        ),
        Target(
            f"{database}: daemon CPU to that of the bare loop",
            ratio(cpu_us[f"{OWN}, 1 run"], cpu_us["log_batch loop, 1 threads"]),
            "",
            most=3 / 19,  # DESIGN 12: what the stock client takes on the machine of the targets
            is_ratio=True,
        ),
    ]


def _relay(
    bench: Bench, name: str, server: MlflowServer, runs: int, batches: int
) -> tuple[float, float]:
    """Return (points per second, CPU µs per point) of a daemon that has so much in its spool."""
    load = Load(runs, batches + BEGUN_BATCHES, records=BATCH // 10, runs=runs, distinct=True)
    with bench.node(name, server.uri, offline=True) as node:
        send_to(node, load)
        node.stop()
        node.set(offline=False)
        node.start()
        seen = _watch(node, BEGUN_BATCHES * runs * BATCH, load.points)
    (first, begin_s, begin_cpu_s), (last, end_s, end_cpu_s) = seen[0], seen[-1]
    return (last - first) / (end_s - begin_s), (end_cpu_s - begin_cpu_s) / (last - first) * 1e6


def _watch(node: BenchNode, begun: int, total: int) -> list[tuple[int, float, float]]:
    """Return (points delivered, time, daemon CPU) from when it is under way until shortly before
    the end: between two such looks the rate is exact, however seldom one looks."""
    seen: list[tuple[int, float, float]] = []
    until_s = time.monotonic() + 180
    while time.monotonic() < until_s:
        delivered = sum(run["delivered_points"] for run in node.status()["runs"])
        if delivered >= total and len(seen) > 1:
            return seen
        if delivered >= begun:
            seen.append((delivered, time.monotonic(), node.cpu_s))
        time.sleep(LOOK_EVERY_S)
    raise TimeoutError(f"not delivered within 180 s: {total} points")
