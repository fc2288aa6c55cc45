"""Bad bytes on the socket: counted, logged once a minute, and nobody else is disturbed.

A good rank logs all the while; `good_rank` checks at the end of each test that all of it arrived.
"""

from __future__ import annotations

import os
import random
import socket as sockets
import struct
import time
import uuid
from collections.abc import Iterator
from contextlib import suppress

import msgpack
import pytest

from mlflow_relay import frames, messages
from tests.support.relay import PATIENCE_S, Node, finish, last_json, wait_until
from tests.support.scenes import (
    STEADY,
    Peer,
    attachment,
    fresh_name,
    in_order,
    log_lines,
    metric_frame,
    plain_connection,
    show,
    steady_points,
    stored,
)
from tests.support.seeds import new_seed

LOG_LINE_CHARS_MAX = 2000


@pytest.fixture(scope="module")
def node(tmp_path_factory, mlflow_server) -> Iterator[Node]:
    with Node(tmp_path_factory.mktemp("bad-bytes"), mlflow_server.uri) as node:
        node.start()
        yield node


@pytest.fixture(autouse=True)
def good_rank(node, mlflow_server) -> Iterator[str]:
    """A rank that logs during the test: not one of its points may be missing after it."""
    rank = node.rank(STEADY, fresh_name("good"), fresh_name("key"))
    run_id = rank.stdout.readline().strip()
    attached = wait_until(
        lambda: [run for run in node.status()["runs"] if run["run_id"] == run_id],
        "the good rank is attached",
    )
    assert attached[0]["ranks_alive"] == 1
    yield run_id
    calls = last_json(finish([rank])[0])["calls"]
    assert calls > 10
    run = node.wait_until_ended(run_id)
    found = stored(mlflow_server, run["mlflow_run_id"])
    assert found.status == "FINISHED"
    assert found.points == steady_points(calls)
    assert (run["lost_records"], run["dead_letters"], run["damaged_records"]) == (0, 0, 0)


@pytest.fixture
def peer(node) -> Iterator[Peer]:
    with Peer(node.socket) as peer:
        yield peer


def bad_messages(node: Node) -> int:
    return int(node.status()["counters"]["bad_messages"])


def broken(frame: bytes, at: int, new: bytes) -> bytes:
    return frame[:at] + new + frame[at + len(new) :]


def test_each_bad_message_is_counted_and_they_are_logged_once_a_minute(node, peer):
    session = os.urandom(16)
    frame = metric_frame(session, 0, 1.0, 2.0)
    attach = messages.pack_map(attachment())
    bad: list[tuple[bytes, ...]] = [
        # no message of ours
        (b"",), (b"D",), (b"garbage",), (b"D", frame, b"and more"), tuple([b"x"] * 1000),
        (b"", b""), (b"Z", b"unknown kind"), (b"DD", frame), (os.urandom(64), os.urandom(64)),
        (os.urandom(100), os.urandom(5 << 20)), (messages.ACK, messages.pack_ack(session, 1)),
        # frames
        *((messages.DATA, frame[:size]) for size in (0, 1, 39, 40, 41, len(frame) - 1)),
        (messages.DATA, frame + b"\0"), (messages.DATA, frame + frame),
        (messages.DATA, broken(frame, 0, b"XXX")), (messages.DATA, broken(frame, 3, bytes([frames.VERSION + 1]))),
        (messages.DATA, broken(frame, 3, b"\0")), (messages.DATA, broken(frame, 36, b"CRC!")),
        (messages.DATA, broken(frame, len(frame) - 1, b"!")),
        (messages.DATA, broken(frame, 28, struct.pack("<I", 0))),
        (messages.DATA, broken(frame, 28, b"\xff\xff\xff\xff")),
        (messages.DATA, broken(frame, 32, b"\xff\xff\xff\xff")),
        (messages.DATA, os.urandom(200_000)), (messages.DATA, bytes(6 << 20)),
        # sessions
        (messages.ALIVE, b""), (messages.ALIVE, session[:15]), (messages.ALIVE, session + b"\0"),
        (messages.DETACH, b""), (messages.DETACH, session), (messages.DETACH, bytes(25)),
        # maps
        (messages.ATTACH, b""), (messages.ATTACH, attach[:-1]), (messages.ATTACH, attach + b"\0"),
        (messages.ATTACH, b"\xc1"), (messages.ATTACH, b"\x91" * 5000),
        (messages.ATTACH, msgpack.packb([1, 2])), (messages.ATTACH, msgpack.packb({1: 2})),
        (messages.ATTACH, msgpack.packb({"v": 1})), (messages.ATTACH, msgpack.packb({"v": 2})),
        (messages.ATTACH, msgpack.packb({"v": "x" * (7 << 20)})),
        (messages.CONTROL, b""), (messages.CONTROL, os.urandom(50)),
        (messages.CONTROL, msgpack.packb({"v": 1})),
        (messages.CONTROL, messages.pack_map({"command": ["status"]})),
    ]  # fmt: skip
    before = bad_messages(node)
    for parts in bad:
        peer.send(*parts)
    unknown = peer.settle()
    assert bad_messages(node) - before == len(bad)
    assert unknown == []
    lines = log_lines(node, "bad_messages")
    lived_ms = node.status()["time_ms"] - node.status()["daemon"]["started_ms"]
    assert 1 <= len(lines) <= 1 + lived_ms // 60_000


