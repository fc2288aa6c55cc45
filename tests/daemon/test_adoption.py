"""Dead ranks' journals: real processes with real locks, killed; what they left is taken over."""

from __future__ import annotations

import errno
import itertools
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import msgpack
import pytest

from mlflow_relay.journal import Journal
from mlflow_relay.messages import pack_map
from mlflow_relay_daemon import adoption
from mlflow_relay_daemon.adoption import Watcher
from mlflow_relay_daemon.counters import Counters
from mlflow_relay_daemon.hosted import Runs
from mlflow_relay_daemon.lane.links import LineageParams
from mlflow_relay_daemon.spool.spool import UNREAD_EVERY_S, Spool
from tests.support.seeds import new_seed
from tests.support.spools import (
    RUN_ID,
    SESSION,
    FailingDisk,
    attachment,
    found_in,
    frame_of_metrics,
    metrics,
    seqs_in,
)

OTHER = bytes(16)
OTHER_RUN = "f" * 32
FILE_BYTES = 64 << 10

#: A rank that lives until its stdin ends. A lock is not seen by the process that holds it, so it
#: must be another process; and it starts faster without the rest of the client.
RANK = """
import sys, msgpack
from pathlib import Path
from mlflow_relay.journal import Journal
told = msgpack.unpackb(sys.stdin.buffer.read(int.from_bytes(sys.stdin.buffer.read(8), "big")))
journal = Journal(Path(told["folder"]), told["session"], told["card"],
                  bytes_max=64 << 20, file_bytes=65536)
for record in told["records"]:
    assert journal.append(record)
for _ in range(told["lost"]):
    assert not journal.append(bytes(1 << 20))
for _ in range(told["acked"]):
    frame = journal.next_frame()
    journal.mark_sent(frame)
    journal.ack(frame.next_seq)
if told["spare"]:
    journal.prepare()
print("ready", flush=True)
sys.stdin.buffer.read()
"""


class Crash(BaseException):
    """The daemon is killed here."""


class Node:
    """A folder of journals, and a daemon's spool and watcher, that come and go."""

    def __init__(self, folder: Path) -> None:
        self.journals = folder / "journals"
        self.journals.mkdir()
        self._spool_folder = folder / "spool"
        self._ranks: list[subprocess.Popen[bytes]] = []
        self.spool: Spool | None = None
        self.start()

    def start(self, disk: FailingDisk | None = None) -> None:
        """A daemon that comes after another was killed."""
        if self.spool is not None:
            self.watcher.close()
            self.spool.close()
        self.disk = disk or FailingDisk()
        self.spool = Spool(self.disk, self._spool_folder, segment_bytes_max=1 << 20)
        self.counters = Counters()
        self.runs = Runs(self.spool, None, None, None, LineageParams())
        self.watcher = WatcherThatCloses(self.journals, self.runs, self.counters)

    def rank(
        self,
        records: Sequence[bytes] = (),
        session: bytes = SESSION,
        *,
        run_id: str = RUN_ID,
        lost: int = 0,
        acked_frames: int = 0,
        spare: bool = False,
        **fields: Any,
    ) -> subprocess.Popen[bytes]:
        """Start a rank that has logged these records."""
        process = subprocess.Popen(
            [sys.executable, "-c", RANK], stdin=subprocess.PIPE, stdout=subprocess.PIPE
        )
        self._ranks.append(process)
        told = msgpack.packb(
            {
                "folder": str(self.journals),
                "session": session,
                "card": card(session, run_id=run_id, **fields),
                "records": list(records),
                "lost": lost,
                "acked": acked_frames,
                "spare": spare,
            }
        )
        assert process.stdin is not None
        assert process.stdout is not None
        process.stdin.write(len(told).to_bytes(8, "big") + told)
        process.stdin.flush()
        assert process.stdout.readline() == b"ready\n"
        return process

    def look(self, heard_s: dict[bytes, float] | None = None) -> list[bytes]:
        return self.watcher.look(heard_s or {}, time.monotonic())

    def left(self) -> list[str]:
        return sorted(path.name for path in self.journals.iterdir())

    def quarantined(self) -> list[str]:
        assert self.spool is not None
        folder = self.spool.folder / "quarantine"
        return sorted(path.name.partition("-")[2] for path in folder.iterdir())

    def seqs(self, session: bytes = SESSION, run_id: str = RUN_ID) -> list[int]:
        return seqs_in(self.runs.by_id[run_id].run, session)

    def session_card(self, session: bytes = SESSION, run_id: str = RUN_ID) -> Any:
        return self.runs.by_id[run_id].run.card.sessions[session.hex()]

    def close(self) -> None:
        for process in self._ranks:
            process.kill()
            process.wait()
            assert process.stdin is not None
            assert process.stdout is not None
            process.stdin.close()
            process.stdout.close()
        self.watcher.close()
        assert self.spool is not None
        self.spool.close()


