"""The thread that brings the journal to the daemon: frames out, acks in.

It raises nothing into training. While no daemon answers it keeps the journal and tries on. Its
states are these three:

    SEEKING    ── ATTACHED ──▶ SENDING ── UNKNOWN, or no ack for ACK_TIMEOUT_S ──▶ SEEKING
    SEEKING, SENDING ── REFUSED ──▶ REFUSED (says why once; asks again at a long interval)
"""

from __future__ import annotations

import logging
import math
import os
import threading
import time
from collections.abc import Callable
from enum import Enum
from pathlib import Path
from time import monotonic
from typing import Any

import zmq

from . import messages
from .errors import FormatError
from .journal import Journal

log = logging.getLogger("mlflow_relay")

#: How long records may wait before they are sent. A turn of the thread costs the training some
#: tens of microseconds of one core; 50 a second are 0.2 % of it. An ack comes within a millisecond:
#: to answer each with what was logged meanwhile would be thousands of turns.
LOOK_EVERY_S = 0.02
ATTACH_RETRY_S = 0.25
ATTACH_REFUSED_RETRY_S = 10.0
ACK_TIMEOUT_S = 2.0
NO_DAEMON_AFTER_S = 0.2
#: Pause between two frames of a backlog: to count and to pack one holds the interpreter's lock for
#: some 0.3 ms, and the training is let in before the next.
FRAME_PAUSE_S = 1e-4
#: Pause after the file system had no space for another file of the journal.
PREPARE_RETRY_S = 1.0
ALIVE_EVERY_S = 5.0
LOSS_REPORT_EVERY_S = 60.0
TROUBLE_PAUSE_S = 0.1
#: Frames on their way to the daemon, in bytes: enough for 200 MB/s at 5 ms per fsync, and little
#: enough for a daemon that has hundreds of ranks to hold it for all of them.
WINDOW_BYTES = 1 << 20


class State(Enum):
    SEEKING = "seeking"
    SENDING = "sending"
    REFUSED = "refused"