WRONG_FIELDS = {
    "session": [b"", b"short", os.urandom(17), "text of 16 chars", None, 16, [1] * 16],
    "run_id": ["", "short", "G" * 32, "A" * 32, "../../../../../../../../../etc/xx", b"a" * 32, 7],
    "run_key": [None, 1, b"key", "k" * 2001, "k" * 5_000_000],
    "experiment_name": [None, 1, b"e", "e" * 2001],
    "run_name": [None, 1, ["n"], "n" * 2001],
    "rank": [-1, 1 << 63, (1 << 64) - 1, 1.0, "0", None, True],
    "world_size": [-1, 1 << 63, 1.5, "4", None, False],
    "node": [None, 5, "n" * 2001],
    "pid": [-1, "1", None, 1 << 63],
    "primary": [1, 0, None, "yes"],
    "start_ms": [-1, 0.5, None, "now", 1 << 63],
    "tags": [
        None, [], "t", {1: "a"}, {"a": 1}, {"a": None}, {"a": {"b": "c"}},
        {f"t{n}": "x" for n in range(101)},
    ],
    "first_seq": [-1, 1 << 63, 1.0, None, "0"],
}  # fmt: skip


def test_an_attach_with_a_wrong_field_is_refused_and_makes_no_run(node, peer):
    runs = len(node.status()["runs"])
    before = bad_messages(node)
    sent = 0
    for name, values in WRONG_FIELDS.items():
        for value in values:
            peer.send(messages.ATTACH, messages.pack_map(attachment(**{name: value})))
            sent += 1
        if name != "first_seq":
            fields = attachment()
            del fields[name]
            peer.send(messages.ATTACH, messages.pack_map(fields))
            sent += 1
    assert [answer for answer in peer.settle() if answer[0] != messages.REFUSED] == []
    assert bad_messages(node) - before == sent
    assert len(node.status()["runs"]) == runs


def test_numbers_at_their_limits_in_an_attach_break_no_command(node, peer):
    most = (1 << 63) - 1
    for fields in (
        {"start_ms": 0},
        {"start_ms": most},
        {"rank": most, "world_size": most, "pid": most},
        {"first_seq": most},
        {"run_name": "\x1b[31m\n\0red", "run_key": "\n" * 2000, "experiment_name": "limits"},
        {"tags": {f"tag {n}": "v" for n in range(100)}},
    ):
        peer.attach(**{"experiment_name": fresh_name("limits"), **fields})
    for command in (("runs",), ("runs", "--json"), ("status",), ("status", "--json")):
        done = node.command(*command)
        assert done.returncode in (0, 1), done.stderr
        assert done.stderr == ""
        assert "\x1b" not in done.stdout


