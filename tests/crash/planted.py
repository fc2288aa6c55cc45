"""Bugs to plant: each is a mistake that somebody could make, and the suite must catch it.

Nothing of this is in the product; it is patched from outside, in a process of its own.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mlflow_relay import frames, journal_files, records, sender
from mlflow_relay_daemon.batch import Batch
from mlflow_relay_daemon.lane.batches import Batches
from mlflow_relay_daemon.lane.creation import Creation
from mlflow_relay_daemon.spool import segment
from mlflow_relay_daemon.spool.disk import Disk
from mlflow_relay_daemon.spool.run_spool import RunSpool

ROOT = Path(__file__).resolve().parents[2]
Patch = Callable[[object, str, object], None]
_CRASH_STATES = (
    "tests/crash/test_spool_crash_states.py::"
    "test_whatever_was_acknowledged_is_found_after_any_crash"
)


@dataclass(frozen=True)
class Bug:
    """A mistake, and the test that catches it."""

    plant: Callable[[Patch], None]
    test: str


def skip_fsync(patch: Patch) -> None:
    """What was written counts as durable."""
    patch(Disk, "sync", lambda disk, fd: None)


def skip_folder_fsync(patch: Patch) -> None:
    """A file's name counts as durable with the file."""
    patch(Disk, "sync_folder", lambda disk, path: None)


def ack_before_fsync(patch: Patch) -> None:
    """The fsync of a group comes when the next one is there."""

    def append(writer: segment.Writer, parts: Sequence[bytes | memoryview]) -> None:
        if writer.synced > writer.start:
            writer._disk.sync(writer._fd)
        writer._disk.write(writer._fd, b"".join(parts))
        writer.synced += sum(map(len, parts))

    patch(segment.Writer, "append", append)


def ignore_crc(patch: Patch) -> None:
    """Frames and records are taken as they are read."""

    def check_frame(data: bytes | memoryview, offset: int = 0) -> frames.Header:
        header = frames.read_header(data, offset)
        if offset + frames.HEADER_BYTES + header.body_bytes > len(data):
            raise frames.FormatError("frame cut off")
        return header

    def iter_entries(body: bytes | memoryview) -> Iterator[bytes | None]:
        at = 0
        while at + frames.ENTRY_BYTES <= len(body):
            length, _ = frames.ENTRY.unpack_from(body, at)
            at += frames.ENTRY_BYTES
            yield bytes(body[at : at + length])
            at += length

    patch(frames, "check_frame", check_frame)
    patch(frames, "iter_entries", iter_entries)


def early_unlink(patch: Patch) -> None:
    """A segment is removed when it has been read, though its end is not delivered."""
    settle = RunSpool.settle

    def settle_early(run: RunSpool, mark: Any) -> None:
        settle(run, mark)
        with run.lock:
            run._remove([number for number in run._ends if number <= mark.segment])

    patch(RunSpool, "settle", settle_early)


def lost_tail_on_adopt(patch: Patch) -> None:
    """The last record of a dead rank's journal is forgotten."""
    salvage = journal_files.salvage_entries

    def salvage_less(data: bytes, session: bytes, from_seq: int) -> journal_files.Salvage:
        found = salvage(data, session, from_seq)
        if not found.frames:
            return found
        *rest, last = found.frames
        header, entries = frames.read_frame(last), list(frames.iter_entries(last[40:]))[:-1]
        if entries:
            body = b"".join(frames.pack_entry(each) for each in entries if each is not None)
            rest.append(frames.pack_frame(session, header.first_seq, len(entries), body))
        return found._replace(frames=rest)

    patch(journal_files, "salvage_entries", salvage_less)


def restamped_timestamps(patch: Patch) -> None:
    """A record gets its time when it is delivered, not when it was logged."""
    add = Batch.add

    def add_now(batch: Batch, session: bytes, record: records.Record, known: Any) -> None:
        add(batch, session, record._replace(timestamp_ms=time.time_ns() // 1_000_000), known)

    patch(Batch, "add", add_now)


def watermark_before_delivery(patch: Patch) -> None:
    """A batch is settled, and sent afterwards."""

    def deliver_next(batches: Batches, failures: int) -> bool:
        batch, mark = batches._collect()
        if vars(mark) == vars(batches._to.run.mark):
            return False
        batches._settle(batch, mark)
        batches._deliver(batch, failures)
        return True

    patch(Batches, "deliver_next", deliver_next)


def double_create(patch: Patch) -> None:
    """A create is sent again without a look at whether the first one was carried out."""
    find, find_or_create = Creation._find, Creation.find_or_create
    looks_away: set[Creation] = set()

    def find_or_create_blindly(creation: Creation) -> Any:
        looks_away.add(creation)
        return find_or_create(creation)

    def find_later(creation: Creation, experiment_id: str) -> list[Any]:
        if creation in looks_away:
            looks_away.discard(creation)
            return []
        return find(creation, experiment_id)

    patch(Creation, "find_or_create", find_or_create_blindly)
    patch(Creation, "_find", find_later)


def swallowed_sender_error(patch: Patch) -> None:
    """A frame that could not be sent counts as sent, and as done with: nobody looks again."""
    send_frames = sender.Sender._send_frames

    def send_and_forget(self: sender.Sender, socket: Any, now_s: float) -> None:
        send_frames(self, socket, now_s)
        self._ack_due = float("inf")

    def try_send(socket: Any, kind: bytes, payload: bytes) -> bool:
        with contextlib.suppress(sender.zmq.Again):
            socket.send_multipart((kind, payload), sender.zmq.NOBLOCK)
        return True

    patch(sender.Sender, "_send_frames", send_and_forget)
    patch(sender, "_try_send", try_send)
    # The test waits half a minute for what never comes; that much patience is not needed here.
    wait = threading.Event.wait
    patch(threading.Event, "wait", lambda event, timeout=None: wait(event, min(timeout or 5, 5)))


_DELIVERY, _ADOPTION = "tests/daemon/test_delivery.py::", "tests/daemon/test_adoption.py::"
BUGS = {
    bug.plant.__name__: bug
    for bug in (
        Bug(skip_fsync, _CRASH_STATES),
        Bug(skip_folder_fsync, _CRASH_STATES),
        Bug(ack_before_fsync, _CRASH_STATES),
        Bug(
            ignore_crc,
            "tests/daemon/test_segment.py::"
            "test_damage_anywhere_costs_no_frame_but_the_one_that_it_hit",
        ),
        Bug(early_unlink, _CRASH_STATES),
        Bug(
            lost_tail_on_adopt,
            _ADOPTION + "test_what_a_killed_rank_had_is_in_the_spool_and_its_journal_is_gone",
        ),
        Bug(restamped_timestamps, _DELIVERY + "test_a_run_is_made_filled_and_ended"),
        Bug(
            watermark_before_delivery,
            _DELIVERY + "test_a_daemon_killed_between_any_two_requests_delivers_once_in_effect",
        ),
        Bug(double_create, _DELIVERY + "test_a_create_whose_answer_is_lost_makes_one_run"),
        Bug(
            swallowed_sender_error,
            "tests/client/test_sender.py::test_what_is_not_acknowledged_is_sent_again_after_a_while",
        ),
    )
}
