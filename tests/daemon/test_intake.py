"""Intake on a real socket and a disk that fails: acks only for what is on the disk."""

from __future__ import annotations

import errno
import logging
import os
import resource
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import zmq

from mlflow_relay import messages
from mlflow_relay.frames import FRAME_BYTES_MAX
from mlflow_relay.messages import (
    ACK,
    ALIVE,
    ATTACH,
    ATTACHED,
    CONTROL,
    DATA,
    DETACH,
    DETACHED,
    NEWS,
    REFUSED,
    REPLY,
    UNKNOWN,
    pack_detach,
    pack_map,
    unpack_ack,
    unpack_map,
)
from mlflow_relay_daemon import intake as module
from mlflow_relay_daemon.batch import Entry, Objection
from mlflow_relay_daemon.control import Control
from mlflow_relay_daemon.counters import Counters
from mlflow_relay_daemon.hosted import Hosted, Runs
from mlflow_relay_daemon.intake import Intake
from mlflow_relay_daemon.lane.links import LineageParams
from mlflow_relay_daemon.spool import card as cards
from mlflow_relay_daemon.spool.spool import Spool
from tests.support.relay import wait_until
from tests.support.spools import (
    RUN_ID,
    SESSION,
    START_MS,
    FailingDisk,
    frame_of_metrics,
    seqs_in,
)

OTHER = bytes(16)
OTHER_RUN = "f" * 32


class Peer:
    """A rank as intake sees it: a DEALER that says what a test wants."""

    def __init__(self, daemon: Daemon) -> None:
        self._daemon = daemon
        self.socket = daemon.context.socket(zmq.DEALER)
        self.socket.linger = 0
        self.socket.connect(f"ipc://{daemon.path}")

    def say(self, *parts: bytes) -> None:
        self.socket.send_multipart(parts)

    def hear(self, kind: bytes) -> bytes:
        """Let the daemon turn until it answers; it must be this kind."""
        found = self.hear_any()
        assert found[0] == kind, f"{found} instead of {kind!r}"
        return found[1]

    def hear_any(self) -> list[bytes]:
        for _ in range(100):
            if self.socket.poll(0):
                return self.socket.recv_multipart()
            self._daemon.intake.turn(0.05)
        raise AssertionError("no answer")

    def hears_nothing(self) -> bool:
        """Return whether nothing has come, once the daemon has served all that was said."""
        self._daemon.drain()
        return not self.socket.poll(50)

    def attach(self, session: bytes = SESSION, **fields: Any) -> dict[str, Any]:
        self.say(ATTACH, attach_payload(session, **fields))
        return unpack_map(self.hear(ATTACHED))

    def send(self, first: int, count: int = 5, session: bytes = SESSION) -> None:
        self.say(DATA, frame_of_metrics(first, count, session)[1])

    def hear_ack(self, session: bytes = SESSION) -> int:
        name, next_seq = unpack_ack(self.hear(ACK))
        assert name == session
        return next_seq


def attach_payload(session: bytes = SESSION, **fields: Any) -> bytes:
    known = {
        "session": session,
        "run_id": RUN_ID,
        "run_key": "a key",
        "experiment_name": "aifs",
        "run_name": "",
        "rank": 0,
        "world_size": 4,
        "node": "node7",
        "pid": 4711,
        "primary": True,
        "start_ms": START_MS,
        "tags": {},
        "first_seq": 0,
    }
    return pack_map({**known, **fields})


class Daemon:
    """Intake and what it needs, offline: nothing delivers."""

    def __init__(self, folder: Path) -> None:
        self.path = folder / "relay.sock"
        self.disk = FailingDisk()
        self.spool = Spool(self.disk, folder / "spool", segment_bytes_max=1 << 20)
        self.counters = Counters()
        self.runs = Runs(self.spool, None, None, None, LineageParams())
        self.control = Control(self.runs, dict, lambda: None, lambda _: 0)
        self.intake = Intake(self.path, self.runs, self.control, self.counters, 1 << 20)
        self.control.answer_later = self.intake.answer_later
        self.context = zmq.Context()

    def drain(self) -> None:
        """Turn until all that was said before is served."""
        probe = Peer(self)
        probe.say(CONTROL, pack_map({"command": "ping"}))
        probe.hear(REPLY)
        probe.socket.close()

    def hosted(self, run_id: str = RUN_ID) -> Hosted:
        return self.runs.by_id[run_id]

    def on_disk(self, run_id: str = RUN_ID) -> cards.Card:
        return cards.read(self.hosted(run_id).run.folder)

    def close(self) -> None:
        self.intake.close()
        self.spool.close()
        self.context.destroy(linger=0)


