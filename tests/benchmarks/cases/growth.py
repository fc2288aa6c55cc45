"""Does anything grow faster than its work: with runs, ranks, keys, or the spool's size?"""

from __future__ import annotations

import time

from tests.benchmarks.bench import OWN, Bench, BenchNode
from tests.benchmarks.load import FRAME_BYTES, Load, Senders, send_to
from tests.benchmarks.outcome import Outcome, Plot, Table, Target


def run(bench: Bench) -> Outcome:
    outcome = Outcome()
    _sessions(bench, outcome, "runs", bench.pick((1, 10, 100), (1, 10, 100, 1000)))
    _sessions(bench, outcome, "ranks", bench.pick((1, 8, 64), (1, 8, 64, 512)))
    _keys(bench, outcome)
    _spool(bench, outcome)
    return outcome


def _sessions(bench: Bench, outcome: Outcome, what: str, counts: tuple[int, ...]) -> None:
    """So many sessions attach at once, each to a run of its own or all to one."""
    rows: list[list] = []
    lines: dict[str, list[tuple[float, float]]] = {}
    for count in counts:
        for name in bench.relays:
            with bench.node(name) as node:
                load = Load(count, frames=0, runs=count if what == "runs" else 1)
                endpoint = f"ipc://{node.socket}"
                with Senders("relay", endpoint, load, node.environ, stay=True) as senders:
                    senders.go()
                    attach_s = max(each["attach_s"] for each in senders.results())
                    begin_s = time.monotonic()
                    node.status()
                    status_ms = (time.monotonic() - begin_s) * 1e3
                    cpu_s, begin_s = node.cpu_s, time.monotonic()
                    time.sleep(3.0)
                    idle = (node.cpu_s - cpu_s) / (time.monotonic() - begin_s)
                lines.setdefault(f"{name}: attach, ms each", []).append(
                    (count, attach_s / count * 1e3)
                )
                lines.setdefault(f"{name}: status, ms", []).append((count, status_ms))
                rows.append(
                    [
                        name,
                        count,
                        attach_s,
                        attach_s / count * 1e3,
                        status_ms,
                        node.resident_mb,
                        idle * 100,
                    ]
                )
                if name == OWN and count == counts[-1] and bench.size != "quick":
                    target = Target(f"status with {count} {what}", status_ms, "ms", most=200)
                    outcome.targets.append(target)
    columns = [
        "",
        what,
        "all attached after s",
        "ms each",
        "status ms",
        "daemon MB",
        "CPU at rest %",
    ]
    outcome.tables.append(Table(f"Number of {what}", columns, rows))
    outcome.plots.append(Plot(f"growth-{what}", f"Cost by number of {what}", what, "ms", lines))


def _keys(bench: Bench, outcome: Outcome) -> None:
    """Calls of so many keys: cost per key."""
    rows: list[list] = []
    lines: dict[str, list[tuple[float, float]]] = {}
    for count in (10, 100, 1000, 10_000, 100_000):
        for name in bench.relays:
            with bench.node(name, offline=True) as node:
                job = {"logger": OWN, "folder": str(node.folder), "metrics": count}
                calls = max(5, min(10_000, 300_000 // count))
                found = bench.script(
                    "loggers", {**job, "calls_max": calls, "seconds_max": 5}, environ=node.environ
                )
            rows.append([name, count, found["p50"], found["p50"] / count])
            lines.setdefault(name, []).append((count, found["p50"] / count))
    columns = ["", "keys in a call", "p50 µs", "µs each"]
    outcome.tables.append(Table("Number of keys", columns, rows))
    outcome.plots.append(
        Plot("growth-keys", "Log call by number of keys", "keys", "µs per key", lines)
    )


def _spool(bench: Bench, outcome: Outcome) -> None:
    """The daemon starts on a spool of so many bytes."""
    sizes = bench.pick((1e6, 1e7), (1e6, 3e7, 1e9), (1e6, 3e7, 1e9, 5e9))
    rows: list[list] = []
    lines: dict[str, list[tuple[float, float]]] = {}
    for size in sizes:
        for name in bench.relays:
            with bench.node(name) as node:
                send_to(node, Load(clients=2, frames=max(1, round(size / 2 / FRAME_BYTES))))
                node.kill()
                begin_s = time.monotonic()
                node.start()
                start_s = time.monotonic() - begin_s
                status_ms = _status_ms(node)
                rows.append([name, size / 1e6, start_s, status_ms, node.resident_mb])
            lines.setdefault(f"{name}: start, s", []).append((size, start_s))
            lines.setdefault(f"{name}: memory, MB", []).append((size, rows[-1][-1]))
    columns = ["", "spool MB", "start s", "status ms", "daemon MB"]
    outcome.tables.append(Table("Size of the spool", columns, rows))
    outcome.plots.append(
        Plot("growth-spool", "Start by size of the spool", "bytes", "s, MB", lines)
    )


def _status_ms(node: BenchNode) -> float:
    begin_s = time.monotonic()
    node.status()
    return (time.monotonic() - begin_s) * 1e3
