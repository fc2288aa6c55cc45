"""What does one log call cost the training?"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator

from tests.benchmarks.bench import OWN, Bench, medians
from tests.benchmarks.outcome import Outcome, Table, Target
from tests.support import MlflowServer

PEERS = (
    *("MLflow sync", "MLflow async", "wandb offline", "neptune-scale offline", "trackio"),
    "TensorBoard",
)
QUICK_PEERS = ("trackio",)  # the fastest: the one that a ratio is taken of
#: What no call that keeps its values can be quicker than; says nothing of keys, losses or signals.
FLOOR = "(floor: pack, CRC, copy)"
COLUMNS = ["", "p50 µs", "p99 µs", "p99.9 µs", "max µs", "CPU µs/call"]
FIGURES = ("p50", "p99", "p99.9", "max", "cpu_us")


def run(bench: Bench) -> Outcome:
    outcome = Outcome()
    with contexts(bench) as loggers:
        seconds = bench.pick(1.0, 1.5)
        tight = _by_turns(
            loggers,
            bench.rounds,
            {"calls_max": bench.pick(20_000, 50_000), "seconds_max": seconds},
        )
        paced = _by_turns(
            loggers,
            bench.rounds,
            {"calls_max": bench.pick(300, 500), "pace_s": 0.004, "seconds_max": 20},
        )
        for title, found in (("tight loop", tight), ("every 4 ms", paced)):
            rows = [[name, *(each[figure] for figure in FIGURES)] for name, each in found.items()]
            outcome.tables.append(
                Table(f"A call of 10 metrics, {title}", COLUMNS, rows, is_race=True)
            )
        if bench.size != "quick":
            _other_calls(loggers, outcome)
            _many_ranks(bench, loggers, outcome)
    if bench.peers is None:
        outcome.skipped.append("peers: no environment with them was given (--peers)")
    _targets(outcome, tight, paced)
    return outcome


class Logger:
    """One of those that are compared: an interpreter, an environment and a job."""

    def __init__(
        self, bench: Bench, name: str, logger: str, environ: dict[str, str], uri: str
    ) -> None:
        self.name, self._bench, self._logger, self._environ, self._uri = (
            name,
            bench,
            logger,
            environ,
            uri,
        )
        # The relay is measured by the same interpreter as its peers where there is one.
        self._python = bench.peers

    def measure(self, **job: object) -> dict[str, float]:
        """Return what scripts/loggers.py finds; see there for the job."""
        folder = self._bench.scratch("logger")
        full = {
            "logger": self._logger,
            "metrics": 10,
            "folder": str(folder),
            "uri": self._uri,
            **job,
        }
        python = {} if self._python is None else {"python": self._python}
        return self._bench.script("loggers", full, environ=self._environ, **python)  # type: ignore[arg-type]


@contextlib.contextmanager
def contexts(bench: Bench) -> Iterator[list[Logger]]:
    """Serve what the loggers need: a daemon for each relay, an MLflow server for MLflow."""
    with contextlib.ExitStack() as stack:
        loggers = []
        uri = ""
        peers = QUICK_PEERS if bench.size == "quick" else PEERS
        if bench.peers is not None and "MLflow sync" in peers:
            server = stack.enter_context(MlflowServer(bench.scratch("server")))
            uri = server.uri
        for name in bench.relays:
            # Offline: what is delivered meanwhile would slow down the turns of the others.
            node = stack.enter_context(bench.node(name, offline=True))
            loggers.append(Logger(bench, name, OWN, node.environ, uri))
        loggers.append(Logger(bench, FLOOR, "bare", dict(os.environ), uri))
        if bench.peers is not None:
            loggers += [Logger(bench, name, name, dict(os.environ), uri) for name in peers]
        yield loggers


def _by_turns(loggers: list[Logger], rounds: int, job: dict) -> dict[str, dict[str, float]]:
    found: dict[str, list[dict[str, float]]] = {each.name: [] for each in loggers}
    for _ in range(rounds):
        for logger in loggers:
            found[logger.name].append(logger.measure(**job))
    return {name: medians(each) for name, each in found.items()}


def _other_calls(loggers: list[Logger], outcome: Outcome) -> None:
    """1, 100 and 10,000 metrics; NumPy's and torch's scalars."""
    jobs = {
        "1 metric": {"metrics": 1, "calls_max": 20_000},
        "100 metrics": {"metrics": 100, "calls_max": 5_000},
        "10,000 metrics": {"metrics": 10_000, "calls_max": 30},
        "10 NumPy scalars": {"kind": "numpy", "calls_max": 20_000},
        "10 torch scalars": {"kind": "torch", "calls_max": 20_000},
    }
    rows = []
    for logger in loggers:
        row: list = [logger.name]
        for job in jobs.values():
            try:
                row.append(logger.measure(**job, seconds_max=1)["p50"])
            except RuntimeError as error:  # torch is not there, or MLflow refuses 10,000 at once
                row.append(str(error).strip().splitlines()[-1].partition(":")[0])
        rows.append(row)
    columns = ["p50 µs, tight loop", *jobs]
    note = "A word in place of a number is the error that the call raises."
    outcome.tables.append(Table("Other calls", columns, rows, note, is_race=True))


def _many_ranks(bench: Bench, loggers: list[Logger], outcome: Outcome) -> None:
    """8 ranks of each relay at once, every 4 ms: what the busy cores of a node make of it."""
    from concurrent.futures import ThreadPoolExecutor

    rows = []
    for logger in loggers:
        if logger.name in PEERS:
            continue
        with ThreadPoolExecutor(8) as pool:
            jobs = [pool.submit(logger.measure, calls_max=1000, pace_s=0.004) for _ in range(8)]
            found = medians([job.result() for job in jobs])
        rows.append([logger.name, *(found[figure] for figure in FIGURES)])
    outcome.tables.append(Table("8 ranks at once, every 4 ms, median of the ranks", COLUMNS, rows))


def _targets(outcome: Outcome, tight: dict, paced: dict) -> None:
    ours = tight[OWN]
    outcome.targets += [
        Target("log call of 10, tight loop, p50", ours["p50"], "µs", most=3),
        Target("log call of 10, tight loop, p99", ours["p99"], "µs", most=15),
        *(
            Target(
                f"log call of 10, every 4 ms, {name}",
                paced[OWN][name],
                "µs",
                most=most,
                beside=f"packing, a CRC and a copy alone {paced[FLOOR][name]:.3g} µs",
            )
            for name, most in (("p50", 15), ("p99", 60))
        ),
    ]
    for title, found in (("tight loop", tight), ("every 4 ms", paced)):
        peers = {name: each["p50"] for name, each in found.items() if name in PEERS}
        if peers:
            fastest = min(peers, key=lambda name: peers[name])
            what = f"fastest peer ({fastest}) to a log call, {title}, p50"
            least = 5 if title == "tight loop" else 42 / 15  # DESIGN 12: trackio's, and the target
            outcome.targets.append(
                Target(what, peers[fastest] / found[OWN]["p50"], "×", least=least, is_ratio=True)
            )