@pytest.fixture
def daemon() -> Iterator[Daemon]:
    with tempfile.TemporaryDirectory(prefix="relay-intake-", dir="/dev/shm") as path:
        daemon = Daemon(Path(path))
        try:
            yield daemon
        finally:
            daemon.close()


@pytest.fixture
def peer(daemon: Daemon) -> Peer:
    return Peer(daemon)


# ── the good way ──


def test_the_socket_is_for_this_user_alone(daemon):
    assert daemon.path.stat().st_mode & 0o777 == 0o600


def test_a_session_is_on_the_disk_before_it_is_told_so(daemon, peer):
    fields = peer.attach()

    assert (fields["session"], fields["next_seq"], fields["mlflow_run_id"]) == (SESSION, 0, None)
    card = daemon.on_disk()
    assert card.experiment_name == "aifs"
    assert card.sessions[SESSION.hex()].node == "node7"
    assert not card.sessions[SESSION.hex()].closed


def test_frames_are_acknowledged_when_they_are_on_the_disk(daemon, peer):
    peer.attach()
    daemon.disk.asked.clear()
    for first in range(0, 50, 5):
        peer.send(first)
    while peer.hear_ack() < 50:
        pass

    assert seqs_in(daemon.hosted().run) == list(range(50))
    writes = daemon.disk.count("write", ".segment")
    assert writes == daemon.disk.count("sync", ".segment")


@pytest.fixture
def own_frames(monkeypatch):
    """Frames that came from nowhere are our own user's."""
    monkeypatch.setattr("mlflow_relay_daemon.intake.peer_uid", lambda _frame: os.getuid())


@pytest.mark.usefixtures("own_frames")
@pytest.mark.usefixtures("own_frames")
def test_what_comes_together_shares_one_fsync_for_each_run(daemon):
    ranks = [Peer(daemon) for _ in range(4)]
    for index, rank in enumerate(ranks):
        run_id = RUN_ID if index < 3 else OTHER_RUN
        rank.attach(bytes([index]) * 16, run_id=run_id, rank=index)
        rank.send(0, session=bytes([index]) * 16)  # its run has a segment then
        rank.hear_ack(bytes([index]) * 16)
    daemon.disk.asked.clear()
    group = [
        [zmq.Frame(part) for part in (peer_of(daemon, index), DATA, frame)]
        for index, rank in enumerate(ranks)
        for frame in frames_of(bytes([index]) * 16)
    ]

    daemon.intake._serve(group)

    assert daemon.disk.count("write", ".segment") == 2
    assert daemon.disk.count("sync", ".segment") == 2
    for index, rank in enumerate(ranks):
        assert rank.hear_ack(bytes([index]) * 16) == 25
    assert len(seqs_in(daemon.hosted().run, bytes([1]) * 16)) == 25


def peer_of(daemon: Daemon, index: int) -> bytes:
    return daemon.intake.sessions[bytes([index]) * 16].peer


def frames_of(session: bytes) -> list[bytes]:
    return [frame_of_metrics(first, 5, session)[1] for first in range(5, 25, 5)]


def serve_together(daemon: Daemon, count: int) -> None:
    """Serve so many messages as one group, however they come."""
    group: list[list[zmq.Frame]] = []
    while len(group) < count:
        group += daemon.intake._receive_group()
    daemon.intake._serve(group)


def test_sessions_that_come_and_go_together_share_one_card_for_each_run(daemon):
    ranks = {bytes([index]) * 16: Peer(daemon) for index in range(20)}
    for index, (session, rank) in enumerate(ranks.items()):
        run_id = RUN_ID if index % 2 else OTHER_RUN
        rank.say(ATTACH, attach_payload(session, run_id=run_id, rank=index))
    serve_together(daemon, 20)

    for session, rank in ranks.items():
        assert unpack_map(rank.hear(ATTACHED))["session"] == session
    assert daemon.disk.count("rename", "card") == 2
    on_disk = {**daemon.on_disk().sessions, **daemon.on_disk(OTHER_RUN).sessions}
    assert on_disk.keys() == {session.hex() for session in ranks}

    for session, rank in ranks.items():
        rank.say(DETACH, pack_detach(session, 3))
    serve_together(daemon, 20)

    for session, rank in ranks.items():
        assert rank.hear(DETACHED) == session
    assert daemon.disk.count("rename", "card") == 4
    closed = [*daemon.on_disk().sessions.values(), *daemon.on_disk(OTHER_RUN).sessions.values()]
    assert [(each.closed, each.lost) for each in closed] == [(True, 3)] * 20
    assert not daemon.intake.sessions


