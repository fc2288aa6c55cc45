"""Two nodes of one job, each behind a network link of its own that is cut and healed."""

from __future__ import annotations

import json
import random
import signal
import sqlite3
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path

from tests.crash.cases.kills import check, make_whole, wait_until_over
from tests.crash.cases.mortals import Rank
from tests.crash.outcome import Job, Outcome
from tests.crash.planted import ROOT
from tests.support import MlflowServer
from tests.support.namespaces import Island, why_not
from tests.support.relay import Node

GOAL = 100
RANKS = 2  #: on each node
CUTS_PER_ROUND = 10
PAUSE_S = 0.05
CUT_S = (0.1, 4.0)
#: Longer than the owner of a run waits for the words of other nodes.
LONG_CUT_S, LONG_SHARE = 70.0, 0.1
SETTINGS = {"request_timeout_s": 5.0, "retry_wait_s_max": 0.2}


def run(job: Job, goal: int = GOAL) -> Outcome:
    outcome = Outcome("", goal, "cuts")
    outcome.skipped = why_not()
    if outcome.skipped:
        return outcome
    command = ["unshare", "--net", sys.executable, "-m", "tests.crash.cases.partition"]
    done = subprocess.run(
        [*command, str(job.folder), str(job.seed), str(job.left_s), str(goal)],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    return Outcome(**json.loads(done.stdout.splitlines()[-1]))


def _run_inside(job: Job, goal: int) -> Outcome:
    """The case, in a network that nobody else is in."""
    outcome = Outcome(
        f"Two daemons in network namespaces of their own, {RANKS} ranks each, all of one run; a real "
        "MLflow server in a third one. The link of the one or of the other is cut at random, or of "
        "both, while the ranks log and end: nobody is told, packets vanish. Healed, all is as if "
        "nothing had been: one run, every point once and in its order, FINISHED",
        goal,
        "cuts",
    )
    rounds = points = 0
    longest_drain_s = 0.0
    subprocess.run(["ip", "link", "set", "lo", "up"], check=True)
    with ExitStack() as stack:
        # All addresses: nobody can come to this network from outside.
        arguments = ("--host", "0.0.0.0", "--allowed-hosts", "*")
        server = stack.enter_context(MlflowServer(job.folder / "mlflow", arguments=arguments))
        islands = [stack.enter_context(Island(number)) for number in range(2)]
        nodes = [
            stack.enter_context(
                Node(
                    job.folder / f"node {number}",
                    f"http://{island.our_address}:{server.port}",
                    settings=SETTINGS,
                    within=island.enter,
                )
            )
            for number, island in enumerate(islands)
        ]
        for node in nodes:
            node.start()
        while not job.is_over and outcome.count < goal:
            rng = random.Random(f"{job.seed}/{rounds}")
            try:
                drain_s, count = _play(f"round {rounds}", nodes, islands, server, rng, outcome, job)
                points, longest_drain_s = points + count, max(longest_drain_s, drain_s)
            except (AssertionError, OSError, sqlite3.Error, ValueError) as error:
                outcome.found(f"round {job.seed}/{rounds}: {error}")
                print(outcome.findings[-1], file=sys.stderr)
                for node, island in zip(nodes, islands, strict=True):
                    island.heal()
                    make_whole(node, server)
            rounds += 1
        codes = [node.stop() for node in nodes]
        if any(codes):
            outcome.found(f"the daemons left something behind: {codes}")
    outcome.figures |= {
        "rounds": f"{rounds:,}",
        "points compared": f"{points:,}",
        "longest drain after the last cut": f"{longest_drain_s:.1f} s",
    }
    return outcome


def _play(
    key: str,
    nodes: Sequence[Node],
    islands: Sequence[Island],
    server: MlflowServer,
    rng: random.Random,
    outcome: Outcome,
    job: Job,
) -> tuple[float, int]:
    """Play one round; return how long the drain took, and how many points were compared."""
    world_size = RANKS * len(nodes)
    ranks = [
        Rank(nodes[number // RANKS], key, number, world_size, PAUSE_S)
        for number in range(world_size)
    ]
    ends_early = rng.sample(ranks, rng.randint(0, len(ranks)))
    for index in range(CUTS_PER_ROUND):
        if job.is_over or outcome.count >= outcome.goal:
            break
        time.sleep(rng.uniform(0.1, 1.5))  # the moment is the point
        is_long = index == CUTS_PER_ROUND - 1 and rng.random() < LONG_SHARE
        cut = rng.sample(islands, rng.choice((1, 1, 2)))
        for island in cut:
            island.cut()
        outcome.count += len(cut)
        if ends_early and index >= CUTS_PER_ROUND // 2:
            ends_early.pop().end()
        time.sleep(LONG_CUT_S if is_long else rng.uniform(*CUT_S))
        for island in cut:
            island.heal()
    healed_s = time.monotonic()
    for rank in ranks:
        rank.end()
    for number, node in enumerate(nodes):
        wait_until_over(node, key, ranks[number * RANKS : (number + 1) * RANKS])
    drain_s = time.monotonic() - healed_s
    points = check(server, key, ranks, [life for rank in ranks for life in rank.lives])
    for rank in ranks:
        rank.close()
    return drain_s, points


def main() -> None:
    folder, seed, budget_s, goal = sys.argv[1:]
    job = Job(int(seed), float(budget_s), Path(folder))
    signal.signal(signal.SIGINT, lambda number, frame: job.stop.set())
    print(json.dumps(asdict(_run_inside(job, int(goal)))))


if __name__ == "__main__":
    main()