class WatcherThatCloses(Watcher):
    """A watcher whose locks end with it, as they end with the process of a daemon."""

    def close(self) -> None:
        for watched in self._watched.values():
            os.close(watched.fd)
        self._watched.clear()


def card(session: bytes = SESSION, **fields: Any) -> bytes:
    known = vars(attachment(session)) | {"session": session} | fields
    del known["first_seq"]
    return pack_map(known)


def kill(process: subprocess.Popen[bytes]) -> None:
    process.send_signal(signal.SIGKILL)
    process.wait()


def records(first: int, count: int, *, size: int = 2) -> list[bytes]:
    return [metrics(seq, size=size) for seq in range(first, first + count)]


@pytest.fixture
def node() -> Iterator[Node]:
    with tempfile.TemporaryDirectory(prefix="relay-adoption-", dir="/dev/shm") as path:
        node = Node(Path(path))
        try:
            yield node
        finally:
            node.close()


# ── the living ──


def test_who_lives_is_left_alone_and_counted(node):
    process = node.rank(records(0, 7), lost=3)
    node.runs.attach(attachment())
    before = node.left()
    for _ in range(3):
        assert node.look() == []

    hosted = node.runs.by_id[RUN_ID]
    assert node.watcher.in_journals(hosted) == 7
    assert node.watcher.lost(hosted) == 3
    assert node.seqs() == []
    assert node.left() == before
    assert process.poll() is None


def test_a_rank_that_is_stopped_lives(node):
    process = node.rank(records(0, 7))
    process.send_signal(signal.SIGSTOP)
    assert node.look() == []

    process.send_signal(signal.SIGCONT)
    assert len(node.left()) == 2


# ── the dead ──


def test_what_a_killed_rank_had_is_in_the_spool_and_its_journal_is_gone(node):
    process = node.rank(records(0, 7), lost=3, spare=True)
    node.runs.attach(attachment())
    assert node.look() == []
    kill(process)

    assert node.look() == [SESSION]

    assert node.seqs() == list(range(7))
    assert found_in(node.runs.by_id[RUN_ID].run) == [
        (SESSION, seq, metrics(seq)) for seq in range(7)
    ]
    assert node.session_card().closed
    assert node.session_card().lost == 3
    assert node.session_card().end_status is None
    assert node.left() == []
    assert node.look() == []
    assert node.quarantined() == []
    node.start()
    assert node.seqs() == list(range(7))
    assert node.session_card().closed


def test_a_run_that_nobody_ever_told_of_is_known_from_the_journal(node):
    kill(node.rank(records(0, 7), rank=2, experiment_name="o96"))

    assert node.look() == [SESSION]

    run = node.runs.by_id[RUN_ID].run
    assert run.card.experiment_name == "o96"
    assert node.session_card().rank == 2
    assert node.seqs() == list(range(7))


def test_what_the_rank_had_sent_is_not_taken_twice(node):
    process = node.rank(records(0, 10))
    hosted = node.runs.attach(attachment())
    hosted.run.append([frame_of_metrics(0, 4)])
    kill(process)
    node.look()

    assert node.seqs() == list(range(10))
    assert hosted.run.next_seq(SESSION) == 10


def test_what_was_acknowledged_by_a_spool_that_is_lost_is_not_waited_for(node):
    """Only what the journal's files still have can be saved; all of it is, acknowledged or not."""
    process = node.rank(records(0, 2000, size=20), acked_frames=2)
    kill(process)
    node.look()

    seqs = node.seqs()
    assert seqs == list(range(seqs[0], 2000))
    assert 0 < seqs[0] < 2000
    assert node.session_card().first_seq == seqs[0]
    assert node.session_card().closed
    assert node.left() == []


def test_a_long_journal_is_taken_in_order(node):
    process = node.rank(records(0, 3000, size=15))
    assert len(node.left()) > 5
    kill(process)
    while not node.look():
        pass

    assert node.seqs() == list(range(3000))
    assert node.left() == []