def test_a_session_of_another_peer_can_neither_be_fed_nor_ended(node, peer, mlflow_server):
    told = peer.attach(experiment_name=fresh_name("owned"))
    session, run_id = told["session"], told["run_id"]
    with Peer(node.socket) as stranger:
        stranger.send(messages.DATA, metric_frame(session, 0, 666.0))
        stranger.send(messages.DETACH, messages.pack_detach(session, 0))
        stranger.send(messages.DETACH, messages.pack_detach(session, 1 << 40))
        stranger.send(messages.ALIVE, session)
        assert [kind for kind, _ in stranger.settle()] == [messages.UNKNOWN] * 4
    run = node.run(run_id)
    assert (run["accepted_records"], run["ranks_alive"], run["lost_records"]) == (0, 1, 0)
    peer.send(messages.DATA, metric_frame(session, 0, 1.0, 2.0))
    assert peer.receive() == [messages.ACK, messages.pack_ack(session, 2)]
    wait_until(lambda: node.run(run_id)["delivered_points"] == 2, "two points are delivered")
    points = stored(mlflow_server, node.run(run_id)["mlflow_run_id"]).points
    assert points == [("x", 1.0, 0), ("x", 2.0, 1)]


def test_a_frame_of_a_session_that_is_not_attached_is_answered_with_unknown(node, peer):
    session = os.urandom(16)
    before = len(node.status()["runs"])
    peer.send(messages.DATA, metric_frame(session, 0, 1.0))
    assert peer.receive() == [messages.UNKNOWN, session]
    peer.send(messages.ALIVE, session)
    assert peer.receive() == [messages.UNKNOWN, session]
    peer.send(messages.DETACH, messages.pack_detach(session, 0))
    assert peer.receive() == [messages.UNKNOWN, session]
    assert len(node.status()["runs"]) == before


def test_frames_out_of_turn_are_never_acknowledged_past_what_is_there(node, peer, mlflow_server):
    told = peer.attach(experiment_name=fresh_name("turns"))
    session, run_id = told["session"], told["run_id"]
    peer.send(messages.DATA, metric_frame(session, 5, 5.0))  # 0 to 4 are missing
    assert peer.receive() == [messages.UNKNOWN, session]
    for _ in range(2):  # the second time it is there already
        peer.send(messages.DATA, metric_frame(session, 0, 0.0, 1.0))
    answers = [peer.receive(), *peer.settle()]
    acks = [messages.unpack_ack(body) for kind, body in answers if kind == messages.ACK]
    assert max(acks) == (session, 2)
    peer.send(messages.DATA, metric_frame(session, 1, 1.0, 2.0, 3.0))  # overlaps
    assert peer.receive()[0] in (messages.UNKNOWN, messages.ACK)
    last = frames.pack_frame(session, (1 << 64) - 1, 1, metric_frame(session, 7, 7.0)[40:])
    peer.send(messages.DATA, last)
    assert peer.receive() == [messages.UNKNOWN, session]
    wait_until(lambda: node.run(run_id)["delivered_points"] >= 2, "what was in turn is delivered")
    points = stored(mlflow_server, node.run(run_id)["mlflow_run_id"]).points
    assert points[:2] == [("x", 0.0, 0), ("x", 1.0, 1)]
    assert all(key == "x" and value == step for key, value, step in points)