def test_sessions_that_come_together_to_a_full_disk_are_none_of_them_attached(daemon):
    ranks = [Peer(daemon) for _ in range(5)]
    for index, rank in enumerate(ranks):
        rank.say(ATTACH, attach_payload(bytes([index]) * 16, rank=index))
    daemon.disk.fail("sync", "card", errno.ENOSPC)
    serve_together(daemon, 5)

    assert all(rank.hears_nothing() for rank in ranks)
    assert not daemon.intake.sessions
    assert not daemon.hosted().run.card.sessions

    for index, rank in enumerate(ranks):
        assert rank.attach(bytes([index]) * 16, rank=index)["next_seq"] == 0


def test_one_who_cannot_attach_keeps_no_other_out(daemon):
    good, bad = Peer(daemon), Peer(daemon)
    bad.say(ATTACH, attach_payload(OTHER, rank=-1))
    good.say(ATTACH, attach_payload())
    serve_together(daemon, 2)

    assert unpack_map(good.hear(ATTACHED))["session"] == SESSION
    assert unpack_map(bad.hear(REFUSED))["session"] == OTHER
    assert daemon.counters.bad_messages == 1


def test_a_rank_that_attaches_again_is_told_what_is_here(daemon, peer):
    peer.attach()
    peer.send(0)
    assert peer.hear_ack() == 5

    assert Peer(daemon).attach(first_seq=3)["next_seq"] == 5


def test_a_rank_whose_records_went_elsewhere_is_not_asked_for_them(daemon, peer):
    """Its spool was lost, or the daemon is another one."""
    assert peer.attach(first_seq=17)["next_seq"] == 17
    peer.send(17)

    assert peer.hear_ack() == 22
    assert daemon.on_disk().sessions[SESSION.hex()].first_seq == 17


def test_the_run_began_when_its_first_rank_did(daemon):
    for index, start_ms in enumerate((START_MS, START_MS - 500, START_MS + 500)):
        Peer(daemon).attach(bytes([index]) * 16, start_ms=start_ms, rank=index, world_size=index)

    assert daemon.on_disk().start_ms == START_MS - 500
    assert len(daemon.on_disk().sessions) == 3
    assert daemon.on_disk().world_size == 2


def test_the_mlflow_run_id_is_news_once(daemon, peer):
    peer.attach()
    daemon.hosted().run.card.mlflow_run_id = "m1"
    assert unpack_map(peer.hear(NEWS)) == {"v": 1, "session": SESSION, "mlflow_run_id": "m1"}
    assert peer.hears_nothing()

    assert Peer(daemon).attach(OTHER)["mlflow_run_id"] == "m1"


def test_a_session_that_detaches_is_over_with_its_losses_on_the_disk(daemon, peer):
    peer.attach()
    peer.send(0)
    peer.hear_ack()
    for _ in range(2):  # the answer may be lost
        peer.say(DETACH, pack_detach(SESSION, 7))
        assert peer.hear(DETACHED) == SESSION

    card = daemon.on_disk().sessions[SESSION.hex()]
    assert card.closed
    assert card.lost == 7
    assert card.next_seq == 5
    assert daemon.on_disk().lost_records == 7
    assert SESSION not in daemon.intake.sessions


def test_being_alive_needs_no_answer(daemon, peer):
    peer.attach()
    daemon.intake.sessions[SESSION].heard_s = 0.0
    peer.say(ALIVE, SESSION)

    assert peer.hears_nothing()
    assert daemon.intake.sessions[SESSION].heard_s > 0.0


# ── what comes twice, early or from nobody ──


@pytest.mark.parametrize(
    ("kind", "payload"),
    [
        (DATA, frame_of_metrics(0, 5)[1]),
        (ALIVE, SESSION),
        (DETACH, pack_detach(SESSION, 0)),
    ],
)
def test_who_never_attached_is_asked_to(daemon, peer, kind, payload):
    peer.say(kind, payload)
    assert peer.hear(UNKNOWN) == SESSION

    peer.attach()
    thief = Peer(daemon)
    thief.say(kind, payload)
    assert thief.hear(UNKNOWN) == SESSION
    assert daemon.intake.sessions[SESSION].peer
    assert not daemon.on_disk().sessions[SESSION.hex()].closed


