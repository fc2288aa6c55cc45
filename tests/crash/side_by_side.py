"""Trials of a real daemon that mostly wait: several at once, each in a process of its own."""

from __future__ import annotations

import multiprocessing
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from pathlib import Path

from tests.crash.cases.disk import Plan
from tests.crash.outcome import Job, Outcome
from tests.support import MlflowServer

AT_ONCE = 4


def try_all(
    job: Job, server: MlflowServer, plans: Sequence[Plan], outcome: Outcome
) -> Counter[str]:
    """Try plans in their order, until the time is over; return which calls were met, by name."""
    kinds: Counter[str] = Counter()
    # Not forked: a trial forks itself, and is to do that with no threads of others about.
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(AT_ONCE, mp_context=context) as pool:
        running: set[Future[tuple[Outcome, list[str]]]] = set()
        left = iter(enumerate(plans))
        while True:
            while len(running) < AT_ONCE and not job.is_over and (each := next(left, None)):
                number, plan = each
                folder = job.folder / str(number)
                running.add(pool.submit(_try, folder, server.folder, server.port, plan))
            if not running:
                return kinds
            done, running = wait(running, return_when=FIRST_COMPLETED)
            for future in done:
                found, names = future.result()
                outcome.count += found.count
                for finding in found.findings:
                    outcome.found(finding)
                kinds.update(names)


def _try(
    folder: Path, server_folder: Path, server_port: int, plan: Plan
) -> tuple[Outcome, list[str]]:
    from tests.crash.cases.daemon_disk import try_plan

    server = MlflowServer(server_folder)  # that of the process that asks, already at work
    server.port = server_port
    outcome = Outcome("", 0, "")
    names = try_plan(folder, server, plan, outcome)
    return outcome, names
