"""EIO, ENOSPC, EDQUOT and short writes at every system call with which a spool changes its disk."""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import random
import tempfile
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import NamedTuple, TypeVar

from mlflow_relay_daemon.dead_letters import DeadLetters
from mlflow_relay_daemon.spool.disk import Disk
from mlflow_relay_daemon.spool.run_spool import RunSpool
from mlflow_relay_daemon.spool.spool import RunLeftAlone, Spool
from tests.crash import life
from tests.crash.outcome import Job, Outcome
from tests.crash.power import Known
from tests.crash.teller import Teller, last_known
from tests.crash.tracer import KILL, SHORT, Call, Fault, run_traced, why_not
from tests.support.spools import SESSION, new_card

T = TypeVar("T")

#: A disk that fails for longer than one call fails for so many.
OUTAGE_CALLS = 8
#: More than an outage has calls: a daemon that has not come back by then does not.
TRIES = 20
#: So many calls a start makes on what a kill has left.
RECOVERY_CALLS = 7

EIO, ENOSPC, EDQUOT = (
    Fault(errno.errorcode[each], each) for each in (errno.EIO, errno.ENOSPC, errno.EDQUOT)
)
#: What is done, and to how many calls in a row.
FAULTS = (
    (EIO, 1),
    (ENOSPC, 1),
    (EDQUOT, 1),
    (SHORT, 1),
    (EIO, OUTAGE_CALLS),
    (ENOSPC, OUTAGE_CALLS),
)


class Plan(NamedTuple):
    """One fault of one life."""

    chance: str  #: seed of the life
    first: int  #: of the calls that change the disk, from 1 on
    fault: Fault
    calls: int = 1  #: how many in a row
    killed_at: int = 0  #: a life before it was killed at this call; 0: there was none

    def __str__(self) -> str:
        before = f" after a kill at {self.killed_at}" if self.killed_at else ""
        return f"life {self.chance}{before}: {self.fault.name} at {self.calls} calls from {self.first} on"


class BadDisk:
    """Lets calls fail as planned, and remembers what of files a failed fsync has dropped.

    The kernel calls such pages clean and forgets them at its leisure; a later fsync returns 0. What
    was faked here is in memory still: `forget` takes it away.
    """

    def __init__(self, root: Path) -> None:
        self._root = root
        self.plan(0, EIO, 0)
        self._synced: dict[int, int] = {}  # bytes by inode
        self._dropped: dict[int, list[range]] = {}  # by inode

    def plan(self, first: int, fault: Fault, calls: int) -> None:
        """Let so many calls fail from one on; they are counted from here on, from 1."""
        self._due, self._fault = range(first, first + calls), fault
        self.calls: list[Call] = []  #: that change the disk
        self.failed: list[Call] = []

    def before(self, call: Call) -> Fault | None:
        if not call.changes(self._root):
            return None
        self.calls.append(call)
        if len(self.calls) not in self._due or (self._fault == SHORT and not call.can_be_short):
            return None
        self.failed.append(call)
        return self._fault

    def after(self, call: Call, result: int) -> None:
        if not call.changes(self._root) or not os.path.isfile(call.path):
            return
        found = os.stat(call.path)
        inode, size = found.st_ino, found.st_size
        synced, dropped = self._synced.get(inode, 0), self._dropped.setdefault(inode, [])
        if call.name in ("fsync", "fdatasync") and result == 0:
            self._synced[inode] = size
        elif call.name in ("fsync", "fdatasync"):
            dropped.append(range(synced, size))
        elif call.name in ("openat", "ftruncate"):  # what was cut off can be neither kept nor lost
            self._synced[inode] = min(synced, size)
            dropped[:] = [_within(each, size) for each in dropped]

    def forget(self) -> None:
        """Have on the disk what a kernel would have: zeroes where an fsync has failed."""
        for path in self._root.rglob("*"):
            found = path.lstat()
            for dropped in self._dropped.get(found.st_ino, []):
                with path.open("r+b") as file:
                    file.seek(dropped.start)
                    file.write(bytes(len(_within(dropped, found.st_size))))


def _within(places: range, size: int) -> range:
    """Return those of a file's places that are there if it has this size."""
    return range(places.start, min(places.stop, size))


# ── the life ──


def live(teller: Teller, rng: random.Random) -> None:
    """Live as a daemon does on a bad disk: what it does not take is tried again, or left for later;
    a start that fails is followed by another."""
    disk = Disk()
    for _ in range(rng.randint(1, 3)):
        with _started(disk, teller.root) as (_, run):
            life.attach(teller, run)  # type: ignore[arg-type]
            letters = DeadLetters(disk, run.folder)
            for _ in range(rng.randint(3, 12)):
                with contextlib.suppress(OSError):
                    life.do_something(teller, run, letters, rng)  # type: ignore[arg-type]
            _again(lambda run=run: _append_one(teller, run))