def test_a_session_is_who_attached_it_last(daemon, peer):
    """Its rank has a new connection; the old one may not be known to be gone yet."""
    peer.attach()
    again = Peer(daemon)
    again.attach()
    again.send(0)
    assert again.hear_ack() == 5
    peer.send(5)

    assert peer.hear(UNKNOWN) == SESSION


def test_a_frame_that_comes_twice_is_kept_once_and_acknowledged(daemon, peer):
    """Its ack may have been lost; without another the rank would stand still."""
    peer.attach()
    for _ in range(3):
        peer.send(0)
        assert peer.hear_ack() == 5

    assert seqs_in(daemon.hosted().run) == list(range(5))
    assert daemon.counters.resent_frames == 2


@pytest.mark.parametrize("first", [3, 6, 100])
def test_a_frame_with_something_missing_before_it_is_not_kept(daemon, peer, first):
    peer.attach()
    peer.send(0)
    assert peer.hear_ack() == 5
    peer.send(first)
    assert peer.hear(UNKNOWN) == SESSION
    assert seqs_in(daemon.hosted().run) == list(range(5))

    assert peer.attach()["next_seq"] == 5
    peer.send(5)
    assert peer.hear_ack() == 10


# ── a disk that fails ──


@pytest.mark.parametrize("operation", ["write", "sync", "create", "sync_folder"])
@pytest.mark.parametrize("error", [errno.EIO, errno.ENOSPC])
def test_what_is_not_on_the_disk_is_not_acknowledged(daemon, peer, monkeypatch, operation, error):
    monkeypatch.setattr(module, "FULL_PAUSE_S", 0.0)
    peer.attach()
    daemon.disk.fail(operation, "" if operation == "sync_folder" else ".segment", error)
    peer.send(0)
    assert peer.hears_nothing()
    assert daemon.runs.is_full
    assert daemon.counters.fsync_failures == 1
    assert daemon.hosted().run.next_seq(SESSION) == 0

    peer.send(0)
    assert peer.hear_ack() == 5
    assert not daemon.runs.is_full
    assert seqs_in(daemon.hosted().run) == list(range(5))


def test_a_full_disk_is_not_asked_again_at_every_frame(daemon, peer):
    peer.attach()
    daemon.disk.fail("write", ".segment", errno.ENOSPC, times=-1)
    peer.send(0)
    daemon.drain()
    writes = daemon.disk.count("write")
    for _ in range(20):
        peer.send(0)
    daemon.drain()

    assert daemon.disk.count("write") == writes
    while peer.socket.poll(50):  # a frame that came twice is answered, with what is on the disk
        kind, payload = peer.socket.recv_multipart()
        assert (kind, unpack_ack(payload)) == (ACK, (SESSION, 0))


def test_frames_behind_one_that_was_not_kept_are_no_fault_of_the_rank(daemon, peer, monkeypatch):
    monkeypatch.setattr(module, "FULL_PAUSE_S", 0.0)
    peer.attach()
    daemon.disk.fail("write", ".segment", errno.ENOSPC)
    peer.send(0)
    daemon.drain()
    peer.send(5)
    assert peer.hears_nothing()

    peer.send(0)
    assert peer.hear_ack() == 5


def test_the_quota_is_a_full_disk_too(daemon, peer, monkeypatch):
    monkeypatch.setattr(module, "FULL_PAUSE_S", 0.0)
    peer.attach()
    daemon.spool.bytes_max = 0
    peer.send(0)
    assert peer.hears_nothing()

    daemon.spool.bytes_max = None
    peer.send(0)
    assert peer.hear_ack() == 5


def test_of_frames_that_do_not_fit_together_those_that_fit_are_taken(daemon, peer, monkeypatch):
    """Else a rank that sends more at once than a small quota holds would be refused for ever."""
    monkeypatch.setattr(module, "FULL_PAUSE_S", 0.0)
    peer.attach()
    peer.send(0)
    assert peer.hear_ack() == 5
    daemon.spool.bytes_max = daemon.spool.segment_bytes() + len(frame_of_metrics(5, 5)[1]) + 50
    name = daemon.intake.sessions[SESSION].peer
    daemon.intake.sessions[SESSION].uid = None  # as it is of parts that no socket has received
    group = [
        [zmq.Frame(part) for part in (name, DATA, frame_of_metrics(first, 5)[1])]
        for first in (5, 10, 15)
    ]
    for _ in range(2):  # together they do not fit; then one by one
        daemon.intake._serve(group)

    assert daemon.hosted().run.next_seq(SESSION) == 10
    assert peer.hear_ack() == 10


