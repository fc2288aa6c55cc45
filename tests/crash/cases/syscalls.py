"""SIGKILL at every system call with which a spool changes its disk, by strace."""

from __future__ import annotations

import json
import logging
import os
import platform
import random
import shutil
import subprocess
import sys
import tempfile
from functools import partial
from pathlib import Path

from mlflow_relay_daemon.spool.disk import Disk
from tests.crash import life
from tests.crash.outcome import Job, Outcome
from tests.crash.power import Known

CALLS = ("write", "fdatasync", "fsync", "rename", "unlink", "mkdir", "fallocate")
ROOT = Path(__file__).resolve().parents[3]
TIMEOUT_S = 120.0


class Teller:
    """Stands where lives have a recorder: says on stdout what the world knows, as it learns it."""

    def __init__(self, root: Path) -> None:
        self.root, self.sync_fails_after = root, -1
        self._known = Known()

    @property
    def known(self) -> Known:
        return self._known

    @known.setter
    def known(self, known: Known) -> None:
        self._known = known
        os.write(1, _to_json(known).encode() + b"\n")

    def note(self, what: str) -> None:
        """It is the kernel that ends this life, not the model."""


def _to_json(known: Known) -> str:
    acked, settled = (
        {k.hex(): v for k, v in each.items()} for each in (known.acked, known.settled)
    )
    return json.dumps([acked, settled, known.letters, known.mlflow_run_id])


def _from_json(line: str) -> Known:
    acked, settled, letters, mlflow_run_id = json.loads(line)
    return Known(*({bytes.fromhex(k): v for k, v in each.items()} for each in (acked, settled)), letters, mlflow_run_id)  # fmt: skip


def run(job: Job) -> Outcome:
    outcome = Outcome(
        f"The n-th {', '.join(CALLS)} of a process that lives the life of a spool (append, ack, "
        "deliver, letters, cards, ends, restarts) is its last, for every n; what it had said that it "
        "had acknowledged must be there",
        0,
        "kills",
    )
    outcome.skipped = why_not()
    if outcome.skipped:
        return outcome
    lives = 0
    logging.disable(logging.CRITICAL)
    try:
        while not job.is_over:
            for call in CALLS:
                number = 1
                while not job.is_over and kill_at(call, number, f"{job.seed}/{lives}", outcome):
                    number += 1
            lives += not job.is_over
    finally:
        logging.disable(logging.NOTSET)
    outcome.figures = {"lives killed at every call": f"{lives}"}
    return outcome


def why_not() -> str:
    """Return why this cannot be run here; "" if it can."""
    if platform.machine() != "x86_64":
        return "other machines have other names for these calls than x86_64"
    if shutil.which("strace") is None:
        return "strace is not installed"
    tried = subprocess.run(["strace", "-qq", "-o", "/dev/null", "true"], check=False)
    return "" if tried.returncode == 0 else "this user may not trace processes"


def kill_at(call: str, number: int, chance: str, outcome: Outcome) -> bool:
    """Return False if there is no such call any more: the process lived to its end."""
    with tempfile.TemporaryDirectory(prefix="relay-syscalls-", dir="/dev/shm") as path:
        root = Path(path) / "spool"
        inject = f"inject={call}:signal=KILL:when={number}"
        done = subprocess.run(
            [
                *("strace", "-f", "-qq", "-o", "/dev/null", "-e", f"trace={call}", "-e", inject),
                *(sys.executable, "-B", "-m", "tests.crash.cases.syscalls", str(root), chance),
            ],
            cwd=ROOT,
            capture_output=True,
            text=True,
            timeout=TIMEOUT_S,
            check=False,
        )
        if done.returncode == 0:
            return False
        outcome.count += 1
        outcome.goal += 1
        try:
            assert done.returncode in (-9, 137), f"status {done.returncode}: {done.stderr[-500:]}"
            said = done.stdout.splitlines(keepends=True)
            whole = [line for line in said if line.endswith("\n")]
            known = _from_json(whole[-1]) if whole else Known()
            with life.opened(Disk(), root) as spool:
                life.check(spool, known, in_order=True)
        except Exception as error:  # any is a finding
            outcome.found(f"{call} {number} of life {chance}: {error!r}")
    return True


def main() -> None:
    """Live one life: what is killed."""
    logging.disable(logging.CRITICAL)
    root, chance = Path(sys.argv[1]), sys.argv[2]
    teller = Teller(root)
    live = partial(life.live_by_chance, rng=random.Random(chance))
    live(teller, Disk())  # type: ignore[arg-type]


if __name__ == "__main__":
    main()