def test_a_whole_frame_of_records_that_are_none_gives_dead_letters_and_neighbours_arrive(
    node, peer, mlflow_server
):
    told = peer.attach(experiment_name=fresh_name("records"))
    session, run_id = told["session"], told["run_id"]
    now_ms = time.time_ns() // 1_000_000
    one = struct.pack(">d", 1.0)
    wrong = [
        b"\xc1", os.urandom(30), msgpack.packb({}), msgpack.packb([]), msgpack.packb([99, 1]),
        msgpack.packb([1, now_ms, 0, ["k"], b""]), msgpack.packb([1, now_ms, 0, ["k"], b"1234567"]),
        msgpack.packb([1, now_ms, 0, ["k", "l"], one]), msgpack.packb([1, now_ms, 0, [7], one]),
        msgpack.packb([1, now_ms, 0.5, ["k"], one]), msgpack.packb([1, now_ms, [], ["k"], one]),
        msgpack.packb([1, now_ms, [1 << 63], ["k"], one]), msgpack.packb([1, "now", 0, ["k"], one]),
        msgpack.packb([1, now_ms, 0, [], b""]), msgpack.packb([2, now_ms, {"k": 1}]),
        msgpack.packb([2, now_ms, {"k": None}]), msgpack.packb([2, now_ms, {1: "v"}]),
        msgpack.packb([3, now_ms, ["k", "v"]]), msgpack.packb([3, now_ms, {"k": b"bytes"}]),
        msgpack.packb([4, now_ms, "SLEEPING", ""]), msgpack.packb([4, now_ms, "FINISHED"]),
        msgpack.packb([2, now_ms, {"k": "x"}, "more"]),
    ]  # fmt: skip
    sent = 0
    for record in wrong:
        good = [msgpack.packb([1, now_ms, sent + index, ["good"], one]) for index in (0, 2)]
        entries = [frames.pack_entry(each) for each in (good[0], record, good[1])]
        body = b"".join(entries)
        peer.send(messages.DATA, frames.pack_frame(session, sent, 3, body))
        sent += 3
    # Numbers that msgpack holds and MLflow does not: refused, without other points of their key.
    for record in (
        msgpack.packb([1, (1 << 64) - 1, 0, ["late"], one]),
        msgpack.packb([1, now_ms, -(1 << 63), ["late"], one]),
        msgpack.packb([1, now_ms, 1, ["late"], one]),
    ):
        peer.send(messages.DATA, frames.pack_frame(session, sent, 1, frames.pack_entry(record)))
        sent += 1
        wait_until(
            lambda: node.run(run_id)["settled_records"] == sent,  # noqa: B023  # asked at once
            "all is delivered or refused",
        )
    run = node.run(run_id)
    points = stored(mlflow_server, run["mlflow_run_id"]).points
    steps = [step for at in range(len(wrong)) for step in (3 * at, 3 * at + 2)]
    assert [point for point in points if point[0] == "good"] == [("good", 1.0, s) for s in steps]
    late = [point for point in points if point[0] == "late"]
    assert late == in_order([("late", 1.0, -(1 << 63)), ("late", 1.0, 1)])
    assert run["dead_letters"] == len(wrong) + 1  # and a time beyond 64 bits
    assert len(points) == len(steps) + len(late)


def test_frames_that_lie_about_their_records_keep_nothing_waiting(node, peer, mlflow_server):
    told = peer.attach(experiment_name=fresh_name("lies"))
    session, run_id = told["session"], told["run_id"]
    seq = 0
    for claimed, values in ((5, 2), (1, 3), (2, 1)):
        body = metric_frame(session, seq, *[float(seq)] * values, key="lie")[frames.HEADER_BYTES :]
        peer.send(messages.DATA, frames.pack_frame(session, seq, claimed, body + bytes(32)))
        seq += claimed
        peer.send(messages.DATA, metric_frame(session, seq, 1.0, key="truth"))
        seq += 1
    wait_until(lambda: node.run(run_id)["settled_records"] == seq, "all is settled")
    run = node.run(run_id)
    assert (run["accepted_records"], run["waiting_records"], run["waiting_bytes"]) == (seq, 0, 0)
    points = stored(mlflow_server, run["mlflow_run_id"]).points
    assert [step for key, _, step in points if key == "truth"] == [5, 7, 10]


def test_an_oversized_message_is_counted(node, peer):
    before = bad_messages(node)
    peer.send(messages.DATA, bytes(messages.MESSAGE_BYTES_MAX + 1))
    wait_until(lambda: bad_messages(node) > before, "it is counted", timeout_s=10.0)
    assert len(log_lines(node, "bad_messages")) >= 1


#: What a DEALER says before its first message; all of it is needed to be let in.
GREETING = b"\xff" + bytes(8) + b"\x7f\x03\x00" + b"NULL".ljust(20, b"\0") + bytes(32)
READY = b"\x05READY\x0bSocket-Type\0\0\0\x06DEALER\x08Identity\0\0\0\0"
SHAKEN_HANDS = GREETING + b"\x04" + bytes([len(READY)]) + READY