def test_files_are_taken_in_the_order_of_their_records_not_of_their_names(node):
    """A file that is made in a hurry may be in use before one that was begun earlier."""
    process = node.rank(records(0, 1500, size=15))
    kill(process)
    entries = sorted(node.journals.glob("*.entries"))
    assert len(entries) >= 4
    names = [path.name for path in entries]
    moved = [path.rename(path.with_suffix(".moved")) for path in entries]
    for path, name in zip(moved, reversed(names), strict=True):
        path.rename(node.journals / name)
    while not node.look():
        pass

    assert node.seqs() == list(range(1500))
    assert node.quarantined() == []


def test_a_look_that_takes_long_goes_on_at_the_next(node, monkeypatch):
    """Ranks that live are served meanwhile; and a dead one's long journal is taken to its end."""
    for index in range(3):
        kill(node.rank(records(0, 600, size=15), bytes([index]) * 16, rank=index))
    clock = itertools.count()
    monkeypatch.setattr(adoption, "time", Clock(lambda: next(clock) * adoption.LOOK_BUDGET_S / 2.5))
    over: list[bytes] = []
    for looks in range(200):  # noqa: B007  # its last value is asked below
        over += node.watcher.look({}, adoption.time.monotonic())
        if not node.watcher.is_behind:
            break
    assert looks > 3
    assert sorted(over) == [bytes([index]) * 16 for index in range(3)]
    for index in range(3):
        assert node.seqs(bytes([index]) * 16) == list(range(600))
    assert node.left() == []


class Clock:
    """Stands for the time module in a room that asks it for the time."""

    def __init__(self, monotonic: Callable[[], float]) -> None:
        self.monotonic = monotonic

    time = staticmethod(time.time)


def test_many_dead_ranks_of_many_runs_are_taken_apart(node):
    for index in range(6):
        session, run_id = bytes([index]) * 16, f"{index % 2:032x}"
        kill(node.rank(records(0, 10 + index), session, run_id=run_id, rank=index))
    over = node.look()

    assert len(over) == 6
    for index in range(6):
        assert node.seqs(bytes([index]) * 16, f"{index % 2:032x}") == list(range(10 + index))


# ── a disk that fails ──


def test_dead_ranks_of_a_run_that_can_be_read_only_later_are_taken_then(node):
    """One has left a journal; of the other, whose node lost its power, nothing is left."""
    node.runs.attach(attachment(OTHER, rank=1))
    kill(node.rank(records(0, 7)))
    disk = FailingDisk()
    disk.fail("sync", ".segment")
    disk.fail("rename", ".segment")
    node.look()
    assert node.seqs() == list(range(7))
    kill(node.rank(records(0, 9), b"journal of a rank"[:16], rank=2))
    node.start(disk)
    assert node.look() == []
    assert node.runs.by_id == {}

    assert node.runs.host_unread(time.monotonic() + UNREAD_EVERY_S)
    node.watcher.expect_vanished()
    node.look()

    assert node.seqs() == list(range(7))
    assert node.seqs(b"journal of a rank"[:16]) == list(range(9))
    assert node.runs.by_id[RUN_ID].run.card.sessions[OTHER.hex()].closed
    assert node.left() == []


@pytest.mark.parametrize("operation", ["write", "sync", "create", "sync_folder"])
def test_what_the_spool_cannot_take_waits_and_its_losses_are_counted_once(node, operation):
    kill(node.rank(records(0, 700, size=15), lost=5))
    before = node.left()
    node.disk.fail(operation, error=errno.ENOSPC, times=-1)
    for _ in range(4):
        assert node.look() == []
    assert node.left() == before
    assert node.counters.fsync_failures >= 1
    node.disk.mend()
    while not node.look():
        pass

    assert node.seqs() == list(range(700))
    assert node.runs.by_id[RUN_ID].run.card.lost_records == 5
    assert node.left() == []


def test_the_quota_holds_for_the_dead_too(node):
    kill(node.rank(records(0, 700, size=15)))
    assert node.spool is not None
    node.spool.bytes_max = 0
    assert node.look() == []
    assert len(node.left()) > 1

    node.spool.bytes_max = None
    while not node.look():
        pass
    assert node.seqs() == list(range(700))


