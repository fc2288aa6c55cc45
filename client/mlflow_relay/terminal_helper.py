"""The process between a rank and its terminal: copies what comes, and keeps it. See terminal.py.

It ends when nobody can write to the rank's descriptors any more: the rank is gone, or has put them
back, and so are the processes that the rank has started.
"""

from __future__ import annotations

import os
import select
import signal
from contextlib import suppress
from pathlib import Path
from time import monotonic
from typing import TYPE_CHECKING, Any

import msgpack

from . import clock
from .terminal import PIPE_BYTES, READ_BYTES, SYNC, copy_window_size, read_some, write_all

if TYPE_CHECKING:
    from .session import Session

#: Output that comes within this time shares a record.
GATHER_S = 0.2
#: A terminal that was resized is noticed after this time, while nothing is printed.
RESIZE_LOOK_S = 1.0
#: Of its journal, while no daemon answers: memory of the node.
JOURNAL_BYTES_MAX = 32 << 20
END_TIMEOUT_S = 5.0


def main(arguments: list[str]) -> None:
    """Copy and keep, in a process that is nobody's child.

    Args: arguments: descriptors: where the rank is heard, where it is answered; then, for each
        channel, reader and original.
    """
    hear_fd, say_fd, *fds = map(int, arguments)
    os.closerange(max(fds) + 1, os.sysconf("SC_OPEN_MAX"))  # what the rank leaks
    if os.fork():
        os._exit(0)  # the rank waits for this one: it must not find a child that it never started
    os.setsid()
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT, signal.SIGTSTP):
        signal.signal(number, signal.SIG_IGN)  # they are meant for the rank; we end after it
    Copier(hear_fd, say_fd, dict(zip(fds[::2], fds[1::2], strict=True))).run()
    os._exit(0)


class Copier:
    """Copies from readers to originals.

    Args: ways: by reader, the descriptor that its output goes to.
    """

    def __init__(self, hear_fd: int, say_fd: int, ways: dict[int, int]) -> None:
        self._hear_fd, self._say_fd, self._ways = hear_fd, say_fd, ways
        unpacker = msgpack.Unpacker()
        unpacker.feed(os.read(hear_fd, PIPE_BYTES))
        self._told: dict[str, Any] = unpacker.unpack()
        self._is_asked = bool(unpacker.read_bytes(1))  # the rank was quick to ask
        self._gathered: list[bytes] = []
        self._gathered_bytes, self._due_s = 0, 0.0
        self._session: Session | None = None
        self._terminals = [reader for reader, original in ways.items() if os.isatty(original)]
        self._poller = select.poll()
        for fd in (hear_fd, *ways):
            self._poller.register(fd, select.POLLIN)

    def run(self) -> None:
        """Return when all is copied and kept, and nobody can write any more."""
        if self._is_asked:
            self._answer()
        while self._ways:
            for fd, _ in self._poller.poll(self._wait_ms()):
                if fd == self._hear_fd:
                    self._hear()
                elif fd in self._ways:
                    self._copy(fd)
            for reader in self._terminals:
                copy_window_size(self._ways[reader], reader)
            if self._gathered and monotonic() >= self._due_s:
                self._keep()
        self._keep()
        if self._session is not None:
            self._session.end(END_TIMEOUT_S)

    def _wait_ms(self) -> float | None:
        if self._gathered:
            return max(0.0, self._due_s - monotonic()) * 1000
        return RESIZE_LOOK_S * 1000 if self._terminals else None

    def _copy(self, reader: int) -> bool:
        """Copy once; return whether there was anything."""
        data = read_some(reader)
        if data:
            write_all(self._ways[reader], data)
            if not self._gathered:
                self._due_s = monotonic() + GATHER_S
            self._gathered.append(data)
            self._gathered_bytes += len(data)
            if self._gathered_bytes >= READ_BYTES:
                self._keep()
        elif data == b"":
            self._poller.unregister(reader)
            if reader in self._terminals:
                self._terminals.remove(reader)
            # At once: whoever reads the rank's output waits for its end.
            os.close(self._ways.pop(reader))
            os.close(reader)
        return bool(data)

    def _hear(self) -> None:
        if os.read(self._hear_fd, READ_BYTES):
            self._answer()
        else:  # the rank has gone, or has put its descriptors back
            self._poller.unregister(self._hear_fd)
            os.close(self._say_fd)

    def _answer(self) -> None:
        """Copy all that is there, and say so."""
        for reader in list(self._ways):
            while self._copy(reader):
                pass
        with suppress(OSError):
            os.write(self._say_fd, SYNC)
        self._keep()

    def _keep(self) -> None:
        if not self._gathered:
            return
        data = b"".join(self._gathered)
        self._gathered, self._gathered_bytes = [], 0
        from . import records

        with suppress(Exception):  # nobody hears us: what cannot be kept was at least seen
            if self._session is None:
                self._session = _open_session(self._told)
            for at in range(0, len(data), records.TERMINAL_BYTES_MAX):
                part = data[at : at + records.TERMINAL_BYTES_MAX]
                self._session.journal.append(records.pack_terminal(part, clock.now_ms()))


def _open_session(told: dict[str, Any]) -> Session:
    from .session import Session

    return Session(
        told["card"],
        socket=Path(told["socket"]),
        journal_bytes_max=min(told["journal_bytes_max"], JOURNAL_BYTES_MAX),
        on_mlflow_run_id=lambda _: None,
    )
