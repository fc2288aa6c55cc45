"""SIGKILL at every system call of a rank, with a daemon and without one."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator

from tests.crash.outcome import Job, Outcome
from tests.crash.scripted_rank import STEPS, ScriptedRank, check_all
from tests.crash.tracer import KILL, Call, Fault, run_traced, why_not
from tests.support import MlflowServer
from tests.support.relay import Node

#: So many ranks are killed before the daemon's work is looked through.
BATCH = 40


class Killer:
    """Kills at the n-th call, counted over all threads of the process."""

    def __init__(self, number: int) -> None:
        self._left = number
        self.hit: int | None = None  #: number of the call's kind

    def before(self, call: Call) -> Fault | None:
        self._left -= 1
        if self._left:
            return None
        self.hit = call.number
        return KILL

    def after(self, call: Call, result: int) -> None:
        """Nothing is asked of what went well."""


def run(job: Job) -> Outcome:
    outcome = Outcome(
        f"A rank with a script (start_run, {STEPS} times a metric and a tag of 6 KB, a text file, "
        "end) is killed at its n-th system call, counted over its threads, for every n until one "
        "lives; once while a daemon serves it and once before there is one. What had returned is in "
        "MLflow once, nothing else is but the call that was cut off, a killed run is FAILED, and "
        "nothing is lost, damaged or quarantined, and no journal is left",
        0,
        "kills",
    )
    outcome.skipped = why_not()
    if outcome.skipped:
        return outcome
    kinds: Counter[int] = Counter()
    lives = 0
    with MlflowServer(job.folder / "mlflow") as server:
        while not job.is_over:
            for is_served in (True, False):
                numbers = iter(range(1, 1 << 30))
                has_lived = False
                while not job.is_over and not has_lived:
                    folder = job.folder / f"{lives}-{is_served}-{outcome.count}"
                    with Node(folder, server.uri) as node:
                        batch = (number for number, _ in zip(numbers, range(BATCH), strict=False))
                        has_lived = play(node, server, batch, kinds, outcome, is_served=is_served)
            lives += not job.is_over
    outcome.goal = outcome.count
    outcome.figures = {
        "lives killed at every call, served and alone": f"{lives:,}",
        "different system calls": f"{len(kinds):,}",
    }
    return outcome


def play(
    node: Node,
    server: MlflowServer,
    numbers: Iterable[int] | Iterator[int],
    kinds: Counter[int],
    outcome: Outcome,
    *,
    is_served: bool,
) -> bool:
    """Kill a rank at each of these calls, and look at what the daemon makes of them; return whether
    one has lived."""
    if is_served:
        node.start()
    ranks: dict[str, ScriptedRank] = {}
    has_lived = False
    for number in numbers:
        name = f"call {number} {'with a daemon' if is_served else 'alone'}"
        rank = ranks[name] = ScriptedRank(node, f"{node.folder.name}-{number}")
        killer = Killer(number)
        ended = run_traced(rank.live, killer)
        if killer.hit is None:
            has_lived = True
            if ended.status or not rank.has_ended:
                outcome.found(f"{name}: status {ended.status}: {ended.said[-500:]}")
            break
        kinds[killer.hit] += 1
        outcome.count += 1
    if not is_served:
        node.start()
    check_all(node, server, ranks, outcome)
    if node.stop() != 0:
        outcome.found(f"the daemon left something behind: {node.log.read_text()[-500:]}")
    return has_lived
