"""EIO, ENOSPC, EDQUOT and short writes at every system call by which a rank changes its disk."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Iterable, Iterator

from tests.crash.cases.disk import EDQUOT, EIO, ENOSPC
from tests.crash.outcome import Job, Outcome
from tests.crash.scripted_rank import STEPS, ScriptedRank, check_all, staging_of
from tests.crash.tracer import SHORT, Call, Fault, run_traced, why_not
from tests.support import MlflowServer
from tests.support.relay import Node

#: One call, or all from there on: a memory that stays full.
FAULTS = tuple((fault, count) for fault in (EIO, ENOSPC, EDQUOT, SHORT) for count in (1, 1 << 30))
#: So many ranks meet their fault before the daemon's work is looked through.
BATCH = 40

Plan = tuple[int, Fault, int]  # first call, what is done, to how many


class BadDisk:
    """Lets calls fail that change the node's folders."""

    def __init__(self, node: Node, plan: Plan) -> None:
        first, self._fault, count = plan
        self._due = range(first, first + count)
        self._folders = (node.runtime, staging_of(node))
        self.calls = 0
        self.failed: list[Call] = []

    def before(self, call: Call) -> Fault | None:
        if not any(call.changes(folder) for folder in self._folders):
            return None
        self.calls += 1
        if self.calls not in self._due or (self._fault == SHORT and not call.can_be_short):
            return None
        self.failed.append(call)
        return self._fault

    def after(self, call: Call, result: int) -> None:
        """The rank says what came of it."""


def run(job: Job) -> Outcome:
    outcome = Outcome(
        f"Each system call by which a rank with a script (start_run, {STEPS} times a metric and a "
        "tag of 6 KB, a text file, end) changes its disk (journal, staged files) fails in turn, once "
        "or from there on, with EIO, ENOSPC, EDQUOT or as a short write, with a daemon and before "
        "there is one. start_run may say that it has no place for a journal; nothing else raises. "
        "What had returned is in MLflow once or counted as lost, and the run is FINISHED",
        0,
        "faults",
    )
    outcome.skipped = why_not()
    if outcome.skipped:
        return outcome
    kinds: Counter[str] = Counter()
    rounds = 0
    with MlflowServer(job.folder / "mlflow") as server:
        while not job.is_over:
            for is_served in (True, False):
                waiting = all_plans(job, server)
                while not job.is_over and (batch := list(itertools.islice(waiting, BATCH))):
                    folder = job.folder / f"{rounds}-{is_served}-{outcome.count}"
                    with Node(folder, server.uri) as node:
                        play(node, server, batch, kinds, outcome, is_served=is_served)
            rounds += not job.is_over
    outcome.goal = outcome.count
    outcome.figures = {
        "lives in which every call failed in every way, served and alone": f"{rounds:,}",
        **{f"failed {name}": f"{count:,}" for name, count in sorted(kinds.items())},
    }
    return outcome


def all_plans(job: Job, server: MlflowServer) -> Iterator[Plan]:
    """Yield every fault of a life: it is lived once without any."""
    with Node(job.folder / "plans", server.uri) as node:
        node.start()
        disk = BadDisk(node, (0, EIO, 0))
        ended = run_traced(ScriptedRank(node, "plans").live, disk)
        assert ended.status == 0, ended.said
        node.wait_until_ended()
    for number in range(1, disk.calls + 1):
        for fault, count in FAULTS:
            yield number, fault, count


def play(
    node: Node,
    server: MlflowServer,
    plans: Iterable[Plan],
    kinds: Counter[str],
    outcome: Outcome,
    *,
    is_served: bool,
) -> None:
    """Let a rank meet each of these faults, and look at what the daemon makes of what it kept."""
    if is_served:
        node.start()
    ranks: dict[str, ScriptedRank] = {}
    for number, plan in enumerate(plans):
        first, fault, count = plan
        rank = ScriptedRank(node, f"{node.folder.name}-{number}")
        disk = BadDisk(node, plan)
        ended = run_traced(rank.live, disk)
        if not disk.failed:
            continue  # no write, or no such call in this life: threads do not always do the same
        which = disk.failed[0].name
        how = f"{fault.name} {'once' if count == 1 else 'from there on'}"
        name = f"{which} (call {first}, {how}, {'with a daemon' if is_served else 'alone'})"
        ranks[name] = rank
        outcome.count += 1
        kinds[f"{which} ({fault.name})"] += 1
        if ended.status or not (rank.has_ended or "no run: " in ended.said):
            outcome.found(f"{name}: status {ended.status}: {ended.said[-1000:]}")
        elif "Traceback" in ended.said:
            outcome.found(f"{name}: {ended.said[-1000:]}")
    if not is_served:
        node.start()
    check_all(node, server, ranks, outcome)
    if node.stop() != 0:
        outcome.found(f"the daemon left something behind: {node.log.read_text()[-500:]}")
