"""What does the daemon take while nothing happens, and how long does it take to start?"""

from __future__ import annotations

import statistics
import time

from tests.benchmarks.bench import NOBODY, OWN, Bench, BenchNode
from tests.benchmarks.load import Load, Senders
from tests.benchmarks.outcome import Outcome, Table, Target
from tests.support.servers import free_port


def run(bench: Bench) -> Outcome:
    outcome = Outcome()
    rows: list[list] = []
    for name in bench.relays:
        start_s = statistics.median(_start_s(bench, name) for _ in range(bench.pick(3, 5)))
        # Tests let it ask a server that is away twice a second; by default it is every 30 s.
        with bench.node(name, NOBODY, retry_wait_s_max=30) as node:
            alone = _idle_share(node, bench)
            load = Load(clients=8, frames=0)
            with Senders("relay", f"ipc://{node.socket}", load, node.environ, stay=True) as senders:
                senders.go()
                senders.results()
                attached = _idle_share(node, bench)
            rows.append([name, start_s, node.resident_mb, alone * 100, attached * 100])
        with bench.node(name, NOBODY, retry_wait_s_max=30, http_port=free_port()) as node:
            with_port = _idle_share(node, bench)
            rows[-1].append(with_port * 100)
        if name == OWN:
            outcome.targets += [
                Target("daemon, start to accepting", start_s, "s", most=0.5),
                Target("daemon memory, http sink, idle", rows[-1][2], "MB", most=80),
                Target("daemon idle, share of a core", alone * 100, "%", most=0.2),
                Target("daemon idle, with its HTTP port", with_port * 100, "%", most=0.2),
            ]
    columns = ["", "start s", "MB", "CPU idle %", "with 8 idle ranks %", "with HTTP port %"]
    outcome.tables.append(Table("The daemon at rest", columns, rows))
    return outcome


def _start_s(bench: Bench, name: str) -> float:
    """Return how long from the start of the process to its first answer."""
    with bench.node(name, NOBODY, start=False) as node:
        begin_s = time.monotonic()
        node.start()
        return time.monotonic() - begin_s


def _idle_share(node: BenchNode, bench: Bench) -> float:
    """Return the share of one core that the daemon uses."""
    time.sleep(2.0)  # what follows an attach is not idleness
    begin_s, cpu_s = time.monotonic(), node.cpu_s
    time.sleep(bench.pick(3, 15))
    return (node.cpu_s - cpu_s) / (time.monotonic() - begin_s)