class Sender(threading.Thread):
    """Sends one session's journal.

    Args:
        journal: of this session.
        socket: the daemon's.
        card: the session's card, as a map.
        on_mlflow_run_id: called from this thread when the id is told.
        on_no_daemon: called from this thread, once, if no daemon answers for a while.
    """

    def __init__(
        self,
        journal: Journal,
        socket: Path,
        card: dict[str, Any],
        on_mlflow_run_id: Callable[[str], None],
        on_no_daemon: Callable[[], None] | None = None,
    ) -> None:
        super().__init__(name="mlflow-relay sender", daemon=True)
        self.journal = journal
        self.state = State.SEEKING
        self.over = threading.Event()  #: detached: the daemon has all, the journal is removed
        self._endpoint = f"ipc://{socket}"
        self._card = card
        self._on_mlflow_run_id = on_mlflow_run_id
        self._on_no_daemon = on_no_daemon
        self._wake_fd = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self._ending = False
        self._wanted_seq = 0  # somebody waits until all before it is acked
        self._look_at = 0.0
        self._attach_at = self._ack_due = self._alive_at = self._loss_report_at = 0.0
        self._prepare_at = self._seeking_since_s = self._trouble_report_at = 0.0
        self._lost_reported = 0

    def wake(self) -> None:
        """Send what there is at once, and not at the next look."""
        os.eventfd_write(self._wake_fd, 1)

    def end(self) -> None:
        """Detach once all is acked. `over` tells when that is done."""
        self._ending = True
        self.wake()

    def let_go(self) -> None:
        """Close what is left when the thread has ended, or, in a forked child, never was."""
        os.close(self._wake_fd)

    def run(self) -> None:
        context = zmq.Context()
        try:
            socket = self._connect(context)
            poller = zmq.Poller()
            poller.register(socket, zmq.POLLIN)
            poller.register(self._wake_fd, zmq.POLLIN)
            self._look_at = monotonic() + LOOK_EVERY_S  # by then it is connected
            while not self.over.is_set():
                try:
                    self._turn(socket, poller)
                except Exception as error:  # noqa: BLE001  # logged; training must not see it
                    self._report_trouble(error, monotonic())
                    time.sleep(TROUBLE_PAUSE_S)
        finally:
            context.destroy(linger=0)

    def _turn(self, socket: zmq.Socket[bytes], poller: zmq.Poller) -> None:
        wait_s = max(0.0, self._look_at - monotonic())
        for ready, _ in poller.poll(math.ceil(wait_s * 1000)):
            if ready is socket:
                self._receive_all(socket)
            else:
                os.eventfd_read(self._wake_fd)
                self._wanted_seq = self.journal.next_seq
        now_s = monotonic()
        if not self.over.is_set() and self._is_due(now_s):
            self._look_at = now_s + LOOK_EVERY_S
            self._look(socket, now_s)

    def _is_due(self, now_s: float) -> bool:
        """Return whether to look now, which an ack alone is no reason for."""
        is_wanted = self._ending or self.journal.acked < self._wanted_seq
        return is_wanted or now_s >= self._look_at or self.journal.fills_a_frame

    def _connect(self, context: zmq.Context[zmq.Socket[bytes]]) -> zmq.Socket[bytes]:
        socket = context.socket(zmq.DEALER)
        socket.linger = 0
        socket.immediate = 1  # no daemon, no queue: records stay in the journal alone
        socket.sndhwm = 0  # WINDOW_BYTES is the limit
        socket.maxmsgsize = messages.MESSAGE_BYTES_MAX
        socket.reconnect_ivl = 20
        socket.reconnect_ivl_max = 150  # under the grace that the end of a session gives
        socket.connect(self._endpoint)
        return socket

    # ── out ──

    def _look(self, socket: zmq.Socket[bytes], now_s: float) -> None:
        self._report_losses(now_s)
        if self.state is State.SENDING and self.journal.in_flight_bytes and now_s > self._ack_due:
            self.state = State.SEEKING  # a daemon that was killed had frames of ours
        if self.state is State.SENDING:
            self._send_all(socket, now_s)
        else:
            self._seek(socket, now_s)
        # Last, for it takes milliseconds; and not for a session that will log no more.
        if now_s >= self._prepare_at and not self._ending and not self.journal.prepare():
            self._prepare_at = now_s + PREPARE_RETRY_S

    def _seek(self, socket: zmq.Socket[bytes], now_s: float) -> None:
        self._seek_help(now_s)
        if now_s < self._attach_at:
            return
        attach = {**self._card, "first_seq": self.journal.acked}
        if _try_send(socket, messages.ATTACH, messages.pack_map(attach)):
            is_refused = self.state is State.REFUSED
            self._attach_at = now_s + (ATTACH_REFUSED_RETRY_S if is_refused else ATTACH_RETRY_S)

    def _send_all(self, socket: zmq.Socket[bytes], now_s: float) -> None:
        self._send_frames(socket, now_s)
        if self._ending and not self.journal.unacked and now_s >= self._attach_at:
            self._attach_at = now_s + ATTACH_RETRY_S  # a lost answer is asked for again
            detach = messages.pack_detach(self.journal.session, self.journal.lost)
            self._send(socket, messages.DETACH, detach)
        elif now_s >= self._alive_at:
            self._alive_at = now_s + ALIVE_EVERY_S
            self._send(socket, messages.ALIVE, self.journal.session)

    def _seek_help(self, now_s: float) -> None:
        """Ask for a daemon, if we may, when none has answered for a while."""
        self._seeking_since_s = self._seeking_since_s or now_s
        if self._on_no_daemon and now_s - self._seeking_since_s >= NO_DAEMON_AFTER_S:
            call, self._on_no_daemon = self._on_no_daemon, None
            call()

    def _send_frames(self, socket: zmq.Socket[bytes], now_s: float) -> None:
        while self.journal.in_flight_bytes < WINDOW_BYTES:
            frame = self.journal.next_frame()
            if frame is None or not self._send(socket, messages.DATA, frame.data):
                return
            if not self.journal.in_flight_bytes:
                self._ack_due = now_s + ACK_TIMEOUT_S
            self.journal.mark_sent(frame)
            if self.journal.fills_a_frame:
                time.sleep(FRAME_PAUSE_S)

    def _send(self, socket: zmq.Socket[bytes], kind: bytes, payload: bytes) -> bool:
        """Return False if the daemon is gone: then it is sought."""
        sent = _try_send(socket, kind, payload)
        if not sent:
            self.state, self._attach_at = State.SEEKING, 0.0
        return sent

    # ── in ──

    def _receive_all(self, socket: zmq.Socket[bytes]) -> None:
        while True:
            try:
                parts = socket.recv_multipart(zmq.NOBLOCK)
            except zmq.Again:
                return
            try:
                kind, payload = parts
                self._receive(kind, payload)
            except (FormatError, KeyError, ValueError) as error:
                log.warning("a message of the daemon cannot be read: %s", error)

    def _receive(self, kind: bytes, payload: bytes) -> None:
        if kind == messages.ACK:
            session, next_seq = messages.unpack_ack(payload)
            if session == self.journal.session and self.state is State.SENDING:
                self._acked(next_seq)
        elif kind in (messages.UNKNOWN, messages.DETACHED):
            if payload != self.journal.session:
                return
            if kind == messages.DETACHED and self._ending and not self.journal.unacked:
                self.journal.close(unlink=True)
                self.over.set()
            elif self.state is State.SENDING:
                self.state, self._attach_at, self._look_at = State.SEEKING, 0.0, 0.0
        elif kind in (messages.ATTACHED, messages.NEWS, messages.REFUSED):
            fields = messages.unpack_map(payload)
            if fields["session"] == self.journal.session:
                self._told(kind, fields)

    def _acked(self, next_seq: int) -> None:
        before = self.journal.acked
        self.journal.ack(next_seq)
        if self.journal.acked > before:
            self._ack_due = monotonic() + ACK_TIMEOUT_S

    def _told(self, kind: bytes, fields: dict[str, Any]) -> None:
        if kind == messages.REFUSED:
            if self.state is not State.REFUSED:
                log.error("the daemon refuses this session: %s", fields["error"])
            self.state = State.REFUSED
            return
        if kind == messages.ATTACHED and self.state is not State.SENDING:
            # While sending, it is the late answer to one of several questions: of no use any more.
            self.journal.rewind(int(fields["next_seq"]))
            self._seeking_since_s = 0.0
            self.state = State.SENDING
            self._attach_at = self._look_at = 0.0
        if fields["mlflow_run_id"]:
            self._on_mlflow_run_id(str(fields["mlflow_run_id"]))

    def _report_trouble(self, error: Exception, now_s: float) -> None:
        """Log an exception, once a minute."""
        if now_s >= self._trouble_report_at:
            self._trouble_report_at = now_s + LOSS_REPORT_EVERY_S
            text = "the sender is in trouble and tries on; the journal keeps the records"
            log.error(text, exc_info=error)

    def _report_losses(self, now_s: float) -> None:
        lost = self.journal.lost - self._lost_reported
        if lost and now_s >= self._loss_report_at:
            self._lost_reported += lost
            self._loss_report_at = now_s + LOSS_REPORT_EVERY_S
            log.error(
                "the journal is full: %d log calls lost (%d in all). No daemon takes them at %s; "
                "start one, or raise MLFLOW_RELAY_JOURNAL_BYTES_MAX",
                lost,
                self.journal.lost,
                self._endpoint,
            )


def _try_send(socket: zmq.Socket[bytes], kind: bytes, payload: bytes) -> bool:
    """Return False if there is nobody to send to: what was to be sent stays where it is."""
    try:
        socket.send_multipart((kind, payload), zmq.NOBLOCK)
    except zmq.Again:
        return False
    return True
