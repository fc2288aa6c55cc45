"""The journal: against a model, and with real signals, threads, forks, locks and full disks."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import textwrap
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from mlflow_relay.errors import JournalError
from mlflow_relay.frames import ENTRY_BYTES, HEADER_BYTES, iter_entries, read_frame
from mlflow_relay.journal import END_BYTES_MAX, Journal, SentFrame
from mlflow_relay.journal_files import ENTRIES_AT, read_base, salvage_entries
from tests.support.seeds import new_seed

SESSION = bytes(range(16))
CARD = b"what the daemon must know"
FILE_BYTES = 64 << 10
PATIENCE_S = 60.0


@pytest.fixture
def journal(folder: Path) -> Iterator[Journal]:
    with contextlib.closing(Opened(folder)) as opened:
        yield opened.journal


class Opened:
    """A journal that is closed once, whoever closes it."""

    def __init__(self, folder: Path, bytes_max: int = 4 * FILE_BYTES) -> None:
        self.journal = Journal(folder, SESSION, CARD, bytes_max=bytes_max, file_bytes=FILE_BYTES)

    def close(self) -> None:
        if self.journal._oldest is not None:
            self.journal.close(unlink=True)


def salvaged(folder: Path, from_seq: int = 0) -> dict[int, bytes]:
    """Return what a daemon would find after the death of the rank, by sequence number."""
    found: dict[int, bytes] = {}
    for path in folder.glob("*.entries"):
        salvage = salvage_entries(path.read_bytes(), SESSION, from_seq)
        assert salvage.damaged == 0
        for frame in salvage.frames:
            found |= numbered(frame)
    return dict(sorted(found.items()))


def numbered(frame: bytes) -> dict[int, bytes]:
    header = read_frame(frame)
    assert header.session == SESSION
    records = list(iter_entries(frame[HEADER_BYTES:]))
    assert len(records) == header.records
    assert None not in records
    return dict(enumerate(records, header.first_seq))  # type: ignore[arg-type]


def send_all(journal: Journal) -> list[SentFrame]:
    frames = []
    while (frame := journal.next_frame()) is not None:
        journal.mark_sent(frame)
        frames.append(frame)
    return frames


# ── the model ──


class JournalMachine(RuleBasedStateMachine):
    """A journal is a list of records, with two places in it: acknowledged, and sent."""

    def __init__(self) -> None:
        super().__init__()
        self.folder = Path(tempfile.mkdtemp(prefix="relay-journal-", dir="/dev/shm"))
        self.records: list[bytes] = []
        self.acked = self.sent = self.lost = 0
        self.cuts: list[int] = []

    @initialize(files=st.integers(1, 5))
    def make(self, files: int) -> None:
        self.bytes_max = files * FILE_BYTES
        self.journal = Opened(self.folder, self.bytes_max).journal

    def teardown(self) -> None:
        if hasattr(self, "journal"):
            self.journal.close(unlink=True)
            left = sorted(os.listdir(self.folder))
        shutil.rmtree(self.folder)
        assert not hasattr(self, "journal") or left == []

    @rule(size=st.integers(1, 3000) | st.integers(3000, 30_000), times=st.integers(1, 30))
    def append(self, size: int, times: int) -> None:
        for _ in range(times):
            record = len(self.records).to_bytes(4, "big") + bytes(size)
            if self.journal.append(record):
                self.records.append(record)
            else:
                self.lost += 1
                kept = sum(ENTRY_BYTES + len(each) for each in self.records[self.acked :])
                # A loss needs a reason: a file or two may be partly acknowledged or partly free.
                reserved = self.bytes_max // FILE_BYTES * END_BYTES_MAX
                assert kept + 2 * FILE_BYTES + reserved > self.bytes_max

    @rule()
    def prepare(self) -> None:
        self.journal.prepare()

    @rule(frames=st.integers(1, 8))
    def send(self, frames: int) -> None:
        for _ in range(frames):
            frame = self.journal.next_frame()
            if frame is None:
                assert self.sent == len(self.records)
                return
            expected = dict(enumerate(self.records[self.sent : frame.next_seq], self.sent))
            assert numbered(frame.data) == expected
            assert (frame.first_seq, frame.next_seq) == (self.sent, self.sent + len(expected))
            self.journal.mark_sent(frame)
            self.sent = frame.next_seq
            self.cuts.append(self.sent)

    @rule()
    def ask_without_sending(self) -> None:
        first, second = self.journal.next_frame(), self.journal.next_frame()
        assert (first and first.data) == (second and second.data)

    @precondition(lambda self: self.sent > self.acked)
    @rule(data=st.data())
    def ack(self, data: st.DataObject) -> None:
        self.acked = data.draw(st.sampled_from([cut for cut in self.cuts if cut > self.acked]))
        self.journal.ack(self.acked)
        self.cuts = [cut for cut in self.cuts if cut > self.acked]

    @rule()
    def ack_again(self) -> None:
        self.journal.ack(self.acked)
        self.journal.ack(0)

    @rule(data=st.data())
    def rewind(self, data: st.DataObject) -> None:
        """A daemon may have any number of the records that were ever sent to it: frames are cut
        anew when they are sent again, and an older frame may have been the one that it kept."""
        self.acked = data.draw(st.integers(self.acked, self.sent))
        self.journal.rewind(self.acked)
        self.sent = self.acked
        self.cuts = []

    @precondition(lambda self: self.sent == len(self.records))
    @rule()
    def ack_all_and_go_on(self) -> None:
        """Space is given back: a journal of which all is acknowledged takes records again."""
        self.acked = self.sent
        self.journal.ack(self.acked)
        self.cuts = []
        self.journal.prepare()
        record = len(self.records).to_bytes(4, "big") + bytes(10_000)
        assert self.journal.append(record), "all is acknowledged, and the journal is full"
        self.records.append(record)

    @invariant()
    def counts_agree(self) -> None:
        if not hasattr(self, "journal"):
            return
        assert self.journal.next_seq == len(self.records)
        assert self.journal.acked == self.acked
        assert self.journal.unacked == len(self.records) - self.acked
        assert self.journal.lost == self.lost
        assert (self.journal.in_flight_bytes > 0) == (self.sent > self.acked)

    @invariant()
    def a_daemon_would_find_all_that_is_not_acknowledged(self) -> None:
        if not hasattr(self, "journal"):
            return
        base = read_base(self.journal.path.read_bytes())
        assert base == (CARD, len(self.records), self.acked, self.lost)
        expected = dict(enumerate(self.records[self.acked :], self.acked))
        assert salvaged(self.folder, self.acked) == expected

    @invariant()
    def the_limit_holds(self) -> None:
        taken = sum(path.stat().st_size for path in self.folder.glob("*.entries"))
        assert taken <= getattr(self, "bytes_max", 0)


JournalMachine.TestCase.settings = settings(max_examples=40, stateful_step_count=25, deadline=None)
test_the_journal_behaves_as_a_list_with_two_places_in_it = JournalMachine.TestCase


@pytest.mark.parametrize("bytes_max", [FILE_BYTES, 100_000, 3 * FILE_BYTES // 2, 20 * FILE_BYTES])
def test_any_size_of_journal_serves_a_long_run_whose_records_are_acknowledged(folder, bytes_max):
    opened = Opened(folder, bytes_max)
    with contextlib.closing(opened):
        journal = opened.journal
        for number in range(1000):
            journal.prepare()
            assert journal.append(number.to_bytes(4, "big") + bytes(1000)), f"lost {number}"
            send_all(journal)
            journal.ack(journal.next_seq)

        assert journal.lost == 0


# ── full, and space again ──


def test_growth_spans_files_and_comes_back_in_order(folder, journal):
    records = [number.to_bytes(4, "big") + bytes(999) for number in range(150)]

    assert all(journal.append(record) for record in records)

    assert len(list(folder.glob("*.entries"))) >= 3
    assert salvaged(folder) == dict(enumerate(records))
    sent = {seq: each for frame in send_all(journal) for seq, each in numbered(frame.data).items()}
    assert sent == dict(enumerate(records))


def test_a_full_journal_loses_what_comes_and_keeps_what_it_has_and_counts(folder, journal):
    kept = 0
    while journal.append(kept.to_bytes(4, "big") + bytes(999)):
        kept += 1
    for _ in range(9):
        assert not journal.append(bytes(1003))

    assert journal.lost == 10
    assert journal.next_seq == kept
    assert read_base(journal.path.read_bytes()).lost == 10
    assert len(salvaged(folder)) == kept
    assert kept * 1011 > 4 * (
        FILE_BYTES - ENTRIES_AT - END_BYTES_MAX - 1011
    )  # all four files were made use of


def test_space_is_given_back_as_it_is_acknowledged(folder, journal):
    while journal.append(bytes(1003)):
        pass
    files = set(folder.glob("*.entries"))
    frames = send_all(journal)

    journal.ack(frames[len(frames) // 2].next_seq)

    assert set(folder.glob("*.entries")) < files
    assert journal.append(b"there is room again")
    assert salvaged(folder, journal.acked)[journal.next_seq - 1] == b"there is room again"


def test_a_record_that_no_file_could_hold_is_lost_alone(folder, journal):
    assert journal.append(b"before")
    assert not journal.append(bytes(FILE_BYTES))
    assert journal.append(b"behind")

    assert journal.lost == 1
    assert salvaged(folder) == {0: b"before", 1: b"behind"}


def test_closing_for_good_leaves_nothing_behind(folder, journal):
    for _ in range(150):
        journal.append(bytes(1000))
    journal.prepare()
    journal.close(unlink=True)

    assert list(folder.iterdir()) == []


# ── who holds the lock: asked by another process, since a process does not see its own ──

PROBE = """
import fcntl, os, sys
for path in sys.argv[1:]:
    fd = os.open(path, os.O_RDWR)
    try:
        fcntl.lockf(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        print("free")
    except BlockingIOError:
        print("held")
"""


def lock_of(path: Path) -> str:
    command = [sys.executable, "-c", PROBE, str(path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE_S, check=True)
    return done.stdout.strip()


def run_rank(
    script: str, folder: Path, *arguments: object, timeout_s: float = PATIENCE_S
) -> subprocess.CompletedProcess[str]:
    """Run a script that has a journal `journal` of small files in the folder."""
    return subprocess.run(
        rank_command(script, folder, *arguments),
        capture_output=True,
        text=True,
        timeout=timeout_s,
        check=False,
    )


def rank_command(script: str, folder: Path, *arguments: object) -> list[str]:
    preamble = f"""
import fcntl, json, os, signal, sys, threading, time
from pathlib import Path
from mlflow_relay.journal import Journal
def open_journal(session={SESSION!r}, bytes_max={1024 * FILE_BYTES}, file_bytes={FILE_BYTES}):
    return Journal(Path(sys.argv[1]), session, {CARD!r}, bytes_max=bytes_max, file_bytes=file_bytes)
"""
    source = preamble + textwrap.dedent(script)
    return [sys.executable, "-c", source, str(folder), *map(str, arguments)]


@contextlib.contextmanager
def rank(script: str, folder: Path) -> Iterator[subprocess.Popen[str]]:
    """Start a rank, wait for its first line; kill it at the end if it lives."""
    process = subprocess.Popen(
        rank_command(script, folder),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdin is not None
    assert process.stdout is not None
    try:
        assert process.stdout.readline(), "the rank ended before it was ready"
        yield process
    finally:
        process.kill()
        process.wait()
        process.stdin.close()
        process.stdout.close()


def test_the_lock_is_held_by_the_living_and_dropped_by_sigkill(folder):
    script = """
        journal = open_journal()
        journal.append(b"kept")
        print("ready", flush=True)
        sys.stdin.read()
    """
    base = folder / f"{SESSION.hex()}.journal"
    with rank(script, folder) as process:
        assert lock_of(base) == "held"
        process.kill()
        process.wait()

        assert lock_of(base) == "free"
        assert salvaged(folder) == {0: b"kept"}


def test_the_daemon_never_sees_a_journal_that_is_not_locked_and_complete(folder):
    """A killed beginner leaves a file of another name, or a locked and complete one."""
    script = """
        print("ready", flush=True)
        for number in range(10_000):
            journal = open_journal(session=number.to_bytes(16, "big"), bytes_max=131072)
            journal.close(unlink=True)
    """
    seen = 0
    with rank(script, folder):
        while seen < 50:
            for path in folder.glob("*.journal"):
                try:
                    fd = os.open(path, os.O_RDWR)
                except FileNotFoundError:
                    continue
                try:
                    fcntl.lockf(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                except BlockingIOError:
                    assert read_base(os.pread(fd, 4096, 0)).card == CARD
                    seen += 1
                else:  # free: then it is closed already, and was removed before that
                    assert not path.exists()
                finally:
                    os.close(fd)


def test_a_forked_child_lets_go_and_its_parent_keeps_the_lock_and_the_records(folder):
    """What the child does at its fork, and its exit, must not drop the lock of its parent."""
    script = """
        journal = open_journal()
        journal.append(b"before the fork")
        for _ in range(3):
            child = os.fork()
            if child == 0:
                journal.close(unlink=False)
                assert not [each for each in os.listdir("/proc/self/fd")
                            if ".journal" in os.path.realpath(f"/proc/self/fd/{each}")]
                os._exit(0)
            assert os.waitpid(child, 0)[1] == 0
            journal.append(b"after the fork")
        print("ready", flush=True)
        sys.stdin.read()
    """
    with rank(script, folder) as process:
        assert lock_of(folder / f"{SESSION.hex()}.journal") == "held"
        assert list(salvaged(folder).values()) == [b"before the fork"] + 3 * [b"after the fork"]
        process.kill()
        process.wait()
        assert lock_of(folder / f"{SESSION.hex()}.journal") == "free"


def test_a_child_that_outlives_its_parent_does_not_hold_the_lock(folder):
    script = """
        journal = open_journal()
        child = os.fork()
        if child == 0:
            print("ready", flush=True)
            sys.stdin.read()
            os._exit(0)
        os.kill(os.getpid(), signal.SIGKILL)
    """
    with rank(script, folder) as process:
        process.wait(PATIENCE_S)
        assert lock_of(folder / f"{SESSION.hex()}.journal") == "free"
        assert process.stdin is not None
        process.stdin.close()  # the child leaves


# ── several at once ──


def test_threads_that_log_at_once_lose_nothing_and_keep_their_order(folder):
    """Four threads log, one sends and acknowledges; all arrives, and no file is left behind."""
    opened = Opened(folder, 64 * FILE_BYTES)
    calls, threads = 3000, 4
    found: list[bytes] = []
    logging = threading.Event()
    logging.set()
    errors: list[BaseException] = []
    switch_s = sys.getswitchinterval()

    def log(thread: int) -> None:
        try:
            for number in range(calls):
                record = bytes((thread,)) + number.to_bytes(4, "big") + bytes(300)
                assert opened.journal.append(record)
        except BaseException as error:
            errors.append(error)
            raise

    def send() -> None:
        try:
            while logging.is_set() or opened.journal.unacked:
                opened.journal.prepare()
                for frame in send_all(opened.journal):
                    found.extend(numbered(frame.data).values())
                opened.journal.ack(opened.journal.next_seq)
        except BaseException as error:
            errors.append(error)
            raise

    with contextlib.closing(opened):
        sys.setswitchinterval(1e-5)
        try:
            sender = threading.Thread(target=send)
            loggers = [threading.Thread(target=log, args=(thread,)) for thread in range(threads)]
            for each in (sender, *loggers):
                each.start()
            for each in loggers:
                each.join(PATIENCE_S)
            logging.clear()
            sender.join(PATIENCE_S)
        finally:
            logging.clear()
            sys.setswitchinterval(switch_s)
        assert errors == []
        assert not sender.is_alive()
        assert opened.journal.next_seq == opened.journal.acked == calls * threads
        for thread in range(threads):
            numbers = [int.from_bytes(each[1:5], "big") for each in found if each[0] == thread]
            assert numbers == list(range(calls))
    assert [path.name for path in folder.iterdir()] == []


STORM = """
    # Records are of two sizes, so that one written over the other cannot go unnoticed.
    journal = open_journal(file_bytes=int(sys.argv[3]))
    from_handler = 0
    def handler(signum, frame):
        global from_handler
        record = b"H%09d" % from_handler + b"h" * (from_handler % 37)
        from_handler += 1
        journal.append(record)
        signal.setitimer(signal.ITIMER_REAL, 2e-5 + from_handler % 13 * 1e-5)  # never within itself
    signal.signal(signal.SIGALRM, handler)
    signal.setitimer(signal.ITIMER_REAL, 0.001)
    from_main = 0
    while from_main < int(sys.argv[2]):
        record = b"M%09d" % from_main + b"m" * (from_main % 61)
        from_main += 1
        journal.append(record)
    signal.signal(signal.SIGALRM, signal.SIG_IGN)
    words = {"from_main": from_main, "from_handler": from_handler,
             "next_seq": journal.next_seq, "lost": journal.lost}
    print(json.dumps(words))
    sys.stdout.flush()
    os._exit(0)  # the files stay, as after a kill
"""


@pytest.mark.parametrize("file_bytes", [FILE_BYTES, 8 << 20])
def test_a_signal_handler_that_logs_in_the_middle_of_a_log_call_loses_nothing(folder, file_bytes):
    done = run_rank(STORM, folder, 200_000, file_bytes)
    assert done.returncode == 0, done.stderr
    said: dict[str, Any] = json.loads(done.stdout)
    print("storm:", said)  # shown if it fails

    found = list(salvaged(folder).values())
    for kind, count in ((b"M", said["from_main"]), (b"H", said["from_handler"])):
        numbers = [int(each[1:10]) for each in found if each[:1] == kind]
        assert numbers == list(range(count))
        filler = b"m" if kind == b"M" else b"h"
        modulus = 61 if kind == b"M" else 37
        assert all(
            each[10:] == filler * (int(each[1:10]) % modulus) for each in found if each[:1] == kind
        )
    assert said["from_handler"] > 100
    assert said["next_seq"] == len(found) == said["from_main"] + said["from_handler"]
    assert said["lost"] == 0


def test_an_exception_out_of_a_signal_handler_leaves_the_journal_in_order(folder):
    """Ctrl+C in the middle of a log call: that one may be kept or not, and all others are."""
    script = """
        journal = open_journal()
        class Interrupted(Exception):
            pass
        def handler(signum, frame):
            raise Interrupted
        signal.signal(signal.SIGALRM, handler)
        number = interrupted = 0
        kept = []
        until = time.monotonic() + float(sys.argv[2])
        while time.monotonic() < until:
            try:
                signal.setitimer(signal.ITIMER_REAL, 1e-4 + interrupted % 17 * 1e-5)
                while True:
                    kept.append(number) if journal.append(b"%09d" % number) else None
                    number += 1
            except Interrupted:
                interrupted += 1
                number += 1
        signal.signal(signal.SIGALRM, signal.SIG_IGN)
        print(json.dumps({"kept": kept, "interrupted": interrupted, "next_seq": journal.next_seq}))
        sys.stdout.flush()
        os._exit(0)
    """
    done = run_rank(script, folder, 1.0)
    assert done.returncode == 0, done.stderr
    said = json.loads(done.stdout)

    for path in folder.glob("*.entries"):  # files that were interrupted in the making
        if not any(path.read_bytes()[ENTRIES_AT:]):
            path.unlink()
    found = [int(each) for each in salvaged(folder).values()]
    assert said["interrupted"] > 50
    assert found == sorted(set(found))
    assert set(said["kept"]) <= set(found)
    assert len(found) - len(said["kept"]) <= said["interrupted"]
    assert said["next_seq"] == len(found)


# ── a disk that is full ──


@pytest.fixture
def tiny_tmpfs(folder: Path) -> Iterator[Path]:
    """One megabyte of memory that is a file system of its own."""
    if os.geteuid() != 0:
        pytest.skip("mounting a tmpfs needs root")
    path = folder / "tiny"
    path.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", path], capture_output=True, check=False
    )
    if mounted.returncode != 0:
        pytest.skip(f"no tmpfs can be mounted here: {mounted.stderr.decode().strip()}")
    try:
        yield path
    finally:
        subprocess.run(["umount", path], check=True)


def test_no_space_at_the_start_is_an_error_that_says_what_to_do_and_leaves_nothing(tiny_tmpfs):
    with pytest.raises(JournalError, match=r"No space left.*MLFLOW_RELAY_SOCKET"):
        Journal(tiny_tmpfs, SESSION, CARD, bytes_max=64 << 20)

    assert list(tiny_tmpfs.iterdir()) == []


def test_no_space_for_the_base_file_is_the_same_error(tiny_tmpfs):
    (tiny_tmpfs / "filler").write_bytes(bytes(1 << 20))
    with pytest.raises(JournalError, match="No space left"):
        Journal(tiny_tmpfs, SESSION, CARD, bytes_max=64 << 20)

    assert [path.name for path in tiny_tmpfs.iterdir()] == ["filler"]


def test_no_space_later_is_a_counted_loss_and_never_a_sigbus(tiny_tmpfs):
    script = """
        journal = open_journal(bytes_max=64 << 20, file_bytes=256 << 10)
        kept = 0
        while journal.append(b"%09d" % kept + bytes(1000)):
            kept += 1
        for _ in range(99):
            assert not journal.append(bytes(1009))
        assert not journal.prepare()
        print(json.dumps({"kept": kept, "lost": journal.lost}))
        while True:
            frame = journal.next_frame()
            if frame is None:
                break
            journal.mark_sent(frame)
        journal.ack(journal.next_seq)
        for _ in range(490):
            assert journal.append(bytes(1009)), "space was given back"
        journal.close(unlink=True)
    """
    done = run_rank(script, tiny_tmpfs)

    assert done.returncode != -signal.SIGBUS
    assert done.returncode == 0, done.stderr
    said = json.loads(done.stdout)
    assert said["lost"] == 100
    assert 600 < said["kept"] < 1024
    assert list(tiny_tmpfs.iterdir()) == []


def test_a_journal_on_a_disk_that_others_fill_stands_by_what_it_has_allocated(tiny_tmpfs):
    script = """
        journal = open_journal(bytes_max=64 << 20, file_bytes=512 << 10)
        try:
            with open(os.path.join(sys.argv[1], "filler"), "wb", buffering=0) as filler:
                while True:
                    filler.write(bytes(4096))
        except OSError:
            pass
        kept = 0
        while journal.append(b"%09d" % kept + bytes(1000)):
            kept += 1
        print(kept)
    """
    done = run_rank(script, tiny_tmpfs)

    assert done.returncode == 0, done.stderr
    kept = int(done.stdout)
    assert kept >= (512 << 10) // 1100
    assert len(salvaged(tiny_tmpfs)) == kept


def test_a_name_that_cannot_be_had_is_a_journal_error_and_leaves_nothing(folder):
    in_the_way = folder / f"{SESSION.hex()}.journal" / "not empty"
    in_the_way.mkdir(parents=True)

    with pytest.raises(JournalError, match="MLFLOW_RELAY_SOCKET"):
        Journal(folder, SESSION, b"card", bytes_max=1 << 20)

    assert list(folder.iterdir()) == [in_the_way.parent]


def test_a_file_that_cannot_be_removed_keeps_nothing_from_its_end(folder):
    """The daemon removes it when the session is over."""
    journal = Journal(folder, SESSION, b"card", bytes_max=1 << 20)
    (entries,) = folder.glob("*.entries")
    entries.unlink()
    entries.mkdir()

    journal.close(unlink=True)

    assert list(folder.iterdir()) == [entries]


def test_a_folder_that_cannot_be_written_is_a_journal_error(tmp_path):
    with pytest.raises(JournalError, match="No such file"):
        Journal(tmp_path / "absent", SESSION, CARD, bytes_max=64 << 20)


# ── kills in the making ──


def test_a_kill_at_any_moment_of_the_making_leaves_nothing_that_looks_like_a_journal(folder):
    """strace would be exact; random instants of a process that does nothing else come close."""
    seed = new_seed()
    print(f"seed {seed}")  # shown if it fails
    rng = random.Random(seed)
    script = """
        print("ready", flush=True)
        number = 0
        while True:
            journal = open_journal(session=number.to_bytes(16, "big"), bytes_max=131072)
            journal.append(b"record")
            journal.close(unlink=True)
            number += 1
    """
    for _ in range(8):
        with rank(script, folder) as process:
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(rng.uniform(0.001, 0.02))
            process.kill()
            process.wait()
        for path in folder.glob("*.journal"):
            assert read_base(path.read_bytes()).card == CARD
            assert lock_of(path) == "free"
        for path in list(folder.iterdir()):
            path.unlink()