@pytest.mark.parametrize("operation", ["make_folder", "sync", "rename"])
def test_a_session_that_is_not_on_the_disk_is_not_attached(daemon, peer, operation):
    daemon.disk.fail(operation, error=errno.ENOSPC)
    peer.say(ATTACH, attach_payload())
    assert peer.hears_nothing()
    assert SESSION not in daemon.intake.sessions

    assert peer.attach()["next_seq"] == 0
    assert SESSION.hex() in daemon.on_disk().sessions


def test_an_end_that_is_not_on_the_disk_is_none(daemon, peer):
    peer.attach()
    daemon.disk.fail("sync", "card")
    peer.say(DETACH, pack_detach(SESSION, 3))
    assert peer.hears_nothing()
    assert SESSION in daemon.intake.sessions

    peer.say(DETACH, pack_detach(SESSION, 3))
    assert peer.hear(DETACHED) == SESSION
    assert daemon.on_disk().sessions[SESSION.hex()].closed


def test_a_session_that_comes_back_after_its_end_is_open_on_the_disk_or_not_attached(daemon, peer):
    peer.attach()
    peer.say(DETACH, pack_detach(SESSION, 0))
    peer.hear(DETACHED)
    daemon.disk.fail("sync", "card")
    peer.say(ATTACH, attach_payload())
    assert peer.hears_nothing()

    peer.attach()
    assert not daemon.on_disk().sessions[SESSION.hex()].closed


# ── noise ──

FRAME = frame_of_metrics(0, 5)[1]
NOISE: dict[str, list[bytes]] = {
    "one part": [b"noise"],
    "three parts": [DATA, FRAME, b"more"],
    "empty parts": [b"", b""],
    "a kind that is none": [b"?", b"noise"],
    "what only a daemon says": [ACK, bytes(24)],
    "no frame": [DATA, b"noise"],
    "empty frame": [DATA, b""],
    "cut frame": [DATA, FRAME[:-1]],
    "frame and more": [DATA, FRAME + b"\0"],
    "damaged frame": [DATA, FRAME[:-1] + b"\xff"],
    "frame of a later release": [DATA, FRAME[:3] + b"\3" + FRAME[4:]],
    "frame that says it is huge": [DATA, FRAME[:32] + b"\xff\xff\xff\xff" + FRAME[36:]],
    "short session": [ALIVE, b"short"],
    "short detach": [DETACH, b"short"],
    "attach of nothing": [ATTACH, b""],
    "attach of noise": [ATTACH, b"\xff" * 100],
    "attach of a later release": [ATTACH, b"\x81\xa1v\x63"],
    "attach with a path for an id": [ATTACH, attach_payload(run_id="../../../../tmp/x" + "0" * 15)],
    "control of noise": [CONTROL, b"\xc1"],
    "control without a command": [CONTROL, pack_map({})],
    "control of a list": [CONTROL, pack_map({"command": ["ping"]})],
}


@pytest.mark.parametrize("parts", NOISE.values(), ids=NOISE)
def test_noise_is_counted_and_disturbs_nobody(daemon, peer, caplog, parts):
    peer.attach()
    noisy = Peer(daemon)
    with caplog.at_level(logging.WARNING, "mlflow_relay_daemon"):
        for number in range(20):
            noisy.say(*parts)
            peer.send(5 * number)
        while peer.hear_ack() < 100:
            pass
        daemon.drain()

    assert daemon.counters.bad_messages == 20
    assert len([each for each in caplog.messages if "bad_messages" in each]) == 1
    assert "Traceback" not in caplog.text
    assert seqs_in(daemon.hosted().run) == list(range(100))
    assert sorted(daemon.runs.by_id) == [RUN_ID]


def test_a_message_larger_than_any_of_ours_costs_its_sender_the_connection(daemon, peer):
    peer.attach()
    noisy = Peer(daemon)
    noisy.say(DATA, bytes(2 * messages.MESSAGE_BYTES_MAX + 1))
    peer.send(0)

    assert peer.hear_ack() == 5
    assert daemon.hosted().run.next_seq(SESSION) == 5