@pytest.mark.parametrize("size", [64 << 20, 1 << 40, (1 << 64) - 1])
def test_a_message_that_claims_to_be_huge_ends_its_connection_and_takes_no_memory(node, size):
    memory_bytes = node.status()["daemon"]["memory_bytes"]
    with plain_connection(node.socket) as plain:
        plain.settimeout(PATIENCE_S)
        plain.sendall(SHAKEN_HANDS + b"\x03\x01D" + b"\x02" + struct.pack(">Q", size) + b"x" * 99)
        while plain.recv(4096):
            pass  # the daemon's own greeting; then it hangs up
    assert node.status()["daemon"]["memory_bytes"] - memory_bytes < 16 << 20


def test_bytes_that_are_no_zeromq_leave_nothing_behind(node):
    files_before = open_files(node)
    lines = len(node.log.read_text().splitlines())
    junk = [
        b"", b"\0", b"GET / HTTP/1.1\r\n\r\n", os.urandom(4096), GREETING[:10],
        GREETING[:-16] + os.urandom(2000), GREETING + b"\xff" * 100, GREETING + b"\x04\xff",
    ]  # fmt: skip
    for data in junk * 10:
        with plain_connection(node.socket) as plain, suppress(BrokenPipeError):
            plain.sendall(data)  # the daemon may have hung up by then
    # An open status request has a connection, too.
    wait_until(lambda: open_files(node) <= files_before + 3, "their connections are closed")
    assert len(node.log.read_text().splitlines()) - lines <= 2


def open_files(node: Node) -> int:
    assert node.daemon is not None
    return len(os.listdir(f"/proc/{node.daemon.pid}/fd"))


def test_peers_that_connect_and_hang_hold_up_nobody(node, good_rank):
    hanging = []
    try:
        for number in range(100):
            plain = plain_connection(node.socket)
            if number % 2:
                plain.sendall(b"\xff" + bytes(8))  # the first bytes of a greeting
            hanging.append(plain)
        with Peer(node.socket) as silent:
            silent.settle()
            delivered = node.run(good_rank)["delivered_points"]
            wait_until(
                lambda: node.run(good_rank)["delivered_points"] > delivered + 100,
                "the good rank's points go on",
            )
            # One that asks and never reads the answers.
            for _ in range(2000):
                silent.send(messages.CONTROL, messages.pack_map({"command": "status"}))
            delivered = node.run(good_rank)["delivered_points"]
            wait_until(
                lambda: node.run(good_rank)["delivered_points"] > delivered + 100,
                "the good rank's points go on",
            )
    finally:
        for plain in hanging:
            plain.close()