def test_an_end_that_cannot_be_written_leaves_the_journal_for_the_next_look(node):
    process = node.rank(records(0, 5), lost=2)
    node.runs.attach(attachment())
    kill(process)
    node.disk.fail("sync", "card")
    assert node.look() == []
    assert not node.session_card().closed

    assert node.look() == [SESSION]
    assert node.session_card().closed
    assert node.session_card().lost == 2
    assert node.seqs() == list(range(5))


class KillingDisk(FailingDisk):
    """Kills the daemon before one of its operations."""

    def __init__(self, at: int) -> None:
        super().__init__()
        self._at = at

    def _due(self, operation: str, path: Path) -> Any:
        if len(self.asked) == self._at:
            raise Crash(f"{operation} of {path.name}")
        return super()._due(operation, path)


def test_a_daemon_killed_at_any_moment_of_the_adoption_loses_and_doubles_nothing(node, tmp_path):
    kill(node.rank(records(0, 900, size=15), lost=4))
    kept = tmp_path / "kept"
    shutil.copytree(node.journals, kept)
    node.watcher.close()
    for at in itertools.count():
        assert node.spool is not None
        node.spool.close()
        shutil.rmtree(node.spool.folder)
        shutil.rmtree(node.journals)
        shutil.copytree(kept, node.journals)
        node.spool = None
        crashed = False
        try:
            node.start(KillingDisk(at))
            while not node.look():
                pass
        except Crash:
            crashed = True
        if node.spool is None:
            node.spool = Spool(FailingDisk(), node._spool_folder, segment_bytes_max=1 << 20)
        node.start()
        for _ in range(100):
            if not node.left():
                break
            node.look()
        else:
            raise AssertionError("the journal is never taken")
        if RUN_ID in node.runs.by_id:
            assert sorted(set(node.seqs())) == list(range(900))
            assert node.session_card().lost == 4
            assert node.session_card().closed
        assert node.quarantined() == []
        if not crashed:
            break
    assert at > 10


# ── damage ──


def test_a_damaged_record_costs_itself_alone_and_is_counted_at_the_end(node):
    kill(node.rank(records(0, 20)))
    (path,) = node.journals.glob("*.entries")
    data = bytearray(path.read_bytes())
    size = len(metrics(0)) + 8
    data[64 + 7 * size + 20] ^= 0xFF
    path.write_bytes(data)
    assert node.look() == [SESSION]

    assert node.seqs() == [seq for seq in range(20) if seq != 7]
    run = node.runs.by_id[RUN_ID].run
    assert run.next_seq(SESSION) == 20
    assert run.sequences.missing == 1
    assert node.left() == []


def flipped_copies(folder: Path, path: Path, places: Sequence[int]) -> Iterator[int]:
    data = path.read_bytes()
    for at in places:
        damaged = bytearray(data)
        damaged[at] ^= 0xFF
        path.write_bytes(damaged)
        yield at
    path.write_bytes(data)


def test_no_damaged_byte_of_a_journal_stops_the_daemon_or_costs_another_rank(node, tmp_path):
    """Whatever it hits: heads, versions, counters, cards, entries."""
    kill(node.rank(records(0, 5)))
    kill(node.rank(records(0, 6), OTHER, run_id=OTHER_RUN))
    kept = tmp_path / "kept"
    shutil.copytree(node.journals, kept)
    seed = new_seed()
    print(f"seed {seed}")
    rng = random.Random(seed)
    base, entries = kept / f"{SESSION.hex()}.journal", kept / f"{SESSION.hex()}.000001.entries"
    in_use = 64 + 5 * (len(metrics(0)) + 8)
    places = [(entries, at) for at in (*range(48), *rng.sample(range(64, in_use), 40))]
    places += [
        (base, at) for at in (*range(48), *rng.sample(range(64, len(base.read_bytes())), 40))
    ]
    for original, at in places:
        node.watcher.close()
        assert node.spool is not None
        node.spool.close()
        shutil.rmtree(node.spool.folder)
        shutil.rmtree(node.journals)
        shutil.copytree(kept, node.journals)
        node.spool = None
        node.start()
        path = node.journals / original.name
        data = bytearray(path.read_bytes())
        data[at] ^= 0xFF
        path.write_bytes(data)
        over = node.look() + node.look()

        assert OTHER in over, (original.name, at)
        assert node.seqs(OTHER, OTHER_RUN) == list(range(6))
        if RUN_ID in node.runs.by_id and SESSION.hex() in node.runs.by_id[RUN_ID].run.card.sessions:
            for _, seq, record in found_in(node.runs.by_id[RUN_ID].run):
                assert record == metrics(seq), (original.name, at)
        if original == base and at >= 64:  # the card is damaged: nobody knows whose it is
            assert len(node.quarantined()) == 2