def test_the_largest_frame_is_taken(daemon, peer):
    from tests.support.spools import frame

    header, data = frame(0, [bytes(FRAME_BYTES_MAX - 100)])
    assert len(data) <= FRAME_BYTES_MAX
    peer.attach()
    peer.say(DATA, data)

    assert peer.hear_ack() == header.next_seq


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"rank": -1}, "rank is -1"),
        ({"run_name": 5}, "run_name is int"),
        ({"v": 99}, "update the older of client and daemon"),
    ],
)
def test_a_session_that_is_not_taken_is_told_why(daemon, peer, fields, reason):
    peer.say(ATTACH, attach_payload(**fields))

    refusal = unpack_map(peer.hear(REFUSED))
    assert refusal["session"] == SESSION
    assert reason in refusal["error"]
    assert daemon.counters.bad_messages == 1
    assert daemon.runs.by_id == {}


# ── control ──


def test_operators_are_answered(peer):
    peer.say(CONTROL, pack_map({"command": "ping"}))
    assert unpack_map(peer.hear(REPLY))["pid"] == os.getpid()

    for request in ({"command": "no such"}, {"command": "flush"}, {"command": "dead_letters"}):
        peer.say(CONTROL, pack_map(request))
        reply = unpack_map(peer.hear(REPLY))
        assert reply["ok"] is False
        assert reply["error"]


def test_an_operator_s_wish_that_the_disk_refuses_ends_nothing(daemon, peer):
    peer.attach()
    entry = Entry("metric", "a@b", 1.0, START_MS, 1)
    daemon.hosted().letters.add([Objection(entry, "no name")], START_MS)
    daemon.disk.fail("write", "dead_letters", errno.ENOSPC)
    peer.say(CONTROL, pack_map({"command": "dead_letters", "action": "drop"}))
    reply = unpack_map(peer.hear(REPLY))
    assert (reply["ok"], "No space" in reply["error"]) == (False, True)
    peer.send(0)
    assert peer.hear_ack() == 5

    peer.say(CONTROL, pack_map({"command": "dead_letters", "action": "drop"}))
    assert unpack_map(peer.hear(REPLY))["count"] == 1


def test_an_answer_from_another_thread_wakes_the_loop(daemon, peer):
    peer.attach()
    name = daemon.intake.sessions[SESSION].peer
    thread = threading.Thread(
        target=daemon.intake.answer_later, args=(name, pack_map({"ok": True}))
    )
    thread.start()
    daemon.intake.turn(30.0)
    thread.join()

    assert unpack_map(peer.hear(REPLY))["ok"] is True


def test_a_peer_that_is_gone_stops_nobody(daemon, peer):
    gone = Peer(daemon)
    gone.attach(OTHER)
    gone.socket.close()
    daemon.intake.answer_later(daemon.intake.sessions[OTHER].peer, b"to nobody")
    daemon.hosted().run.card.mlflow_run_id = "m1"

    assert peer.attach()["mlflow_run_id"] == "m1"


def test_a_socket_that_somebody_removed_is_made_anew(daemon, peer):
    """systemd's RemoveIPC, a clean-up of /dev/shm: ranks that come must find their daemon."""
    peer.attach()
    before = daemon.path.stat().st_ino
    daemon.intake.endpoint.look()
    assert daemon.path.stat().st_ino == before
    daemon.path.unlink()
    daemon.intake.endpoint.look()

    assert daemon.path.stat().st_mode & 0o777 == 0o600
    assert Peer(daemon).attach(OTHER)["next_seq"] == 0


def test_with_few_descriptors_left_who_is_here_is_served_and_who_comes_waits(daemon, peer, caplog):
    """libzmq ends the process if it has no descriptor for a connection that comes in."""
    peer.attach()
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    files = [open(os.devnull) for _ in range(10)]  # noqa: SIM115
    few = files[-1].fileno() + 6
    resource.setrlimit(resource.RLIMIT_NOFILE, (few, hard))
    try:
        daemon.intake.endpoint.look()
        wait_until(lambda: not daemon.path.exists(), "nobody is let in")
        daemon.intake.endpoint.look()
        peer.send(0, 3)
        assert peer.hear_ack() == 3
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
        for each in files:
            each.close()
    daemon.intake.endpoint.look()

    assert Peer(daemon).attach(OTHER)["next_seq"] == 0
    assert [each.getMessage().split(":")[0] for each in caplog.records] == [
        f"nearly all of {few} file descriptors are in use",
        "there are file descriptors again",
    ]
