"""The model test: lives that hypothesis makes up, against what was promised."""

from __future__ import annotations

from hypothesis import HealthCheck, core, settings
from hypothesis.stateful import run_state_machine_as_test

from tests.crash.model import SpoolMachine
from tests.crash.outcome import Job, Outcome

GOAL = 100_000
#: Longest life, and how many lives so long: short ones are many, long ones reach far.
ROUNDS = ((10, 400), (20, 200), (40, 100), (200, 50))


def run(job: Job) -> Outcome:
    outcome = Outcome(
        "Append and ack, deliver, end, dead letters, write-back, full disk, failing fsync, kill and "
        "reload, power failure, damage on a copy: lives that hypothesis makes up, of every 750 400 of "
        "up to 10 steps, 200 of up to 20, 100 of up to 40 and 50 of up to 200; after each crash the "
        "spool is compared with what was promised",
        GOAL,
        "cases",
    )
    cases, steps = SpoolMachine.cases, SpoolMachine.steps
    former, rounds = core.global_force_seed, 0
    try:
        while not job.is_over and SpoolMachine.cases - cases < GOAL:
            core.global_force_seed = job.seed + rounds  # as pytest's --hypothesis-seed does
            steps_max, lives = ROUNDS[rounds % len(ROUNDS)]
            many = settings(
                max_examples=lives,
                stateful_step_count=steps_max,
                deadline=None,
                database=None,
                suppress_health_check=list(HealthCheck),
            )
            try:
                run_state_machine_as_test(SpoolMachine, settings=many)
            except Exception as error:  # the shrunk life is in its notes
                notes = "; ".join(getattr(error, "__notes__", []))
                outcome.found(f"round {rounds}: {error!r}: {notes[:1500]}")
            rounds += 1
    finally:
        core.global_force_seed = former
    outcome.count = SpoolMachine.cases - cases
    outcome.figures = {"steps": f"{SpoolMachine.steps - steps:,}", "rounds": f"{rounds:,}"}
    return outcome
