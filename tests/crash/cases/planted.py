"""Bugs planted on purpose, one by one: the suite must catch each."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile

import pytest

from tests.crash.outcome import Job, Outcome
from tests.crash.planted import BUGS, ROOT

TIMEOUT_S = 900.0


def run(job: Job) -> Outcome:
    outcome = Outcome(
        "Mistakes patched into the product from outside, each run against the test that is there for "
        "it, which passes without it and must fail with it",
        len(BUGS),
        "bugs",
    )
    for name, (is_caught, output) in try_all().items():
        outcome.count += 1
        outcome.figures[name] = "caught" if is_caught else "NOT caught"
        if not is_caught:
            outcome.found(f"{name} was not caught: {output[-300:]}")
    return outcome


def try_all() -> dict[str, tuple[bool, str]]:
    """Return of each bug whether the suite catches it, and what pytest said."""
    # A process of its own: it forks for each bug, and has no threads then.
    command = [sys.executable, "-m", "tests.crash.cases.planted"]
    done = subprocess.run(
        command, cwd=ROOT, stdout=subprocess.PIPE, text=True, timeout=TIMEOUT_S, check=True
    )
    return {name: (bool(caught), said) for name, (caught, said) in json.loads(done.stdout).items()}


def _try(name: str) -> tuple[bool, str]:
    """Plant a bug in a forked process and run its test there."""
    with tempfile.TemporaryFile("w+") as file:
        pid = os.fork()
        if pid == 0:
            status = 70
            try:
                os.dup2(file.fileno(), 1)
                os.dup2(file.fileno(), 2)
                BUGS[name].plant(setattr)
                options = ("-p", "no:cacheprovider", "-q", "--tb=short", "--no-header")
                status = pytest.main([*options, BUGS[name].test])
            finally:
                sys.stdout.flush()
                os._exit(status)
        status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        file.seek(0)
        said = file.read()
    # All but 1 is no verdict: nothing collected, wrong usage, an error of pytest's. And it must be
    # the test that says so, not the mistake that stumbles over itself.
    is_caught = status == pytest.ExitCode.TESTS_FAILED and any(
        line.startswith(("E   assert", "E   AssertionError")) for line in said.splitlines()
    )
    return is_caught, said


if __name__ == "__main__":
    print(json.dumps({name: _try(name) for name in BUGS}))
