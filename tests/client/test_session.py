"""A session: opens without a daemon, ends within its bound, and leaves what must be left."""

from __future__ import annotations

import os
import stat
import subprocess
import sys
import tempfile
import textwrap
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from mlflow_relay import messages
from mlflow_relay.errors import JournalError, RelayError
from mlflow_relay.journal_files import read_base
from mlflow_relay.messages import unpack_map
from mlflow_relay.session import NO_DAEMON_GRACE_S, Session
from tests.support.fake_daemon import FakeDaemon
from tests.support.relay import wait_until

#: What a bound of seconds may be exceeded by on a machine that is busy elsewhere.
SLACK_S = 3.0


@pytest.fixture
def socket() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="relay-session-", dir="/dev/shm") as path:
        yield Path(path) / "node" / "relay.sock"


@pytest.fixture
def daemon(socket: Path) -> Iterator[FakeDaemon]:
    socket.parent.mkdir()
    with FakeDaemon(socket) as daemon:
        yield daemon
        assert daemon.bad == []


def open_session(socket: Path, told: list[str] | None = None) -> Session:
    return Session(
        {"rank": 3},
        socket=socket,
        journal_bytes_max=1 << 20,
        on_mlflow_run_id=(told if told is not None else []).append,
    )


def stop(session: Session) -> None:
    """Leave, as the end of the process does, and remove the journal."""
    if not session.sender.over.is_set():
        session.sender.over.set()
        session.sender.wake()
        session.sender.join(30)
        session.journal.close(unlink=True)


def timed_end(session: Session, timeout_s: float) -> tuple[bool, float]:
    begin_s = time.monotonic()
    done = session.end(timeout_s)
    took_s = time.monotonic() - begin_s
    print(f"end() took {took_s * 1000:.0f} ms")
    return done, took_s


def test_a_session_that_ends_with_a_daemon_leaves_nothing(daemon, socket):
    session = open_session(socket)
    for number in range(100):
        session.journal.append(b"%d" % number)

    done, took_s = timed_end(session, 30.0)

    assert done
    assert took_s < SLACK_S
    assert daemon.kept == {session.journal.session: [b"%d" % number for number in range(100)]}
    assert list((socket.parent / "journals").iterdir()) == []


def test_the_card_says_who_it_is_and_is_kept_in_the_journal_too(daemon, socket):
    session = open_session(socket)
    try:
        daemon.wait_for(messages.ATTACH)
        (card,) = daemon.cards.values()
        kept = unpack_map(read_base(session.journal.path.read_bytes()).card)
        assert card == {**kept, "first_seq": 0}
        assert kept["rank"] == 3
        assert kept["pid"] == os.getpid()
        assert kept["session"] == session.journal.session
    finally:
        stop(session)


def test_two_sessions_have_two_names(socket):
    first, second = open_session(socket), open_session(socket)
    try:
        assert first.journal.session != second.journal.session
    finally:
        stop(first)
        stop(second)


def test_the_folders_are_made_for_this_user_alone(socket):
    session = open_session(socket)
    try:
        for folder in (socket.parent, socket.parent / "journals"):
            assert stat.S_IMODE(folder.stat().st_mode) == 0o700
        for path in (socket.parent / "journals").iterdir():
            assert stat.S_IMODE(path.stat().st_mode) == 0o600
    finally:
        stop(session)


def test_without_a_daemon_the_end_is_quick_and_the_journal_stays(socket):
    session = open_session(socket)
    session.journal.append(b"kept")
    try:
        done, took_s = timed_end(session, 30.0)

        assert not done
        assert took_s < NO_DAEMON_GRACE_S + SLACK_S
        assert session.journal.path.exists()
        assert session.journal.unacked == 1
    finally:
        stop(session)


@pytest.mark.parametrize("timeout_s", [0.0, 0.5])
def test_a_daemon_that_hangs_holds_the_end_no_longer_than_its_bound(daemon, socket, timeout_s):
    session = open_session(socket)
    session.journal.append(b"first")
    daemon.wait_for_records(1)
    daemon.hears = False  # it stands still, its socket takes messages
    session.journal.append(b"second")
    try:
        done, took_s = timed_end(session, timeout_s)

        assert not done
        assert took_s < timeout_s + SLACK_S
    finally:
        stop(session)


def test_a_daemon_that_comes_after_the_end_gets_all(socket):
    session = open_session(socket)
    session.journal.append(b"kept")
    assert not session.end(0.1)
    try:
        with FakeDaemon(socket) as daemon:
            wait_until(session.sender.over.is_set, "the late daemon has all")
            assert daemon.kept == {session.journal.session: [b"kept"]}
            assert daemon.bad == []
    finally:
        stop(session)


def test_an_end_that_is_refused_is_quick(daemon, socket):
    daemon.refuses = "no"
    session = open_session(socket)
    session.journal.append(b"kept")
    try:
        done, took_s = timed_end(session, 30.0)

        assert not done
        assert took_s < NO_DAEMON_GRACE_S + SLACK_S
    finally:
        stop(session)


def test_a_folder_that_cannot_be_made_is_an_error_that_names_it(tmp_path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(RelayError, match=str(tmp_path / "file")):
        open_session(tmp_path / "file" / "relay.sock")


def test_a_journal_that_cannot_be_made_starts_no_thread(socket, monkeypatch):
    socket.parent.mkdir()
    (socket.parent / "journals").mkdir()
    monkeypatch.setattr(os, "urandom", bytes)
    (socket.parent / "journals" / f"{bytes(16).hex()}.new").write_text("in the way")
    with pytest.raises(JournalError, match="File exists"):
        open_session(socket)


def test_a_socket_path_that_is_too_long_is_said_at_the_start_and_never_raises_later(tmp_path):
    """A unix socket's path has 107 bytes at most; nothing can ever be sent there."""
    socket = tmp_path / ("x" * 120) / "relay.sock"
    try:
        session = open_session(socket)
    except RelayError as error:
        assert "107" in str(error)  # the other way to pass is not to raise at all
        return
    session.journal.append(b"kept")
    try:
        assert not session.end(1.0)
    finally:
        stop(session)


FORKING = """
    import os, sys, threading, time
    from pathlib import Path
    from mlflow_relay.session import Session

    def new():
        return Session({"rank": 0}, socket=Path(sys.argv[1]), journal_bytes_max=64 << 20,
                       on_mlflow_run_id=print)

    session = new()
    going = True
    def log():
        while going:
            session.journal.append(bytes(200))
            if session.journal.unacked > 50_000:
                time.sleep(0.001)
    thread = threading.Thread(target=log)
    thread.start()
    failed = 0
    for _ in range(60):
        child = os.fork()
        if child == 0:
            try:
                session.leave_to_parent()
                held = [os.path.realpath(f"/proc/self/fd/{each}") for each in os.listdir("/proc/self/fd")]
                assert not [path for path in held if ".journal" in path], held
            except BaseException as error:
                print(repr(error), file=sys.stderr, flush=True)
                os._exit(1)
            os._exit(0)
        failed += os.waitpid(child, 0)[1] != 0
    going = False
    thread.join()
    assert session.end(30.0)
    assert failed == 0, f"{failed} of 60 children could not let go"
"""


def test_children_forked_while_frames_are_cut_let_go_of_all(daemon, socket):
    """The sender's thread does not exist in the child, but what it held in its hands does."""
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(FORKING), str(socket)],
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
    )

    assert done.returncode == 0, done.stderr[-2000:]
