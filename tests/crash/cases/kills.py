"""SIGKILL of daemon, ranks and server at random moments under load, round after round.

The oracle is outside the killed processes: each rank counts the calls that have returned in memory
that this process shares with it, and MLflow's database is read with SQL.
"""

from __future__ import annotations

import contextlib
import os
import random
import signal
import sqlite3
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path

from tests.crash.cases.mortals import Life, Rank
from tests.crash.outcome import Job, Outcome
from tests.support import MlflowServer
from tests.support.jobs import runs_with_key
from tests.support.relay import Node, wait_until

GOAL = 1000
RANKS = 3
PATIENCE_S = 300.0
#: Share of the time in which the daemon is not killed: its memory and descriptors are watched.
STEADY_SHARE = 0.3


@dataclass
class Watched:
    """What was measured over all rounds."""

    kills: dict[str, int] = field(default_factory=lambda: {"daemon": 0, "rank": 0, "server": 0})
    points: int = 0
    longest_call_ns: int = 0
    longest_drain_s: float = 0.0
    samples: list[tuple[float, float, int]] = field(default_factory=list)  #: s, MB, descriptors


def run(job: Job) -> Outcome:
    outcome = Outcome(
        f"One daemon, {RANKS} ranks that log 3 points every 4 ms, one MLflow server on "
        "SQLite; each is killed with SIGKILL at random moments and comes back, or, a rank, perhaps "
        "not. After each round: every point whose call had returned is in MLflow, once, with its "
        "value and a time of its rank's life; in order within each session; no other point; one run; "
        "its status is true; the journals are gone; nothing was lost, damaged or quarantined",
        GOAL,
        "kills",
    )
    watched = Watched()
    rounds = 0
    with (
        MlflowServer(job.folder / "mlflow") as server,
        Node(job.folder / "node", server.uri) as node,
    ):
        node.start()
        while not job.is_over:
            rng = random.Random(f"{job.seed}/{rounds}")
            is_steady = job.left_s < job.budget_s * STEADY_SHARE
            try:
                _play(f"round {rounds}", node, server, rng, watched, is_steady=is_steady)
            except (AssertionError, OSError, sqlite3.Error) as error:
                outcome.found(f"round {job.seed}/{rounds}: {error}")
                make_whole(node, server)
            rounds += 1
        assert node.stop() == 0, "the daemon left something behind"
    outcome.count = sum(watched.kills.values())
    outcome.figures = {
        "rounds": f"{rounds:,}",
        **{f"kills of a {name}": f"{count:,}" for name, count in watched.kills.items()},
        "points compared": f"{watched.points:,}",
        "longest log call": f"{watched.longest_call_ns / 1e6:.1f} ms",
        "longest drain after the faults": f"{watched.longest_drain_s:.1f} s",
        **_slopes(watched.samples),
    }
    return outcome


def _play(
    key: str,
    node: Node,
    server: MlflowServer,
    rng: random.Random,
    watched: Watched,
    *,
    is_steady: bool,
) -> None:
    """Play one round: a job whose processes are killed while it runs, and a look at what is left."""
    ranks = [Rank(node, key, number, RANKS) for number in range(RANKS)]
    restarts: list[threading.Thread] = []
    try:
        wait_until(lambda: all(rank.calls for rank in ranks), "all ranks log", PATIENCE_S)
        for _ in range(rng.randint(20, 50)):
            time.sleep(rng.uniform(0.0, 0.3))  # the moment is the point
            victim = rng.choices(("daemon", "rank", "server"), (0 if is_steady else 12, 6, 1))[0]
            if victim == "daemon":
                node.kill()
                time.sleep(rng.choice((0.0, 0.0, 0.1, 1.0)))
                node.start(wait=rng.random() < 0.5)
            elif victim == "rank":
                if not rng.choice(ranks).kill_and(comes_back=rng.random() < 0.8):
                    continue
            elif restarts:
                continue
            else:
                server.kill()
                restarts.append(threading.Thread(target=server.start))
                restarts[0].start()
            watched.kills[victim] += 1
    finally:
        for thread in restarts:
            thread.join()
    for rank in ranks:
        rank.end()
    healed_s = time.monotonic()
    wait_until_over(node, key, ranks)
    watched.longest_drain_s = max(watched.longest_drain_s, time.monotonic() - healed_s)
    lives = [life for rank in ranks for life in rank.lives]
    watched.longest_call_ns = max(watched.longest_call_ns, *(life.longest_ns for life in lives))
    watched.points += check(server, key, ranks, lives)
    for rank in ranks:
        rank.close()
    if is_steady:
        watched.samples.append((time.monotonic(), *_size(node)))


