"""What does a long outage cost in memory and disk, and how does it come back?"""

from __future__ import annotations

import statistics
import time

from tests.benchmarks.bench import NOBODY, OWN, Bench, BenchNode
from tests.benchmarks.load import Load, send_to
from tests.benchmarks.outcome import Outcome, Plot, Table, Target
from tests.support import MlflowServer

#: 72 h of 8 ranks with 10 metrics at 1 Hz: 20.7 million points.
OUTAGE_POINTS = 20_700_000
MB = 1e6


def run(bench: Bench) -> Outcome:
    outcome = Outcome()
    _memory(bench, outcome)
    _return(bench, outcome)
    return outcome


def _memory(bench: Bench, outcome: Outcome) -> None:
    """A backlog grows in slices; after each: memory, disk, status."""
    slices = bench.pick(2, 5)
    slice_bytes = bench.pick(20e6, 220e6)
    frames = round(slice_bytes / 8 / 174_000)
    rows: list[list] = []
    for name in bench.relays:
        with bench.node(name, NOBODY) as node:
            resident = [node.resident_mb]
            sent_bytes = 0
            for index in range(slices):
                load = Load(clients=8, frames=frames, first=1000 * index)
                sent_bytes += send_to(node, load)["bytes"]
                status_ms, run_ = _status_ms(node)
                resident.append(node.resident_mb)
                points = run_["waiting_records"] * 10
                rows.append(
                    [
                        name,
                        points / 1e6,
                        sent_bytes / MB,
                        run_["waiting_bytes"] / points,
                        resident[-1],
                        status_ms,
                    ]
                )
        if name == OWN:
            growth_mb = resident[-1] - resident[1]
            outcome.targets += [
                Target(
                    f"daemon memory with {sent_bytes / 1e9:.2g} GB waiting",
                    resident[-1],
                    "MB",
                    most=80,
                ),
                Target("memory growth from the first slice to the last", growth_mb, "MB", most=5),
                Target("status with that backlog", rows[-1][-1], "ms", most=200),
            ]
    columns = [
        "",
        "million points waiting",
        "sent MB",
        "bytes/point on disk",
        "daemon MB",
        "status ms",
    ]
    outcome.tables.append(Table("A backlog grows, the server is away", columns, rows))


def _status_ms(node: BenchNode) -> tuple[float, dict]:
    taken = []
    for _ in range(5):
        begin_s = time.monotonic()
        [run_] = node.status()["runs"]
        taken.append((time.monotonic() - begin_s) * 1e3)
    return statistics.median(taken), run_


def _return(bench: Bench, outcome: Outcome) -> None:
    """The server comes back: the rate at which a backlog goes, over time; and its space."""
    points = bench.pick(20_000, 640_000, OUTAGE_POINTS)
    load = Load(8, frames=points // 8 // 10 // 250, records=250, distinct=True)
    lines: dict[str, list[tuple[float, float]]] = {}
    rows: list[list] = []
    for name in bench.relays:
        with (
            MlflowServer(bench.scratch("server")) as server,
            bench.node(name, server.uri, offline=True) as node,
        ):
            send_to(node, load)
            spooled_mb = node.status()["disk"]["spool_bytes"] / MB
            node.stop()
            node.set(offline=False)
            node.start()
            line, delivered, left_mb, peak_mb = _watch(node, load.points, bench.pick(20, 120, 7200))
            lines[name] = line
            took_s = line[-1][0]
            rate = delivered / took_s
            sizes = [spooled_mb, left_mb, peak_mb]
            rows.append([name, load.points, delivered, took_s, rate, *sizes])
    columns = ["", "points", "delivered", "within s", "points/s", "spool MB before", "after"]
    columns.append("daemon MB at most")
    outcome.tables.append(Table("The server comes back", columns, rows))
    plot = Plot("backlog-rate", "Delivery of a backlog", "s", "points/s", lines, is_log=False)
    outcome.plots.append(plot)


def _watch(
    node: BenchNode, points: int, limit_s: float
) -> tuple[list[tuple[float, float]], int, float, float]:
    """Return (the rate over time, points delivered, spool MB at the end, most memory), at most
    until the limit."""
    begin_s = last_s = time.monotonic()
    last = 0
    peak_mb = 0.0
    line: list[tuple[float, float]] = []
    pause_s = limit_s / 60
    while True:
        time.sleep(pause_s)
        status = node.status()
        delivered, now_s = status["runs"][0]["delivered_points"], time.monotonic()
        line.append((now_s - begin_s, (delivered - last) / (now_s - last_s)))
        last, last_s = delivered, now_s
        peak_mb = max(peak_mb, node.resident_mb)
        if delivered >= points or now_s - begin_s > limit_s:
            time.sleep(1.0)  # space is returned twice a second
            return line, delivered, node.status()["disk"]["spool_bytes"] / MB, peak_mb
