"""A daemon of the tests' own: a real ROUTER socket in a thread, with a memory instead of a spool.

It takes frames as intake does: only the one that comes next in its session. What it answers, and
whether, is up to the test. It is there for what a real daemon does only in the worst moments.
"""

from __future__ import annotations

import os
import threading
from collections import defaultdict, deque
from pathlib import Path
from typing import Any

import zmq

from mlflow_relay import messages
from mlflow_relay.frames import HEADER_BYTES, iter_entries, read_frame
from mlflow_relay.records import Record, unpack_record
from tests.support.relay import wait_until


class FakeDaemon:
    """Serves a socket until closed.

    Attributes:
        attaches, acks, detaches: whether these are answered.
        hears: False: messages are received and forgotten, as by a process that hangs.
        kept: of each session, the records, in order. A new daemon may be given the old one's.
        seen: all that was received, as (kind, payload).
    """

    def __init__(self, socket: Path, kept: dict[bytes, list[bytes]] | None = None) -> None:
        self.socket = socket
        self.attaches = self.acks = self.detaches = self.hears = True
        self.refuses = ""
        self.mlflow_run_id: str | None = None
        self.kept: defaultdict[bytes, list[bytes]] = defaultdict(list, kept or {})
        self.cards: dict[bytes, dict[str, Any]] = {}
        self.detached: dict[bytes, int] = {}  #: session, and the losses that it told
        self.seen: list[tuple[bytes, bytes]] = []
        self.bad: list[str] = []  #: what could not be read: of a client of ours, nothing
        self._peers: dict[bytes, bytes] = {}
        self._answers: deque[tuple[bytes, bytes, bytes]] = deque()
        self._wake_fd = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self._closing = False
        self._context = zmq.Context()
        self._router = self._context.socket(zmq.ROUTER)
        self._router.linger = 0
        self._router.router_handover = True
        self._router.bind(f"ipc://{socket}")
        self._thread = threading.Thread(target=self._serve, name="fake daemon", daemon=True)
        self._thread.start()

    def __enter__(self) -> FakeDaemon:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Go away, as a killed daemon does: what is on the way is lost."""
        if self._closing:
            return
        self._closing = True
        self._wake()
        self._thread.join()
        self._context.destroy(linger=0)
        os.close(self._wake_fd)
        self.socket.unlink(missing_ok=True)

    # ── for tests ──

    def say(self, session: bytes, kind: bytes, payload: bytes) -> None:
        """Send something unasked to the peer of a session."""
        self._answers.append((self._peers[session], kind, payload))
        self._wake()

    def attached(self, session: bytes, next_seq: int | None = None) -> bytes:
        """Return the payload that answers an ATTACH."""
        fields = {
            "session": session,
            "next_seq": len(self.kept[session]) if next_seq is None else next_seq,
            "mlflow_run_id": self.mlflow_run_id,
        }
        return messages.pack_map(fields)

    def count(self, kind: bytes) -> int:
        """Return how many messages of a kind have come."""
        return sum(each == kind for each, _ in list(self.seen))

    def wait_for(self, kind: bytes, times: int = 1) -> None:
        """Wait until so many messages of a kind have come."""
        wait_until(lambda: self.count(kind) >= times, f"{times} times {kind!r}")

    def wait_for_records(self, records: int) -> None:
        """Wait until so many records are kept, of all sessions."""
        wait_until(lambda: sum(map(len, self.kept.values())) >= records, f"{records} records")

    def records(self, session: bytes | None = None) -> list[Record]:
        """Return the calls of the only session, or of this one."""
        if session is None:
            (session,) = self.kept
        return [unpack_record(each) for each in self.kept[session]]

    def only_card(self) -> dict[str, Any]:
        """Return what the only session said of itself."""
        (card,) = self.cards.values()
        return card

    # ── the loop ──

    def _wake(self) -> None:
        os.eventfd_write(self._wake_fd, 1)

    def _serve(self) -> None:
        poller = zmq.Poller()
        poller.register(self._router, zmq.POLLIN)
        poller.register(self._wake_fd, zmq.POLLIN)
        while not self._closing:
            ready = dict(poller.poll(1000))
            if self._wake_fd in ready:
                os.eventfd_read(self._wake_fd)
            while self._answers:
                self._router.send_multipart(self._answers.popleft())
            if self._router in ready:
                peer, kind, payload = self._router.recv_multipart()
                if self.hears:
                    try:
                        self._receive(peer, kind, payload)
                    except Exception as error:  # a test asserts that there is none
                        self.bad.append(f"{kind!r}: {error!r}")
                self.seen.append((kind, payload))

    def _receive(self, peer: bytes, kind: bytes, payload: bytes) -> None:
        if kind == messages.ATTACH:
            self._attach(peer, payload)
        elif kind == messages.DATA:
            self._keep(peer, payload)
        elif kind == messages.ALIVE:
            if payload not in self._peers:
                self._answer(peer, messages.UNKNOWN, payload)
        elif kind == messages.DETACH:
            session, lost = messages.unpack_detach(payload)
            if self.detaches:
                self.detached[session] = lost
                self._answer(peer, messages.DETACHED, session)

    def _attach(self, peer: bytes, payload: bytes) -> None:
        card = messages.unpack_map(payload)
        session = card["session"]
        self.cards[session] = card
        self._peers[session] = peer
        if self.refuses:
            refusal = {"session": session, "error": self.refuses}
            self._answer(peer, messages.REFUSED, messages.pack_map(refusal))
        elif self.attaches:
            self._answer(peer, messages.ATTACHED, self.attached(session))

    def _keep(self, peer: bytes, payload: bytes) -> None:
        header = read_frame(payload)
        kept = self.kept[header.session]
        if header.session not in self._peers:
            self._answer(peer, messages.UNKNOWN, header.session)
        elif header.first_seq == len(kept):
            entries = list(iter_entries(payload[HEADER_BYTES:]))
            assert len(entries) == header.records
            kept += [entry for entry in entries if entry is not None]
            assert len(kept) == header.next_seq
            if self.acks:
                self._answer(peer, messages.ACK, messages.pack_ack(header.session, len(kept)))
        elif header.next_seq > len(kept):
            self._answer(peer, messages.UNKNOWN, header.session)

    def _answer(self, peer: bytes, kind: bytes, payload: bytes) -> None:
        self._router.send_multipart((peer, kind, payload))
