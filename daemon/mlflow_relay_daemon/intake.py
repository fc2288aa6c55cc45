"""Socket → spool → fsync → ack: the daemon's one loop.

    receive a group → sort by run → one append and one fdatasync per run → acks
                    → sessions that come or go → one card per run → answers

Records are not looked at here. While the disk syncs, the next group gathers in the socket, so
groups grow with the load by themselves. Whatever fails, an ack is sent only for what is on the
disk, and the ranks' journals hold the rest.
"""

from __future__ import annotations

import contextlib
import logging
import os
import time
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import zmq

from mlflow_relay import messages
from mlflow_relay.errors import FormatError
from mlflow_relay.frames import read_frame
from mlflow_relay_daemon.access import (
    SESSIONS_PER_USER_MAX,
    NotYours,
    peer_uid,
)
from mlflow_relay_daemon.attachment import Attachment, read_attachment, unpack_session
from mlflow_relay_daemon.control import Control
from mlflow_relay_daemon.counters import Counters
from mlflow_relay_daemon.endpoint import Endpoint
from mlflow_relay_daemon.hosted import Hosted, Runs
from mlflow_relay_daemon.spool.run_spool import Arrival
from mlflow_relay_daemon.spool.spool import RunLeftAlone

log = logging.getLogger(__name__)

#: While the disk is full, no rank's frames are taken for so long: sending them again costs, too.
FULL_PAUSE_S = 0.5

#: Frames of one group by session, in order.
Arrivals = dict[bytes, list[Arrival]]


class Said(NamedTuple):
    """A message of a session."""

    peer: bytes  #: ZeroMQ routing id
    uid: int | None  #: of the process at the other end
    payload: bytes


@dataclass
class LiveSession:
    """A session that is attached."""

    peer: bytes  #: its ZeroMQ routing id; a session is who attached it last
    uid: int | None  #: a routing id may be taken over by the next who connects, a uid may not
    hosted: Hosted
    heard_s: float


