"""A network that fails in every way we know, between daemons and a real MLflow server."""

from __future__ import annotations

import random
import sqlite3
import sys
import time
from collections import Counter
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field

from tests.crash.cases.kills import check, make_whole, wait_until_over
from tests.crash.cases.mortals import Rank
from tests.crash.outcome import Job, Outcome
from tests.crash.weather import Weather
from tests.support import MlflowServer, TcpProxy
from tests.support.jobs import runs_with_key
from tests.support.relay import Node, wait_until

GOAL = 10_000
NODES, RANKS = 3, 2
#: Of one round: then the weather clears up, and all that was logged must arrive.
FAULTS_PER_ROUND = 400
PAUSE_S = 0.05
PATIENCE_S = 180.0
#: Half a second would do; where others need the CPU, too, an honest answer may take long.
SETTINGS = {"request_timeout_s": 5.0, "retry_wait_s_max": 0.05}


@dataclass
class Watched:
    """What was measured over all rounds."""

    faults: Counter[str] = field(default_factory=Counter)
    requests: int = 0
    points: int = 0
    longest_call_ns: int = 0
    longest_drain_s: float = 0.0


def run(job: Job) -> Outcome:
    outcome = Outcome(
        f"{NODES} daemons, {RANKS} ranks each that log 3 points every {PAUSE_S * 1000:.0f} ms, and a "
        "proxy of our own in front of one MLflow server on SQLite, which does to each request what "
        "chance says; some ranks end meanwhile. Then it is healed, and the same is compared as after "
        "kills: every point once and in its order, no other, one run, its true status, no dead letter",
        GOAL,
        "faults",
    )
    watched, rounds = Watched(), 0
    with ExitStack() as stack:
        server = stack.enter_context(MlflowServer(job.folder / "mlflow"))
        proxy = stack.enter_context(TcpProxy(server.uri))
        folders = [job.folder / f"node {index}" for index in range(NODES)]
        nodes = [
            stack.enter_context(Node(folder, proxy.uri, settings=SETTINGS)) for folder in folders
        ]
        for node in nodes:
            node.start()
        while not job.is_over and watched.faults.total() < GOAL:
            rng = random.Random(f"{job.seed}/{rounds}")
            key = f"round {rounds}"
            try:
                play(key, nodes, server, proxy, rng, watched, faults=FAULTS_PER_ROUND, job=job)
            except (AssertionError, OSError, sqlite3.Error) as error:
                outcome.found(f"round {job.seed}/{rounds}: {error}")
                print(outcome.findings[-1], file=sys.stderr)
                proxy.heal()
                for node in nodes:
                    make_whole(node, server)
            rounds += 1
        codes = [node.stop() for node in nodes]
        if any(codes):
            outcome.found(f"the daemons left something behind: {codes}")
    outcome.count = watched.faults.total()
    outcome.figures = {
        "rounds": f"{rounds:,}",
        **{kind: f"{count:,}" for kind, count in sorted(watched.faults.items())},
        "requests, with those that were let through": f"{watched.requests:,}",
        "points compared": f"{watched.points:,}",
        "longest log call": f"{watched.longest_call_ns / 1e6:.1f} ms",
        "longest drain after the faults": f"{watched.longest_drain_s:.1f} s",
    }
    return outcome


def play(
    key: str,
    nodes: Sequence[Node],
    server: MlflowServer,
    proxy: TcpProxy,
    rng: random.Random,
    watched: Watched,
    *,
    faults: int,
    job: Job | None = None,
) -> None:
    """Play one round: a job on each node, so many faults, a healed network, and a look."""
    requests, until = proxy.requests(), watched.faults.total() + faults
    proxy.fail(Weather(rng, watched.faults))
    keys = [f"{key} of node {index}" for index in range(len(nodes))]
    jobs = [
        [Rank(node, name, number, RANKS, PAUSE_S) for number in range(RANKS)]
        for node, name in zip(nodes, keys, strict=True)
    ]
    ends_early = rng.sample([rank for ranks in jobs for rank in ranks], len(nodes))
    while watched.faults.total() < until and not (job and job.is_over):
        if ends_early and watched.faults.total() > until - faults / 2:
            ends_early.pop().end()
        time.sleep(0.05)
    proxy.heal()
    healed_s = time.monotonic()
    for ranks in jobs:
        for rank in ranks:
            rank.end()
    for node, name, ranks in zip(nodes, keys, jobs, strict=True):
        wait_until_over(node, name, ranks)
    watched.longest_drain_s = max(watched.longest_drain_s, time.monotonic() - healed_s)
    watched.requests += proxy.requests() - requests
    for name, ranks in zip(keys, jobs, strict=True):
        wait_until_alone(server, name)
        lives = [life for rank in ranks for life in rank.lives]
        watched.longest_call_ns = max(watched.longest_call_ns, *(life.longest_ns for life in lives))
        watched.points += check(server, name, ranks, lives)
        for rank in ranks:
            rank.close()


def wait_until_alone(server: MlflowServer, key: str) -> None:
    """A create that timed out may be carried out late: its empty run is removed a minute later."""

    def is_alone() -> bool:
        runs = [run for run in runs_with_key(server, key) if run.info.lifecycle_stage == "active"]
        return len(runs) == 1

    wait_until(is_alone, f"one run of {key}", PATIENCE_S)