@pytest.mark.parametrize("word", [2, 3, 4])
@pytest.mark.parametrize("is_known", [True, False])
def test_a_damaged_counter_invents_no_loss_and_hides_no_record(node, word, is_known):
    """Of the next number, of the acknowledged, of the lost calls: each is far off."""
    process = node.rank(records(0, 9), lost=3)
    if is_known:
        node.runs.attach(attachment())
    kill(process)
    (path,) = node.journals.glob("*.journal")
    data = bytearray(path.read_bytes())
    data[8 * word + 6] ^= 0xFF
    path.write_bytes(data)
    assert node.look() == [SESSION]

    run = node.runs.by_id[RUN_ID].run
    assert node.seqs() == list(range(9))
    assert run.next_seq(SESSION) == 9
    assert run.sequences.missing == 0
    assert node.session_card().lost == 0
    assert node.left() == node.quarantined() == []


def test_a_damaged_base_costs_nothing_where_the_session_is_known(node):
    process = node.rank(records(0, 9))
    node.runs.attach(attachment())
    kill(process)
    (path,) = node.journals.glob("*.journal")
    path.write_bytes(b"noise" * 30)
    assert node.look() == [SESSION]

    assert node.seqs() == list(range(9))
    # Its counters are noise, too: nothing is said to be missing.
    assert node.runs.by_id[RUN_ID].run.next_seq(SESSION) == 9
    assert node.session_card().lost == 0
    assert node.session_card().closed
    assert node.left() == []


def test_a_journal_of_a_later_release_is_left_alone_and_the_others_are_taken(node):
    for session, run_id in ((SESSION, RUN_ID), (OTHER, OTHER_RUN)):
        kill(node.rank(records(0, 5), session, run_id=run_id))
    for path in node.journals.glob(f"{SESSION.hex()}.*"):
        data = path.read_bytes()
        path.write_bytes(data[:3] + b"\2" + data[4:])
    for _ in range(3):
        node.look()

    assert node.seqs(OTHER, OTHER_RUN) == list(range(5))
    assert [name for name in node.left() if name.endswith(".journal")] == [
        f"{SESSION.hex()}.journal"
    ]
    assert node.quarantined() == []


@pytest.mark.parametrize(
    "name", ["noise.journal", f"{'0' * 32}.x.journal", "abcd.journal", ".journal"]
)
def test_what_only_looks_like_a_journal_is_put_aside_once(node, name):
    (node.journals / name).write_bytes(b"noise")
    kill(node.rank(records(0, 5)))
    for _ in range(3):
        node.look()

    assert node.seqs() == list(range(5))
    assert node.quarantined() == [name]
    assert node.left() == []


def test_a_folder_that_is_not_there_yet_is_empty(node):
    shutil.rmtree(node.journals)

    assert node.look() == []


# ── what is left by those who were killed in the making ──


def test_unfinished_files_are_removed_when_they_are_old(node):
    old, young = "aa" * 16, "bb" * 16
    for name in (f"{old}.new", f"{old}.000001.entries", f"{young}.new", f"{young}.000001.entries"):
        (node.journals / name).write_bytes(bytes(100))
        if name.startswith(old):
            then_s = time.time() - adoption.UNFINISHED_AGE_S - 5
            os.utime(node.journals / name, (then_s, then_s))
    node.look()

    assert node.left() == [f"{young}.000001.entries", f"{young}.new"]


def make_old(node: Node) -> None:
    for path in node.journals.iterdir():
        os.utime(path, (0, 0))


def test_entries_whose_base_file_is_gone_are_taken_where_their_session_is_known(node):
    process = node.rank(records(0, 9), spare=True)
    node.runs.attach(attachment())
    kill(process)
    node.start()  # another daemon, that has never seen the base file
    next(node.journals.glob("*.journal")).unlink()
    assert node.look() == []  # young: somebody may be making his journal
    assert not node.session_card().closed

    make_old(node)
    assert node.look() == [SESSION]
    assert node.seqs() == list(range(9))
    assert node.session_card().closed
    assert node.left() == node.quarantined() == []