class Intake:
    """Serves the socket.

    Args:
        socket_path: made here, for this user alone.
        group_bytes_max: bytes that share one fdatasync, at most.
        gid: of the group whose members may connect, too.
    """

    def __init__(
        self,
        socket_path: Path,
        runs: Runs,
        control: Control,
        counters: Counters,
        group_bytes_max: int,
        *,
        gid: int | None = None,
    ) -> None:
        self._runs, self._control, self._counters = runs, control, counters
        self.group_bytes_max = group_bytes_max
        self.sessions: dict[bytes, LiveSession] = {}
        self._untold: set[bytes] = set()  # sessions that do not know their MLflow run id yet
        self._full_until_s = 0.0
        self._answers: deque[tuple[bytes, bytes]] = deque()
        self._wake_fd = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self._context = zmq.Context()
        self.endpoint = Endpoint(self._context, socket_path, gid)
        self._socket = self.endpoint.socket
        self._poller = zmq.Poller()
        self._poller.register(self._socket, zmq.POLLIN)
        self._poller.register(self._wake_fd, zmq.POLLIN)

    def answer_later(self, peer: bytes, payload: bytes) -> None:
        """Send an answer to a control request from another thread."""
        self._answers.append((peer, payload))
        self.wake()

    def wake(self) -> None:
        """Let the loop turn now. Safe in signal handlers and threads."""
        os.eventfd_write(self._wake_fd, 1)

    def turn(self, wait_s: float) -> None:
        """Wait for something to do, and do it."""
        ready = dict(self._poller.poll(int(wait_s * 1000)))
        if self._wake_fd in ready:
            os.eventfd_read(self._wake_fd)
        if self._socket in ready:
            self._serve(self._receive_group())
        while self._answers:
            peer, payload = self._answers.popleft()
            self._send(peer, messages.REPLY, payload)
        self._tell_news()

    def forget(self, session: bytes) -> None:
        """The session is over."""
        self.sessions.pop(session, None)
        self._untold.discard(session)

    def close(self) -> None:
        self.endpoint.close()
        self._context.destroy(linger=200)
        os.close(self._wake_fd)

    # ── in ──

    def _receive_group(self) -> list[list[zmq.Frame]]:
        """Return the messages that are there, up to a group's size.

        Not copied: what the socket has received is checked and written where it lies.
        """
        group: list[list[zmq.Frame]] = []
        size = 0
        while size < self.group_bytes_max:
            try:
                parts = self._socket.recv_multipart(zmq.NOBLOCK, copy=False)
            except zmq.Again:
                break  # all is received
            group.append(parts)
            size += sum(map(len, parts))
        return group

    def _serve(self, group: list[list[zmq.Frame]]) -> None:
        arrivals: Arrivals = {}
        comers: list[Said] = []
        goers: list[Said] = []
        for parts in group:
            with self._guarded():
                routing_id, what, payload = parts
                peer, kind, uid = routing_id.bytes, what.bytes, peer_uid(routing_id)
                if len(payload) > messages.MESSAGE_BYTES_MAX:
                    raise FormatError(f"a message of {len(payload)} bytes")
                if kind == messages.DATA:
                    self._sort(peer, uid, payload.buffer, arrivals)
                elif kind == messages.ATTACH:
                    comers.append(Said(peer, uid, payload.bytes))
                elif kind == messages.DETACH:
                    goers.append(Said(peer, uid, payload.bytes))
                else:
                    self._settle(arrivals, comers, goers)
                    self._answer(peer, uid, kind, payload.bytes)
        self._settle(arrivals, comers, goers)

    def _settle(self, arrivals: Arrivals, comers: list[Said], goers: list[Said]) -> None:
        """Put on the disk what the group has brought up to here, and answer. Frames come first: a
        session that comes again is told what is here, one that goes has all of it here."""
        self._keep(arrivals)
        self._attach(comers)
        self._detach(goers)
        comers.clear()
        goers.clear()

    @contextlib.contextmanager
    def _guarded(self) -> Iterator[None]:
        """One peer's message, whatever it does to us, must not end the service of the rest."""
        try:
            yield
        except (FormatError, NotYours, ValueError) as error:
            self._counters.count("bad_messages", error)
        except Exception as error:
            log.exception("a message was not served")
            self._counters.count("bad_messages", repr(error))

    def _sort(self, peer: bytes, uid: int | None, payload: memoryview, arrivals: Arrivals) -> None:
        """Put a frame with those of its session, if it is the one that comes next."""
        header = read_frame(payload)
        session = self._session_of(peer, uid, header.session)
        if session is None:
            self._send(peer, messages.UNKNOWN, header.session)
            return
        session.heard_s = time.monotonic()
        before = arrivals.get(header.session)
        expected = before[-1][0].next_seq if before else session.hosted.run.next_seq(header.session)
        if header.first_seq == expected:
            arrivals.setdefault(header.session, []).append((header, payload))
            return
        if header.next_seq <= expected:
            self._counters.count("resent_frames", "a frame came twice")
            self._ack(header.session)  # of what is on the disk: its ack may have been lost
        elif not self._runs.is_full:  # else the gap is ours: the rank sends again after its timeout
            self._counters.count("resent_frames", "a frame came before its predecessor")
            self._send(peer, messages.UNKNOWN, header.session)

    # ── keep ──

    def _keep(self, arrivals: Arrivals) -> None:
        """Append and fsync, run by run; then ack."""
        if not arrivals:
            return
        by_run: dict[str, list[Arrival]] = {}
        for session, frames in arrivals.items():
            by_run.setdefault(self.sessions[session].hosted.run.card.run_id, []).extend(frames)
        for run_id, frames in by_run.items():
            # A full disk may have room for some of them, and never for all at once.
            groups = [[each] for each in frames] if self._runs.is_full else [frames]
            for group in groups:
                if not self._append(self._runs.by_id[run_id], group):
                    break  # what follows must not be there before it
                for session in {header.session for header, _ in group}:
                    self._ack(session)
        arrivals.clear()

    def _append(self, hosted: Hosted, frames: list[Arrival]) -> bool:
        """Return whether the frames are on the disk."""
        if self._runs.is_full and time.monotonic() < self._full_until_s:
            return False
        try:
            self._runs.append(hosted, frames)
        except OSError as error:
            self._note_full("not written, not acknowledged", error)
            self._full_until_s = time.monotonic() + FULL_PAUSE_S
            return False
        return True

    def _note_full(self, what: str, error: OSError) -> None:
        self._counters.count("fsync_failures", f"{what}: {error.strerror or error}")
        self._runs.note_full()

    def _ack(self, session: bytes) -> None:
        live = self.sessions[session]
        next_seq = live.hosted.run.next_seq(session)
        self._send(live.peer, messages.ACK, messages.pack_ack(session, next_seq))

    # ── answer ──

    def _session_of(self, peer: bytes, uid: int | None, name: bytes) -> LiveSession | None:
        """Return the session if it is this peer's."""
        session = self.sessions.get(name)
        if session is None or session.peer != peer or session.uid != uid:
            return None
        return session

    def _answer(self, peer: bytes, uid: int | None, kind: bytes, payload: bytes) -> None:
        if kind == messages.ALIVE:
            name = messages.unpack_session(payload)
            session = self._session_of(peer, uid, name)
            if session is None:
                self._send(peer, messages.UNKNOWN, name)
            else:
                session.heard_s = time.monotonic()
        elif kind == messages.CONTROL:
            reply = self._control.answer(peer, payload, uid)
            if reply is not None:
                self._send(peer, messages.REPLY, reply)
        else:
            raise FormatError(f"message of unknown kind {kind[:8]!r}")

    def _attach(self, comers: list[Said]) -> None:
        """Let sessions in; those of one run share one card, and its fsync."""
        by_run: dict[tuple[str, int | None], list[tuple[Said, Attachment]]] = {}
        for said in comers:
            with self._guarded():
                try:
                    attachment = read_attachment(said.payload)
                    self._check_session(attachment.session, said.uid)
                except (FormatError, NotYours) as error:
                    self._refuse(said, error)
                    raise
                by_run.setdefault((attachment.run_id, said.uid), []).append((said, attachment))
        for group in by_run.values():
            with self._guarded():
                self._attach_to_run(group)

    def _attach_to_run(self, group: list[tuple[Said, Attachment]]) -> None:
        try:
            hosted = self._runs.attach_all([attachment for _, attachment in group], group[0][0].uid)
        except (RunLeftAlone, NotYours) as error:
            for said, _ in group:
                self._refuse(said, error)
            raise
        except OSError as error:
            self._note_full("no session attached", error)
            return  # they ask again
        for said, attachment in group:
            self._let_in(said, attachment.session, hosted)

    def _let_in(self, said: Said, name: bytes, hosted: Hosted) -> None:
        self.sessions[name] = LiveSession(said.peer, said.uid, hosted, time.monotonic())
        mlflow_run_id = hosted.run.card.mlflow_run_id
        if mlflow_run_id is None:
            self._untold.add(name)
        fields = {
            "session": name,
            "next_seq": hosted.run.next_seq(name),
            "mlflow_run_id": mlflow_run_id,
        }
        self._send(said.peer, messages.ATTACHED, messages.pack_map(fields))

    def _check_session(self, name: bytes, uid: int | None) -> None:
        """Raises: NotYours: it is another user's session, or this user has too many."""
        known = self.sessions.get(name)
        if known is not None and known.uid != uid:
            raise NotYours("this session is another user's")
        if known is not None or len(self.sessions) < SESSIONS_PER_USER_MAX:
            return  # not worth counting, with a thousand ranks that attach at once
        count = sum(each.uid == uid for each in self.sessions.values())
        if count >= SESSIONS_PER_USER_MAX:
            raise NotYours(
                f"uid {uid} has {count} sessions at this daemon: wait until some have ended"
            )

    def _refuse(self, said: Said, error: Exception) -> None:
        """Tell a session why it is not taken, if it can be made out who asks."""
        try:
            session = unpack_session(said.payload)
        except FormatError:
            return
        fields = {"session": session, "error": str(error)}
        self._send(said.peer, messages.REFUSED, messages.pack_map(fields))

    def _detach(self, goers: list[Said]) -> None:
        """Let sessions go; those of one run share one card, and its fsync."""
        by_run: dict[str, dict[bytes, int]] = {}
        for peer, uid, payload in goers:
            with self._guarded():
                name, lost = messages.unpack_detach(payload)
                session = self._session_of(peer, uid, name)
                if name not in self.sessions and self._is_closed(name):
                    self._send(peer, messages.DETACHED, name)  # the answer was lost
                elif session is None:
                    self._send(peer, messages.UNKNOWN, name)
                else:
                    by_run.setdefault(session.hosted.run.card.run_id, {})[name] = lost
        for run_id, lost_by_session in by_run.items():
            with self._guarded():
                self._detach_from_run(self._runs.by_id[run_id], lost_by_session)

    def _detach_from_run(self, hosted: Hosted, lost_by_session: dict[bytes, int]) -> None:
        try:
            self._runs.close_all(hosted, lost_by_session)
        except OSError as error:
            self._note_full("no session closed", error)
            return  # they ask again
        for name in lost_by_session:
            self._send(self.sessions[name].peer, messages.DETACHED, name)
            self.forget(name)

    def _is_closed(self, session: bytes) -> bool:
        hosted = self._runs.find_session(session)
        return hosted is not None and hosted.run.card.sessions[session.hex()].closed

    def _tell_news(self) -> None:
        """Tell ranks the MLflow run id as soon as there is one."""
        for name in list(self._untold):
            session = self.sessions[name]
            mlflow_run_id = session.hosted.run.card.mlflow_run_id
            if mlflow_run_id is not None:
                self._untold.discard(name)
                fields = {"session": name, "mlflow_run_id": mlflow_run_id}
                self._send(session.peer, messages.NEWS, messages.pack_map(fields))

    def _send(self, peer: bytes, kind: bytes, payload: bytes) -> None:
        try:
            self._socket.send_multipart((peer, kind, payload), zmq.NOBLOCK)
        except zmq.ZMQError as error:
            log.debug("a peer is gone: %s", error)