def test_ten_thousand_mutated_messages_end_nobody_and_change_no_point(node, peer, mlflow_server):
    seed = new_seed()
    show(f"seed {seed}")
    rng = random.Random(seed)
    # Their own runs, so that what a mutation makes of them is theirs.
    experiment = fresh_name("mutated")
    told = peer.attach(experiment_name=experiment)
    sessions = [told]
    attach = messages.pack_map(attachment(experiment_name=experiment))
    control = [
        messages.pack_map({"command": "ping"}),
        messages.pack_map({"command": "status"}),
        messages.pack_map({"command": "flush", "runs": [uuid.uuid4().hex]}),
        messages.pack_map(
            {"command": "dead_letters", "action": "list", "run": told["run_id"], "ids": [1, 2]}
        ),
    ]
    next_seq = 0
    before, started_s = bad_messages(node), time.monotonic()
    pid = node.status()["daemon"]["pid"]
    for number in range(10_000):
        valid = [
            (messages.DATA, metric_frame(told["session"], next_seq, *[1.5] * rng.randint(1, 5))),
            (messages.ATTACH, attach),
            (messages.ALIVE, told["session"]),
            (messages.DETACH, messages.pack_detach(told["session"], 0)),
            (messages.CONTROL, rng.choice(control)),
        ]
        weights = (6, 3, 1, 1, 3)
        peer.send(*mutated(rng.choices(valid, weights)[0], rng))
        if number % 500 == 499:
            # One that is good: what came before it must not stand in its way.
            peer.send(messages.DATA, metric_frame(told["session"], next_seq, 1.5))
            answers = peer.settle()
            acks = [messages.unpack_ack(body)[1] for kind, body in answers if kind == messages.ACK]
            next_seq = max([next_seq, *acks])
            if any(kind == messages.DETACHED for kind, _ in answers):  # a DETACH came unchanged
                told, next_seq = peer.attach(experiment_name=experiment), 0
                sessions.append(told)
    peer.settle()
    counted = bad_messages(node) - before
    show(f"{counted} of 10,000 refused in {time.monotonic() - started_s:.1f} s")
    assert counted > 5000
    assert node.daemon is not None
    assert node.daemon.poll() is None
    assert node.status()["daemon"]["pid"] == pid
    assert node.log.read_text().count("Traceback") == 0
    assert max(map(len, node.log.read_text(errors="replace").splitlines())) < LOG_LINE_CHARS_MAX
    # Whatever got through is a whole frame with a CRC that fits: its values are those sent.
    points = []
    for each in sessions:
        run = wait_until(
            lambda: [
                run
                for run in node.status()["runs"]
                if run["run_id"] == each["run_id"]  # noqa: B023
                and run["mlflow_run_id"]
                and run["waiting_records"] == 0
            ],
            "all of the run is in MLflow",
        )
        points += stored(mlflow_server, run[0]["mlflow_run_id"]).points
    assert points
    assert {(key, value) for key, value, _ in points} == {("x", 1.5)}
    # What mutated ATTACHes made of themselves stops no command.
    for command in (("status", "--json"), ("runs",)):
        done = node.command(*command)
        assert done.returncode in (0, 1), done.stderr


def mutated(parts: tuple[bytes, ...], rng: random.Random) -> list[bytes]:
    """Return the message with one to four random changes."""
    changed = [bytearray(part) for part in parts]
    for _ in range(rng.randint(1, 4)):
        part = rng.choice(changed)
        at = rng.randrange(len(part) + 1)
        match rng.randrange(8):
            case 0 | 1 if part:
                part[at % len(part)] ^= 1 << rng.randrange(8)
            case 2 if part:
                part[at % len(part)] = rng.randrange(256)
            case 3:
                del part[at:]
            case 4:
                part[at:at] = rng.randbytes(rng.randint(1, 20))
            case 5:
                del part[at : at + rng.randint(1, 10)]
            case 6:
                part[at:at] = part[: rng.randint(0, len(part))]
            case 7 if rng.random() < 0.1:
                changed.insert(rng.randrange(len(changed) + 1), bytearray(rng.randbytes(5)))
    return [bytes(part) for part in changed]


def test_a_connection_that_is_cut_in_the_middle_of_a_frame_disturbs_nobody(node, peer):
    """A rank that dies while it sends: half a message, then the end of the connection."""
    message = SHAKEN_HANDS + b"\x01\x01D" + b"\x02" + struct.pack(">Q", 1 << 20) + bytes(50)
    for cut in (1, 10, 63, 64, 70, 100, len(SHAKEN_HANDS), len(SHAKEN_HANDS) + 2, len(message)):
        with plain_connection(node.socket) as plain:
            plain.sendall(message[:cut])
            plain.shutdown(sockets.SHUT_RDWR)
    assert peer.settle() == []


def test_what_a_stranger_sends_is_not_repeated_at_length_in_the_log(tmp_path, mlflow_server):
    with Node(tmp_path / "node", mlflow_server.uri) as node:
        node.start()
        with Peer(node.socket) as peer:
            peer.send(messages.ATTACH, msgpack.packb({"v": "x\x1b[31m" * (1 << 20)}))
            peer.settle()
        (line,) = log_lines(node, "bad_messages")
        assert len(line) < LOG_LINE_CHARS_MAX
        assert "\x1b" not in node.log.read_text()