def test_entries_whose_base_file_is_gone_and_that_nobody_knows_are_put_aside(node):
    kill(node.rank(records(0, 9), spare=True))
    next(node.journals.glob("*.journal")).unlink()
    make_old(node)
    node.look()

    assert node.quarantined() == [
        f"{SESSION.hex()}.000001.entries",
        f"{SESSION.hex()}.000002.entries",
    ]
    assert node.left() == []


def test_a_rank_whose_base_file_was_removed_lives_until_its_lock_is_free(node):
    process = node.rank(records(0, 9))
    node.runs.attach(attachment())
    node.look()
    next(node.journals.glob("*.journal")).unlink()
    make_old(node)
    assert node.look() == []
    assert len(node.left()) == 1

    kill(process)
    assert node.look() == [SESSION]
    assert node.seqs() == list(range(9))
    assert node.session_card().closed


def test_entries_of_a_later_release_without_a_base_file_are_left_alone(node):
    kill(node.rank(records(0, 9)))
    node.runs.attach(attachment())
    next(node.journals.glob("*.journal")).unlink()
    (path,) = node.journals.iterdir()
    data = path.read_bytes()
    path.write_bytes(data[:3] + b"\2" + data[4:])
    make_old(node)
    for _ in range(2):
        assert node.look() == []

    assert node.left() == [path.name]
    assert path.read_bytes()[4:] == data[4:]


def test_what_is_nothing_of_a_journal_is_left_where_it_is(node):
    strangers = ["notes.txt", ".hidden", f"{'c' * 32}.txt", f"{'c' * 31}.000001.entries"]
    for name in strangers:
        (node.journals / name).write_text("foreign")
    folders = [
        f"{'d' * 32}.journal",
        f"{'e' * 32}.000001.entries",
        f"{SESSION.hex()}.000007.entries",
    ]
    for name in folders:
        (node.journals / name).mkdir()
        (node.journals / name / "file").write_text("foreign")
    kill(node.rank(records(0, 5)))
    make_old(node)
    for _ in range(3):
        node.look()

    assert node.seqs() == list(range(5))
    assert node.left() == sorted([*strangers, *folders])
    assert node.quarantined() == []
    assert node.counters.fsync_failures == node.counters.bad_messages == 0


def test_entries_of_a_living_rank_are_never_too_old(node):
    node.rank(records(0, 5))
    for path in node.journals.iterdir():
        os.utime(path, (0, 0))
    before = node.left()
    node.look()

    assert node.left() == before


# ── sessions without a journal ──


def test_a_session_that_a_former_daemon_knew_and_that_left_nothing_is_over(node):
    node.runs.attach(attachment())
    node.runs.attach(attachment(OTHER, rank=1))
    living = node.rank(records(0, 5), OTHER, rank=1)
    node.start()
    node.look()

    assert node.session_card().closed
    assert not node.session_card(OTHER).closed
    kill(living)


def test_a_session_whose_journal_is_not_to_be_seen_lives_while_it_is_heard(node):
    node.look()  # the first look closes what a former daemon knew
    node.runs.attach(attachment())
    now_s = time.monotonic()
    assert node.look({SESSION: now_s - adoption.UNSEEN_TIMEOUT_S + 20}) == []
    assert not node.session_card().closed

    assert node.look({SESSION: now_s - adoption.UNSEEN_TIMEOUT_S - 1}) == [SESSION]
    assert node.session_card().closed


def test_a_session_with_a_locked_journal_lives_though_it_is_not_heard(node):
    """A training that is stopped in a debugger, or waits for its data, says nothing."""
    node.rank(records(0, 5))
    node.runs.attach(attachment())

    assert node.look({SESSION: time.monotonic() - 3600}) == []
    assert not node.session_card().closed


# ── the clean way ──


def test_a_rank_that_removes_its_journal_in_peace_is_no_case(node):
    node.look()
    journal = Journal(node.journals, OTHER, card(OTHER), bytes_max=1 << 20, file_bytes=FILE_BYTES)
    journal.close(unlink=True)

    assert node.look() == []
    assert node.left() == []
    assert node.counters.fsync_failures == node.counters.bad_messages == 0


def test_looking_opens_each_journal_once_and_lets_go_of_it(node):
    processes = [node.rank(records(0, 2), bytes([index]) * 16, rank=index) for index in range(3)]
    node.look()
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(20):
        node.look()
    assert len(os.listdir("/proc/self/fd")) == before
    for process in processes:
        kill(process)
    node.look()
    node.look()

    assert node.watcher._watched == {}