def come_back(teller: Teller) -> None:
    """Start on what a kill has left, tell the ranks what is there, and do no more."""
    with _started(Disk(), teller.root) as (_, run):
        life.attach(teller, run)  # type: ignore[arg-type]


def _append_one(teller: Teller, run: RunSpool) -> None:
    """Raises: OSError: it was not acknowledged."""
    before = teller.known.acked
    life.append(teller, run, (SESSION, 1))  # type: ignore[arg-type]
    if teller.known.acked == before:
        raise OSError(errno.EIO, "not acknowledged")


@contextlib.contextmanager
def _started(disk: Disk, root: Path) -> Iterator[tuple[Spool, RunSpool]]:
    spool, run = _again(lambda: _start(disk, root))
    try:
        yield spool, run
    finally:
        spool.close()


def _start(disk: Disk, root: Path) -> tuple[Spool, RunSpool]:
    """Raises: OSError, RunLeftAlone: the disk does not let it."""
    spool = Spool(disk, root, segment_bytes_max=life.SEGMENT_BYTES)
    try:
        run = spool.open_run(new_card(life.SESSIONS))
        run.save_card()
    except BaseException:
        spool.close()
        raise
    return spool, run


def _again(step: Callable[[], T]) -> T:
    """Try until the disk is well again. Raises: OSError, RunLeftAlone: that does not help."""
    for _ in range(TRIES):
        with contextlib.suppress(OSError, RunLeftAlone):
            return step()
    return step()


# ── the case ──


def run(job: Job) -> Outcome:
    outcome = Outcome(
        "A process lives the life of a spool (append, ack, deliver, letters, cards, ends, restarts), "
        "and each of the system calls by which it changes its disk (write, fdatasync, fsync, rename, "
        "unlink, mkdir, rmdir, open for writing, fallocate, ftruncate) fails in turn: with EIO, "
        f"ENOSPC, EDQUOT, as a short write, and with EIO or ENOSPC for {OUTAGE_CALLS} calls on end. "
        "What a failed fsync had not brought to the disk is zeroed, as a kernel does that drops it. "
        "The process goes on and stores again when the disk is well; what it had said that it had "
        "acknowledged is there",
        0,
        "faults",
    )
    outcome.skipped = why_not()
    if outcome.skipped:
        return outcome
    lives = 0
    kinds: dict[str, int] = {}
    logging.disable(logging.CRITICAL)
    try:
        while not job.is_over:
            for plan in plans(f"{job.seed}/{lives}"):
                if job.is_over:
                    break
                for name in try_plan(plan, outcome):
                    kinds[name] = kinds.get(name, 0) + 1
            lives += not job.is_over
    finally:
        logging.disable(logging.NOTSET)
    outcome.figures = {
        "lives in which every call failed in every way": f"{lives:,}",
        **{f"failed {name}": f"{count:,}" for name, count in sorted(kinds.items())},
    }
    return outcome


def plans(chance: str) -> Iterator[Plan]:
    """Yield every fault of one life, and of one that finds what a kill has left; they are lived once
    without any."""
    for number, call in enumerate(_calls_of(chance), 1):
        for fault, count in FAULTS:
            if fault != SHORT or call.can_be_short:
                yield Plan(chance, number, fault, count)
        if call.name == "fdatasync":  # what is killed there has written and not synced
            for first in range(1, RECOVERY_CALLS + 1):
                yield Plan(chance, first, EIO, killed_at=number)


def _calls_of(chance: str) -> list[Call]:
    with tempfile.TemporaryDirectory(prefix="relay-disk-", dir="/dev/shm") as path:
        disk = BadDisk(Path(path) / "spool")
        ended = run_traced(partial(live, Teller(Path(path) / "spool"), random.Random(chance)), disk)
        assert ended.status == 0, ended.said[-500:]
        return disk.calls


def try_plan(plan: Plan, outcome: Outcome) -> list[str]:
    """Return the names of the calls that failed."""
    with tempfile.TemporaryDirectory(prefix="relay-disk-", dir="/dev/shm") as path:
        root = Path(path) / "spool"
        disk = BadDisk(root)
        known = Known()
        lives = partial(live, Teller(root), random.Random(plan.chance))
        if plan.killed_at:
            disk.plan(plan.killed_at, KILL, 1)
            known = last_known(run_traced(lives, disk).said)
            lives = partial(come_back, Teller(root, known))
        disk.plan(plan.first, plan.fault, plan.calls)
        ended = run_traced(lives, disk)
        outcome.count += 1
        outcome.goal += 1
        try:
            assert disk.failed, "no call failed"
            assert ended.status == 0, f"status {ended.status}: {ended.said[-1500:]}"
            disk.forget()
            with life.opened(Disk(), root) as spool:
                life.check(spool, last_known(ended.said, known), in_order=plan.calls == 1)
        except Exception as error:  # any is a finding
            outcome.found(f"{plan}, {[each.name for each in disk.failed][:1]}: {error!r}")
    return [f"{each.name} ({plan.fault.name})" for each in disk.failed]