def wait_until_over(node: Node, key: str, ranks: list[Rank]) -> None:
    """Wait for the end of the run; nothing may be left behind."""
    from tests.support.jobs import status_when

    node.wait_until_it_answers()
    seen = len([rank for rank in ranks if any(life.calls for life in rank.lives)])
    status = status_when(
        node,
        key,
        lambda run: run["state"] == "ended" and run["ranks_seen"] >= seen,
        "it ended, and all is delivered",
        PATIENCE_S,
    )
    counts = {name: status[name] for name in ("dead_letters", "lost_records", "damaged_records")}
    assert not any(counts.values()), f"{counts}"
    assert node.status()["counters"]["quarantined_files"] == 0, "files were quarantined"
    journals = node.runtime / "journals"
    wait_until(lambda: not list(journals.glob("*.journal")), "no journal is left", PATIENCE_S)


def check(server: MlflowServer, key: str, ranks: list[Rank], lives: list[Life]) -> int:
    """Compare MLflow with what the ranks counted; return how many points that is."""
    (run,) = [each for each in runs_with_key(server, key) if each.info.lifecycle_stage == "active"]
    words = [rank.word() for rank in ranks]
    if "unknown" not in words:
        expected = "FAILED" if "vanished" in words else "FINISHED"
        assert run.info.status == expected, f"{run.info.status}, must be {expected}: {words}"
    with contextlib.closing(_rows(server)) as database:
        rows = database.execute(
            "SELECT key, value, timestamp, step FROM metrics WHERE run_uuid = ? ORDER BY rowid",
            (run.info.run_id,),
        ).fetchall()
    left = {(name, step): (value, time_ms) for name, value, time_ms, step in rows}
    assert len(left) == len(rows), f"{len(rows) - len(left)} points are there twice"
    places = {place: index for index, place in enumerate(left)}
    for life in lives:
        last = -1
        for step in range(life.first, life.calls + 1):
            for name, value in life.points(step):
                found = left.pop((name, step), None)
                if found is None:
                    # The last call may have been cut off by the kill, or only its count.
                    assert step == life.calls, f"{name} of step {step} is missing"
                    continue
                assert found[0] == value, f"{name} of step {step} is {found[0]}, was {value}"
                assert life.began_ms <= found[1] <= life.ended_ms, f"{name} at {found[1]} ms"
                assert places[name, step] > last, f"{name} of step {step} is out of order"
            last = max(last, places.get((life.key, step), last))
    assert not left, f"{len(left)} points that nobody logged, such as {next(iter(left))}"
    return len(rows)


def _rows(server: MlflowServer) -> sqlite3.Connection:
    return sqlite3.connect(f"file:{server.database}?mode=ro", uri=True, timeout=30.0)


def make_whole(node: Node, server: MlflowServer) -> None:
    """After a finding: no rank lives on, daemon and server are there for the next round."""
    for process in node.ranks:
        if process.poll() is None:
            process.send_signal(signal.SIGKILL)
            process.wait()
    with contextlib.suppress(AssertionError, OSError):
        node.kill()
    server.kill()
    server.start()
    node.start()


def _size(node: Node) -> tuple[float, int]:
    """Return resident megabytes and descriptors of the daemon."""
    assert node.daemon is not None
    pages = int(Path(f"/proc/{node.daemon.pid}/statm").read_text().split()[1])
    megabytes = pages * os.sysconf("SC_PAGE_SIZE") / 1e6
    return megabytes, len(os.listdir(f"/proc/{node.daemon.pid}/fd"))


def _slopes(samples: list[tuple[float, float, int]]) -> dict[str, str]:
    """Return how memory and descriptors of a daemon that is not killed grow."""
    if len(samples) < 3:
        return {"memory and descriptors": "too few rounds to tell"}
    times = [each[0] for each in samples]
    middle = sum(times) / len(times)
    spread = sum((each - middle) ** 2 for each in times)

    def per_hour(values: list[float]) -> float:
        return 3600 * sum((t - middle) * v for t, v in zip(times, values, strict=True)) / spread

    memory, descriptors = [each[1] for each in samples], [float(each[2]) for each in samples]
    over = f"over {(times[-1] - times[0]) / 60:.1f} min, {len(samples)} rounds"
    return {
        "memory of the daemon": (
            f"{memory[0]:.1f} → {memory[-1]:.1f} MB, {per_hour(memory):+.1f} MB/h, {over}"
        ),
        "descriptors of the daemon": (
            f"{descriptors[0]:.0f} → {descriptors[-1]:.0f}, {per_hour(descriptors):+.1f}/h"
        ),
    }
