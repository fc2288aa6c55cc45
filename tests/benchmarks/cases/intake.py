"""How many points a second are fsynced and acknowledged, and how long does an ack take?"""

from __future__ import annotations

import statistics

from tests.benchmarks.bench import OWN, Bench, ratio
from tests.benchmarks.load import Load, bare_pipe, send_to
from tests.benchmarks.outcome import Outcome, Plot, Table, Target


def run(bench: Bench) -> Outcome:
    outcome = Outcome()
    _against_the_bare_pipe(bench, outcome)
    if bench.size != "quick":
        _by_clients(bench, outcome)
        _ack_at_a_trainings_pace(bench, outcome)
    return outcome


def _against_the_bare_pipe(bench: Bench, outcome: Outcome) -> None:
    load = Load(clients=8, frames=bench.pick(120, 300))
    found: dict[str, list[dict]] = {name: [] for name in bench.relays}
    bare: list[float] = []
    for _ in range(bench.pick(3, 5)):
        bare.append(bare_pipe(bench, load))
        for name in bench.relays:
            with bench.node(name) as node:
                seen = send_to(node, load)
                seen["resident_mb"] = node.resident_mb
                seen["disk"] = node.status()["disk"]["spool_bytes"] / seen["bytes"]
                found[name].append(seen)
    rows: list[list] = [
        ["bare pipe: PUSH → write → fdatasync", statistics.median(bare) / 1e6, 1.0, None, None]
    ]
    for name, each in found.items():
        rates = [one["points_per_s"] for one in each]
        rows.append(
            [
                name,
                statistics.median(rates) / 1e6,
                ratio(rates, bare),
                statistics.median(one["cpu_us_per_point"] for one in each),
                statistics.median(one["resident_mb"] for one in each),
            ]
        )
    columns = ["", "million points/s", "of the pipe", "daemon CPU µs/point", "daemon MB"]
    note = "8 clients with prepacked frames of 550 calls of 10 metrics, as fast as they go."
    outcome.tables.append(Table("Intake, 8 ranks at full speed", columns, rows, note))
    rates = [one["points_per_s"] for one in found[OWN]]
    outcome.targets += [
        Target(
            "intake, 8 ranks, fsynced and acked", statistics.median(rates), "points/s", least=3e6
        ),
        Target("intake to the bare pipe", ratio(rates, bare), "", least=0.6, is_ratio=True),
        Target(
            "disk to packed bytes",
            statistics.median(one["disk"] for one in found[OWN]),
            "",
            most=1.1,
            is_ratio=True,
        ),
    ]


def _by_clients(bench: Bench, outcome: Outcome) -> None:
    rows: list[list] = []
    lines: dict[str, list[tuple[float, float]]] = {name: [] for name in bench.relays}
    for clients in (1, 8, 64, 512):
        # The same points for all; with many clients in small frames, as a training sends them.
        frames = max(4, 2000 // clients)
        load = Load(clients, frames, records=RECORDS_BY_CLIENTS[clients])
        for name in bench.relays:
            with bench.node(name) as node:
                seen = send_to(node, load)
                acks = sorted(seen["ack_ms"])
                lines[name].append((clients, seen["points_per_s"]))
                rows.append(
                    [
                        name,
                        clients,
                        seen["points_per_s"] / 1e6,
                        acks[len(acks) // 2],
                        acks[len(acks) * 99 // 100],
                        seen["cpu_us_per_point"],
                        node.resident_mb,
                        node.status()["disk"]["spool_bytes"] / load.points,
                    ]
                )
    columns = [
        "",
        "clients",
        "million points/s",
        "ack p50 ms",
        "p99 ms",
        "CPU µs/point",
        "MB",
        "bytes/point",
    ]
    outcome.tables.append(Table("Intake by number of clients, at full speed", columns, rows))
    outcome.plots.append(Plot("intake-clients", "Intake", "clients", "points/s", lines))


RECORDS_BY_CLIENTS = {1: 550, 8: 550, 64: 300, 512: 100}


def _ack_at_a_trainings_pace(bench: Bench, outcome: Outcome) -> None:
    """8 ranks of the real client, 10,000 points/s together."""
    rows: list[list] = []
    for name in bench.relays:
        with bench.node(name) as node:
            found = bench.script(
                "paced",
                {"ranks": 8, "metrics": 10, "points_per_s": 10_000, "seconds": 15},
                environ=node.environ,
            )
            rows.append([name, found["p50"], found["p99"], found["max"]])
            if name == OWN:
                outcome.targets.append(
                    Target("ack at 10,000 points/s, p99", found["p99"], "ms", most=100)
                )
    columns = ["", "p50 ms", "p99 ms", "max ms"]
    note = "From the log call to the ack, the sender's 20 ms look included."
    outcome.tables.append(Table("Ack, 8 ranks at 10,000 points/s together", columns, rows, note))
