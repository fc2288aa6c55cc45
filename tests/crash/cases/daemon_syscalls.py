"""SIGKILL at every system call by which a real daemon changes its spool."""

from __future__ import annotations

from tests.crash.cases.daemon_disk import calls_of_a_life
from tests.crash.cases.disk import Plan
from tests.crash.outcome import Job, Outcome
from tests.crash.side_by_side import try_all
from tests.crash.tracer import KILL, why_not
from tests.support import MlflowServer


def run(job: Job) -> Outcome:
    outcome = Outcome(
        "A real daemon serves a rank with a script, or finds in the spool what a killed daemon has "
        "taken of one, and delivers it to MLflow; the n-th system call by which it changes its spool "
        "is its last, for every n, and another daemon is started. All that the rank logged is in "
        "MLflow once, there is one run, FINISHED, and nothing is lost or left behind",
        0,
        "kills",
    )
    outcome.skipped = why_not()
    if outcome.skipped:
        return outcome
    with MlflowServer(job.folder / "mlflow") as server:
        plans = [
            Plan("", number, KILL, killed_at=int(is_heir))
            for is_heir in (True, False)
            for number, _ in enumerate(calls_of_a_life(job, server, is_heir=is_heir), 1)
        ]
        outcome.goal = len(plans)
        kinds = try_all(job, server, plans, outcome)
    outcome.figures = {f"at {name}": f"{count:,}" for name, count in sorted(kinds.items())}
    return outcome
